"""Reads the metrics page of any engine by its table: bytes in, samples out. Pure.

A page of vLLM has 48-60 KB and 600 lines, of which a dozen matter. One regular expression that begins with a literal lets the scan
skip from candidate to candidate: 0.05 ms a page, against 5-6 ms for the parser of prometheus_client, which at 100 replicas
and two pages a second would be a whole core. `tests/adapters/engines/test_speed.py` compares the two.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Final

from extproc.adapters.engines.adapters import adapters_of
from extproc.adapters.engines.table import Figure, Figures, Table
from extproc.core.types import Sample

_MOST: Final = 2.0**53
"""Above it a double no longer counts by ones."""
MOST_LINES: Final = 8192
"""Wanted lines of one page; more are no engine's (64 ranks have 800 to 4,000), and would hold up the event loop at 5 us each."""
_SELECTOR: Final = re.compile(r'(\w+)(?:\{(\w+="[^"]*")\}|\[(\w+)\])?')
_FIGURES: Final = tuple(field.name for field in fields(Table) if field.type == "Figures")


@dataclass(frozen=True, slots=True)
class _Series:
    """One line of a page: the labels as written, with a comma before each, so that patterns for them begin with a literal and are
    searched fast, and the value as written.
    """

    labels: bytes
    value: bytes


_Page = Mapping[bytes, Sequence[_Series]]
"""Series by name without the engine's prefix. Several of one name are ranks, models, or parts of a whole."""


@dataclass(frozen=True, slots=True)
class _Term:
    """A selector, ready to be looked up."""

    name: bytes
    having: re.Pattern[bytes] | None
    label: re.Pattern[bytes] | None

    def of(self, page: _Page) -> list[tuple[bytes, float]]:
        """Labels and number of each line of it; NaN for a number that cannot count anything."""
        lines = page.get(self.name, ())
        if self.having is not None:
            lines = [line for line in lines if self.having.search(line.labels)]
        if self.label is not None:
            return [(line.labels, _in_label(line.labels, self.label)) for line in lines]
        return [(line.labels, _number(line.value)) for line in lines]


def _term(selector: str) -> _Term:
    found = _SELECTOR.fullmatch(selector)
    if found is None:
        raise ValueError(f'{selector!r} is no selector; write name, name{{label="value"}} or name[label]')
    name, having, label = found.groups()
    return _Term(
        name.encode(),
        re.compile(b"," + re.escape(having.encode())) if having else None,
        # What comes before the name keeps `hash_block_size` and its like out. Nine digits are more blocks than any engine has,
        # and keep int() off its limit of 4300 digits.
        re.compile(rb',%s="([1-9]\d{0,8})"' % label.encode()) if label else None,
    )


def _number(value: bytes) -> float:
    try:
        number = float(value)
    except ValueError:
        return math.nan
    return number if 0.0 <= number <= _MOST else math.nan


def _in_label(labels: bytes, label: re.Pattern[bytes]) -> float:
    found = label.search(labels)
    return float(found[1]) if found else math.nan


@dataclass(frozen=True, slots=True)
class _Read:
    """A figure as one page tells it: a number of each rank or part, and how."""

    numbers: Sequence[float]
    figure: Figure

    @property
    def total(self) -> float | None:
        """One rank unreadable makes the whole unknown: without it the sum would look like less load."""
        # Sorted, so that the rounding does not depend on the order of the lines; NaN in the list survives any order.
        total = sum(sorted(self.numbers))
        return total if self.numbers and math.isfinite(total) else None

    @property
    def all_set(self) -> bool | None:
        """Whether it is above 0 on all ranks."""
        return None if self.total is None else min(self.numbers) > 0.0

    @property
    def mean_share(self) -> float | None:
        """Mean over ranks, whose caches are equally large; None where one is outside 0 to 1."""
        total = self.total
        return None if total is None or max(self.numbers) > 1.0 else total / len(self.numbers)

    @property
    def size(self) -> int | None:
        """The one that all ranks have; None where they disagree, for then no product with it would be right."""
        sizes = set(self.numbers)
        size = sizes.pop() if len(sizes) == 1 else math.nan
        return int(size) if size >= 1.0 else None

    @property
    def count(self) -> int | None:
        total = self.total
        return None if total is None else int(total)

    def some(self, ranks: int) -> int | None:
        """A count that is nowhere 0: an engine that says so has not looked yet. Of one of so many ranks."""
        if self.figure.of_all:
            return None if self.size is None else self.size // ranks
        return self.count if all(self.numbers) else None

    def tokens(self, block_size: int | None) -> float | None:
        total = self.total
        if total is None or not self.figure.in_blocks:
            return total
        return None if block_size is None else total * block_size


_NOTHING: Final = _Read((), Figure(""))


class Engine:
    """How to read one kind of engine."""

    def __init__(self, table: Table) -> None:
        """Raises ValueError for a selector that is none."""
        self.table = table
        figures: dict[str, Figures] = {name: getattr(table, name) for name in _FIGURES}
        self._alternatives = {
            name: [(figure, [_term(s) for s in (figure.series, *figure.plus)]) for figure in told]
            for name, told in figures.items()
        }
        wanted = {t.name for told in self._alternatives.values() for _, terms in told for t in terms}
        self._adapters = table.adapters.encode()
        if self._adapters:
            wanted.add(self._adapters)
        # Begins with a literal, not with `^`: the latter is tried at each byte and costs six times as much.
        self._line = re.compile(rb"\n%s(%s)(?:\{(.*)\})? +(\S+)" % (table.prefix.encode(), b"|".join(sorted(wanted))))
        self._skip = re.compile(table.skip.encode()) if table.skip else None
        copies = "|".join(table.copies).encode()
        self._copies = re.compile(rb',(?:%s)="[^"]*"' % copies) if copies else None
        self._rank = re.compile(rb',%s="(\d{1,2})"' % table.rank.encode()) if table.rank else None
        self._marks = {figure.only_with for told in figures.values() for figure in told if figure.only_with}

    def __repr__(self) -> str:
        return f"<engine {self.name}>"

    @property
    def name(self) -> str:
        return self.table.name

    def parse(self, page: bytes) -> Sample | None:
        """What a metrics page (text format 0.0.4) says of the whole server, None where it has none of the wanted lines.

        Never raises; a figure that is absent or garbage is None.
        """
        lines = self._lines(page)
        return self._sample(lines, self._marks_on(page)) if lines else None

    def parse_ranks(self, page: bytes) -> dict[int, Sample]:
        """What a page says of each data parallel rank, by its number, 0 to 99; empty where it numbers none."""
        if self._rank is None:
            return {}
        ranks: defaultdict[int, defaultdict[bytes, list[_Series]]] = defaultdict(lambda: defaultdict(list))
        for name, series in self._lines(page).items():
            for line in series:
                if found := self._rank.search(line.labels):
                    ranks[int(found[1])][name].append(line)
        marks = self._marks_on(page)
        return {rank: self._sample(lines, marks, len(ranks)) for rank, lines in sorted(ranks.items())}

    def _lines(self, page: bytes) -> Mapping[bytes, list[_Series]]:
        """None of them where there are too many: a part would look like less load."""
        series: defaultdict[bytes, list[_Series]] = defaultdict(list)
        found = list(islice(self._line.finditer(b"\n" + page), MOST_LINES + 1))
        for line in found if len(found) <= MOST_LINES else ():
            name, labels, value = line.groups(b"")
            labels = b"," + labels
            if self._skip is None or not self._skip.search(labels):
                series[name].append(_Series(labels, value))
        return series

    def _marks_on(self, page: bytes) -> frozenset[bytes]:
        return frozenset(mark for mark in self._marks if mark in page)

    def _sample(self, lines: _Page, marks: frozenset[bytes], ranks: int = 1) -> Sample:
        """`lines` are those of one of so many ranks, or of all; `marks` what decides between alternatives, of what is on the page."""

        def read(name: str) -> _Read:
            return self._read(name, lines, marks)

        block_size = read("block_size").size
        prompt, generated = read("prompt_tokens"), read("generated_tokens")
        return Sample(
            running=read("running").count,
            waiting=read("waiting").count,
            kv_usage=read("kv_usage").mean_share,
            block_size=block_size,
            num_blocks=read("num_blocks").some(ranks),
            cache_tokens=read("cache_tokens").some(ranks),
            prompt_tokens=prompt.total,
            generated_tokens=generated.total,
            counted_at_end=prompt.figure.at_end or generated.figure.at_end,
            prefix_queries=read("prefix_queries").tokens(block_size),
            prefix_hits=read("prefix_hits").tokens(block_size),
            preemptions=read("preemptions").total,
            awake=read("awake").all_set,
            adapters=adapters_of(lines.get(self._adapters, ())) if self._adapters else None,
        )

    def _read(self, name: str, lines: _Page, marks: frozenset[bytes]) -> _Read:
        for figure, (term, *more) in self._alternatives[name]:
            numbers = self._numbers(term, lines)
            if figure.only_with in marks if figure.only_with else numbers:
                # Where what it must have is not there yet, the rest is a part of it at most.
                rest = [number for each in more for number in self._numbers(each, lines)] if numbers else []
                return _Read([*numbers, *rest], figure)
        return _NOTHING

    def _numbers(self, term: _Term, lines: _Page) -> list[float]:
        told = term.of(lines)
        if self._copies is None:
            return [number for _, number in told]
        largest: dict[bytes, float] = {}
        for labels, number in told:
            key = self._copies.sub(b"", labels)
            known = largest.get(key, math.nan)
            largest[key] = number if math.isnan(known) else max(known, number)  # in this order NaN never wins
        return list(largest.values())


def told(sample: Sample) -> int:
    """How many figures of a sample are known."""
    return sum(getattr(sample, name) is not None for name in _FIGURES)
