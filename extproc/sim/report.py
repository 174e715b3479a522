"""What a run came to: a summary of its records and counters, and two summaries side by side.

Keys carry their unit and are those of the JSON file; unknown is None, there and in the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from extproc.sim.client import Record

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Counters:
    """What one replica counted, from its metrics page; vLLM's names."""

    requests: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    prefix_queries: float = 0.0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: float = 0.0
    """Prompt tokens found there."""

    def since(self, before: Counters) -> Counters:
        """What was added since `before`."""
        return Counters(*(now - then for now, then in zip(_values(self), _values(before), strict=True)))


def counters(page: str) -> Counters:
    """Read a metrics page; a counter that is not there is 0, as it is before the first request."""
    return Counters(
        requests=total(page, "vllm:request_success_total") or 0.0,
        prompt_tokens=total(page, "vllm:prompt_tokens_total") or 0.0,
        output_tokens=total(page, "vllm:generation_tokens_total") or 0.0,
        prefix_queries=total(page, "vllm:prefix_cache_queries_total") or 0.0,
        prefix_hits=total(page, "vllm:prefix_cache_hits_total") or 0.0,
    )


def total(page: str, name: str) -> float | None:
    """Sum over all label sets of one series of a Prometheus text page; None when it has none."""
    found = re.findall(rf"^{re.escape(name)}(?:\{{[^\n]*\}})? (\S+)", page, re.MULTILINE)
    return sum(map(float, found)) if found else None


def predicted_share(page: str) -> float | None:
    """Share of prompt tokens that extproc predicted to be cached, from its own metrics page; None before any usage came."""
    predicted = total(page, "extproc_predicted_cached_tokens_total")
    prompt = total(page, "extproc_prompt_tokens_total")
    return predicted / prompt if predicted is not None and prompt else None


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest ranks, of values in ascending order; None of none."""
    if not ordered:
        return None
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(
    records: Sequence[Record],
    replicas: Mapping[str, Counters],
    labels: Mapping[str, Mapping[str, str]],
    predicted: float | None,
) -> dict[str, Any]:
    """One run. `replicas` holds what each address counted during it, `labels` what it is.

    Latencies are those of whole answers; errors are counted beside them, so a run that fails fast does not look fast.
    """
    good = [r for r in records if r.error is None]
    queries = sum(c.prefix_queries for c in replicas.values())
    hits = sum(c.prefix_hits for c in replicas.values())
    return {
        **_distribution("ttft", (r.ttft_s for r in good if r.ttft_s is not None)),
        **_distribution("e2e", (r.e2e_s for r in good)),
        "prefix_hit_predicted": predicted,
        "prefix_hit_actual": hits / queries if queries else None,
        "requests": len(records),
        "errors": len(records) - len(good),
        "output_tokens": sum(r.output_tokens for r in good),
        "duration_s": max((r.started_s + r.e2e_s for r in records), default=0.0),
        "replicas": {address: _replica(c, labels.get(address, {})) for address, c in replicas.items()},
    }


def _distribution(name: str, values: Iterable[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    keys = {f"{name}_p{p}_s": percentile(ordered, p) for p in PERCENTILES}
    return {**keys, f"{name}_mean_s": sum(ordered) / len(ordered) if ordered else None}


def _replica(c: Counters, labels: Mapping[str, str]) -> dict[str, Any]:
    return {
        "requests": round(c.requests),
        "prompt_tokens": round(c.prompt_tokens),
        "output_tokens": round(c.output_tokens),
        "prefix_hit": c.prefix_hits / c.prefix_queries if c.prefix_queries else None,
        "labels": dict(labels),
    }


def _values(c: Counters) -> list[float]:
    return list(asdict(c).values())


# --- the table ----------------------------------------------------------------------------------------------------------


def table(runs: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Table:
    """Summaries side by side, the first against the second; `titles` names the columns."""
    title = "the same sessions, the same arrivals, fresh replicas"
    grid = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("", no_wrap=True)
    for key in runs:
        grid.add_column(titles.get(key, key), justify="right")
    names = list(runs)
    if len(names) == 2:
        grid.add_column("change", justify="right")
    for label, key, show in _ROWS:
        values = [runs[name][key] for name in names]
        grid.add_row(label, *map(show, values), *([_change(*values)] if len(names) == 2 and show is _seconds else []))
    grid.add_section()
    for address in _addresses(runs):
        grid.add_row(_named(runs, address), *(_share_of(run, address) for run in runs.values()))
    return grid


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _count(value: int) -> str:
    return f"{value:,}"


def _change(new: float | None, old: float | None) -> str:
    return f"{(new - old) / old:+.0%}" if new is not None and old else ""


_ROWS = (
    *((f"TTFT p{p}", f"ttft_p{p}_s", _seconds) for p in PERCENTILES),
    ("TTFT mean", "ttft_mean_s", _seconds),
    *((f"end to end p{p}", f"e2e_p{p}_s", _seconds) for p in PERCENTILES),
    ("end to end mean", "e2e_mean_s", _seconds),
    ("prefix hit, predicted", "prefix_hit_predicted", _percent),
    ("prefix hit, actual", "prefix_hit_actual", _percent),
    ("requests", "requests", _count),
    ("errors", "errors", _count),
)


def _addresses(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(address for run in runs.values() for address in run["replicas"]))


def _named(runs: Mapping[str, Mapping[str, Any]], address: str) -> str:
    labels = next(run["replicas"][address]["labels"] for run in runs.values() if address in run["replicas"])
    what = [labels.get("gpu", ""), f"tp{labels['tp']}" if labels.get("tp") else ""]
    return " ".join(filter(None, [*what, address]))


def _share_of(run: Mapping[str, Any], address: str) -> str:
    replica = run["replicas"].get(address)
    if replica is None:
        return "-"
    tokens = replica["prompt_tokens"] + replica["output_tokens"]
    return f"{replica['requests']:,} req, {tokens / 1000:,.0f}k tok"
