"""What it costs our policy to know less, and what it would gain by knowing more: the same requests with and without.

One router, load 0.8. Each window is replayed with exact state, and again with one thing changed. Where that is the prior, the
requests before the router can have learned are replayed and not scored: what is asked is whether it learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Final

from extproc.sim.sidecar import Wiring
from tests.bench.matrix.cells import SIZES, SLOS, STATES, Cell
from tests.bench.matrix.runs import OURS, Figures, Job, Replay, figures, replay, serve
from tests.bench.matrix.summary import MEASURES, geomean, valued

LEARNED_AFTER: Final = 300
"""Requests, or half of the window where it is shorter than twice that."""
_EXACT: Final = STATES["exact"]
_BOTH: Final = ("equal", "mixed")


@dataclass(frozen=True, slots=True)
class Variant:
    """What is changed."""

    wiring: Wiring = _EXACT
    oracle_lengths: bool = False
    learns: bool = False
    """Only requests after `LEARNED_AFTER` are scored."""
    fleets: tuple[str, ...] = ("equal",)
    """Where it is tried."""


STALE: Final = "stale"
WRONG: Final = ("priors x2", "priors x0.5")
HALF_WRONG: Final = "half of priors x2"
LENGTHS: Final = "lengths known"
VARIANTS: Final[Mapping[str, Variant]] = {
    STALE: Variant(STATES["stale"]),
    WRONG[0]: Variant(replace(_EXACT, prior_error=2.0), learns=True, fleets=_BOTH),
    WRONG[1]: Variant(replace(_EXACT, prior_error=0.5), learns=True, fleets=_BOTH),
    HALF_WRONG: Variant(replace(_EXACT, prior_error=2.0, prior_error_every=2), learns=True, fleets=_BOTH),
    LENGTHS: Variant(oracle_lengths=True),
}

RATIOS: Final = {"ttft_mean_s": "ttft_ratio", "e2e_mean_s": "e2e_ratio", "goodput": "goodput_ratio"}
"""Measure -> its key in an entry: the changed over the exact, so above 1 is a loss for times, below 1 for goodput."""
Entry = dict[str, Any]
"""One variant on one trace and fleet, a JSON object."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Figures of the same requests."""

    changed: Figures
    exact: Figures


def bases(traces: Iterable[str]) -> list[Cell]:
    """The cells in which variants are tried."""
    return [Cell(trace, fleet=fleet) for trace in traces for fleet in _BOTH]


def compare(job: Job) -> dict[str, Pair]:
    """Each variant that the cell's fleet has, against the cell as it is. Raises LoadError."""
    shared = replay(replace(job, policy=None))
    slo = SLOS[SIZES[job.cell.fleet]]
    exact = serve(shared.scenario, OURS)
    found: dict[str, Pair] = {}
    for name, variant in VARIANTS.items():
        if job.cell.fleet in variant.fleets:
            counted = scored(shared, variant)
            scenario = replace(shared.scenario, wiring=variant.wiring, oracle_lengths=variant.oracle_lengths)
            found[name] = Pair(figures(serve(scenario, OURS), counted, slo), figures(exact, counted, slo))
    return found


def scored(shared: Replay, variant: Variant) -> frozenset[int]:
    """Places of the turns that count for this variant."""
    return shared.after(min(LEARNED_AFTER, len(shared.order) // 2)) if variant.learns else shared.scored


def entries(cell: Cell, seeds: Sequence[Mapping[str, Pair]]) -> list[Entry]:
    """One for each variant of the cell, from what `compare` found for each seed."""
    return [_entry(cell, what, [found[what] for found in seeds]) for what in seeds[0]]


def _entry(cell: Cell, what: str, pairs: Sequence[Pair]) -> Entry:
    """Ratios of means over the seeds; `spread` has the least and the greatest ratio of the seeds."""
    ratios = {measure: _ratio(pairs, measure) for measure in MEASURES}
    spread = {measure: _extremes([_ratio([pair], measure) for pair in pairs]) for measure in MEASURES}
    named = {RATIOS[measure]: value for measure, value in ratios.items()}
    return {"trace": cell.trace, "fleet": cell.fleet, "what": what, **named, "spread": spread}


def _ratio(pairs: Sequence[Pair], measure: str) -> float:
    changed, exact = (
        valued(measure, fmean(getattr(each, measure) for each in side))
        for side in ([pair.changed for pair in pairs], [pair.exact for pair in pairs])
    )
    return changed / exact if math.isfinite(exact) else math.inf


def _extremes(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


KINDS: Final[Mapping[str, Sequence[str]]] = {
    "stale": (STALE,),
    "wrong_prior": WRONG,
    "half_wrong_prior": (HALF_WRONG,),
    "known_lengths": (LENGTHS,),
}
"""What is summed up together."""


def summary(found: Sequence[Entry]) -> dict[str, float]:
    """The worst ratio of mean TTFT of each kind over traces and fleets, and the geometric mean; nothing for a kind not run."""
    summed: dict[str, float] = {}
    for kind, whats in KINDS.items():
        if ratios := [each["ttft_ratio"] for each in found if each["what"] in whats]:
            summed |= {f"{kind}_ttft_ratio": max(ratios), f"{kind}_ttft_geomean_ratio": geomean(ratios)}
    return summed
