"""Requests that tenants have in flight, where they may have so many: counted here, and told to the other routers.

Each router tells a store how many it has of a tenant, absolute, whenever that changes and once a second, and hears with the answer how many
the others have. What was told lapses after `TOLD_S`: a router that dies vanishes by itself, there is no counter to leak, and without
a store each router is back to its own count. Nobody waits for any of this. So more than the limit may run only of what came to several routers
before they heard of each other, a few milliseconds: at most the limit on each of them. What runs for longer counts everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from extproc.core.admission.leases import Key
from extproc.core.record import record

REFRESH_S: Final = 1.0
"""How often what has not changed is told again."""
TOLD_S: Final = 3.0
"""For how long the word of a router counts: three of these, less one that was late."""


@record
class Held:
    """What this router has in flight of one tenant."""

    key: Key
    count: int


class InFlight:
    """By tenant and model, here and on the other routers."""

    __slots__ = ("_others", "_stirred", "_told_at", "here")

    def __init__(self) -> None:
        self.here: Counter[Key] = Counter()
        self._others: dict[Key, tuple[int, float]] = {}  # and until when that counts
        self._stirred: set[Key] = set()
        self._told_at = float("-inf")

    def __repr__(self) -> str:
        return f"<in flight {self.here.total()} here, of {len(self._others)} told by others>"

    def of(self, key: Key, now: float) -> int:
        """How many there are, as far as is known here."""
        others, until = self._others.get(key, (0, 0.0))
        return self.here[key] + (others if now < until else 0)

    def began(self, key: Key) -> None:
        """One more here."""
        self.here[key] += 1

    def ended(self, key: Key) -> None:
        """One less."""
        self.here[key] -= 1
        if self.here[key] <= 0:
            del self.here[key]

    def stir(self, key: Key) -> None:
        """To be told, and asked, with the next report."""
        self._stirred.add(key)

    def reports(self, now: float) -> list[Held]:
        """What to tell the store now; afterwards `told` or `unheard` has to be called."""
        due, self._stirred = self._stirred, set()
        if now >= self._told_at + REFRESH_S:
            self._told_at = now
            due |= self.here.keys()
            self._others = {key: word for key, word in self._others.items() if now < word[1]}
        return [Held(key, self.here[key]) for key in due]

    def told(self, reports: Sequence[Held], others: Sequence[int], now: float) -> None:
        """So many of each have the others."""
        for report, count in zip(reports, others, strict=True):
            self._others[report.key] = count, now + TOLD_S

    def unheard(self, reports: Iterable[Held]) -> None:
        """The store did not answer: what still runs is to be told again. The rest lapses there by itself."""
        self._stirred.update(report.key for report in reports if report.key in self.here)
