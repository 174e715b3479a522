"""An Envoy external processor that sends each LLM request to the replica where it costs least.

The words used here, in the order in which a request meets them:

pool        replicas that serve the same models and are chosen among by one policy
replica     one inference engine behind one address (`ip:port`), whatever its tensor or pipeline parallelism
request     what the client asked for, reduced to what routing needs; never its text
block       a piece of the canonical prompt with the hash of itself and all before it: equal hash, equal prefix
prefix hit  tokens at the head of the prompt that a replica holds in its KV cache and need not prefill again
sample      what a replica said of itself when its metrics were last scraped; it has an age, and may be missing
load        what we put on a replica and have not seen end, from the ledger; it has no age
flight      one routed request, from the decision to its one end
ledger      all open flights
split       a request whose prompt another replica computes than the one that answers; the roles of replicas say who may do what
leg         the prefill of a split request, in the queue of the replica that computes it
catalog     the configured models: names, rules, shares, fallbacks
target      where requests for a model may go, and what the model is called there: a pool, or a provider
provider    an OpenAI-compatible API elsewhere, paid for by the token; it has no replicas
policy      the rule that orders the candidates of a pool for one request, best first
candidate   a replica that may be chosen now: a member, not draining, reachable, allowed by the subset hint
prediction  what we expect on one replica: cached tokens, seconds to the first token, seconds to the end
cost        seconds: what the request will wait there, and the delay that it adds to those already there
verdict     Route (best replica and alternates) or Reject (a status and an OpenAI-shaped error)
decision    the record of one verdict: why, among whom, at what predicted cost
fact        anything learned from outside: membership, samples, progress of a flight
outcome     how a flight ended: served by whom, first token, duration, usage
TTFT        time to first token: from the request to the first byte of the response body
TPOT        time per output token after the first

Layers, each importing only what stands to its right: `app, cli -> envoy, adapters, sim -> openai -> core`.
"""

__version__ = "0.1.0"
