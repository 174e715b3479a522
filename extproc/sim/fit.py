"""Step-time constants of a GPU, fitted to requests that a real engine served on it.

Nothing but the six constants is fitted: queue, batches and preemptions come from simulating the engine as it was configured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, replace
from statistics import fmean
from typing import Final

from extproc.core.steptime import StepTime
from extproc.sim.engine import EngineConfig
from extproc.sim.replay import Timed, replay
from extproc.sim.simplex import Point, minimize

ROUNDS: Final = (0.4, 0.2)
"""First extent of the simplex in each round, as a logarithm: from 50 % off, and once more, for a simplex may collapse early."""
EVALUATIONS: Final = 250
"""In each round."""
UNNOTICED_S: Final = 0.02
"""Below this, a difference in TTFT is one of moments within a step, and no longer counts in proportion."""


def fit(
    real: Sequence[Timed],
    config: EngineConfig,
    scored: Iterable[int] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> StepTime:
    """Constants with which the replay of `real` comes closest to it, judged by the requests at the places `scored`.

    The search starts from `config.step_time`; `tick` is called for each of at most about 500 replays. What the CPU adds to
    a step cannot be told from `c0`, so `config.cpu_overhead_s` should be 0 and `c0` will hold both.
    """
    places = range(len(real)) if scored is None else tuple(scored)

    def error(point: Point) -> float:
        tick()
        return mismatch(real, replay(real, replace(config, step_time=_step_time(point))), places)

    best: Point = tuple(math.log(term) for term in astuple(config.step_time))
    for spread in ROUNDS:
        _, best = minimize(error, best, spread, EVALUATIONS)
    return _step_time(best)


def mismatch(real: Sequence[Timed], simulated: Sequence[Timed], places: Iterable[int]) -> float:
    """How far apart two accounts of the same requests are: 0 for equal, about 0.1 for 3 % in each of its three parts.

    Mean difference of TTFT by the mean TTFT, the same for the time from first to last token, and mean difference of the
    logarithm of TTFT. The first alone would see nothing but the requests that queued longest.
    """
    pairs = [(real[i], simulated[i]) for i in places]
    return (
        _relative([(r.ttft_s, s.ttft_s) for r, s in pairs])
        + _relative([(r.last_token_s - r.first_token_s, s.last_token_s - s.first_token_s) for r, s in pairs])
        + fmean(abs(math.log((s.ttft_s + UNNOTICED_S) / (r.ttft_s + UNNOTICED_S))) for r, s in pairs)
    )


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    mean = fmean(r for r, _ in pairs)
    return fmean(abs(s - r) for r, s in pairs) / mean if mean else 0.0


def _step_time(point: Point) -> StepTime:
    """All constants are positive, and by how many per cent one is off matters: hence logarithms."""
    return StepTime(*map(math.exp, point))
