"""Models by the names that clients ask for: which targets serve each, by what rule and share, and what comes after them.

A target is a pool, or a provider elsewhere, with the name under which it knows the model. A request goes to the first target
whose rule it meets; targets with the same rule share what meets it; where that one cannot serve the request the others of the
group come next, then the fallbacks.
"""
