"""What the routers of a fleet tell one another, by way of a store that all of them reach. Off the request path, all of it.

`board.py` is the seam: one call publishes and reads; in memory for one process. `redis_board.py` is the same by Redis, whose
connections `redis_client.py` makes. `wire.py` is the encoding. `sharing.py` does it every beat and turns it into facts.
"""
