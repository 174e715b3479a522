"""`make chaos`: the real Envoy, extproc and six simulated replicas under load, while one thing after another breaks.

settings.py   what is run             rows.py     PURE: from what was seen to a row of the table, and the targets
replica.py    a replica to break      page.py     PURE: the table as a page
load.py       the clients             faults.py   what breaks, each a coroutine
stack.py      the processes           run.py      one row after the other; the command
relay.py      a wire to cut
"""
