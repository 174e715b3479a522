"""The queue of one pool: who is held, whose turn it is, and who is refused.

The choice of a replica is not made here: `place` is asked, for one request after the other in the order in which they go, and
it routes, refuses, or says that there is no room. So what is decided here holds for every policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from extproc.core.admission.drain import Drain
from extproc.core.admission.fairness import Service, charge_tokens
from extproc.core.admission.queue import Entry, Queue
from extproc.core.admission.room import Room
from extproc.core.admission.settings import QueueSettings
from extproc.core.flights import Flight
from extproc.core.observers import Held
from extproc.core.types import Api, End, Outcome, Refusal, Reject, Request, Route, Wait

Place = Callable[[Entry], Route | Reject | None]
"""Routes the request, which opens a flight, or refuses it; None while there is no room for it."""
Turned = tuple[Entry, Route | Reject]
"""The end of a wait."""
Reach = Callable[[Request], Hashable]
"""Names the members that may have the request: equal for requests with the same, None for all of the pool."""

LOOK_AHEAD: Final = 64
"""So many may be tried in vain in one round, each for other replicas or another LoRA adapter. Those behind do not wait for them; more
would make a round dear, and they leave by their deadline at the latest."""
RECENT_S: Final = 30.0
"""After the queue was last seen so long what is sent off is still charged: about the life of an answer. Near saturation a queue
comes and goes within seconds, and who took the places while there was none is not forgotten. Without a queue for longer
everyone gets what they want, nothing is shared out, and nothing is counted."""
CREDIT_TOKENS: Final = 16_384.0
"""Most tokens that starved requests can have saved up: a few, not a burst of them after a quiet hour."""
LOOK_S: Final = 1.0
"""Longest time between two looks while requests are held. Whatever frees a place is told, or known in advance, except what
merely grows old: a failure, a sample."""


@dataclass(slots=True)
class Work:
    """What a request amounts to, as known when it arrives."""

    tokens: float
    """Expected charge."""
    prefill_s: float
    """On the replica that has the most of it cached."""
    first_token_s: float
    """The same with what every request pays, were the replica free."""


class Admission:
    """Requests held for one pool. Every entry leaves exactly once: by a turn, or by `leave`."""

    def __init__(self, settings: QueueSettings) -> None:
        self.settings = settings
        self.queue = Queue(settings.max_requests, settings.max_bytes)
        self.drain = Drain()
        self.room = Room()
        self._displaced: list[Turned] = []
        self._charged: dict[str, tuple[int, float]] = {}
        """Open flight -> priority and tokens charged."""
        self._recent_until = -math.inf
        self._credit = 0.0
        self._absent_since: float | None = None
        self._wake_at: float | None = None
        self._number = 0
        self.served = Service()
        self.sent_tokens = 0.0
        """Charged for what was sent off while requests waited, in all."""
        self.starved_tokens = 0.0
        """Of these, out of turn, for requests that had waited too long."""

    def __repr__(self) -> str:
        return f"<admission {self.queue!r}, {self.drain!r}>"

    def __len__(self) -> int:
        return len(self.queue)

    @property
    def stirs(self) -> bool:
        """Whether there is anything to ask turns for."""
        return bool(self.queue or self._displaced)

    @property
    def next_wakeup(self) -> float | None:
        """When to ask for turns, if nothing else happens."""
        return self._wake_at if self.queue else None

    def holds(self, request: Request) -> bool:
        """Whether such a request is ever held: its prompt must be known, or nobody could say how much it is."""
        known = request.prompt_bytes is not None or request.prompt_tokens is not None
        return self.settings.enabled and known and request.api is not Api.OTHER

    def configure(self, settings: QueueSettings) -> None:
        """Go on with other settings. Who is held stays, also above a lower bound."""
        self.settings = settings
        self.queue.configure(settings.max_requests, settings.max_bytes)

    # --- arrival ------------------------------------------------------------------------------------------------------

    def hold(self, ticket: str, pool: str, request: Request, work: Work, absent: bool, now: float) -> Wait | Reject:
        """Let it wait, or refuse it: because it cannot be in time, or would be the first to be given up."""
        limit_s = self._limit_s(absent)
        if limit_s <= 0:
            return self.reject(Refusal.ABSENT, request, now)
        entry = self._entry(ticket, pool, request, work, limit_s, now)
        if self._too_late(entry, work, now):
            return self.reject(Refusal.SLO, request, now)
        self._begin(now)
        given_up = self.queue.add(entry)
        if given_up == [entry]:
            if not self.queue:
                self._empty(now)
            return self.reject(Refusal.QUEUE_FULL, request, now)
        for other in given_up:
            self._displaced.append((other, self.reject(Refusal.DISPLACED, other.request, now)))
        self._wake_at = now  # until turns are asked for nobody knows better
        return Wait(ticket, entry.deadline)

    def _limit_s(self, absent: bool) -> float:
        if not absent:
            return self.settings.max_wait_s
        wait_s = self.settings.absent_wait_s
        return max(wait_s, self.settings.max_wait_s) if wait_s else 0.0

    def _entry(self, ticket: str, pool: str, request: Request, work: Work, limit_s: float, now: float) -> Entry:
        self._number += 1
        slo_s = request.slo_ttft_s
        left_s = math.inf if slo_s is None else max(slo_s - work.first_token_s, 0.0)
        return Entry(
            held=Held(pool, ticket, request.priority, request.tenant),
            request=request,
            tokens=work.tokens,
            key=work.prefill_s + self.settings.ageing * now,
            arrived_at=now,
            deadline=now + min(limit_s, left_s),
            by_slo=left_s <= limit_s,
            number=self._number,
        )

    def _too_late(self, entry: Entry, work: Work, now: float) -> bool:
        """Whether its first token cannot come in time, as the queue drains. Unknown is no reason to refuse.

        While requests are held every replica has about `hold_above_s` of work, which it will find there.
        """
        slo_s = entry.request.slo_ttft_s
        if slo_s is None:
            return False
        if work.first_token_s > slo_s:
            return True
        ahead = self.queue.ahead(entry.held.priority, entry.held.tenant, entry.key)
        wait_s = self.drain.wait_s(ahead, now) if ahead else None
        return wait_s is not None and wait_s + self.settings.hold_above_s + work.first_token_s > slo_s

    def _begin(self, now: float) -> None:
        if now >= self._recent_until and not self.queue:
            self.queue.forget()
            self._charged.clear()
            self._credit = 0.0
        self._recent_until = now + RECENT_S
        self.drain.start(now)

    def _empty(self, now: float) -> None:
        self._recent_until = now + RECENT_S
        self.drain.stop(now)
        self._absent_since = None

    # --- turns --------------------------------------------------------------------------------------------------------

    def turns(self, now: float, place: Place, absent: bool, reach: Reach = attrgetter("subset")) -> list[Turned]:
        """The waits that end now, each entry out of the queue. `absent`: no member can be reached, so none is tried."""
        ended, self._displaced = self._displaced, []
        ended += self._overdue(now, absent)
        if not absent:
            ended += self._dispatch(now, place, reach)
        return ended

    def plan(self, now: float, crosses_at: float | None) -> None:
        """Set the time of the next look: a deadline, or when queued prefill will have fallen far enough."""
        deadline = self.queue.next_deadline
        if deadline is None:
            self._wake_at = None
            return
        times = (now + LOOK_S, deadline, crosses_at, self._absent_until)
        self._wake_at = min(at for at in times if at is not None)

    def release(self, now: float, place: Place) -> list[Turned]:
        """All waits end: routed where `place` can, else refused because this process stops."""
        ended, self._displaced = self._displaced, []
        for entry in list(self.queue.order()):
            ended.append((entry, place(entry) or Reject(Refusal.STOPPING, entry.request.model)))
            self._remove(entry, now)
        return ended

    def leave(self, ticket: str, now: float) -> Entry | None:
        """The client of a held request left; None if it does not wait."""
        entry = self.queue.get(ticket)
        if entry is not None:
            self._remove(entry, now)
        return entry

    def _overdue(self, now: float, absent: bool) -> list[Turned]:
        ended: list[Turned] = []
        while (entry := self.queue.overdue(now)) is not None:
            why = Refusal.ABSENT if absent else Refusal.SLO if entry.by_slo else Refusal.DEADLINE
            ended.append(self._refuse(entry, why, now))
        if not absent or not self.queue:
            self._absent_since = None
            return ended
        if self._absent_since is None:
            self._absent_since = now
        while (until := self._absent_until) is not None and now >= until:
            ended.append(self._refuse(next(iter(self.queue)), Refusal.ABSENT, now))
        return ended

    @property
    def _absent_until(self) -> float | None:
        """When the first to have come has waited for long enough without anybody to serve it."""
        if self._absent_since is None or not self.queue:
            return None
        first = next(iter(self.queue))
        return max(first.arrived_at, self._absent_since) + self.settings.absent_wait_s

    def _dispatch(self, now: float, place: Place, reach: Reach) -> list[Turned]:
        """Place one after the other until there is no room. Each takes its room in the same call, so it is never given twice."""
        ended: list[Turned] = []
        blocked: set[Hashable] = set()
        while self.queue and (turned := self._next(now, place, reach, blocked)) is not None:
            self._remove(turned[0], now)
            ended.append(turned)
        return ended

    def _next(self, now: float, place: Place, reach: Reach, blocked: set[Hashable]) -> Turned | None:
        """The first in order that can be placed. `blocked`: among whom nothing is free any more; None for all members."""
        if (turned := self._starved(now, place, reach, blocked)) is not None:
            return turned
        tried = 0
        for entry in self.queue.order():
            if None in blocked or tried >= LOOK_AHEAD:
                return None
            if (among := reach(entry.request)) in blocked:
                continue
            if (verdict := place(entry)) is not None:
                return entry, verdict
            blocked.add(among)
            tried += 1
        return None

    def _starved(self, now: float, place: Place, reach: Reach, blocked: set[Hashable]) -> Turned | None:
        """One that waited too long, ahead of those of higher priority, while such requests have a share left."""
        if self._credit <= 0 or None in blocked:
            return None
        entry = self.queue.starved(now - self.settings.starved_after_s)
        if entry is None:
            return None
        before, among = self.sent_tokens, reach(entry.request)
        verdict = place(entry) if among not in blocked else None
        if verdict is None:
            blocked.add(among)
            return None
        self._credit -= self.sent_tokens - before
        self.starved_tokens += self.sent_tokens - before
        return entry, verdict

    def _refuse(self, entry: Entry, why: Refusal, now: float) -> Turned:
        reject = self.reject(why, entry.request, now)
        self._remove(entry, now)
        return entry, reject

    def _remove(self, entry: Entry, now: float) -> None:
        self.queue.remove(entry)
        if not self.queue:
            self._empty(now)

    def reject(self, why: Refusal, request: Request, now: float) -> Reject:
        """A refusal that says when to come again, by what waits and how fast that drains."""
        after_s = None if why is Refusal.ABSENT else self.drain.retry_after_s(self.queue.tokens, now)
        return Reject(why, request.model, retry_after_s=after_s)

    # --- accounts -----------------------------------------------------------------------------------------------------

    def sent(self, flight: Flight, priority: int, now: float) -> None:
        """A request was routed, held before or not. It is charged while there is a queue, or was one lately."""
        if not self.queue and now >= self._recent_until:
            return
        tokens = charge_tokens(flight.uncached_tokens, flight.output_tokens * flight.samples)
        self.queue.charge(priority, flight.tenant, tokens)
        self.served.charge(priority, flight.tenant, tokens)
        self._charged[flight.id] = (priority, tokens)
        self._credit = min(self._credit + self.settings.starved_share * tokens, CREDIT_TOKENS)
        self.sent_tokens += tokens
        if self.queue:
            self.drain.sent(tokens, now)

    def settle(self, flight: Flight, outcome: Outcome, output_tokens: int | None) -> None:
        """A flight ended: charge what it really was. `output_tokens`: reported or estimated; None when nothing tells."""
        charged = self._charged.pop(flight.id, None) if self._charged else None
        if charged is None:
            return
        priority, tokens = charged
        more = _used(flight, outcome, output_tokens) - tokens
        self.queue.correct(priority, flight.tenant, more)
        self.served.charge(priority, flight.tenant, more)

    def charged_elsewhere(self, priority: int, tenant: str | None, tokens: float, now: float) -> None:
        """Another router charged so much more, or less, than it had told before. It counts while there is a queue here."""
        if not self.queue and now >= self._recent_until:
            return
        if tokens > 0:
            self.queue.charge(priority, tenant, tokens)
        else:
            self.queue.correct(priority, tenant, tokens)


def _used(flight: Flight, outcome: Outcome, output_tokens: int | None) -> float:
    """What a flight that ended is charged; nothing where the replica never ran it."""
    if output_tokens is None and outcome.end not in (End.OK, End.LOST, End.CLIENT_GONE):
        return 0.0
    usage, uncached = outcome.usage, float(flight.uncached_tokens)
    if usage is not None and usage.prompt_tokens is not None and usage.cached_tokens is not None:
        uncached = max(usage.prompt_tokens - usage.cached_tokens, 0)
    output = flight.output_tokens * flight.samples if output_tokens is None else output_tokens
    return charge_tokens(uncached, output)
