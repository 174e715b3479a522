"""LoRA adapters: which replicas have one at hand, how long its load takes, and how long it waits for a slot.

An engine holds a few adapters at once (vLLM's `max_loras`), and one batch uses no others: a request for another adapter waits until
all requests of one that is in use have ended, and lets those behind it pass. An adapter that nobody uses keeps its slot until
another needs it, the one not used for longest first (vLLM 0.32, `lora/worker_manager.py`); loading one holds up the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from extproc.core.settings import LoraSettings

if TYPE_CHECKING:
    from extproc.core.flights import Flight
    from extproc.core.types import AdaptersSampled

REMEMBERED: Final = 8
"""Adapters that are believed to be held where nobody told how many slots there are; SGLang's default (`max_loras_per_batch`)."""
MOST: Final = 64
"""Adapters of one replica that are kept in mind, where it does not tell how many slots it has."""
FORGOTTEN_S: Final = 60.0
"""One that was not used for so long is asked for again with a third of the certainty."""
_LATE: Final = 0.25
"""What runs for longer than predicted goes on for this share of its prediction."""
_SURPRISE: Final = 8.0
"""A load that took longer than so many times what was expected counts as that: it was something else that took so long."""
_LEAST_S: Final = 0.001
_WAIT_NOISE: Final = 0.3
"""Of a predicted wait, as a share of it; as in `core/speed.py`."""
_DRIFT: Final = 0.02
"""By how much the load time may change from one load to the next, as a share."""


class Wanted(NamedTuple):
    """The adapter that a request needs, and what its pool knows of such."""

    name: str
    load_s: float
    """Expected of a load."""
    slots: int | None
    """Of a replica that does not tell; None where nobody said."""


class Held:
    """Adapters on one replica: in use by our requests, and believed to be in its slots."""

    __slots__ = ("_flights", "_others", "_recent", "_running", "_waiting", "slots")

    def __init__(self) -> None:
        self.slots: int | None = None
        """As the replica tells."""
        self._flights: dict[str, dict[str, Flight]] = {}
        """Adapter -> our open flights for it, both in the order in which they came."""
        self._recent: dict[str, float] = {}
        """In slots, and last used when; the one not used for longest first."""
        self._running: tuple[str, ...] = ()
        self._waiting: tuple[str, ...] = ()
        """By the last sample."""
        self._others: frozenset[str] = frozenset()
        """Of these, those that none of our requests used then."""

    def __repr__(self) -> str:
        return f"<held {', '.join(self._recent) or 'none'}; {self.slots} slots, {len(self._flights)} in use>"

    @property
    def names(self) -> tuple[str, ...]:
        """Believed to be in its slots, the one used last at the end."""
        return tuple(self._recent)

    @property
    def in_use(self) -> dict[str, int]:
        """Adapters that our open flights need, and how many do."""
        return {name: len(flights) for name, flights in self._flights.items()}

    def opened(self, name: str, flight: Flight, now: float) -> None:
        """A flight that needs the adapter was sent there. It counts at once, before any sample says so."""
        self._flights.setdefault(name, {})[flight.id] = flight
        self._touch(name, now)

    def closed(self, name: str, flight: Flight, now: float) -> None:
        """It ended, or was sent on to another."""
        flights = self._flights[name]
        del flights[flight.id]
        if not flights:
            del self._flights[name]
        self._touch(name, now)

    def sampled(self, told: AdaptersSampled, now: float) -> None:
        """The replica said what it runs."""
        self.slots = told.slots
        self._running, self._waiting = told.running, told.waiting
        self._others = frozenset((*told.running, *told.waiting)) - self._flights.keys()
        for name in told.running:
            self._touch(name, now)

    def restarted(self) -> None:
        """Another process is there: its slots are empty."""
        self.slots, self._running, self._waiting, self._others = None, (), (), frozenset()
        self._recent.clear()

    def expected(self, wanted: Wanted, fresh: bool, turnover_s: float | None, now: float) -> tuple[float, float, float]:
        """Seconds until a slot is free for the adapter, of loading it, and of loading again the one that it pushes out.

        `fresh`: the last sample counts. `turnover_s`: how long requests take there; None where that is unknown. The third, as far as
        it is likely, lowers mean TTFT by up to a sixth with 20 adapters for 16 slots, and never raised it (`tests/bench/lora.py`).
        """
        name = wanted.name
        slots = wanted.slots if self.slots is None else self.slots
        load_s = 0.0 if name in self._flights or self._holds(name, slots or REMEMBERED) else wanted.load_s
        again_s = load_s * self._missed(slots, now) if load_s and slots is not None else 0.0
        return (0.0 if slots is None else self._slot_s(name, slots, fresh, turnover_s, now)), load_s, again_s

    def _holds(self, name: str, slots: int) -> bool:
        recent = self._recent
        return name in recent and (len(recent) <= slots or name in list(recent)[-slots:])

    def waiting(self, fresh: bool) -> int:
        """Our flights that wait for a slot, so that they wait neither for a prefill nor for a place. 0 where slots are unknown."""
        if self.slots is None or len(self._flights) + len(self._others) <= self.slots:
            return 0
        return sum([len(self._flights.get(name, ())) for name in self._in_use(fresh)[self.slots :]])

    def _missed(self, slots: int, now: float) -> float:
        """How sure it is that the next adapter to be pushed out will be asked for again; 0 where a slot is free."""
        if len(self._recent) < slots:
            return 0.0
        idle_s = next((now - at for name, at in self._recent.items() if name not in self._flights), 0.0)
        return math.exp(-idle_s / FORGOTTEN_S)

    def _slot_s(self, name: str, slots: int, fresh: bool, turnover_s: float | None, now: float) -> float:
        used = self._in_use(fresh)
        before = used[: used.index(name)] if name in used else used
        if len(before) < slots:
            return 0.0
        ends = sorted(self._lasts_s(each, turnover_s, now) for each in before)
        return ends[len(before) - slots]

    def _in_use(self, fresh: bool) -> list[str]:
        """Adapters with requests there, in the order in which they have or get slots: those that run, ours, those of others that wait."""
        if not fresh:
            return list(self._flights)
        running = [name for name in self._running if name in self._flights or name in self._others]
        waiting = [name for name in self._waiting if name in self._others]
        return list(dict.fromkeys((*running, *self._flights, *waiting)))

    def _lasts_s(self, name: str, turnover_s: float | None, now: float) -> float:
        flights = self._flights.get(name)
        if not flights:
            return turnover_s or 0.0
        return max(_left_s(flight, now) for flight in flights.values())

    def _touch(self, name: str, now: float) -> None:
        recent = self._recent
        recent.pop(name, None)
        recent[name] = now
        while len(recent) > (self.slots or MOST):
            idle = next((each for each in recent if each not in self._flights), next(iter(recent)))
            del recent[idle]

    def check(self, flights: Iterable[Flight]) -> None:
        """Raise AssertionError if this does not fit the open flights; for tests."""
        ours = {flight.id: flight for flight in flights if flight.adapter is not None}
        assert ours == {key: each for by_id in self._flights.values() for key, each in by_id.items()}, self
        assert all(self._flights.values()), self


def _left_s(flight: Flight, now: float) -> float:
    """Expected until its last token."""
    predicted = flight.prediction
    begun = flight.routed_at + predicted.ttft_s if flight.first_token_at is None else flight.first_token_at
    return max(begun + predicted.decode_s - now, _LATE * predicted.decode_s)


class LoadTime:
    """How long a pool's replicas take to load an adapter, learned from first tokens of requests that had to wait for it."""

    __slots__ = ("_variance", "s")

    def __init__(self, prior_s: float) -> None:
        self.s = prior_s
        self._variance = 1.0
        """Of the estimate, as a share of it: at first it may be off by as much as it is."""

    def __repr__(self) -> str:
        return f"<load {self.s * 1e3:.0f} ms>"

    def learn(self, took_s: float, other_s: float) -> None:
        """A load took so long, as what is left of a time to first token without `other_s` of waiting and prefill, which were predicted."""
        scale = max(self.s, _LEAST_S)
        noise = 0.1 + (_WAIT_NOISE * other_s / scale) ** 2
        gain = self._variance / (self._variance + noise)
        took_s = min(max(took_s, 0.0), _SURPRISE * scale)
        self.s += gain * (took_s - self.s)
        self._variance = min(self._variance * (1.0 - gain) + _DRIFT, 1.0)


class Lora:
    """What a pool knows of its adapters."""

    __slots__ = ("holders", "load", "settings")

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self.load = LoadTime(settings.load_s)
        self.holders: Mapping[str, frozenset[str]] = {}
        """Adapter -> replicas that list it. Nobody else can serve it."""

    def __repr__(self) -> str:
        return f"<lora {len(self.holders)} adapters, {self.load!r}>"

    def configure(self, settings: LoraSettings) -> None:
        """Go on with other settings. What was learned of loads stays, unless it was told otherwise now."""
        if settings.load_s != self.settings.load_s:
            self.load = LoadTime(settings.load_s)
        self.settings = settings

    def listed(self, parents: Iterable[tuple[str, Iterable[str]]], configured: Collection[str] = ()) -> None:
        """Of each replica, the adapters that it lists: as of now. `configured`: models that are known even while nobody lists them."""
        holders: dict[str, set[str]] = {name: set() for name in self.holders if name in configured}
        for address, names in parents:
            for name in names:
                holders.setdefault(name, set()).add(address)
        self.holders = {name: frozenset(addresses) for name, addresses in holders.items()}

    def wanted(self, model: str | None) -> Wanted | None:
        """What a request for the model needs; None where that is no adapter."""
        if model is None or model not in self.holders:
            return None
        return Wanted(model, self.load.s, self.settings.slots)
