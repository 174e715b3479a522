"""What the routers of a fleet tell one another, by way of a store that all of them reach. Off the request path, all of it.

`board.py` is the seam: a board that each router writes to and reads from at a slow beat, and a channel on which it says at once what
changed; in memory for one process. `redis_board.py` and `redis_channel.py` are the same by Redis, whose connections `redis_client.py`
makes and whose errors `redis_errors.py` names. `wire.py` is the encoding. `sharing.py` runs the beats, `pushing.py` what is said and
heard in between, and `others.py` turns what is heard into facts.
"""
