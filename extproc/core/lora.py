"""LoRA adapters: which replicas have one at hand, how long its load takes, and how long it waits for a slot.

An engine holds a few adapters at once (vLLM's `max_loras`), and one batch uses no others: a request for another adapter waits until
all requests of one that is in use have ended, and lets those behind it pass. An adapter that nobody uses keeps its slot until
another needs it, the one not used for longest first (vLLM 0.32, `lora/worker_manager.py`); loading one holds up the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from extproc.core.settings import LoraSettings

if TYPE_CHECKING:
    from extproc.core.flights import Flight
    from extproc.core.types import AdaptersSampled

UNKNOWN: Final = 404
"""The status of an answer to a request for a model that the replica does not have, or no longer."""
REMEMBERED: Final = 8
"""Adapters that are believed to be held where nobody told how many slots there are; SGLang's default (`max_loras_per_batch`)."""
MOST: Final = 64
"""Adapters of one replica that are kept in mind, where it does not tell how many slots it has."""
FORGOTTEN_S: Final = 60.0
"""One that was not used for so long is asked for again with a third of the certainty."""
_LATE: Final = 0.25
"""What runs for longer than predicted goes on for this share of its prediction."""
_SURPRISE: Final = 8.0
"""A load that took longer than so many times what was expected counts as that: it was something else that took so long.
With less, loads now from disk and now from the host's memory would be taken for the latter alone."""
_LEAST_S: Final = 0.01
_MOST_S: Final = 60.0
"""Bounds of what is believed: below, a load is lost in the noise; above, several in a row that stood still would set it."""
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
    """Of a replica that has not told; None where neither the configuration nor another replica did."""


class Held:
    """Adapters on one replica: in use by our requests, and believed to be in its slots."""

    __slots__ = ("_assumed", "_flights", "_others", "_recent", "_running", "_told", "_waiting")

    def __init__(self) -> None:
        self._told: int | None = None
        """Slots, as the replica says."""
        self._assumed: int | None = None
        """By the last request for an adapter that was sent there."""
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
    def slots(self) -> int | None:
        """Adapters that it holds at once: as it tells, else what is assumed of it; None where nobody knows."""
        return self._assumed if self._told is None else self._told

    @property
    def names(self) -> tuple[str, ...]:
        """Believed to be in its slots, the one used last at the end."""
        return tuple(self._recent)

    @property
    def in_use(self) -> dict[str, int]:
        """Adapters that our open flights need, and how many do."""
        return {name: len(flights) for name, flights in self._flights.items()}

    def opened(self, wanted: Wanted, flight: Flight, now: float) -> None:
        """A flight that needs the adapter was sent there. It counts at once, before any sample says so."""
        self._assumed = wanted.slots
        self._flights.setdefault(wanted.name, {})[flight.id] = flight
        self._touch(wanted.name, now)

    def closed(self, wanted: Wanted, flight: Flight, now: float) -> None:
        """It ended, or was sent on to another."""
        flights = self._flights[wanted.name]
        del flights[flight.id]
        if not flights:
            del self._flights[wanted.name]
        self._touch(wanted.name, now)

    def forget(self, name: str) -> None:
        """It is not believed to be in a slot any more, unless others need it."""
        self._recent.pop(name, None)

    def sampled(self, told: AdaptersSampled, now: float) -> None:
        """The replica said what it runs."""
        self._told = told.slots
        self._running, self._waiting = told.running, told.waiting
        self._others = frozenset((*told.running, *told.waiting)) - self._flights.keys()
        for name in told.running:
            self._touch(name, now)

    def restarted(self) -> None:
        """Another process is there: its slots are empty."""
        self._told, self._running, self._waiting, self._others = None, (), (), frozenset()
        self._recent.clear()

    def open_to(self, wanted: Wanted, fresh: bool) -> bool:
        """Whether a request for the adapter would have a slot at once. `fresh`: the last sample counts."""
        slots = wanted.slots if self._told is None else self._told
        if slots is None or wanted.name in self._flights:
            return True
        others = self._others if fresh else frozenset[str]()
        if len(self._flights) + len(others) < slots:
            return True
        return wanted.name in others or len(self._flights.keys() | others) < slots

    def expected(self, wanted: Wanted, fresh: bool, turnover_s: float | None, now: float) -> tuple[float, float, float]:
        """Seconds until a slot is free for the adapter, of loading it, and of loading again the one that it pushes out.

        `fresh`: the last sample counts. `turnover_s`: how long requests take there; None where that is unknown. The third, as far as
        it is likely, lowers mean TTFT by up to a sixth with 20 adapters for 16 slots, and never raised it (`tests/bench/lora.py`).
        """
        name = wanted.name
        slots = wanted.slots if self._told is None else self._told
        load_s = 0.0 if name in self._flights or self._holds(name, slots or REMEMBERED) else wanted.load_s
        again_s = load_s * self._missed(slots, now) if load_s and slots is not None else 0.0
        return (0.0 if slots is None else self._slot_s(name, slots, fresh, turnover_s, now)), load_s, again_s

    def _holds(self, name: str, slots: int) -> bool:
        recent = self._recent
        return name in recent and (len(recent) <= slots or name in list(recent)[-slots:])

    def waiting(self, fresh: bool) -> int:
        """Our flights that wait for a slot, so that they wait neither for a prefill nor for a place. 0 where slots are unknown."""
        slots = self.slots
        if slots is None or len(self._flights) + len(self._others) <= slots:
            return 0
        return sum([len(self._flights.get(name, ())) for name in self._in_use(fresh)[slots:]])

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
        recent, most = self._recent, self.slots or MOST
        recent.pop(name, None)
        recent[name] = now
        while len(recent) > most:
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
        self.s = min(max(self.s + gain * (took_s - self.s), _LEAST_S), _MOST_S)
        self._variance = min(self._variance * (1.0 - gain) + _DRIFT, 1.0)


def _move(lists: dict[str, set[str]], address: str, before: Collection[str], after: Collection[str]) -> None:
    """The replica is listed under other names now."""
    for name in {*before}.difference(after):
        lists[name].discard(address)
        if not lists[name]:
            del lists[name]
    had = {*before}
    for name in after:
        if name not in had:
            lists.setdefault(name, set()).add(address)


class Lora:
    """What a pool knows of its adapters, and of the models that its replicas list."""

    __slots__ = ("_called", "_listed", "holders", "load", "models", "settings", "slots_told")

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self.load = LoadTime(settings.load_s)
        self.slots_told: int | None = None
        """By the replica that told last how many it has: one that was not asked for anything yet is taken to be like it."""
        self.models: dict[str, set[str]] = {}
        """Model, adapters included -> replicas that list it."""
        self.holders: dict[str, set[str]] = {}
        """Adapter -> replicas that list it. Nobody else can serve it."""
        self._called: dict[str, set[str]] = {}
        """Adapter -> replicas that say that it is one."""
        self._listed: dict[str, tuple[Sequence[str], frozenset[str]]] = {}
        """Replica -> what it lists, and what of it it calls adapters: only changes are entered, for it may be thousands."""

    def __repr__(self) -> str:
        return f"<lora {len(self.holders)} adapters, {self.load!r}>"

    def configure(self, settings: LoraSettings) -> None:
        """Go on with other settings. What was learned of loads stays, unless it was told otherwise now."""
        if settings.load_s != self.settings.load_s:
            self.load = LoadTime(settings.load_s)
        self.settings = settings

    def lists(
        self, address: str, models: Sequence[str], parents: Collection[str], configured: Collection[str] = ()
    ) -> None:
        """As of now the replica lists these models, and calls some of them adapters; none once it left.

        Where any says that a name is one of an adapter, others may have it too and say no more than the name. `configured`: models that
        are known even while nobody lists them.
        """
        calls = frozenset(parents).intersection(models)
        listed, called = self._listed.pop(address, ((), frozenset()))
        _move(self.models, address, listed, models)
        _move(self._called, address, called, calls)
        if models:
            self._listed[address] = models, calls
        for name in {*listed} ^ {*models} | called ^ calls:
            if name in self._called or (name in configured and name in self.holders):
                self.holders[name] = self.models.get(name, set())
            else:
                self.holders.pop(name, None)

    def wanted(self, model: str | None) -> Wanted | None:
        """What a request for the model needs; None where that is no adapter."""
        if model is None or model not in self.holders:
            return None
        slots = self.settings.slots
        return Wanted(model, self.load.s, self.slots_told if slots is None else slots)
