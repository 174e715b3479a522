"""Requests that wait, in the order in which they go: by priority, fair between tenants, within a tenant the shortest first.

Everything is kept sorted by keys that do not change while a request waits, so that nothing is sorted again as time passes.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from extproc.core.admission.fairness import Counters
from extproc.core.observers import Held
from extproc.core.types import Request

MAX_LEVELS: Final = 64
"""Priorities with nothing waiting whose counters are kept; beyond, they begin anew."""


@dataclass(slots=True, eq=False)
class Entry:
    """One request that waits."""

    held: Held
    """What observers get to know."""
    request: Request
    tokens: float
    """Expected charge: how much work it is, and what the bounds and predictions of the queue count."""
    key: float
    """Its place among those of its tenant: seconds of prefill, plus `ageing` times the moment of its arrival. All of them age
    alike, so the order between two never changes."""
    arrived_at: float
    deadline: float
    by_slo: bool
    """Whether the deadline is what the client's SLO leaves."""
    number: int
    """Of arrival: breaks ties."""

    def __repr__(self) -> str:
        return f"<entry {self.held.ticket} priority {self.held.priority}, {self.tokens:.0f} tokens, until {self.deadline:.3f}>"

    @property
    def size(self) -> int:
        """Bytes that holding it takes up."""
        return self.request.body_bytes


class Sorted:
    """Entries in the order of a key that each has, both ends at hand. Insertion moves pointers: a thousand take a microsecond."""

    __slots__ = ("_rows",)

    def __init__(self) -> None:
        self._rows: list[tuple[float, int, Entry]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Entry]:
        return (row[2] for row in self._rows)

    def add(self, key: float, entry: Entry) -> None:
        insort(self._rows, (key, entry.number, entry))

    def remove(self, key: float, entry: Entry) -> None:
        del self._rows[bisect_left(self._rows, (key, entry.number))]

    @property
    def first(self) -> Entry:
        return self._rows[0][2]

    @property
    def last(self) -> Entry:
        return self._rows[-1][2]


class Line:
    """What one tenant has waiting at one priority."""

    __slots__ = ("entries", "tokens")

    def __init__(self) -> None:
        self.entries = Sorted()
        self.tokens = 0.0


class Level:
    """What waits at one priority."""

    __slots__ = ("_by_arrival", "counters", "lines", "tokens")

    def __init__(self) -> None:
        self.counters = Counters()
        self.lines: dict[str | None, Line] = {}
        self.tokens = 0.0
        self._by_arrival: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._by_arrival)

    def add(self, entry: Entry) -> None:
        tenant = entry.held.tenant
        line = self.lines.get(tenant)
        if line is None:
            line = self.lines[tenant] = Line()
            self.counters.begin(tenant)
        line.entries.add(entry.key, entry)
        line.tokens += entry.tokens
        self.tokens += entry.tokens
        self._by_arrival[entry.number] = entry

    def remove(self, entry: Entry) -> None:
        tenant = entry.held.tenant
        line = self.lines[tenant]
        line.entries.remove(entry.key, entry)
        line.tokens -= entry.tokens
        self.tokens -= entry.tokens
        del self._by_arrival[entry.number]
        if not line.entries:
            del self.lines[tenant]
            self.counters.end(tenant)
        if not self._by_arrival:
            self.tokens = 0.0  # no drift of a sum over the life of a process

    @property
    def oldest(self) -> Entry:
        return next(iter(self._by_arrival.values()))

    def order(self) -> Iterator[Entry]:
        """Who goes next, and who if that one cannot. Ask again after a charge: the counters have moved."""
        heap = [(self.counters.of(tenant), i, line) for i, (tenant, line) in enumerate(self.lines.items())]
        heapq.heapify(heap)  # of equals the one who came back first
        while heap:
            yield from heapq.heappop(heap)[2].entries

    def ahead(self, tenant: str | None, key: float) -> float:
        """Tokens that go before a newcomer: of its own tenant what sorts before it, and of each other as much, or all it has."""
        own = self.lines.get(tenant)
        before = sum(e.tokens for e in own.entries if e.key <= key) if own else 0.0
        lead = self.counters.of(tenant)
        others = 0.0
        for other, line in self.lines.items():
            if other != tenant:
                others += min(line.tokens, max(before + lead - self.counters.of(other), 0.0))
        return before + others

    def heaviest(self, tenant: str | None, extra: float) -> str | None:
        """The tenant with the most tokens waiting, when `tenant` has so many more."""
        own = self.lines.get(tenant)
        heaviest, most = tenant, extra + (own.tokens if own else 0.0)
        for other, line in self.lines.items():
            if other != tenant and line.tokens > most:
                heaviest, most = other, line.tokens
        return heaviest


class Queue:
    """All that wait, of every priority."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._levels: dict[int, Level] = {}
        self._priorities: list[int] = []
        """Of the levels with something waiting, rising."""
        self._deadlines = Sorted()
        self._entries: dict[str, Entry] = {}
        self.bytes = 0

    def __repr__(self) -> str:
        return f"<queue {len(self)} requests, {self.bytes} bytes, priorities {self._priorities[::-1]}>"

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def configure(self, max_requests: int, max_bytes: int) -> None:
        """Other bounds from now on; what waits stays."""
        self._max_requests, self._max_bytes = max_requests, max_bytes

    def get(self, ticket: str) -> Entry | None:
        return self._entries.get(ticket)

    @property
    def tokens(self) -> float:
        """Work that waits."""
        return sum(self._levels[priority].tokens for priority in self._priorities)

    def charge(self, priority: int, tenant: str | None, tokens: float) -> None:
        """A tenant was given so much at that priority."""
        self._level(priority).counters.charge(tenant, tokens)

    def correct(self, priority: int, tenant: str | None, tokens: float) -> None:
        """It was so much more, or less; nothing if the charge is forgotten already."""
        if (level := self._levels.get(priority)) is not None:
            level.counters.correct(tenant, tokens)

    def _level(self, priority: int) -> Level:
        level = self._levels.get(priority)
        if level is None:
            self._forget_levels()
            level = self._levels[priority] = Level()
        return level

    def add(self, entry: Entry) -> list[Entry]:
        """Take it in. Returns who had to go for it: it alone, when it would be the first to be given up, or others, or nobody."""
        given_up: list[Entry] = []
        while self._over(entry):
            victim = self._victim(entry)
            if victim is entry:
                for other in given_up:
                    self._insert(other)
                return [entry]
            self.remove(victim)
            given_up.append(victim)
        self._insert(entry)
        return given_up

    def remove(self, entry: Entry) -> None:
        """It no longer waits."""
        del self._entries[entry.held.ticket]
        self._deadlines.remove(entry.deadline, entry)
        self.bytes -= entry.size
        priority = entry.held.priority
        level = self._levels[priority]
        level.remove(entry)
        if not len(level):
            del self._priorities[bisect_left(self._priorities, priority)]

    def overdue(self, now: float) -> Entry | None:
        """One whose deadline is over."""
        if self._entries and now >= self._deadlines.first.deadline:
            return self._deadlines.first
        return None

    @property
    def next_deadline(self) -> float | None:
        return self._deadlines.first.deadline if self._entries else None

    def order(self) -> Iterator[Entry]:
        """Who goes next, and who if that one cannot. Add and remove nothing meanwhile."""
        for priority in reversed(self._priorities):
            yield from self._levels[priority].order()

    def overtakes(self, entry: Entry) -> bool:
        """Whether requests of a lower priority wait."""
        return bool(self._priorities) and self._priorities[0] < entry.held.priority

    def starved(self, since: float) -> Entry | None:
        """Of those below the highest priority that waits, the one that waits longest, if it came at `since` or before."""
        oldest = (self._levels[priority].oldest for priority in self._priorities[:-1])
        found = min(oldest, key=lambda entry: entry.number, default=None)
        return found if found is not None and found.arrived_at <= since else None

    def ahead(self, priority: int, tenant: str | None, key: float) -> float:
        """Tokens that would go before a newcomer."""
        higher = sum(self._levels[p].tokens for p in self._priorities if p > priority)
        level = self._levels.get(priority)
        return higher + (level.ahead(tenant, key) if level else 0.0)

    def forget(self) -> None:
        """Drop the counters of all with nothing waiting."""
        self._levels = {p: self._levels[p] for p in self._priorities}

    def check(self) -> None:
        """Raise AssertionError if the sums or the orders do not fit what waits; for tests."""
        entries = list(self._entries.values())
        assert self.bytes == sum(e.size for e in entries), self
        assert self._priorities == sorted({e.held.priority for e in entries}), self
        assert sorted(e.number for e in self.order()) == sorted(e.number for e in entries), self
        assert [e.deadline for e in self._deadlines] == sorted(e.deadline for e in entries), self
        assert abs(self.tokens - sum(e.tokens for e in entries)) < 1e-3 * (1 + self.tokens), self

    def _insert(self, entry: Entry) -> None:
        priority = entry.held.priority
        level = self._level(priority)
        if not len(level):
            insort(self._priorities, priority)
        level.add(entry)
        self._entries[entry.held.ticket] = entry
        self._deadlines.add(entry.deadline, entry)
        self.bytes += entry.size

    def _over(self, entry: Entry) -> bool:
        return len(self) >= self._max_requests or self.bytes + entry.size > self._max_bytes

    def _victim(self, entry: Entry) -> Entry:
        """Whom to give up: of the lowest priority, of the tenant with the most tokens waiting, the last; the newcomer counts."""
        lowest = self._priorities[0] if self._priorities else entry.held.priority
        if entry.size > self._max_bytes or entry.held.priority < lowest:
            return entry
        level, newcomer = self._levels[lowest], entry.held.priority == lowest
        tenant = level.heaviest(entry.held.tenant, entry.tokens) if newcomer else level.heaviest(None, 0.0)
        if newcomer and tenant == entry.held.tenant:
            line = level.lines.get(tenant)
            if line is None or (line.entries.last.key, line.entries.last.number) < (entry.key, entry.number):
                return entry
        return level.lines[tenant].entries.last

    def _forget_levels(self) -> None:
        idle = [p for p, level in self._levels.items() if not len(level)]
        for priority in idle[: max(len(idle) - MAX_LEVELS + 1, 0)]:
            del self._levels[priority]
