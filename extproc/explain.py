"""A decision record as a table for people; the same record that `/debug/explain` gives."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def table(record: dict[str, Any], console: Console | None = None) -> None:
    """Print one decision: what the request is, and every candidate in the policy's order with what it looked at."""
    console = console or Console(
        width=None if sys.stdout.isatty() else 140
    )  # a pipe has no width; 80 would cut addresses
    predicted = record["predicted"]
    console.print(
        f"{record['api']} for [bold]{record['model']}[/] in pool {record['pool']}: "
        f"{record['prompt_tokens']} prompt tokens, about {record['output_tokens']:.0f} output tokens "
        f"(p90 {record['output_p90_tokens']})"
    )
    console.print(
        f"policy [bold]{record['policy']}[/], reason {record['reason']}: {record['endpoints'][0]}, "
        f"{predicted['cached_tokens']} tokens cached ({predicted['prefix_source']}), first token in {predicted['ttft_s'] * 1e3:.0f} ms"
    )
    if record["tokens"] not in (None, "tokenized"):
        console.print(f"the prompt was not tokenized ({record['tokens']}): what is cached is guessed")
    if record["prefiller"] is not None:
        console.print(f"prompt computed by {record['prefiller']}")
    if "tier" in record:
        left = ", ".join(f"{q['remaining']} of {q['limit']} {of}" for of, q in record["left"].items() if q)
        console.print(
            f"tenant {record['tenant']} of tier {record['tier']}: {left or 'no limit'}{' left' if left else ''}"
        )
    names = list(record["candidates"][0]["terms"])
    grid = Table("", "replica", "score", *names)
    for column in grid.columns:
        column.no_wrap = True
    for column in grid.columns[2:]:
        column.justify = "right"
    for place, candidate in enumerate(record["candidates"], 1):
        terms = (_shown(candidate["terms"].get(name)) for name in names)
        grid.add_row(str(place), candidate["replica"], _shown(candidate["score"]), *terms)
    console.print(grid)


def _shown(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e9 else f"{value:.4f}"
