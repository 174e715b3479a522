"""What simulated runs came to: one summary each, and a table of them side by side. Keys carry their unit; unknown is None."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich import box
from rich.table import Table

from extproc.core.types import End, Refusal
from extproc.sim.cluster import Result, Served
from extproc.sim.node import Node
from extproc.sim.report import percentile

TTFT_PERCENTILES: Final = (50, 90, 99)
E2E_PERCENTILES: Final = (50, 99)
CLASS_PERCENTILES: Final = (50, 99)
"""Of TTFT, shown for each priority."""
TOO_MANY: Final = 429
"""The status of a refusal for want of room."""
SHOWN: Final = 16
"""Replicas in the table."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What counts towards goodput."""

    ttft_s: float = 2.0
    tpot_s: float = 0.025

    def met(self, served: Served) -> bool:
        """Whether a request was answered in full, and in time by both."""
        tpot = tpot_s(served)
        in_time = served.ttft_s is not None and served.ttft_s <= self.ttft_s and (tpot is None or tpot <= self.tpot_s)
        return served.end is End.OK and in_time


@dataclass(frozen=True, slots=True)
class Curves:
    """What a plot shows of one run. Times are seconds, those of whole answers only."""

    ttft_s: tuple[float, ...]
    e2e_s: tuple[float, ...]
    requests: Mapping[str, tuple[tuple[float, int], ...]]
    """Replica -> (time, requests that run or wait there)."""


@dataclass(frozen=True, slots=True)
class Load:
    """All runs at one speed of arrivals, by policy."""

    speed_up: float
    runs: Mapping[str, dict[str, Any]]
    """Summaries."""
    curves: Mapping[str, Curves]


def tpot_s(served: Served) -> float | None:
    """Mean time per output token after the first; None where there was but one."""
    if served.ttft_s is None or served.output_tokens < 2:
        return None
    return (served.e2e_s - served.ttft_s) / (served.output_tokens - 1)


def summary(result: Result, slo: Slo) -> dict[str, Any]:
    """One run. Latencies are those of whole answers; what failed or was refused is counted beside them, and never good.

    Refused is what was answered with 429 for want of room; a refusal with 503, because nobody can serve, is a failure.
    """
    served = result.served
    good = [s for s in served if s.end is End.OK]
    refused = sum(s.status == TOO_MANY for s in served)
    in_time = sum(slo.met(s) for s in served)
    last_arrival_s = max((s.arrived_s for s in served), default=0.0)
    return {
        "requests": len(served),
        "failed": len(served) - len(good) - refused,
        "refused": refused,
        "held": sum(s.held_s is not None for s in served),
        "held_mean_s": _mean(s.held_s for s in served if s.held_s is not None),
        "ends": {end.value: n for end in End if (n := sum(s.end is end for s in served))},
        "refusals": {why.value: n for why in Refusal if (n := sum(s.refusal is why for s in served))},
        "retried": sum(s.attempts > 1 for s in served),
        **_distribution("ttft", (s.ttft_s for s in good if s.ttft_s is not None), TTFT_PERCENTILES),
        **_distribution("e2e", (s.e2e_s for s in good), E2E_PERCENTILES),
        "tpot_mean_s": _mean(t for s in good if (t := tpot_s(s)) is not None),
        "queue_mean_s": _mean(s.queue_s for s in good if s.queue_s is not None),
        **_prefix(good),
        **_prediction(good),
        "priorities": {str(p): _class(served, p, slo) for p in sorted({s.priority for s in served}, reverse=True)},
        "offered_requests_per_s": _ratio(len(served), last_arrival_s),
        "goodput_requests_per_s": _ratio(in_time, last_arrival_s),
        "goodput_share": _ratio(in_time, len(served)),
        "makespan_s": result.lasted_s,
        "output_tokens": sum(s.output_tokens for s in good),
        "replicas": {node.address: _replica(node, served, result.lasted_s) for node in result.nodes},
        "digest": digest(served),
    }


def curves(result: Result) -> Curves:
    """Of one run; the rest of the result, its routers above all, need not be kept for them."""
    good = [s for s in result.served if s.end is End.OK]
    return Curves(
        ttft_s=tuple(s.ttft_s for s in good if s.ttft_s is not None),
        e2e_s=tuple(s.e2e_s for s in good),
        requests={n.address: tuple((at, running + waiting) for at, running, waiting in n.loads) for n in result.nodes},
    )


def digest(served: Iterable[Served]) -> str:
    """SHA-256 of the record of each request in the order of their ends: equal only if two runs went alike."""
    sha = hashlib.sha256()
    for each in served:
        sha.update(line(each).encode())
    return sha.hexdigest()


def line(served: Served) -> str:
    """One request as a line of JSON."""
    return json.dumps(asdict(served), separators=(",", ":")) + "\n"


def _prefix(good: Sequence[Served]) -> dict[str, float | None]:
    """Shares of all prompt tokens: found in the cache, and expected there when the replica was chosen."""
    tokens = sum(s.prompt_tokens for s in good)
    return {
        "prefix_hit_actual": _ratio(sum(s.cached_tokens or 0 for s in good), tokens),
        "prefix_hit_predicted": _ratio(sum(s.predicted_cached_tokens or 0 for s in good), tokens),
    }


def _prediction(good: Sequence[Served]) -> dict[str, float | None]:
    """How far off the predicted TTFT was: mean of the amounts, and mean with sign (above 0: too pessimistic).

    It is predicted from the moment of the choice on, so the wait for that does not count.
    """
    errors = [
        s.predicted_ttft_s + (s.held_s or 0.0) - s.ttft_s
        for s in good
        if s.predicted_ttft_s is not None and s.ttft_s is not None
    ]
    return {"ttft_error_mean_s": _mean(map(abs, errors)), "ttft_bias_mean_s": _mean(errors)}


def _class(served: Sequence[Served], priority: int, slo: Slo) -> dict[str, Any]:
    """The requests of one priority."""
    alike = [s for s in served if s.priority == priority]
    ttfts = (s.ttft_s for s in alike if s.end is End.OK and s.ttft_s is not None)
    return {
        "requests": len(alike),
        "refused": sum(s.status == TOO_MANY for s in alike),
        **_distribution("ttft", ttfts, CLASS_PERCENTILES),
        "goodput_share": _ratio(sum(map(slo.met, alike)), len(alike)),
    }


def _replica(node: Node, served: Sequence[Served], lasted_s: float) -> dict[str, Any]:
    totals = node.totals
    return {
        "labels": dict(node.spec.replica.labels),
        "requests": sum(s.replica == node.address for s in served),
        "prompt_tokens": totals.prompt_tokens,
        "output_tokens": totals.generated_tokens,
        "preemptions": totals.preemptions,
        "busy_share": _ratio(totals.busy_s, lasted_s),
    }


def _distribution(name: str, values: Iterable[float], percents: Sequence[int]) -> dict[str, float | None]:
    ordered = sorted(values)
    return {f"{name}_mean_s": _mean(ordered), **{f"{name}_p{p}_s": percentile(ordered, p) for p in percents}}


def _mean(values: Iterable[float]) -> float | None:
    kept = list(values)
    return sum(kept) / len(kept) if kept else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# --- the table ----------------------------------------------------------------------------------------------------------


def table(runs: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Runs side by side; the keys name the columns."""
    grid = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("", no_wrap=True)
    for name in runs:
        grid.add_column(name, justify="right")
    for label, key, show in _ROWS:
        grid.add_row(label, *(show(run.get(key)) for run in runs.values()))
    for row in _priorities(runs):
        grid.add_row(*row)
    grid.add_section()
    grid.add_row("each: requests, tokens, busy")
    addresses = list(next(iter(runs.values()))["replicas"])
    for address in addresses[:SHOWN]:
        grid.add_row(_named(runs, address), *(_share(run["replicas"][address]) for run in runs.values()))
    if len(addresses) > SHOWN:
        grid.add_row(f"and {len(addresses) - SHOWN} more; --json has all")
    return grid


def _priorities(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Where there is more than one priority, what each of them got."""
    classes = {name: run["priorities"] for name, run in runs.items()}
    found = next(iter(classes.values()))
    for priority in found if len(found) > 1 else ():
        for percent in CLASS_PERCENTILES:
            shown = (_ms(each[priority][f"ttft_p{percent}_s"]) for each in classes.values())
            yield [f"priority {priority}: TTFT p{percent}, ms", *shown]
        yield [
            f"priority {priority}: goodput",
            *(_percent(each[priority]["goodput_share"]) for each in classes.values()),
        ]
        yield [f"priority {priority}: refused", *(_count(each[priority]["refused"]) for each in classes.values())]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:,.1f}" if value < 0.1 else f"{value * 1e3:,.0f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


_ROWS: Final[tuple[tuple[str, str, Callable[[float | None], str]], ...]] = (
    ("TTFT mean, ms", "ttft_mean_s", _ms),
    *((f"TTFT p{p}, ms", f"ttft_p{p}_s", _ms) for p in TTFT_PERCENTILES),
    ("end to end mean, ms", "e2e_mean_s", _ms),
    *((f"end to end p{p}, ms", f"e2e_p{p}_s", _ms) for p in E2E_PERCENTILES),
    ("TPOT mean, ms", "tpot_mean_s", _ms),
    ("queue mean, ms", "queue_mean_s", _ms),
    ("prefix hit, actual", "prefix_hit_actual", _percent),
    ("prefix hit, predicted", "prefix_hit_predicted", _percent),
    ("TTFT off by, mean, ms", "ttft_error_mean_s", _ms),
    ("offered, requests/s", "offered_requests_per_s", _rate),
    ("goodput, requests/s", "goodput_requests_per_s", _rate),
    ("goodput", "goodput_share", _percent),
    ("makespan, s", "makespan_s", _seconds),
    ("requests", "requests", _count),
    ("failed", "failed", _count),
    ("refused (429)", "refused", _count),
    ("held", "held", _count),
    ("held mean, ms", "held_mean_s", _ms),
    ("retried", "retried", _count),
    ("simulated in, s", "wall_s", _seconds),
    ("virtual over real time", "speed", _count),
)


def _named(runs: Mapping[str, Mapping[str, Any]], address: str) -> str:
    labels = next(iter(runs.values()))["replicas"][address]["labels"]
    return f"{labels['gpu']} tp{labels['tp']} {address.partition(':')[0]}"


def _share(replica: Mapping[str, Any]) -> str:
    tokens = (replica["prompt_tokens"] + replica["output_tokens"]) / 1e6
    return f"{replica['requests']:,} {tokens:,.1f}M {replica['busy_share'] or 0:4.0%}"
