"""The health of one replica: evidence in, state out.

All of the state lives here. It is a function of what was seen and of the time (`_judged`), so no order of evidence can lead
into a state that does not fit; what changes is told once, with the next evidence or the next `expire`, whichever is first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from extproc.core.health.breaker import Breaker
from extproc.core.health.settings import HealthSettings
from extproc.core.health.states import Reason, State
from extproc.core.types import Judgement, Probe

Report = Callable[[State, State, Reason], None]
"""Takes a transition: state before, state after, and why."""


def untold(before: State, after: State, reason: Reason) -> None:
    """A report to nobody."""


class Streak:
    """Whether checks of one kind say that the replica is out: so many failures in a row, until so many successes."""

    __slots__ = ("_run", "out")

    def __init__(self) -> None:
        self.out = False
        self._run = 0

    def seen(self, good: bool, settings: HealthSettings) -> bool:
        """A check came back. True if the replica is back by it."""
        self._run = self._run + 1 if good is self.out else 0
        if self._run < (settings.successes if self.out else settings.failures):
            return False
        self.out, self._run = not self.out, 0
        return not self.out


class Health:
    """What is known of one replica's health. `now` never goes back."""

    __slots__ = (
        "_asked",
        "_asleep",
        "_breaker",
        "_ends_at",
        "_heard",
        "_left",
        "_listed",
        "_live",
        "_model",
        "_reason",
        "_refused_at",
        "_report",
        "_scraped",
        "_since",
        "_slow_from",
        "_slow_reason",
        "_slow_since",
        "_slow_until",
        "_starting",
        "_state",
        "_suspect_firm",
        "_suspect_reason",
        "_suspect_until",
        "_told",
        "_told_ends_at",
        "_told_out",
        "_until",
        "restarts",
        "settings",
        "trial",
    )

    def __init__(
        self,
        settings: HealthSettings,
        now: float,
        *,
        scraped: bool,
        drain: bool = False,
        slow_from: float = -math.inf,
        report: Report = untold,
    ) -> None:
        """A new member, ready at once unless it is `scraped`: then when it is first heard of. New ones that are ready before
        `slow_from` get their full share at once. `report` is told of each transition, the first from GONE.
        """
        self.settings = settings
        self._scraped = scraped
        self._slow_from = slow_from
        self._report = report
        self._state, self._reason, self._since, self._until = State.GONE, Reason.LEFT, now, -math.inf
        self._left = False
        self._refused_at: float | None = None
        self._listed, self._asked = drain, False
        self._asleep = False
        self._ends_at = math.inf
        self._told, self._told_ends_at = False, math.inf
        """Asked of another router: to drain, and until when."""
        self._told_out = 0
        """Other routers that have taken it out, when they last said."""
        self._live, self._model = Streak(), Streak()
        self._breaker = Breaker(settings)
        self._breaker.since = now  # what went to an earlier member of this address says nothing of this one
        self._heard, self._starting = not scraped, Reason.JOINED
        self._suspect_until, self._suspect_reason, self._suspect_firm = -math.inf, Reason.REQUEST_FAILED, False
        self._slow_since, self._slow_until, self._slow_reason = -math.inf, -math.inf, Reason.JOINED
        self.restarts = 0
        """How often another process was found at its address: each time its cache is empty."""
        self.trial: str | None = None
        """The request that is on trial there."""
        if self._heard and now >= slow_from:
            self._slow(Reason.JOINED, now)
        self._settle(now)

    def __repr__(self) -> str:
        return f"{self._state} by {self._reason}"

    # --- state --------------------------------------------------------------------------------------------------------

    def state(self, now: float) -> State:
        """The state at this time, at or after the last evidence."""
        return self._state if now < self._until else self._judged(now)[0]

    def why(self, now: float) -> tuple[State, Reason, float]:
        """State, the reason for it, and since when it is in it."""
        if now < self._until:
            return self._state, self._reason, self._since
        state, reason, _ = self._judged(now)
        return state, reason, self._since if state is self._state else self._until

    def unreachable(self, now: float) -> bool:
        """Whether nothing that is sent there is served: nobody listens, or it sleeps."""
        state, reason, _ = self.why(now)
        return state is State.GONE or (state is State.OPEN and reason in (Reason.REFUSED, Reason.ASLEEP))

    def passed_over(self, now: float) -> bool:
        """Whether it is chosen only where all are out."""
        state = self.state(now)
        if state is State.READY:
            return False
        if state is State.PROBATION:
            return self.trial is not None
        return state in (State.SUSPECT, State.OPEN, State.DRAINING, State.GONE)

    def share(self, now: float) -> float:
        """Of a full load, what it may have now: 0 to 1, growing while it starts slowly."""
        if now >= self._slow_until:
            return 1.0
        return (now - self._slow_since) / (self._slow_until - self._slow_since)

    def drain_left_s(self, now: float) -> float | None:
        """Seconds until it will be taken away; None where no time is known."""
        ends_at = self._end
        return None if ends_at == math.inf else max(ends_at - now, 0.0)

    @property
    def _end(self) -> float:
        return min(self._ends_at, self._told_ends_at)

    @property
    def waits(self) -> bool:
        """Whether it is out until work that it has is over; `expire` must be told of it then."""
        return self._breaker.held

    @property
    def failing_since(self) -> float:
        """When the first of the failures came that are in a row now."""
        return self._breaker.failing_since

    def _judged(self, now: float) -> tuple[State, Reason, float]:
        """State, reason, and until when time alone does not change it. The first that applies:

        1. no member, or taken away     5. checks fail                       9. its time out is over: on trial
        2. nothing listens, or it sleeps 6. out: it hangs, or requests fail 10. new, or back
        3. asked to drain               7. one failure, or silence          11. well
        4. about to be taken away       8. never heard of
        """
        if self._left:
            return State.GONE, Reason.LEFT, math.inf
        ends_at = self._end
        if now >= ends_at:
            return State.GONE, Reason.NOTICE, math.inf
        state, reason, until = self._living(now)
        return state, reason, min(until, ends_at)

    def _living(self, now: float) -> tuple[State, Reason, float]:
        if self._refused_at is not None:
            return State.OPEN, Reason.REFUSED, math.inf
        if self._asleep:
            return State.OPEN, Reason.ASLEEP, math.inf
        if self._listed or self._asked or self._told:
            return State.DRAINING, Reason.ASKED, math.inf
        if self._end < math.inf:
            return State.DRAINING, Reason.NOTICE, math.inf
        if self._live.out or self._model.out:
            return State.OPEN, Reason.CHECKS_FAILED if self._live.out else Reason.NO_MODEL, math.inf
        return self._by_requests(now)

    def _by_requests(self, now: float) -> tuple[State, Reason, float]:
        broken = self._breaker.reason
        if broken is not None and now < self._breaker.until:
            return State.DRAINING if broken is Reason.SHUTTING_DOWN else State.OPEN, broken, self._breaker.until
        if now < self._suspect_until:
            return State.SUSPECT, self._suspect_reason, self._suspect_until
        if not self._heard:
            return State.STARTING, self._starting, math.inf
        if broken is not None:
            return State.PROBATION, Reason.TRIAL, math.inf
        if now < self._slow_until:
            return State.SLOW_STARTING, self._slow_reason, self._slow_until
        return State.READY, Reason.ANSWERS, math.inf

    def _settle(self, now: float) -> None:
        """Take the state of now for the last known, and tell if it is another."""
        before = self._state
        state, self._reason, self._until = self._judged(now)
        if state is before:
            return
        self._state, self._since = state, now
        if state is not State.PROBATION:
            self.trial = None
        self._report(before, state, self._reason)

    # --- evidence: checks and scrapes ---------------------------------------------------------------------------------

    def heard(self, now: float, other: bool = False) -> None:
        """It answered a scrape. `other`: what it said is of another process than the one that was known."""
        self._due(now)
        if other and self._refused_at is None:
            self._restart(now)
        self._answers(now)
        self._begins(now)
        self._settle(now)

    def refused(self, now: float) -> None:
        """Nothing listens there: whatever was known is of a process that is gone."""
        self._due(now)
        self._refused_at = now
        self._settle(now)

    def probed(self, probe: Probe, ok: bool, now: float) -> None:
        """A check came back."""
        if probe is Probe.DEEP:  # it asks for what requests ask for
            (self.succeeded if ok else self.failed)(now, now)
        self._due(now)
        if ok:
            self._answers(now)
            if probe is not Probe.LIVE:
                self._begins(now)
        if probe is not Probe.DEEP:
            self._checked(probe, ok, now)
        self._settle(now)

    def _checked(self, probe: Probe, ok: bool, now: float) -> None:
        live = probe is Probe.LIVE
        if (self._live if live else self._model).seen(ok, self.settings):
            self._slow(Reason.ANSWERS, now)
        if not ok and self._breaker.reason is None:
            self._suspect(Reason.CHECKS_FAILED if live else Reason.NO_MODEL, firm=False, now=now)

    def _due(self, now: float) -> None:
        """Tell first what time alone has changed."""
        if now >= self._until:
            self._settle(now)

    def _answers(self, now: float) -> None:
        if self._refused_at is not None:
            self._restart(now)
        if not self._suspect_firm:
            self._suspect_until = -math.inf

    def _begins(self, now: float) -> None:
        if self._heard:
            return
        self._heard = True
        if self._starting is Reason.RESTARTED or now >= self._slow_from:
            self._slow(self._starting, now)

    def _restart(self, now: float) -> None:
        self.restarts += 1
        self._refused_at = None
        self._ends_at = self._told_ends_at = math.inf  # it was another that was to be taken away
        self._live, self._model = Streak(), Streak()
        self._breaker.reset(now)
        self._suspect_until = -math.inf
        self._heard, self._starting = not self._scraped, Reason.RESTARTED
        if self._heard:
            self._slow(Reason.RESTARTED, now)

    def _slow(self, reason: Reason, now: float) -> None:
        self._slow_since, self._slow_until, self._slow_reason = now, now + self.settings.slow_start_s, reason

    # --- evidence: requests -------------------------------------------------------------------------------------------

    def succeeded(self, sent_at: float, now: float) -> None:
        """A request that was sent at `sent_at` was answered well."""
        self._due(now)
        if self._breaker.succeeded(sent_at, now):
            self._slow(Reason.ANSWERS, now)
        if self._state is State.READY:
            return
        if self._refused_at is not None and sent_at >= self._refused_at:
            self._restart(now)
        if self._suspect_reason is not Reason.SILENT and sent_at >= self._breaker.failing_since:
            self._suspect_until = -math.inf
        self._settle(now)

    def failed(self, sent_at: float, now: float, working: bool = False) -> None:
        """A request failed. `working`: what it had before goes on there, so it may be shutting down."""
        self._due(now)
        if sent_at < self._breaker.since:
            return
        why = self._breaker.failed(sent_at, now)
        if why is not None:
            shuts = working and why is Reason.REQUESTS_FAILED
            self._open(Reason.SHUTTING_DOWN if shuts else why, now, self.settings.max_open_s if shuts else None)
        elif self._breaker.reason is None:
            # A page that answers ends it the first time. A second failure in a row shows that pages are no proof.
            self._suspect(Reason.REQUEST_FAILED, firm=self._breaker.failures > 1, now=now)
        self._settle(now)

    def worked(self, now: float) -> None:
        """It gave a sign of work: a byte, an answer, a counter that moved."""
        if self._state is State.READY:
            return  # as nearly always, for each answer and each report of progress
        self._due(now)
        if self._breaker.reason is Reason.SILENT:
            self._breaker.close(now)
            self._slow(Reason.ANSWERS, now)
        if self._suspect_reason is Reason.SILENT:
            self._suspect_until = -math.inf
        self._settle(now)

    def silent_for(self, silence_s: float, now: float) -> None:
        """It has work, and nothing moves."""
        self._due(now)
        if silence_s >= self.settings.hang_s:
            if self._breaker.reason is None or self._breaker.half_open(now):
                self._open(Reason.SILENT, now, math.inf)
        elif silence_s >= self.settings.hang_s / 2 and self._breaker.reason is None:
            self._suspect(Reason.SILENT, firm=True, now=now)
        self._settle(now)

    def tried(self, flight: str, now: float) -> None:
        """A request goes there; on probation it is on trial, and the next waits for its end."""
        self._due(now)
        if self._state is State.PROBATION:
            self.trial = flight

    def released(self, flight: str) -> None:
        """The request ended, or is no longer on trial."""
        if self.trial == flight:
            self.trial = None

    def _open(self, reason: Reason, now: float, hold_s: float | None) -> None:
        self._breaker.open(reason, now, hold_s)
        self._suspect_until = -math.inf

    def _suspect(self, reason: Reason, firm: bool, now: float) -> None:
        self._suspect_until = now + self.settings.suspect_s
        self._suspect_reason, self._suspect_firm = reason, firm

    def slept(self, asleep: bool, now: float) -> bool:
        """It says whether it sleeps. True if it woke: then its KV cache is empty, and its share grows as that of a new one."""
        self._due(now)
        woke = self._asleep and not asleep
        if woke:
            self._slow(Reason.RESTARTED, now)
        self._asleep = asleep
        self._settle(now)
        return woke

    # --- membership and drain -----------------------------------------------------------------------------------------

    def listed(self, drain: bool, now: float) -> None:
        """Discovery lists it, to be drained or not."""
        self._due(now)
        if self._listed and not drain:
            self._slow(Reason.ANSWERS, now)
        self._listed = drain
        self._settle(now)

    def drain(self, within_s: float | None, now: float) -> None:
        """Somebody wants it to get nothing new. After `within_s`, if that is known, it is gone."""
        self._due(now)
        if within_s is None:
            self._asked = True
        else:
            self._ends_at = now + within_s
        self._settle(now)

    def drain_ended(self, now: float) -> None:
        """It shall get requests again, unless discovery says otherwise."""
        self._due(now)
        if self._asked or self._ends_at < math.inf:
            self._slow(Reason.ANSWERS, now)
        self._asked, self._ends_at = False, math.inf
        self._settle(now)

    # --- other routers ------------------------------------------------------------------------------------------------

    def judgement(self, address: str, now: float) -> Judgement | None:
        """What our own evidence has against it, to be told to other routers; None for nothing. What we were told by them
        is left out: two routers would otherwise confirm each other for ever.
        """
        state, reason, _ = self.why(now)
        shuts = state is State.DRAINING and reason is Reason.SHUTTING_DOWN
        out = shuts or state is State.OPEN
        ends_in_s = None if self._ends_at == math.inf else max(self._ends_at - now, 0.0)
        if not (out or self._asked or ends_in_s is not None):
            return None
        return Judgement(address, out, self._asked, ends_in_s)

    def told(self, out: int, draining: bool, ends_at: float | None, now: float) -> None:
        """What other routers have against it: so many have taken it out, one was asked to drain it, it will be taken away.

        A drain is a wish, and taken over for as long as it is told. That it is out there is evidence at second hand: it is
        passed over until a page or a check of ours shows otherwise, which for a suspect comes soon; while two say so, for as
        long as they do.
        """
        self._due(now)
        if self._told and not draining:
            self._slow(Reason.ANSWERS, now)
        self._told, self._told_ends_at = draining, math.inf if ends_at is None else ends_at
        if self._breaker.reason is None and (out > 1 or out > self._told_out):
            self._suspect(Reason.PEERS, firm=out > 1, now=now)
        self._told_out = out
        self._settle(now)

    def left(self, now: float) -> None:
        """Discovery no longer lists it."""
        self._due(now)
        self._left = True
        self._settle(now)

    # --- time ---------------------------------------------------------------------------------------------------------

    def expire(self, now: float, oldest: float | None) -> None:
        """Notice what time has changed. `oldest`: when the oldest request that is there was sent; None where none is."""
        if self._breaker.held and (oldest is None or oldest >= self._breaker.since):
            self._breaker.let_go(now)
            self._settle(now)
        self._due(now)

    def configure(self, settings: HealthSettings) -> None:
        """Go on with other thresholds."""
        self.settings = self._breaker.settings = settings
