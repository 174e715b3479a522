"""Fairness between tenants in tokens: virtual counters, one for each tenant of a priority.

Virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): of those who wait, the tenant
goes first whose counter is least. It is charged for what it is given, and one that comes back after a pause is lifted to the
least of those who wait, so that a pause is no credit. Why virtual time and not deficit round robin: how long an answer gets is
known only at its end, and a counter is corrected then, whoever is waiting, while a round that was given out cannot be taken
back; there is no quantum to choose, which for prompts of ten and of a hundred thousand tokens would be wrong for one of them;
and the bound is proven: the service of two tenants that both wait differs by at most twice the largest single charge (theorem
4.4 there), plus what has not been corrected yet.

Charged are the prompt tokens that the replica computes, not those that it has cached (the time of replicas is shared out, and a
cached token takes none), and output tokens with the weight of that paper.
"""

from __future__ import annotations

from typing import Final

from extproc.core.types import TenantServed

OUTPUT_WEIGHT: Final = 2.0
"""An output token counts as so many prompt tokens, as in the paper, which follows what providers charge."""
MAX_TENANTS: Final = 1024
"""Counters kept of tenants with nothing waiting; who has more than others is remembered longest."""

TOLD_TENANTS: Final = 256
"""Told to other routers: those that were charged last. One that is dropped and comes back starts anew, and they see it so."""


def charge_tokens(uncached_tokens: float, output_tokens: float) -> float:
    """What a request is charged, in prompt tokens; at least one, so that nothing is for nothing."""
    return max(uncached_tokens + OUTPUT_WEIGHT * output_tokens, 1.0)


class Service:
    """What tenants were charged here in all, to be told to other routers, which charge it there as well."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens: dict[tuple[int, str | None], float] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def charge(self, priority: int, tenant: str | None, tokens: float) -> None:
        """It was given so much more, or less than charged before."""
        before = self._tokens.pop((priority, tenant), 0.0)
        self._tokens[priority, tenant] = before + tokens
        if len(self._tokens) > TOLD_TENANTS:
            del self._tokens[next(iter(self._tokens))]

    def told(self) -> tuple[TenantServed, ...]:
        """All that is kept: those charged last."""
        return tuple(TenantServed(tenant, priority, tokens) for (priority, tenant), tokens in self._tokens.items())


class Counters:
    """Tokens charged to the tenants of one priority. None is the tenant of all who are unknown."""

    __slots__ = ("_floor", "_tokens", "_waiting")

    def __init__(self) -> None:
        self._tokens: dict[str | None, float] = {}
        self._waiting: dict[str | None, None] = {}
        self._floor = 0.0
        """Where a tenant begins when no other waits: the counter of the one who was last to wait."""

    def __repr__(self) -> str:
        return f"<counters {len(self._tokens)} tenants, {len(self._waiting)} waiting, from {self._floor:.0f}>"

    def __len__(self) -> int:
        return len(self._tokens)

    def of(self, tenant: str | None) -> float:
        """Its counter; one that is not known begins where the others stand."""
        return self._tokens.get(tenant, self._floor)

    def begin(self, tenant: str | None) -> None:
        """The tenant has something waiting from now on, and had nothing."""
        if self._waiting:
            self._floor = min(self._tokens[other] for other in self._waiting)
        self._tokens[tenant] = max(self.of(tenant), self._floor)
        self._waiting[tenant] = None

    def end(self, tenant: str | None) -> None:
        """Its last waiting request is gone."""
        del self._waiting[tenant]
        if not self._waiting:
            self._floor = self._tokens[tenant]
        self._bound()

    def charge(self, tenant: str | None, tokens: float) -> None:
        """It was given so much."""
        self._tokens[tenant] = self.of(tenant) + tokens
        self._bound()

    def correct(self, tenant: str | None, tokens: float) -> None:
        """It was so much more, or less, than charged; nothing if that is forgotten, for then it began anew."""
        if tenant in self._tokens:
            self._tokens[tenant] += tokens

    def _bound(self) -> None:
        """Forget of those with nothing waiting whom the next lift would forget first."""
        if len(self._tokens) - len(self._waiting) <= MAX_TENANTS:
            return
        idle = sorted((t for t in self._tokens if t not in self._waiting), key=self.of)
        for tenant in idle[: len(idle) // 2]:  # half at a time: the cost of sorting is spread over as many tenants
            del self._tokens[tenant]
