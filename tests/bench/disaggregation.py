"""Whether to split by cost, against always, never and a threshold: `python -m tests.bench.disaggregation [--traces FOLDER]`.

The same traces on the same eight GPUs, some of which only compute prompts; the same router, which chooses the best replica on either
side by its costs, whatever the rule: so only the rule differs. The threshold is llm-d's (`prefix-based-pd-decider`): split where so many
prompt tokens are not cached on the replica that would answer; of several thresholds each place counts with its best.
`together` are the same GPUs without roles, every request whole.

With `--rates` instead: what a second of decode counts, from half to four times of what it should by `core/traffic.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from extproc.core.disaggregation import SPLIT, Disaggregation
from extproc.core.fleet import Member
from extproc.core.prediction import Ask
from extproc.core.settings import DisaggregationSettings
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.disaggregation import Link
from extproc.sim.fleet_spec import Group, nodes
from extproc.sim.sidecar import POOL, Wiring
from extproc.sim.traces import Generate, Starts, Trace, generate, load
from tests.bench.matrix.summary import geomean

OUTPUT: Final = Path("build/bench-disaggregation.json")
GPUS: Final = 8
BANDWIDTH: Final = 50e9
"""Bytes a second: one 400 Gbit/s port for each GPU."""
THRESHOLDS: Final = (256, 1024, 4096)
SEEDS: Final = (1, 2)
PREFILL: Final = (2, 4)
"""Of the GPUs, those that only compute prompts."""
DIVIDED: Final = (1, 2, 4, 5)
"""The same for `--rates`."""
RATES: Final = (0.5, 1.0, 2.0, 4.0)
"""Multiples of what a second of decode counts."""
SLO_TTFT_S: Final = 1.0
SLO_TPOT_S: Final = 0.025
RECORDED: Final = "mooncake_conversation.jsonl"
WINDOW: Final = 600
"""Requests of the recorded trace."""


@dataclass(frozen=True, slots=True)
class Source:
    """Sessions that are generated."""

    name: str
    user_tokens: int
    sessions_per_s: float
    output_tokens: int = 200
    sessions: int = 250

    def trace(self, seed: int) -> Trace:
        """Of that seed."""
        spec = Generate(
            sessions=self.sessions,
            sessions_per_s=self.sessions_per_s,
            user_tokens=self.user_tokens,
            output_tokens=self.output_tokens,
        )
        return generate(spec, seed)


SOURCES: Final = (
    Source("documents, light", 2000, 2.0),
    Source("documents, heavy", 2000, 4.0),
    Source("chat, light", 800, 10.0),
    Source("chat, heavy", 800, 20.0),
)


class Always(Disaggregation):
    """Every prompt goes to a replica that only computes prompts."""

    def prefers(self, ask: Ask, alone: Member, whole_s: float, split_s: float) -> bool:
        """Yes."""
        return True


class Never(Disaggregation):
    """Those replicas stand idle."""

    def prefers(self, ask: Ask, alone: Member, whole_s: float, split_s: float) -> bool:
        """No."""
        return False


class Threshold(Disaggregation):
    """Split where so many tokens are not cached."""

    tokens = 0

    def prefers(self, ask: Ask, alone: Member, whole_s: float, split_s: float) -> bool:
        """By the replica that would answer, as llm-d's decider: whatever queues anywhere."""
        return ask.prompt_tokens - ask.cached_tokens(alone) >= self.tokens


class Priced(Disaggregation):
    """By cost, with decode at a multiple of its rate of exchange."""

    times = 1.0

    def plan(
        self, ask: Ask, members: Sequence[Member], prefillers: Sequence[Member], within_s: float | None, now: float
    ) -> None:
        """The same with other prices."""
        ask.prices = replace(ask.prices, decode=ask.prices.decode * self.times)
        super().plan(ask, members, prefillers, within_s, now)


def priced(times: float) -> type[Disaggregation]:
    """The rule with that multiple."""
    return type(f"Priced{times:g}", (Priced,), {"times": times})


def threshold(tokens: int) -> type[Disaggregation]:
    """The rule with that threshold."""
    return type(f"Threshold{tokens}", (Threshold,), {"tokens": tokens})


OURS: Final = "cost"
TOGETHER: Final = "together"
RULES: Final[dict[str, type[Disaggregation] | None]] = {
    OURS: Disaggregation,
    "always": Always,
    "never": Never,
    **{f"threshold {tokens}": threshold(tokens) for tokens in THRESHOLDS},
    TOGETHER: None,
}


@dataclass(frozen=True, slots=True)
class Figures:
    """What clients saw; refused requests count as late, and in no mean."""

    ttft_s: float
    tpot_s: float
    goodput: float
    """Share of requests within both bounds."""
    split: float
    """Share that was split."""
    refused: int
    e2e_s: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One rule at one place."""

    trace: str
    prefill: int
    seed: int
    rule: str
    figures: Figures


def play(trace: Trace, prefill: int, rule: type[Disaggregation] | None, seed: int) -> Result:
    """One run; without a rule the GPUs have no roles."""
    groups = [Group(count=GPUS)]
    believed = None
    if rule is not None:
        groups = [Group(count=prefill, role="prefill"), Group(count=GPUS - prefill, role="decode")]
        believed = DisaggregationSettings(bandwidth_bytes_per_s=BANDWIDTH)
    fleet = nodes(groups, "8b", trace.block_size, 0.002)
    wiring = Wiring(disaggregation=believed)
    cluster = Cluster(
        Scenario(trace, fleet, wiring=wiring, link=Link(bandwidth_bytes_per_s=BANDWIDTH), seed=seed), "predicted"
    )
    if rule is not None and believed is not None:
        for sidecar in cluster.sidecars:
            sidecar.router.pools[POOL].disaggregation = rule(believed)
    return cluster.run()


def figures(result: Result) -> Figures:
    """Of a run."""
    came = [s for s in result.served if s.ttft_s is not None]
    paces = [(s.e2e_s - (s.ttft_s or 0.0)) / max(s.output_tokens - 1, 1) for s in came]
    kept = [s.ttft_s <= SLO_TTFT_S and pace <= SLO_TPOT_S for s, pace in zip(came, paces, strict=True) if s.ttft_s]
    return Figures(
        fmean(s.ttft_s for s in came if s.ttft_s is not None),
        fmean(pace for s, pace in zip(came, paces, strict=True) if s.output_tokens > 8),
        sum(kept) / len(result.served),
        fmean(s.reason == SPLIT for s in result.served),
        len(result.served) - len(came),
        fmean(s.e2e_s for s in came),
    )


def recorded(traces: Path | None) -> list[tuple[str, Trace]]:
    """A window of the recorded conversations, at two loads; empty without the folder."""
    if traces is None:
        return []
    window = load(traces / RECORDED, None, Starts()).limited(WINDOW)
    return [(f"conversation x{speed_up:g}", window.faster(speed_up)) for speed_up in (1.0, 2.0)]


def places(sources: Sequence[Source], traces: Path | None) -> Iterator[tuple[str, Trace, int]]:
    """Name, trace and seed."""
    for seed in SEEDS:
        yield from ((source.name, source.trace(seed), seed) for source in sources)
        yield from ((name, trace, seed) for name, trace in recorded(traces))


def measure(
    sources: Sequence[Source] = SOURCES, traces: Path | None = None, prefills: Sequence[int] = PREFILL
) -> list[Cell]:
    """Every rule at every place."""
    cells = []
    for name, trace, seed in places(sources, traces):
        together = figures(play(trace, 0, None, seed))
        for prefill in prefills:
            cells.append(Cell(name, prefill, seed, TOGETHER, together))
            cells += [
                Cell(name, prefill, seed, rule, figures(play(trace, prefill, how, seed)))
                for rule, how in RULES.items()
                if how is not None
            ]
    return cells


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """Ratios of ours to others, geometric means over places; below 1 is less, so better for times and worse for goodput."""
    found: dict[str, Any] = {}
    for other in ("always", "never", "threshold", TOGETHER):
        pairs = [(ours, _other(cells, ours, other)) for ours in cells if ours.rule == OURS]
        found[f"vs_{other}"] = geomean([a.figures.ttft_s / b.figures.ttft_s for a, b in pairs])
        found[f"tpot_vs_{other}"] = geomean([a.figures.tpot_s / b.figures.tpot_s for a, b in pairs])
        found[f"goodput_vs_{other}"] = fmean(a.figures.goodput - b.figures.goodput for a, b in pairs)
    return found


def _other(cells: Sequence[Cell], ours: Cell, rule: str) -> Cell:
    """At the same place; of several thresholds the one with the least mean TTFT there."""
    there = [c for c in cells if (c.trace, c.prefill, c.seed) == (ours.trace, ours.prefill, ours.seed)]
    return min((c for c in there if c.rule.split()[0] == rule), key=lambda c: c.figures.ttft_s)


def by_rate(traces: Path | None) -> Table:
    """Against the rate as it is, geometric means over places and ways to divide the GPUs."""
    found: dict[float, list[Figures]] = {times: [] for times in RATES}
    for _, trace, seed in places(SOURCES, traces):
        for prefill in DIVIDED:
            for times, figured in found.items():
                figured.append(figures(play(trace, prefill, priced(times), seed)))
    shown = Table("times", "TTFT", "TPOT", "duration", "TTFT x duration", "goodput, points")
    for times, figured in found.items():
        pairs = list(zip(figured, found[1.0], strict=True))
        ttft = geomean([a.ttft_s / b.ttft_s for a, b in pairs])
        tpot = geomean([a.tpot_s / b.tpot_s for a, b in pairs])
        e2e = geomean([a.e2e_s / b.e2e_s for a, b in pairs])
        points = 100 * fmean(a.goodput - b.goodput for a, b in pairs)
        shown.add_row(f"{times:g}", f"{ttft:.3f}", f"{tpot:.3f}", f"{e2e:.3f}", f"{ttft * e2e:.3f}", f"{points:+.1f}")
    return shown


def table(cells: Sequence[Cell]) -> Table:
    """Means over seeds."""
    shown = Table("trace", "prefill", "rule", "TTFT ms", "TPOT ms", "goodput", "split", "refused")
    for trace, prefill, rule in dict.fromkeys((c.trace, c.prefill, c.rule) for c in cells):
        found = [c.figures for c in cells if (c.trace, c.prefill, c.rule) == (trace, prefill, rule)]
        shown.add_row(
            trace,
            f"{prefill} of {GPUS}",
            rule,
            f"{fmean(f.ttft_s for f in found) * 1e3:.0f}",
            f"{fmean(f.tpot_s for f in found) * 1e3:.1f}",
            f"{fmean(f.goodput for f in found):.1%}",
            f"{fmean(f.split for f in found):.0%}",
            f"{sum(f.refused for f in found)}",
        )
    return shown


def run(traces: Path | None = None) -> dict[str, float]:
    """Ratios of mean TTFT, ours to each other's; for `make bench-models`."""
    found = summary(measure(traces=traces))
    return {key: found[key] for key in ("vs_always", "vs_never", "vs_threshold", f"vs_{TOGETHER}")}


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, help="folder with recorded traces")
    parser.add_argument("--rates", action="store_true", help="what a second of decode should count")
    given = parser.parse_args(arguments)
    if given.rates:
        Console(width=120).print(by_rate(given.traces))
        return 0
    cells = measure(traces=given.traces)
    found = summary(cells)
    Console(width=120).print(table(cells))
    Console(width=120).print(found)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps({"summary": found, "cells": [asdict(cell) for cell in cells]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
