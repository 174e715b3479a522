"""The ledger: every routed request from its decision to its one end, and the load that they are on each replica.

A replica works off prefills first come, first served, so its queue is kept as a timeline: each flight has the moment at
which its prefill should be done, in order. Time drains it; a first token that comes early or late moves what stands behind.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from extproc.core.catalog.settings import Target
from extproc.core.lora import Held, Wanted
from extproc.core.types import Api, Blocks, Prediction, PrefixSource


class LedgerError(Exception):
    """A flight was opened twice or ended twice: a defect of the caller, never of a client."""


@dataclass(slots=True, eq=False)
class Flight:
    """One routed request that has not ended."""

    id: str
    pool: str
    address: str
    """Empty where `pool` is a provider."""
    model: str | None
    api: Api
    tenant: str | None
    stream: bool
    blocks: Blocks
    prompt_bytes: int | None
    prompt_tokens: int
    """Estimated, unless the client sent token ids, or the prompt was tokenized here."""
    output_tokens: float
    """Expected."""
    samples: int
    hit_bytes: int
    """Of the prompt's head, believed to be cached on the replica."""
    prediction: Prediction
    work_s: float
    """The prior's seconds of prefill that stood before its first token, its own included."""
    unseen_s: float
    """Expected to stand there as well, for requests of others."""
    company: tuple[float, float]
    """Sequences and KV tokens there when it was routed."""
    routed_at: float
    expires_at: float
    others_s: float = 0.0
    """Prefill of other routers' requests that stands between it and the one before it here."""
    prefill_done_at: float = 0.0
    """Predicted, and moved as the queue moves."""
    exact_tokens: bool = False
    """The client sent token ids: their bytes say nothing of how text is tokenized."""
    tokenized: bool = False
    """The prompt was tokenized here, so that its tokens are not estimated."""
    first_token_at: float | None = None
    response_bytes: int = 0
    output_p90_tokens: int = 0
    """Of one generation, as predicted when it was routed."""
    heard_at: float = 0.0
    """When its last bytes were reported; before the first, when it was routed."""
    reported_at: float = 0.0
    """When the proxy last said that it still runs; before that, when it was routed."""
    vouched: bool = False
    """On trial, it counted as a success by its first token."""
    at: str = ""
    """Who has it now: `address`, unless the proxy sent it on to another."""
    target: Target | None = None
    """Of the catalog's model that was asked for; None where the catalog does not have it."""
    prefix_source: PrefixSource = PrefixSource.NONE
    """What told of the prediction's cached tokens."""
    leg: Leg | None = None
    """Its prefill, while another replica may be at it; None where there is no such, and after the first token."""
    whole: Flight | None = None
    """Of a leg: the flight that it belongs to."""
    adapter: Wanted | None = None
    """The LoRA adapter that it needs."""
    slot_at: float = 0.0
    """When the replica should have a slot for that."""

    def __post_init__(self) -> None:
        self.at = self.at or self.address

    def __repr__(self) -> str:
        state = "decoding" if self.first_token_at is not None else "prefilling"
        return f"<flight {self.id} {state} on {self.address}, {self.prompt_tokens} prompt tokens>"

    @property
    def shows_first_token(self) -> bool:
        """Whether the first byte of the response body comes with the first token.

        A whole response comes at the end, and a Responses stream begins with an event before any token.
        """
        return self.stream and self.api in (Api.CHAT, Api.COMPLETIONS)

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that the replica must prefill, as predicted."""
        return max(self.prompt_tokens - self.prediction.cached_tokens, 0)

    @property
    def held_tokens(self) -> float:
        """KV cache tokens that it holds on average: the prompt, and half of what it will generate."""
        return self.prompt_tokens + 0.5 * self.output_tokens * self.samples


@dataclass(slots=True, eq=False)
class Leg:
    """The prefill of a flight on another replica than the one that answers. It is no flight of the ledger: that has the whole."""

    flight: Flight
    """As the replica that prefills has it: only its place in the queue there counts."""
    transfer_s: float
    """Expected from there to the replica that answers."""
    tried_again: bool = True
    """Whether the proxy asks another that answers when the first says that it failed, and not only where that refuses to be asked."""


class Load:
    """The open flights of one replica."""

    __slots__ = ("_elsewhere", "_flights", "_held_tokens", "_legs", "_output_tokens", "_queue", "lora")

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        # Those whose first token has not been reported, in the order in which the replica got them; `prefill_done_at`
        # rises along it. Believed done is not removed: reading would then change what a late report can still correct.
        self._queue: list[Flight] = []
        self._legs: dict[str, Flight] = {}
        # Prompts that it computes for flights of other replicas, in the queue like its own.
        self._elsewhere: set[str] = set()
        # Flights whose prompt another replica computes, and whose first token has not been reported.
        self._held_tokens = 0.0
        self._output_tokens = 0.0
        self.lora: Held | None = None
        """LoRA adapters there; None while nothing was heard of any."""

    def __repr__(self) -> str:
        return f"<load {len(self._flights)} flights, {len(self._queue)} without first token, {self._held_tokens:.0f} tokens held>"

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights.values())

    def has(self, flight: Flight) -> bool:
        """Whether the flight is open here."""
        return flight.id in self._flights

    @property
    def legs(self) -> Collection[Flight]:
        """Prompts that it computes for flights of other replicas."""
        return self._legs.values()

    @property
    def requests(self) -> int:
        """What the engine there would count: flights and legs."""
        return len(self._flights) + len(self._legs)

    @property
    def held_tokens(self) -> float:
        """KV cache tokens held by the open flights, expected on average over their lives."""
        return self._held_tokens

    @property
    def output_tokens(self) -> float:
        """Output tokens expected of the open flights, counted in full."""
        return self._output_tokens

    def backlog_s(self, now: float) -> float:
        """Predicted seconds until all queued prefill is done."""
        return max(self._queue[-1].prefill_done_at - now, 0.0) if self._queue else 0.0

    def prefilling(self, now: float) -> int:
        """Flights whose first token is still to come, as far as we know or believe."""
        return len(self._queue) - self._believed_done(now) + len(self._elsewhere)

    def decoding(self, now: float) -> int:
        """Flights that generate."""
        legs = sum(f.id in self._legs for f in self._queue[self._believed_done(now) :]) if self._legs else 0
        return len(self._flights) - self.prefilling(now) + legs

    def sharing_step(self, now: float, budget: int) -> tuple[int, int]:
        """Flights at the end of the queue that get their first token from one step that has not begun, and the tokens in it.

        A step computes up to `budget` tokens of all that wait. What is put behind these flights fills theirs up, and they
        wait for all of it.
        """
        flights, tokens = 0, 0
        for flight in reversed(self._queue):
            uncached = max(flight.uncached_tokens, 1)
            last = (uncached - 1) % budget + 1
            if flight.prefill_done_at - flight.prediction.prefill_s * last / uncached <= now or tokens + last > budget:
                break
            flights, tokens = flights + 1, tokens + last
            if last < uncached:
                break
        return flights, tokens

    def queued_tokens(self, now: float) -> int:
        """Uncached prompt tokens whose prefill is not done."""
        return sum(f.uncached_tokens for f in self._queue[self._believed_done(now) :])

    def decoding_tokens(self, now: float) -> float:
        """Output tokens expected of the flights that generate."""
        queued = sum(f.output_tokens * f.samples for f in self._queue[self._believed_done(now) :])
        return max(self._output_tokens - queued, 0.0)

    def work_s(self, now: float) -> float:
        """Seconds of prefill in the queue that are not done; what others have between is not in it."""
        todo = self._queue[self._believed_done(now) :]
        return sum([min(f.prediction.prefill_s, f.prefill_done_at - now) for f in todo])

    def open(self, flight: Flight, now: float, backlog_s: float | None = None) -> None:
        """Put a flight at the end of the prefill queue. `backlog_s`: what stands before it, others' prefill included."""
        if flight.id in self._flights:
            raise LedgerError(f"{flight!r} is already open")
        if flight.leg is None:
            self._enqueue(flight, now, backlog_s)
        else:
            self._elsewhere.add(flight.id)
        self._flights[flight.id] = flight
        self._held_tokens += flight.held_tokens
        self._output_tokens += flight.output_tokens * flight.samples
        if flight.adapter is not None:
            self._use_adapter(flight.adapter, flight, now)

    def _use_adapter(self, wanted: Wanted, flight: Flight, now: float) -> None:
        if self.lora is None:
            self.lora = Held()
        self.lora.opened(wanted, flight, now)

    def doubt_adapter(self, flight: Flight, unknown: bool) -> None:
        """A flight that was closed had failed: what it was to load is not there, nor is what the replica said to be `unknown`."""
        if self.lora is not None and flight.adapter is not None and (unknown or flight.prediction.load_s):
            self.lora.forget(flight.adapter.name)

    def _enqueue(self, flight: Flight, now: float, backlog_s: float | None) -> None:
        ours_s = self.backlog_s(now)
        before_s = ours_s if backlog_s is None else max(ours_s, backlog_s)
        flight.others_s = before_s - ours_s
        flight.prefill_done_at = now + before_s + flight.prediction.prefill_s
        self._queue.append(flight)

    def open_leg(self, leg: Flight, now: float, backlog_s: float | None = None) -> None:
        """Put a prompt that is computed for another replica at the end of the prefill queue."""
        if leg.id in self._legs:
            raise LedgerError(f"{leg!r} is already open")
        self._legs[leg.id] = leg
        self._enqueue(leg, now, backlog_s)
        if leg.adapter is not None:
            self._use_adapter(leg.adapter, leg, now)

    def leg_done(self, leg: Flight, at: float) -> None:
        """The prompt of a leg was computed at time `at`; what stands behind it starts from there."""
        if leg in self._queue:
            del self._queue[: self._queue.index(leg) + 1]
            self._retime(0, at)

    def close_leg(self, leg: Flight, now: float) -> None:
        """The leg ended."""
        if self._legs.pop(leg.id, None) is None:
            raise LedgerError(f"{leg!r} is not open")
        if leg.adapter is not None and self.lora is not None:
            self.lora.closed(leg.adapter, leg, now)
        self._dequeue(leg, now)

    def has_leg(self, leg: Flight) -> bool:
        """Whether the leg is open here."""
        return leg.id in self._legs

    def first_token(self, flight: Flight, at: float) -> None:
        """The first token of the flight came at time `at`: what stands behind it in the queue starts from there."""
        flight.first_token_at = at
        self._elsewhere.discard(flight.id)
        if flight in self._queue:  # else one behind it is done already, and tells more
            # First come, first served: those before it are done as well.
            del self._queue[: self._queue.index(flight) + 1]
            self._retime(0, at)

    def still_prefilling(self, flight: Flight, now: float) -> None:
        """The replica has sent no byte for the flight yet: if we believed it done, it is not, nor is what came later."""
        if now < flight.prefill_done_at or now < flight.slot_at:
            return
        if flight not in self._queue:
            self._queue.insert(0, flight)  # overtaken by one whose first token came: all others are later
        # How much is left nobody says. A quarter more, and half of what it is late by against what was predicted when
        # it was routed: so the estimate grows with the delay, and a replica that hangs does not look free.
        late_s = max(now - flight.routed_at - flight.prediction.ttft_s, now - flight.prefill_done_at)
        flight.prefill_done_at = now + 0.25 * flight.prediction.prefill_s + 0.5 * late_s
        self._retime(self._queue.index(flight) + 1, flight.prefill_done_at)

    def close(self, flight: Flight, now: float) -> None:
        """The flight ended."""
        if self._flights.pop(flight.id, None) is None:
            raise LedgerError(f"{flight!r} is not open")
        self._held_tokens -= flight.held_tokens
        self._output_tokens -= flight.output_tokens * flight.samples
        if flight.adapter is not None and self.lora is not None:
            self.lora.closed(flight.adapter, flight, now)
        if not self._flights:
            self._held_tokens = self._output_tokens = 0.0  # no drift of sums over the life of a process
        self._elsewhere.discard(flight.id)
        self._dequeue(flight, now)

    def _dequeue(self, flight: Flight, now: float) -> None:
        if flight in self._queue:
            i = self._queue.index(flight)
            del self._queue[i]
            if flight.prefill_done_at > now:  # what is left of its prefill, or all of it, falls away
                self._retime(i, max(self._queue[i - 1].prefill_done_at, now) if i else now)

    def _believed_done(self, now: float) -> int:
        """How many at the head of the queue should have their first token, reported or not."""
        queue = self._queue
        if not queue or queue[0].prefill_done_at > now:
            return 0
        return bisect_right(queue, now, key=_done_at)

    def _retime(self, i: int, start: float) -> None:
        """Lay the queue out again from its i-th flight on: the replica turns to that one at `start`."""
        for flight in self._queue[i:]:
            start = max(start, flight.routed_at) + flight.others_s + flight.prediction.prefill_s
            flight.prefill_done_at = start

    def check(self) -> None:
        """Raise AssertionError if the sums or the queue do not fit the open flights; for tests."""
        assert math.isclose(self._held_tokens, sum(f.held_tokens for f in self), abs_tol=1e-3), self
        assert math.isclose(self._output_tokens, sum(f.output_tokens * f.samples for f in self), abs_tol=1e-3), self
        open_ = {**self._flights, **self._legs}
        assert all(open_.get(f.id) is f and f.first_token_at is None for f in self._queue), self
        assert all(id_ in self._flights and self._flights[id_].first_token_at is None for id_ in self._elsewhere), self
        done = [f.prefill_done_at for f in self._queue]
        assert done == sorted(done), self
        if self.lora is not None:
            self.lora.check([*self, *self.legs])


def _done_at(flight: Flight) -> float:
    return flight.prefill_done_at


class Ledger:
    """All open flights, by id; each ends exactly once."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self.opened = 0
        self.closed = 0

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights.values())

    def __repr__(self) -> str:
        return f"<ledger {self.opened} opened - {self.closed} closed = {len(self)} open>"

    def get(self, flight_id: str) -> Flight | None:
        return self._flights.get(flight_id)

    def open(self, flight: Flight) -> None:
        if flight.id in self._flights:
            raise LedgerError(f"{flight!r} is already open")
        self._flights[flight.id] = flight
        self.opened += 1

    def close(self, flight_id: str) -> Flight | None:
        """Take the flight out; None if it is not open (already ended, swept, or routed by an earlier process)."""
        flight = self._flights.pop(flight_id, None)
        self.closed += flight is not None
        return flight

    def touch(self, flight: Flight, expires_at: float) -> None:
        """Something was heard of it. Keeps the order of expiry, so that the sweep looks at the head alone."""
        flight.expires_at = expires_at
        self._flights[flight.id] = self._flights.pop(flight.id)

    def prolong(self, by_s: float) -> None:
        """All are given so much longer."""
        for flight in self._flights.values():
            flight.expires_at += by_s
            flight.heard_at += by_s

    def expired(self, now: float) -> list[Flight]:
        """Flights of which nothing was heard until their deadline, oldest first."""
        found = []
        for flight in self._flights.values():
            if now < flight.expires_at:
                break
            found.append(flight)
        return found

    def next_expiry(self) -> float | None:
        """When the next flight would expire."""
        return next((f.expires_at for f in self._flights.values()), None)

    def check(self) -> None:
        """Raise AssertionError if the ledger's own equation does not hold; for tests."""
        assert self.opened - self.closed == len(self._flights), self
