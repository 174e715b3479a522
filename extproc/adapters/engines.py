"""What inference engines say of themselves: pages of bytes in, samples out. Pure.

A page of vLLM has 48-60 KB and 600 lines, of which a dozen matter. One regular expression that begins with a literal lets the scan
skip from candidate to candidate: 0.05 ms a page, against 5-6 ms for the parser of prometheus_client, which at 100 replicas
and two pages a second would be a whole core. `tests/adapters/test_engines_speed.py` compares the two.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from extproc.core.types import Sample


@dataclass(frozen=True, slots=True)
class Engine:
    """How to read one kind of engine."""

    name: str
    parse: Callable[[bytes], Sample | None]
    """A metrics page -> what it says, None where it has none of the wanted lines. Never raises; a field that is absent or garbage is None."""


_MOST: Final = 2.0**53
"""Above it a double no longer counts by ones."""


@dataclass(frozen=True, slots=True)
class _Series:
    """One line of a page: the labels as written, and the value as written."""

    labels: bytes
    value: bytes

    def number(self) -> float:
        """The value; NaN for whatever cannot count anything."""
        try:
            value = float(self.value)
        except ValueError:
            return math.nan
        return value if 0.0 <= value <= _MOST else math.nan

    def count_in(self, label: re.Pattern[bytes]) -> int | None:
        """A label that holds a whole number; None where it is absent, "None" or absurd."""
        found = label.search(self.labels)
        return int(found[1]) if found else None


_Page = Mapping[str, Sequence[_Series]]
"""Series by name without the engine's prefix. Several series of one name are data parallel ranks (`engine`) of the same server."""

# Newest name first. A page that has two of them (vLLM 0.10, with hidden metrics shown) says the same twice, so the first wins.
_RUNNING: Final = ("num_requests_running",)
_WAITING: Final = ("num_requests_waiting",)
_KV_USAGE: Final = ("kv_cache_usage_perc", "gpu_cache_usage_perc")
_PROMPT: Final = ("prompt_tokens_total",)
_GENERATED: Final = ("generation_tokens_total",)
_QUERIES: Final = ("prefix_cache_queries_total", "gpu_prefix_cache_queries_total")
_HITS: Final = ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total")
_PREEMPTIONS: Final = ("num_preemptions_total",)
_CACHE_CONFIG: Final = ("cache_config_info",)

_WANTED: Final = (
    _RUNNING + _WAITING + _KV_USAGE + _PROMPT + _GENERATED + _QUERIES + _HITS + _PREEMPTIONS + _CACHE_CONFIG
)
_LINE: Final = re.compile(rb"\nvllm:(%s)(?:\{(.*)\})? +(\S+)" % "|".join(_WANTED).encode())
"""Begins with a literal, not with `^`: the latter is tried at each byte and costs six times as much."""
# The character before the name keeps `hash_block_size` and its like out. Nine digits are more blocks than any engine has, and
# keep int() off its limit of 4300 digits.
_BLOCK_SIZE: Final = re.compile(rb'(?:^|,)block_size="([1-9]\d{0,8})"')
_NUM_BLOCKS: Final = re.compile(rb'(?:^|,)num_gpu_blocks="([1-9]\d{0,8})"')
_COUNTED_IN_BLOCKS: Final = b"in terms of number of queried blocks"
"""In the help text of the first vLLM V1 releases, whose prefix cache counters count blocks under the name that later counted tokens."""


def parse_vllm(page: bytes) -> Sample | None:
    """Read the metrics page of vLLM: the names of 0.9 to 0.33, in the text format 0.0.4 that it answers whatever is asked."""
    series: defaultdict[str, list[_Series]] = defaultdict(list)
    for name, labels, value in _LINE.findall(b"\n" + page):
        series[name.decode()].append(_Series(labels, value))
    if not series:
        return None
    block_size = _block_size(series)
    queries, hits = _total(series, _QUERIES), _total(series, _HITS)
    if _QUERIES[0] not in series and _COUNTED_IN_BLOCKS in page:
        queries, hits = _times(queries, block_size), _times(hits, block_size)
    return Sample(
        running=_whole(_total(series, _RUNNING)),
        waiting=_whole(_total(series, _WAITING)),
        kv_usage=_mean_share(series, _KV_USAGE),
        block_size=block_size,
        num_blocks=_num_blocks(series),
        prompt_tokens=_total(series, _PROMPT),
        generated_tokens=_total(series, _GENERATED),
        prefix_queries=queries,
        prefix_hits=hits,
        preemptions=_total(series, _PREEMPTIONS),
    )


def _of(page: _Page, names: Sequence[str]) -> Sequence[_Series]:
    """All series of the first of `names` that the page has."""
    return next((page[name] for name in names if name in page), ())


def _total(page: _Page, names: Sequence[str]) -> float | None:
    """Sum over ranks. One rank unreadable makes the whole unknown: without it the sum would look like less load."""
    numbers = [s.number() for s in _of(page, names)]
    # Sorted, so that the rounding does not depend on the order of the lines; NaN in the list survives any order.
    total = sum(sorted(numbers))
    return total if numbers and math.isfinite(total) else None


def _mean_share(page: _Page, names: Sequence[str]) -> float | None:
    """Mean over ranks, whose caches are equally large; None outside 0 to 1."""
    total, ranks = _total(page, names), len(_of(page, names))
    return total / ranks if total is not None and total <= ranks else None


def _block_size(page: _Page) -> int | None:
    """Tokens; None where ranks disagree, for then no product with the blocks would be right."""
    sizes = {s.count_in(_BLOCK_SIZE) for s in _of(page, _CACHE_CONFIG)}
    return sizes.pop() if len(sizes) == 1 else None


def _num_blocks(page: _Page) -> int | None:
    """Sum over ranks; None while one of them has not profiled its memory yet and says "None"."""
    counts = [s.count_in(_NUM_BLOCKS) for s in _of(page, _CACHE_CONFIG)]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _times(value: float | None, factor: int | None) -> float | None:
    return None if value is None or factor is None else value * factor


ENGINES: Final[Mapping[str, Engine]] = {"vllm": Engine("vllm", parse_vllm)}
"""By the name that `pools[].engine` has in the configuration."""


def listed_models(page: bytes) -> tuple[str, ...] | None:
    """Ids in an answer of `/v1/models`, LoRA adapters included, in its order; None where it is no such answer."""
    try:
        answer = orjson.loads(page)
    except orjson.JSONDecodeError:
        return None
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        return None
    ids = (entry.get("id") for entry in entries if isinstance(entry, dict))
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, str) and i))
