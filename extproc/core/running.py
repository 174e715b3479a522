"""Requests on replicas: reserved, reported of, ended once; and what each of these changes and teaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from extproc.core.admission.limits import Limits
from extproc.core.catalog.steering import Steering
from extproc.core.deciding import flight_for
from extproc.core.disaggregation import still_at_leg, suspected
from extproc.core.estimates import failed, whole
from extproc.core.fleet import Member
from extproc.core.flights import Flight, Ledger
from extproc.core.learning import learn_first_token, learn_speed
from extproc.core.lora import UNKNOWN
from extproc.core.observers import Ended, Observer
from extproc.core.peers import Placements
from extproc.core.pool import Pool, leg_ended
from extproc.core.prediction import Ask
from extproc.core.ranks import on_rank_of
from extproc.core.types import Decision, End, Outcome, Progressed

SILENT_S: Final = 3.0
"""A replica with work that gives no sign for so long is not counted on: longer than any step, or the wait between scrapes."""


class Running:
    """The flights of one router. All that opens, moves or closes one is here, so that each ends exactly once."""

    def __init__(
        self, pools: Mapping[str, Pool], steering: Steering, limits: Limits, observer: Observer, ttl_s: float
    ) -> None:
        """A flight that nothing is heard of for `ttl_s` is lost."""
        self._pools = pools
        self._steering = steering
        self._limits = limits
        self._observer = observer
        self.ttl_s = ttl_s
        self.ledger = Ledger()
        self.placements = Placements()
        """Where prompts were sent, to be told to other routers."""

    def __repr__(self) -> str:
        return f"<running {self.ledger!r}>"

    def outside(self, flight: Flight, decision: Decision) -> None:
        """A request goes to a provider."""
        self.ledger.open(flight)
        self._observer.decided(decision)

    def reserve(self, decision: Decision, pool: Pool, ask: Ask, member: Member, now: float) -> None:
        """The decision is acted on: the member has the request from now on."""
        request = ask.request
        backlog_s = member.backlog_s(now)
        flight = flight_for(decision, ask, member, backlog_s, now, now + self.ttl_s)
        self.ledger.open(flight)
        pool.admission.sent(flight, request.priority, now)
        pool.traffic.arrived(decision.prediction.prefill_s, now)
        if ask.split is not None:
            pool.book(flight, ask, now)
        member.load.open(flight, now, backlog_s)
        member.health.tried(flight.id, now)
        pool.caches.placed(flight.id, member.replica.address, request)
        if request.blocks.hashes:
            self.placements.add(decision.pool, member.replica.address, request.blocks)
            if decision.prefiller is not None:
                self.placements.add(decision.pool, decision.prefiller, request.blocks)
        self._observer.decided(decision)

    def progressed(self, fact: Progressed, now: float) -> None:
        """The proxy told of a response under way."""
        flight = self.ledger.get(fact.flight)
        if flight is None:
            return
        self.ledger.touch(flight, now + self.ttl_s)
        flight.reported_at = now
        grown = fact.response_bytes > flight.response_bytes
        flight.response_bytes = fact.response_bytes
        if fact.served is not None and flight.address:
            served = on_rank_of(fact.served, flight.address)
            if served != flight.at:
                self._sent_on(flight, served, now)
        member = self._pools[flight.pool].fleet.get(flight.at) if flight.address else None
        if member is None or not member.load.has(flight):
            return
        if grown:
            flight.heard_at = now
            member.worked(now)
        if flight.first_token_at is not None:
            return
        if flight.shows_first_token and fact.replica_ttft_s is not None:
            self._first_token(member, flight, fact.replica_ttft_s, now)
            member.began(flight, now)
        elif fact.replica_ttft_s is None and (flight.shows_first_token or _silent(member, flight, now)):
            if flight.leg is None:
                member.load.still_prefilling(flight, now)
            elif flight.shows_first_token:
                still_at_leg(self._pools[flight.pool].fleet, flight, now)

    def stalled(self, for_s: float) -> None:
        """Nothing ran here for so long: as if the time had not passed, for all that is inferred from silence."""
        self.ledger.prolong(for_s)
        for pool in self._pools.values():
            for member in pool.fleet.members:
                member.heard_at += for_s

    def _sent_on(self, flight: Flight, served: str, now: float) -> None:
        """The proxy gave it to another: its load goes along, and what it brings says nothing of the one that was chosen."""
        fleet = self._pools[flight.pool].fleet
        before, after = fleet.get(flight.at), fleet.get(served)
        if before is not None and before.load.has(flight):
            before.load.close(flight, now)
            before.load.doubt_adapter(flight, unknown=False)
        flight.at, flight.heard_at = served, now
        self._pools[flight.pool].caches.pending.move(flight.id, served)
        if after is not None:
            after.load.open(flight, now)
            if flight.first_token_at is not None:
                after.load.first_token(flight, flight.first_token_at)

    def _first_token(self, member: Member, flight: Flight, replica_ttft_s: float, now: float) -> None:
        member.load.first_token(flight, min(flight.routed_at + replica_ttft_s, now))
        if flight.leg is not None:
            self._pools[flight.pool].leg_computed(flight, replica_ttft_s, now)
        elif flight.prompt_bytes and flight.at == flight.address:
            learn_first_token(self._pools[flight.pool], member, flight, replica_ttft_s)

    def finish(self, flight_id: str, outcome: Outcome, now: float) -> None:
        """A flight ended. Ids that are not open are counted and change nothing: late, doubled, or another process's."""
        flight = self.ledger.close(flight_id)
        if flight is None:
            self._observer.unknown_flight(outcome)
        elif flight.address:
            self._end(flight, outcome, now)
        else:
            self._end_outside(flight, outcome, now)

    def expire(self, now: float) -> int:
        """Close the flights whose end was never reported. Returns how many."""
        lost = self.ledger.expired(now)
        for flight in lost:
            self.finish(flight.id, Outcome(End.LOST), now)
        return len(lost)

    def _end(self, flight: Flight, outcome: Outcome, now: float) -> None:
        """Everything that the end of a flight changes."""
        pool = self._pools[flight.pool]
        if pool.settings.ranks > 1 and outcome.served is not None:
            outcome = replace(outcome, served=on_rank_of(outcome.served, flight.address))
        member = pool.fleet.get(flight.at)
        if member is not None and not member.load.has(flight):
            member = None  # it left and came back meanwhile: another process, which never had the flight
        moved = outcome.served is not None and outcome.served != flight.address
        if member is not None:
            self._leave(member, flight, outcome, moved, now)
        if pool.scaling is not None and flight.shows_first_token and outcome.ttft_s is not None:
            pool.scaling.first_token(outcome.ttft_s, now)
        pool.settle_prefix(flight, outcome, now)
        pool.judge(flight, outcome, moved, now)
        if flight.leg is not None:
            begun = outcome.end is End.OK and not failed(outcome)
            leg_ended(pool, flight, now, begun, suspected(flight, outcome, now))
        output_tokens = pool.learn_tokens(flight, outcome)
        pool.admission.settle(flight, outcome, output_tokens)
        self._limits.settle(flight.id, outcome, flight.prompt_tokens, output_tokens)
        if whole(outcome) and outcome.duration_s is not None:
            ttft_s = outcome.ttft_s if flight.shows_first_token and outcome.ttft_s else flight.prediction.ttft_s
            pool.traffic.answered(min(ttft_s, outcome.duration_s), max(outcome.duration_s - ttft_s, 0.0))
        if member is not None and not moved and whole(outcome):
            learn_speed(member, flight, outcome, output_tokens, now)
        self._observer.ended(Ended(flight, outcome, moved, output_tokens))

    def _leave(self, member: Member, flight: Flight, outcome: Outcome, moved: bool, now: float) -> None:
        """Take the flight's load off the replica."""
        # The first byte of an error says nothing of prefill: learning from it would make a failing replica look fast.
        told = flight.shows_first_token and flight.first_token_at is None and not moved and not failed(outcome)
        if told and outcome.replica_ttft_s is not None:
            self._first_token(member, flight, outcome.replica_ttft_s, now)
        member.load.close(flight, now)
        if failed(outcome) or outcome.end is End.UNREACHABLE:
            member.load.doubt_adapter(flight, unknown=outcome.status == UNKNOWN)

    def _end_outside(self, flight: Flight, outcome: Outcome, now: float) -> None:
        """The same for a flight to a provider, which may no longer be configured."""
        provider = self._steering.providers.get(flight.pool)
        output_tokens = provider.settle(flight, outcome, now) if provider is not None else None
        self._limits.settle(flight.id, outcome, flight.prompt_tokens, output_tokens)
        self._observer.ended(Ended(flight, outcome, False, output_tokens))

    def check(self) -> None:
        """Raise AssertionError if the ledger and the loads of the replicas disagree."""
        self.ledger.check()
        for name, pool in self._pools.items():
            for member in pool.fleet.members:
                self._check_load(name, member)
        for flight in self.ledger:
            if flight.address:
                self._check_flight(flight)

    def _check_load(self, pool: str, member: Member) -> None:
        member.load.check()
        for flight in member.load:
            assert self.ledger.get(flight.id) is flight, flight
            assert (flight.pool, flight.at) == (pool, member.address), flight
        for leg in member.load.legs:
            assert leg.whole is not None, leg
            assert self.ledger.get(leg.whole.id) is leg.whole, leg
            assert leg.whole.leg is not None, leg
            assert (leg.whole.leg.flight, leg.address) == (leg, member.address), leg

    def _check_flight(self, flight: Flight) -> None:
        fleet = self._pools[flight.pool].fleet
        at = fleet.get(flight.at)
        # One that joined since then is another process at the same address: it never had the flight.
        assert at is None or at.load.has(flight) or flight.routed_at <= at.joined_at, flight
        if flight.leg is not None:
            leg = flight.leg.flight
            by = fleet.get(leg.address)
            assert by is None or by.load.has_leg(leg) or leg.routed_at <= by.joined_at, leg


def _silent(member: Member, flight: Flight, now: float) -> bool:
    """Whether a response that comes as a whole is overdue on a replica that gives no sign of work: it may hang.

    Overdue alone says little, for the length of an answer is a guess; a replica at work moves its counters.
    """
    due = flight.routed_at + flight.prediction.ttft_s + flight.prediction.decode_s
    return now > due and now - member.heard_at > SILENT_S
