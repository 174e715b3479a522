"""Recorded and generated request streams, all reduced to one shape: tokens and block ids, never text."""

from extproc.sim.traces.base import Run, Starts, Trace, TraceError, Turn
from extproc.sim.traces.files import FORMATS, load
from extproc.sim.traces.generated import Generate, generate
from extproc.sim.traces.marks import flooded, prioritized

__all__ = [
    "FORMATS",
    "Generate",
    "Run",
    "Starts",
    "Trace",
    "TraceError",
    "Turn",
    "flooded",
    "generate",
    "load",
    "prioritized",
]
