"""The routing benchmark in parts: windows of traces, cells, the load they are at, runs, what they came to, the page of it.

Words: a *window* is what one run replays; a *cell* is one setting of everything but seed and policy; a *row* is one policy in one
cell, with its figures over all seeds.
"""
