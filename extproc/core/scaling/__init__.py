"""How many replicas a pool should have: from the work that arrives, over what one replica does within its SLO.

`autoscaler.py` wires: `arrivals.py` counts the work, `capacity.py` says what a replica does, `rules.py` holds the rules by name,
`steps.py` keeps changes apart. Nothing here starts or stops a replica; an orchestrator asks and does.
"""
