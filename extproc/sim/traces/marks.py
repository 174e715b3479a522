"""Who asks, put onto a trace that does not say: some sessions are urgent, or one tenant asks far more than another.

A request that belongs to no session counts as one. What a session becomes depends on the seed and its name alone, so a trace at
another speed, or a part of it, is marked alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Final

from extproc.sim.traces.base import Trace, Turn

URGENT: Final = 1
"""The priority of what is marked; the rest keeps its own."""
FLOODING: Final = "flooding"
MODEST: Final = "modest"


def prioritized(trace: Trace, share: float, seed: int) -> Trace:
    """About this share (0 to 1) of the sessions has priority `URGENT`."""
    return _marked(
        trace, f"{seed}/priority", lambda turn, drawn: replace(turn, priority=URGENT) if drawn < share else turn
    )


def flooded(trace: Trace, factor: float, seed: int) -> Trace:
    """Two tenants, `FLOODING` with about `factor` times as many sessions as `MODEST`. There are no more requests than before."""
    share = factor / (factor + 1.0)
    return _marked(
        trace, f"{seed}/flood", lambda turn, drawn: replace(turn, tenant=FLOODING if drawn < share else MODEST)
    )


def _marked(trace: Trace, purpose: str, mark: Callable[[Turn, float], Turn]) -> Trace:
    """`mark` gets each turn with a number from 0 to 1, the same for all of its session."""
    drawn = (Random(f"{purpose}/{turn.session or number}").random() for number, turn in enumerate(trace.turns))
    return replace(trace, turns=tuple(map(mark, trace.turns, drawn)))
