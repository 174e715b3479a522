"""The facade of the core: requests and facts come in here, verdicts go out.

Who may go where, who waits and who is turned away is put together here; `deciding` writes the record, `running` has what is in
flight, `learning` what is heard of replicas.

One object decides in production, in the simulator and in the benchmarks. It is driven from one thread, and every call returns
at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Final

from extproc.core.admission.admission import Turned
from extproc.core.admission.limits import Limits
from extproc.core.admission.queue import Entry
from extproc.core.admission.room import crosses_at, in_time, soonest
from extproc.core.catalog.listing import Listed
from extproc.core.catalog.providers import Provider
from extproc.core.catalog.settings import Target
from extproc.core.catalog.steering import ELSEWHERE, VACANT, Option, Place, Steering, Waiting, serves, too_late, useless
from extproc.core.deciding import decide, on_trial
from extproc.core.fleet import Member
from extproc.core.flights import Ledger
from extproc.core.health.states import Reason, State
from extproc.core.learning import learn
from extproc.core.observers import HealthChanged, Observer, Quiet, Waited
from extproc.core.patience import patience_s
from extproc.core.policies.base import Ranking
from extproc.core.pool import (
    Pool,
    came,
    first_to_come,
    nobody_yet,
    starts,
    work_of,
)
from extproc.core.prediction import Ask
from extproc.core.running import Running
from extproc.core.settings import PoolSettings as PoolSettings
from extproc.core.types import (
    Add,
    CatalogConfigured,
    Change,
    Configured,
    Decision,
    End,
    Fact,
    GpuUsed,
    Judgement,
    Outcome,
    PeerGone,
    PeerJudged,
    PeerLoad,
    PeerReported,
    PeerServed,
    Placed,
    Progressed,
    Refusal,
    Reject,
    Remove,
    Request,
    Reset,
    Route,
    Stalled,
    TenantServed,
    Turn,
    Verdict,
    Wait,
)

LEAVE_S: Final = 0.25
"""Between two looks at all who wait for a pool that has nobody: a look at a full queue takes some milliseconds."""


class Router:
    """Requests to replicas. `now` is seconds on any one monotonic scale."""

    def __init__(
        self,
        pools: Sequence[PoolSettings],
        rng: Random,
        observer: Observer | None = None,
        flight_ttl_s: float = 120.0,
        max_flights: int = 100_000,
    ) -> None:
        """`rng` breaks ties and draws for the policies that draw; its first bits name this process in flight ids.

        With `max_flights` requests in flight nothing more is routed.
        """
        self._pools = {
            settings.name: Pool(settings, partial(self._health_changed, settings.name)) for settings in pools
        }
        self.steering = Steering(self._pools)
        """Which pool or provider a request goes to."""
        self._rng = rng
        self._observer = observer or Quiet()
        self._max_flights = max_flights
        self._boot = f"{rng.getrandbits(32):08x}"
        self._count = 0
        self.limits = Limits()
        """Of tenants; only requests with an account are counted."""
        self._running = Running(self._pools, self.steering, self.limits, self._observer, flight_ttl_s)
        self._leave_at: dict[str, float] = {}
        """Pool without anybody that is well -> when those who wait for it are looked at next for other ways."""
        self._held: dict[str, Pool] = {}
        """Ticket -> where it waits, until its turn was told."""

    def __repr__(self) -> str:
        return f"<router {list(self._pools.values())} {self._running.ledger!r}>"

    @property
    def pools(self) -> Mapping[str, Pool]:
        return self._pools

    @property
    def in_flight(self) -> int:
        """Open flights."""
        return len(self._running.ledger)

    @property
    def ledger(self) -> Ledger:
        """The books on them, to be looked at."""
        return self._running.ledger

    # --- requests -----------------------------------------------------------------------------------------------------

    def arrive(self, request: Request, now: float) -> Verdict:
        """Choose a replica and reserve it, in one call: the next request already sees this one's load.

        Or hold it: while others are held it waits for its turn behind or before them, and while all candidates would let it wait
        for longer than the pool's bound it waits for the first of them.
        """
        options = self.steering.options(request, self._draw)
        if not options:
            return self._refuse(self.steering.unknown(request, now), None)
        place, target = options[0]
        if self._full:
            return self._refuse(Reject(Refusal.OVERLOADED, request.model), place)
        if request.account is None:
            verdict = self._along(options, request, now)
            return self._refuse(verdict, place) if isinstance(verdict, Reject) else verdict
        prompt_tokens, output_each = place.size(self.steering.aim(request, target))
        output_tokens = output_each * request.samples
        if (exceeded := self.limits.check(request, prompt_tokens, output_tokens, now)) is not None:
            return self._refuse(exceeded, place)
        verdict = self._along(options, request, now)
        if isinstance(verdict, Reject):
            return self._refuse(verdict, place)
        counted = verdict.ticket if isinstance(verdict, Wait) else verdict.flight
        self.limits.take(counted, request.account, prompt_tokens + output_tokens, now)
        return verdict if isinstance(verdict, Wait) else self._with_allowance(verdict, request, now)

    def _along(self, options: Sequence[Option], request: Request, now: float) -> Verdict:
        """Try one after the other: whoever takes it, or lets it wait in time."""
        if len(options) == 1:
            return self._at(options[0], request, Waiting.LONG, now)
        why: Refusal | None = None
        for option in options:
            verdict = self._at(option, request, Waiting.IN_TIME, now)
            if not isinstance(verdict, Reject):
                self._spilled(option, why)
                return verdict
            if verdict.refusal not in ELSEWHERE:
                return verdict
            why = why or verdict.refusal
        return self._with_the_first(options, request, why, now)

    def _with_the_first(self, options: Sequence[Option], request: Request, why: Refusal | None, now: float) -> Verdict:
        """What the first says that has anybody, were it the only one. What the others said before is known: none takes it at once."""
        nobody: Reject | None = None
        for option in options:
            verdict = self._at(option, request, Waiting.LONG, now, again=True)
            if not isinstance(verdict, Reject):
                self._spilled(option, None if nobody is None else why)
                return verdict
            if verdict.refusal not in VACANT:
                return verdict
            nobody = nobody or verdict
        assert nobody is not None
        return nobody

    def _spilled(self, option: Option, why: Refusal | None) -> None:
        """Count a request that went on to this option; `why` is None for the first."""
        if why is not None and option[1] is not None:
            self.steering.spilled[option[1].model, option[1].to, why] += 1

    def _at(self, option: Option, request: Request, waiting: Waiting, now: float, again: bool = False) -> Verdict:
        place, target = option
        request = self.steering.aim(request, target)
        if isinstance(place, Provider):
            return self._provide(place, request, now)
        return self._admit(place, request, waiting, now, again)

    def _provide(self, provider: Provider, request: Request, now: float) -> Route | Reject:
        self._count += 1
        made = provider.route(request, f"{self._boot}-{self._count:x}", self._running.ttl_s, now)
        if isinstance(made, Reject):
            return made
        route, flight = made
        self._running.outside(flight, route.decision)
        return route

    def _admit(self, pool: Pool, request: Request, waiting: Waiting, now: float, again: bool) -> Verdict:
        """Place or hold what exceeds no limit. `again`: its arrival was noted already."""
        members = pool.candidates(request, now)
        if not members:
            if not starts(pool, request):
                return self._nobody(pool, request)
            return self._hold(pool, pool.ask(request, members, now), members, waiting, now, absent=True, again=again)
        ask = pool.ask(request, members, now)
        if waiting is not Waiting.LONG and useless(members, now):
            came(pool, ask, members, now)
            return Reject(Refusal.ABSENT, request.model)
        if not pool.admission.holds(request):
            return self._send(pool, ask, pool.policy.rank(ask, members, now, self._rng), now)
        absent = _unreachable(members, now) or ask.lacks_prefiller(now) or first_to_come(pool, now)
        able = in_time(ask, members, request.slo_ttft_s, now)
        if not able and not absent:  # nor would it be in time after a wait here
            if not again:
                came(pool, ask, members, now)
            return pool.admission.reject(Refusal.SLO, request, now)
        if pool.admission.queue or absent:
            return self._hold(pool, ask, members, waiting, now, absent, again)
        ranking = pool.policy.rank(ask, able, now, self._rng)
        if not self._starts_soon(pool, ask, ranking, members, now):
            return self._hold(pool, ask, members, waiting, now, again=again)
        if not again:
            came(pool, ask, (ranking.order[0][1],), now)
        return self._send(pool, ask, ranking, now)

    def explain(self, request: Request, now: float) -> Decision | Reject:
        """The decision that `arrive` would take, with every candidate in it, or its refusal. Reserves nothing and changes nothing.

        Of a request that would wait first: what would be decided were it placed now.
        """
        state = self._rng.getstate()
        try:
            return self._explained(request, now)
        finally:
            self._rng.setstate(state)

    def _explained(self, request: Request, now: float) -> Decision | Reject:
        options = self.steering.options(request, self._draw)
        if not options:
            return self.steering.unknown(request, now)
        aimed = [(place, self.steering.aim(request, target)) for place, target in options]
        if request.account is not None:
            first, of_first = aimed[0]
            prompt_tokens, output_each = first.size(of_first)
            exceeded = self.limits.would_refuse(request, prompt_tokens, output_each * request.samples, now)
            if exceeded is not None:
                return exceeded
        pool, request = next((each for each in aimed if serves(*each, now)), aimed[0])
        if isinstance(pool, Provider):
            return pool.refusal(request, now) or pool.decide(request, "", now)
        members = pool.candidates(request, now)
        if not members:
            return self._nobody(pool, request)
        ask = pool.ask(request, members, now)
        ranking = pool.policy.rank(ask, members, now, self._rng)
        ranking = pool.settled(ask, ranking)
        return decide("", pool, ask, ranking, now, listed=len(members))

    def turns(self, now: float) -> list[Turn]:
        """The waits that end now: routed, reserved like those of `arrive`, or refused. To be asked after every call that
        may free or take a place, and at `next_wakeup`; nothing held costs nothing.
        """
        if not self._held:
            return []
        stirring = [pool for pool in self._pools.values() if pool.admission.stirs]
        return [turn for pool in stirring for turn in self._turns(pool, now)]

    def release(self, now: float) -> list[Turn]:
        """All waits end now, each with the best replica that there is, however long its queue: this process stops."""
        ended = []
        for pool in self._pools.values():

            def place(entry: Entry, pool: Pool = pool) -> Route | Reject | None:
                return self._place(pool, entry, now, soon=False)

            ended += [self._over(pool, *turned, now) for turned in pool.admission.release(now, place)]
        return ended

    @property
    def holding(self) -> int:
        """Requests held, and those whose turn has come but was not asked for yet."""
        return len(self._held)

    def leave(self, ticket: str, now: float) -> None:
        """The client of a held request left. Tickets that do not wait change nothing."""
        pool = self._held.get(ticket)
        entry = pool.admission.leave(ticket, now) if pool is not None else None
        if entry is not None:
            del self._held[ticket]
            self.limits.refund(ticket)
            self._observer.waited(Waited(entry.held, now - entry.arrived_at, None))

    def finish(self, flight_id: str, outcome: Outcome, now: float) -> None:
        """A flight ended. Ids that are not open are counted and change nothing: late, doubled, or another process's."""
        self._running.finish(flight_id, outcome, now)

    def forget(self, flight_id: str, now: float) -> bool:
        """The answer that names the flight may never have arrived: close it, unless something was reported of it since.

        Whether it was closed.
        """
        flight = self._running.ledger.get(flight_id)
        if flight is None or flight.reported_at > flight.routed_at:
            return False
        self.finish(flight_id, Outcome(End.CLIENT_GONE), now)
        return True

    def reachable(self, model: str | None) -> list[tuple[str, str | None]]:
        """Every pool where a request for the model may go, and the LoRA adapter that it is there; None for a base model."""
        found = self.steering.reachable(model)
        return [
            (pool.settings.name, name if name is not None and name in pool.lora.holders else None)
            for pool, name in found
        ]

    # --- facts --------------------------------------------------------------------------------------------------------

    def learn(self, fact: Fact, now: float) -> None:
        """Take in something from outside. Facts on pools, replicas or flights that are not known change nothing."""
        if isinstance(fact, Progressed):
            self._running.progressed(fact, now)
            return
        if isinstance(fact, Stalled):
            self._running.stalled(fact.for_s)
            return
        if isinstance(fact, CatalogConfigured):
            self.steering.configure(fact.settings)
            return
        pool = self._pools.get(fact.pool)
        if pool is None:
            return
        if isinstance(fact, Configured):
            pool.configure(fact.settings)
            return
        if isinstance(fact, GpuUsed):
            if pool.scaling is not None:
                pool.scaling.gpu = fact.share
            return
        if isinstance(fact, Reset | Add | Remove):
            self._changed(pool, fact, now)
            return
        if isinstance(fact, PeerReported | PeerJudged | PeerServed | PeerGone):
            pool.told(fact, now)
            return
        learn(pool, fact, now)

    def expire(self, now: float) -> int:
        """Close the flights whose end was never reported, and notice what time has changed in the health of replicas. To be
        called several times a second. Returns how many flights were closed.
        """
        for pool in self._pools.values():
            pool.fleet.expire(now, pool.answers)
            if pool.scaling is not None and pool.listed:
                pool.scaling.look(pool.admission, pool.fleet, now)
            for name in pool.peers.silent(now):
                pool.told(PeerGone(pool.settings.name, name), now)
        return self._running.expire(now)

    def next_wakeup(self) -> float | None:
        """When `expire` or `turns` has something to do next, if nothing else happens."""
        times = [pool.admission.next_wakeup for pool in self._pools.values()] if self._held else []
        return min((at for at in (self._running.ledger.next_expiry(), *times) if at is not None), default=None)

    # --- what is told to other routers --------------------------------------------------------------------------------

    def report(self, pool: str, now: float, only: Collection[str] | None = None) -> tuple[PeerLoad, ...]:
        """What this router has on the replicas of a pool: absolute, and of those that have something of it.

        With `only` of these members instead, whether they have or not.
        """
        fleet = self._pools[pool].fleet
        if only is None:
            members = [m for m in fleet.members if m.load.requests]
        else:
            members = [m for address in only if (m := fleet.get(address)) is not None]
        loads = ((m.address, m.load) for m in members)
        return tuple(
            PeerLoad(address, load.requests, load.work_s(now), load.held_tokens, load.prefilling(now))
            for address, load in loads
        )

    def verdicts(self, pool: str, now: float) -> tuple[Judgement, ...]:
        """What this router has against replicas of a pool by its own evidence; only of those that it has something against."""
        judged = (m.health.judgement(m.address, now) for m in self._pools[pool].fleet.members)
        return tuple(judgement for judgement in judged if judgement is not None)

    def placements(self) -> list[Placed]:
        """Where prompts were sent since the last call, in all pools; bounded, each chain once. From the first call on."""
        return self._running.placements.take()

    def served(self, pool: str) -> tuple[TenantServed, ...]:
        """What this router has charged tenants of a pool since it began: those charged last, bounded in number."""
        return self._pools[pool].admission.served.told()

    # --- parts of the above -------------------------------------------------------------------------------------------

    def _draw(self) -> int:
        return self._rng.getrandbits(64)

    def _nobody(self, pool: Pool, request: Request) -> Reject:
        """No member is allowed: because there is none at all, or by the request's own hint."""
        by_hint = request.subset is not None and len(pool.fleet) > 0
        return Reject(Refusal.SUBSET_EMPTY if by_hint else Refusal.NO_REPLICAS, request.model)

    @property
    def _full(self) -> bool:
        return len(self._running.ledger) >= self._max_flights

    def _refuse(self, reject: Reject, place: Place | None) -> Reject:
        self._observer.refused(reject, None if place is None else place.settings.name)
        return reject

    def _starts_soon(self, pool: Pool, ask: Ask, ranking: Ranking, members: Sequence[Member], now: float) -> bool:
        """Whether any replica would turn to the request within the pool's bound. The best is asked first: mostly that is all."""
        admission, best = pool.admission, ranking.order[0][1]
        within_s = admission.settings.hold_above_s
        if ask.split is not None and ask.split.member.backlog_s(now) > within_s:
            return False
        return admission.room.free(ask, (best,), within_s, now) or admission.room.free(ask, members, within_s, now)

    def _hold(
        self,
        pool: Pool,
        ask: Ask,
        members: Sequence[Member],
        waiting: Waiting,
        now: float,
        absent: bool = False,
        again: bool = False,
    ) -> Wait | Reject:
        self._count += 1
        ticket = f"{self._boot}-w{self._count:x}"
        if not again:
            came(pool, ask, members, now)
        if waiting is not Waiting.LONG and absent:
            return Reject(Refusal.ABSENT, ask.request.model)
        work = work_of(ask, members, now)
        if waiting is Waiting.NOT or (waiting is Waiting.IN_TIME and too_late(pool.admission, ask.request, work, now)):
            return pool.admission.reject(Refusal.DEADLINE, ask.request, now)
        verdict = pool.admission.hold(ticket, pool.settings.name, ask.request, work, absent, now)
        if isinstance(verdict, Reject):
            return verdict
        self._held[ticket] = pool
        entry = pool.admission.queue.get(ticket)
        assert entry is not None
        self._observer.held(entry.held)
        return verdict

    def _turns(self, pool: Pool, now: float) -> list[Turn]:
        admission = pool.admission
        absent = nobody_yet(pool, now)
        ended = admission.turns(now, lambda entry: self._place(pool, entry, now), absent, pool.reach(now))
        due = len(self.steering.catalog) and now >= self._leave_at.get(pool.settings.name, now)
        if due and (absent or useless(pool.fleet.members, now)):
            self._leave_at[pool.settings.name] = now + LEAVE_S
            ended += self._leaving(pool, now)
        admission.plan(now, crosses_at(pool.fleet.members, admission.settings.hold_above_s, now))
        return [self._over(pool, entry, verdict, now) for entry, verdict in ended]

    def _place(self, pool: Pool, entry: Entry, now: float, soon: bool = True) -> Route | Reject | None:
        """Route a held request as if it arrived now; None while there is no room. `soon`: only where it need not wait long."""
        request, admission = entry.request, pool.admission
        within_s = admission.settings.hold_above_s
        members = pool.candidates(request, now)
        if not members:
            return self._nobody(pool, request)
        if request.target is not None and useless(members, now):
            route = self._spill(entry, Refusal.ABSENT, now)
            if route is not None:
                return route
        if _unreachable(members, now):
            return self._later(entry, pool, now)
        soon = soon and admission.settings.enabled
        if self._full or (soon and all(member.backlog_s(now) > within_s for member in members)):
            return None
        if soon and pool.awaits_slot(request, members, now):
            return None
        ask = pool.ask(request, members, now, now - entry.arrived_at)
        if ask.lacks_prefiller(now):
            return self._later(entry, pool, now)
        if soon and not admission.room.free(ask, members, within_s, now):
            return None
        if soon and ask.split is not None and ask.split.member.backlog_s(now) > within_s:
            return None
        slo_s = request.slo_ttft_s
        left_s = None if slo_s is None else slo_s - (now - entry.arrived_at)
        able = in_time(ask, members, left_s, now)
        if not able:
            return admission.reject(Refusal.SLO, request, now)
        if soon and admission.queue.overtakes(entry):
            # The policy weighs what a placement costs the others. Who goes before them shall not wait on a full replica for
            # their sake: with this p99 of urgent requests at 1.2 times saturation falls by a third, on the longest prompts by half.
            able = soonest(ask, able, within_s, now)
        return self._send(pool, ask, pool.policy.rank(ask, able, now, self._rng), now)

    def _later(self, entry: Entry, pool: Pool, now: float) -> Reject | None:
        """While nobody is there: nothing, until that has lasted for too long."""
        late = now - entry.arrived_at >= pool.admission.settings.absent_wait_s
        return Reject(Refusal.ABSENT, entry.request.model) if late else None

    def _over(self, pool: Pool, entry: Entry, verdict: Route | Reject, now: float) -> Turn:
        """Tell of the end of a wait."""
        del self._held[entry.held.ticket]
        if isinstance(verdict, Reject):
            verdict = self._elsewhere(entry, verdict, now)
        self._observer.waited(Waited(entry.held, now - entry.arrived_at, verdict))
        if isinstance(verdict, Reject):
            self.limits.refund(entry.held.ticket)
            self._refuse(verdict, pool)
        else:
            self.limits.turned(entry.held.ticket, verdict.flight)
            verdict = self._with_allowance(verdict, entry.request, now)
        return Turn(entry.held.ticket, verdict)

    def _elsewhere(self, entry: Entry, reject: Reject, now: float) -> Route | Reject:
        """Route a request that waited in vain to another option, if one takes it at once."""
        route = self._spill(entry, reject.refusal, now) if reject.refusal in ELSEWHERE else None
        return reject if route is None else route

    def _leaving(self, pool: Pool, now: float) -> list[Turned]:
        """Those whose pool has nobody that is well, and who can go elsewhere at once. Of those with the same ways all are passed over after one cannot."""
        ended: list[Turned] = []
        stuck: set[tuple[bool, tuple[Target | None, ...]]] = set()
        for entry in list(pool.admission.queue.order()):
            ways = tuple(target for _, target in self.steering.after(entry.request))
            alike = entry.request.slo_ttft_s is None, ways  # who is in haste may be refused where others are not
            if not ways or alike in stuck:
                continue
            route = self._spill(entry, Refusal.ABSENT, now)
            if route is None:
                stuck.add(alike)
            elif pool.admission.leave(entry.held.ticket, now) is not None:
                ended.append((entry, route))
        return ended

    def _spill(self, entry: Entry, why: Refusal, now: float) -> Route | None:
        """Route a held request to another option that takes it at once; None where there is none."""
        if self._full:
            return None
        request = entry.request
        if request.slo_ttft_s is not None:
            request = replace(request, slo_ttft_s=request.slo_ttft_s - (now - entry.arrived_at))
        for option in self.steering.after(request):
            verdict = self._at(option, request, Waiting.NOT, now)
            if isinstance(verdict, Route):
                self._spilled(option, why)
                return verdict
        return None

    def _with_allowance(self, route: Route, request: Request, now: float) -> Route:
        """Say what is left to the tenant, where it is counted."""
        account = request.account
        return route if account is None else replace(route, allowance=self.limits.allowance(account, now))

    def _send(self, pool: Pool, ask: Ask, ranking: Ranking, now: float) -> Route:
        """Reserve the first of the ranking."""
        if pool.fleet.trial_due is not None:
            ranking = on_trial(ranking, pool.fleet.trial_due)
            pool.fleet.trial_due = None
        ranking = pool.settled(ask, ranking)
        best = ranking.order[0][1]
        self._count += 1
        decision = decide(f"{self._boot}-{self._count:x}", pool, ask, ranking, now)
        pool.policy.took(ask, best)  # after the record of what it looked at
        self._running.reserve(decision, pool, ask, best, now)
        patience = patience_s(ask.request, decision, pool.settings.health)
        return Route(decision.flight, decision.endpoints, decision, patience)

    def _changed(self, pool: Pool, change: Change, now: float) -> None:
        pool.listed = True
        for address in pool.fleet.apply(change, now):
            pool.caches.forget(address)
            pool.lists(address, (), {})
            self._observer.left(pool.settings.name, address)

    def _health_changed(self, pool: str, address: str, before: State, after: State, reason: Reason) -> None:
        if after is State.GONE:
            self._pools[pool].caches.gone(address)
        self._observer.health_changed(HealthChanged(pool, address, before, after, reason))

    # --- inspection ---------------------------------------------------------------------------------------------------

    def listed(self, who: Request, now: float) -> tuple[Listed, ...]:
        """The models that can be asked for at present by whoever `who` says."""
        return self.steering.listed(who, now)

    def members(self) -> Iterable[tuple[str, Member]]:
        """Every replica with the name of its pool."""
        for name, pool in self._pools.items():
            for member in pool.fleet.members:
                yield name, member

    def check(self) -> None:
        """Raise AssertionError if the ledger, the loads and the index disagree; for tests and simulations."""
        self._running.check()
        waiting = {entry.held.ticket for pool in self._pools.values() for entry in pool.admission.queue}
        assert waiting <= self._held.keys(), self
        assert all(i in self._held or self.ledger.get(i) is not None for i in self.limits.counted), self.limits
        self.limits.check_books()
        for pool in self._pools.values():
            pool.admission.queue.check()
            pool.caches.check()
            cached = pool.index.addresses | pool.caches.exact.addresses
            assert cached <= {member.address for member in pool.fleet.members}, pool


def _unreachable(members: Sequence[Member], now: float) -> bool:
    """Whether nothing listens on any of these."""
    return all(member.health.unreachable(now) for member in members)
