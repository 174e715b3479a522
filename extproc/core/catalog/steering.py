"""The catalog with what stands behind it: a request in, the pools and providers where it may go out, in the order in which they are tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from itertools import islice
from typing import Final

from extproc.core.admission.admission import Admission, Work
from extproc.core.catalog.catalog import Catalog, Draw, aimed, known_as
from extproc.core.catalog.listing import Listed, listed
from extproc.core.catalog.providers import Provider
from extproc.core.catalog.settings import CatalogSettings, Target
from extproc.core.fleet import Member
from extproc.core.health.states import State
from extproc.core.pool import Pool
from extproc.core.types import Refusal, Reject, Request

Place = Pool | Provider
Option = tuple[Place, Target | None]
"""Where a request may go, and as what; None where the catalog does not have its model."""


class Waiting(Enum):
    """How long a request may wait for one option."""

    LONG = "long"  # for as long as the pool lets requests wait: there is no other option
    IN_TIME = "in_time"  # where its turn is expected before the end of that
    NOT = "not"  # it is placed now or goes elsewhere


ELSEWHERE: Final = frozenset(
    {
        Refusal.NO_REPLICAS,
        Refusal.SUBSET_EMPTY,
        Refusal.ABSENT,
        Refusal.QUEUE_FULL,
        Refusal.DISPLACED,
        Refusal.DEADLINE,
        Refusal.SLO,
        Refusal.STOPPING,
        Refusal.BUDGET,
    }
)
"""Refusals of one option after which the next is tried. The others are of the request or of this process."""
TOLD: Final = 20
"""Names that a refusal brings along: replicas may list thousands of adapters, and a client may ask for what there is not as often as it likes."""
VACANT: Final = frozenset({Refusal.NO_REPLICAS, Refusal.SUBSET_EMPTY, Refusal.ABSENT, Refusal.BUDGET})
"""Those of an option that has nobody to wait for."""
USELESS: Final = frozenset({State.OPEN, State.DRAINING, State.GONE})
"""States of replicas that get requests only for want of others."""


class Steering:
    """Where requests go by their model: by the catalog, and for names that it does not have by what pools list."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self._pools = pools
        self._first = next(iter(pools.values()))
        self.catalog = Catalog()
        self.providers: dict[str, Provider] = {}
        self.spilled: Counter[tuple[str, str, Refusal]] = Counter()
        """Model, pool or provider, and what the first option said: requests that went to another than the first."""

    def __repr__(self) -> str:
        return f"<steering by {self.catalog!r}, {list(self.providers.values())}>"

    def configure(self, settings: CatalogSettings) -> None:
        """Go on with other models and providers; a provider that stays keeps what it has spent and learned."""
        self.catalog = Catalog(settings)
        before, self.providers = self.providers, {}
        for each in settings.providers:
            known = before.get(each.name)  # which is false while nothing is in flight there
            provider = self.providers[each.name] = Provider(each) if known is None else known
            provider.configure(each)

    def place(self, name: str) -> Place:
        """The pool or provider of that name."""
        pool = self._pools.get(name)
        return self.providers[name] if pool is None else pool

    def options(self, request: Request, draw: Draw) -> list[Option]:
        """Where the request may go; empty where its model is not known, or not for it."""
        model = self.catalog.find(request.model)
        if model is None:
            pool = self._pool_of(request.model, request)
            return [] if pool is None else [(pool, None)]
        targets = self.catalog.targets(model, request, lambda target: self._size(target, request), draw)
        return [(self.place(target.to), target) for target in targets]

    def reachable(self, model: str | None) -> list[tuple[Pool, str | None]]:
        """Every pool where a request for the model may go, whatever the rules say of it, and what the model is called there."""
        known = self.catalog.find(model)
        if known is None:
            pool = self._pool_of(model)
            return [] if pool is None else [(pool, model)]
        targets = [(self._pools.get(each.to), each.engine) for each in (*known.targets, *known.fallback)]
        return [(pool, engine) for pool, engine in targets if pool is not None]

    def after(self, request: Request) -> list[Option]:
        """Where a request may go that waited for its target in vain."""
        if request.target is None:
            return []
        targets = self.catalog.after(request.target, request, lambda target: self._size(target, request))
        return [(self.place(target.to), target) for target in targets]

    def aim(self, request: Request, target: Target | None) -> Request:
        """The request as it goes there."""
        if target is not None:
            return aimed(request, target)
        if not len(self.catalog) or request.model is None:
            return request
        return replace(request, blocks=known_as(request.blocks, request.model))

    def unknown(self, request: Request, now: float) -> Reject:
        """The refusal of a request without options."""
        if len(self.catalog):
            known = listed(self.catalog, self._pools, self.providers, request, now)
            return Reject(Refusal.MODEL_NOT_FOUND, request.model, tuple(each.name for each in islice(known, TOLD)))
        names = tuple(model for pool in self._pools.values() for model in pool.models)
        return Reject(Refusal.UNKNOWN_MODEL, request.model, names)

    def listed(self, who: Request, now: float) -> tuple[Listed, ...]:
        """What this client can ask for at present."""
        return tuple(listed(self.catalog, self._pools, self.providers, who, now))

    def _pool_of(self, model: str | None, who: Request | None = None) -> Pool | None:
        """The first that has a name which the catalog has not, and leaves it to `who`; None for anybody."""
        open_to = self.catalog.open_to
        return next((p for p in self._naming(model) if who is None or open_to(p.settings.name, model, who)), None)

    def _naming(self, model: str | None) -> Iterable[Pool]:
        if model is None:
            return (self._first,)
        pools = self._pools.values()
        if len(self.catalog):  # then only what somebody names is known
            return (pool for pool in pools if pool.names(model))
        return (pool for pool in pools if pool.serves(model))

    def _size(self, target: Target, request: Request) -> tuple[float, float]:
        return self.place(target.to).size(request, target.engine)


def useless(members: Sequence[Member], now: float) -> bool:
    """Whether these would get requests only for want of others: no reason to stay where there is another option."""
    return all(member.state(now) in USELESS for member in members)


def serves(place: Place, request: Request, now: float) -> bool:
    """Whether there is anybody who would take such a request, aimed there, sooner or later."""
    if isinstance(place, Provider):
        return place.refusal(request, now) is None
    members = place.candidates(request, now)
    return bool(members) and not useless(members, now)


def too_late(admission: Admission, request: Request, work: Work, now: float) -> bool:
    """Whether a newcomer's turn is expected after the longest wait. Unknown is not: it may as well come soon."""
    ahead = admission.queue.ahead(request.priority, request.tenant, work.prefill_s + admission.settings.ageing * now)
    wait_s = admission.drain.wait_s(ahead, now) if ahead else None
    return wait_s is not None and wait_s > admission.settings.max_wait_s
