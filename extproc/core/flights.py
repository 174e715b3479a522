"""The ledger: every routed request from its decision to its one end, and the load that they are on each replica.

A replica works off prefills first come, first served, so its queue is kept as a timeline: each flight has the moment at
which its prefill should be done, in order. Time drains it; a first token that comes early or late moves what stands behind.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from extproc.core.types import Api, Blocks, Prediction


class LedgerError(Exception):
    """A flight was opened twice or ended twice: a defect of the caller, never of a client."""


@dataclass(slots=True, eq=False)
class Flight:
    """One routed request that has not ended."""

    id: str
    pool: str
    address: str
    model: str | None
    api: Api
    tenant: str | None
    stream: bool
    blocks: Blocks
    prompt_bytes: int | None
    prompt_tokens: int
    """Estimated, unless the client sent token ids."""
    output_tokens: float
    """Expected."""
    samples: int
    hit_bytes: int
    """Of the prompt's head, believed to be cached on the replica."""
    prediction: Prediction
    work_s: float
    """The prior's seconds of prefill that stood before its first token, its own included."""
    company: tuple[float, float]
    """Sequences and KV tokens there when it was routed."""
    routed_at: float
    expires_at: float
    prefill_done_at: float = 0.0
    """Predicted, and moved as the queue moves."""
    first_token_at: float | None = None
    response_bytes: int = 0

    def __repr__(self) -> str:
        state = "decoding" if self.first_token_at is not None else "prefilling"
        return f"<flight {self.id} {state} on {self.address}, {self.prompt_tokens} prompt tokens>"

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that the replica must prefill, as predicted."""
        return max(self.prompt_tokens - self.prediction.cached_tokens, 0)

    @property
    def held_tokens(self) -> float:
        """KV cache tokens that it holds on average: the prompt, and half of what it will generate."""
        return self.prompt_tokens + 0.5 * self.output_tokens * self.samples


class Load:
    """The open flights of one replica."""

    __slots__ = ("_flights", "_held_tokens", "_output_tokens", "_queue")

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self._queue: deque[Flight] = deque()  # not yet known or believed to have their first token, in order
        self._held_tokens = 0.0
        self._output_tokens = 0.0

    def __repr__(self) -> str:
        return (
            f"<load {len(self._flights)} flights, {len(self._queue)} prefilling, {self._held_tokens:.0f} tokens held>"
        )

    def __len__(self) -> int:
        return len(self._flights)

    def has(self, flight: Flight) -> bool:
        """Whether the flight is open here."""
        return flight.id in self._flights

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
        self._drain(now)
        return self._queue[-1].prefill_done_at - now if self._queue else 0.0

    def prefilling(self, now: float) -> int:
        """Flights whose first token is still to come, as far as we know or believe."""
        self._drain(now)
        return len(self._queue)

    def decoding(self, now: float) -> int:
        """Sequences that generate."""
        self._drain(now)
        return len(self._flights) - len(self._queue)

    def queued_tokens(self, now: float) -> int:
        """Uncached prompt tokens whose prefill is not done."""
        self._drain(now)
        return sum(f.uncached_tokens for f in self._queue)

    def decoding_tokens(self, now: float) -> float:
        """Output tokens expected of the flights that generate."""
        self._drain(now)
        return self._output_tokens - sum(f.output_tokens * f.samples for f in self._queue)

    def open(self, flight: Flight, now: float) -> None:
        """Put a flight at the end of the prefill queue."""
        if flight.id in self._flights:
            raise LedgerError(f"{flight!r} is already open")
        flight.prefill_done_at = now + self.backlog_s(now) + flight.prediction.prefill_s
        self._flights[flight.id] = flight
        self._queue.append(flight)
        self._held_tokens += flight.held_tokens
        self._output_tokens += flight.output_tokens * flight.samples

    def first_token(self, flight: Flight, at: float) -> None:
        """The first token of the flight came at time `at`: what stands behind it in the queue starts from there."""
        flight.first_token_at = at
        if flight in self._queue:
            before = self._queue.index(flight)
            for _ in range(before + 1):  # first come, first served: those before it are done as well
                self._queue.popleft()
        self._retime(at)

    def still_prefilling(self, flight: Flight, now: float) -> None:
        """The replica has sent no byte for the flight yet: if we believed it done, it is not."""
        if now < flight.prefill_done_at:
            return
        if flight not in self._queue:
            self._queue = deque(sorted((*self._queue, flight), key=lambda f: f.routed_at))
        # How much is left nobody says; a quarter more, and half of what it is late by, grows with the delay itself.
        overdue_s = 0.25 * flight.prediction.prefill_s + 0.5 * (now - flight.prefill_done_at)
        self._retime(now, first_s=overdue_s)

    def close(self, flight: Flight, now: float) -> None:
        """The flight ended."""
        if self._flights.pop(flight.id, None) is None:
            raise LedgerError(f"{flight!r} is not open")
        self._held_tokens -= flight.held_tokens
        self._output_tokens -= flight.output_tokens * flight.samples
        if not self._flights:
            self._held_tokens = self._output_tokens = 0.0  # no drift of sums over the life of a process
        if flight in self._queue:
            first = self._queue[0] is flight
            self._queue.remove(flight)
            self._retime(now if first else self._queue[0].prefill_done_at, keep_first=not first)

    def _drain(self, now: float) -> None:
        queue = self._queue
        while queue and queue[0].prefill_done_at <= now:
            queue.popleft()

    def _retime(self, start: float, first_s: float | None = None, keep_first: bool = False) -> None:
        """Lay the queue out again from `start`, each with its own prefill time."""
        done = start
        for i, flight in enumerate(self._queue):
            if i == 0 and keep_first:
                done = flight.prefill_done_at
                continue
            own = first_s if i == 0 and first_s is not None else flight.prediction.prefill_s
            done = max(done, flight.routed_at) + own
            flight.prefill_done_at = done


class Ledger:
    """All open flights, by id; each ends exactly once."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self.opened = 0
        self.closed = 0

    def __len__(self) -> int:
        return len(self._flights)

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
