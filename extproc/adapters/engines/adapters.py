"""What `vllm:lora_requests_info` says of LoRA adapters. Pure.

A gauge whose value is the time at which its labels held, and whose old labels stay on the page for ever: the latest series counts
(vLLM 0.9 to 0.33, `vllm/v1/metrics/loggers.py`). It is there from the first request on, and has no label of a rank, so that ranks
behind one address cannot be told apart by it. 0.32 puts each adapter with a request that has begun into both lists, and none that
only waits (`v1/metrics/stats.py`; seen on a running one).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Protocol

from extproc.core.types import AdaptersSampled

MOST: Final = 256
"""Adapters of one kind that are read."""
_LABEL: Final = re.compile(rb'(?:^|,)(max_lora|running_lora_adapters|waiting_lora_adapters)="([^"]*)"')


class Series(Protocol):
    """One line of a page."""

    @property
    def labels(self) -> bytes:
        """As written."""

    @property
    def value(self) -> bytes:
        """As written."""


def adapters_of(lines: Iterable[Series]) -> AdaptersSampled | None:
    """What the latest of these series says; None without any, and where that is none of its kind."""
    latest = max(lines, key=_at, default=None)
    if latest is None or _at(latest) < 0:
        return None
    told = dict(_LABEL.findall(latest.labels))
    slots = told.get(b"max_lora", b"")
    if not (slots.isdigit() and len(slots) < 10 and int(slots)):
        return None
    running, waiting = (_names(told.get(kind, b"")) for kind in (b"running_lora_adapters", b"waiting_lora_adapters"))
    return AdaptersSampled(int(slots), running, waiting)


def _at(line: Series) -> float:
    try:
        at = float(line.value)
    except ValueError:
        return -1.0
    return at if at >= 0.0 else -1.0  # NaN neither


def _names(joined: bytes) -> tuple[str, ...]:
    names = [name.strip() for name in joined.decode(errors="replace").split(",")]
    return tuple(dict.fromkeys(name for name in names if name))[:MOST]
