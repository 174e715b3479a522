"""Replicas that serve the same models, with what is known of them and of the requests for them: one of the router's parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Final

from extproc.core.admission.admission import Admission, Reach, Work
from extproc.core.admission.fairness import charge_tokens
from extproc.core.disaggregation import Disaggregation, book, decodes, learn, suspected
from extproc.core.estimates import Estimates, failed
from extproc.core.fleet import Changed, Fleet, Member
from extproc.core.flights import Flight
from extproc.core.health.states import State
from extproc.core.lora import Lora
from extproc.core.peers import PEERS_SLACK_S, Peers, trusted
from extproc.core.policies import Policy, create
from extproc.core.policies.base import Ranking
from extproc.core.prediction import Ask, predict, unseen
from extproc.core.prefix.caches import Caches
from extproc.core.prefix.index import PrefixIndex
from extproc.core.scaling.autoscaler import NOBODY, Asked, Autoscaler
from extproc.core.settings import DisaggregationSettings, PoolSettings
from extproc.core.traffic import Traffic
from extproc.core.types import (
    End,
    Outcome,
    PeerFact,
    PeerGone,
    PeerJudged,
    PeerReported,
    PeerServed,
    Prediction,
    Request,
)

KNOWN_S: Final = 0.5
"""After so long the proxy has read of a new member: a file is written and watched, which takes some tens of milliseconds."""

_WELL: Final = frozenset({State.READY, State.SLOW_STARTING, State.PROBATION})


class Pool(Estimates):
    """Replicas that serve the same models, and what was learned of requests for them."""

    def __init__(self, settings: PoolSettings, changed: Changed) -> None:
        """`changed` is told of each change of a replica's health."""
        super().__init__()
        self.settings = settings
        self.policy: Policy = create(settings.policy, settings.policy_options)
        self.fleet = Fleet(settings.scraped, settings.stale_after_s, settings.health, changed)
        self.caches = Caches()
        self.traffic = Traffic()
        self.admission = Admission(settings.queue)
        self.scaling = Autoscaler(settings.scaling) if settings.scaling else None
        self.disaggregation = Disaggregation(settings.disaggregation) if settings.disaggregation else None
        """Where prefill and decode may be apart."""
        self.lora = Lora(settings.lora)
        self.listed = False
        """Whether its members were ever told of; a pool that is not known yet is not empty."""
        self.peers = Peers()

    def __repr__(self) -> str:
        return f"<pool {self.settings.name} {self.settings.policy} {len(self.fleet)} replicas>"

    @property
    def models(self) -> tuple[str, ...]:
        """Configured names first, then what replicas list, LoRA adapters included."""
        return tuple(dict.fromkeys((*self.settings.models, *self.lora.models)))

    def names(self, model: str) -> bool:
        """Whether the configuration or a replica names the model. Asked once a request, where replicas may list thousands."""
        return model in self.lora.models or model in self.settings.models

    def lists(self, address: str, models: tuple[str, ...], parents: Mapping[str, str]) -> None:
        """The replica lists these models, of which `parents` has the adapters."""
        self.lora.lists(address, models, parents, self.settings.models)

    @property
    def index(self) -> PrefixIndex:
        """The approximate index of the replicas' caches."""
        return self.caches.index

    def configure(self, settings: PoolSettings) -> None:
        """Go on with other settings. A policy that stays keeps what it has learned."""
        before, self.settings = self.settings, settings
        if (before.policy, before.policy_options) != (settings.policy, settings.policy_options):
            self.policy = create(settings.policy, settings.policy_options)
        self.fleet.configure(settings.stale_after_s, settings.health)
        self.admission.configure(settings.queue)
        self._configure_disaggregation(settings.disaggregation)
        self.lora.configure(settings.lora)
        if settings.scaling is None:
            self.scaling = None
        elif self.scaling is None:
            self.scaling = Autoscaler(settings.scaling)
        else:
            self.scaling.configure(settings.scaling)

    def _configure_disaggregation(self, settings: DisaggregationSettings | None) -> None:
        if settings is None:
            self.disaggregation = None
        elif self.disaggregation is None:
            self.disaggregation = Disaggregation(settings)
        else:
            self.disaggregation.configure(settings)

    @property
    def answers(self) -> Callable[[Member], bool] | None:
        """Which members get requests at all; None for all."""
        return None if self.disaggregation is None else decodes

    def candidates(self, request: Request, now: float) -> list[Member]:
        """Who may be chosen to answer the request."""
        disaggregation = self.disaggregation
        if disaggregation is None:
            return self._able(request, now)
        if disaggregation.settings.local_prefill or not disaggregation.apart(request):
            return self._able(request, now, disaggregation.alone)
        helped = bool(self._prefillers(request, disaggregation, now))
        return self._able(request, now, disaggregation.helped if helped else disaggregation.alone)

    def _able(self, request: Request, now: float, among: Callable[[Member], bool] | None = None) -> list[Member]:
        """Candidates, of a LoRA adapter only those that list it."""
        holders = self.lora.holders.get(request.model or "")
        if holders is None:
            return self.fleet.candidates(now, request.subset, among)
        return self.fleet.candidates(
            now, request.subset, lambda member: member.address in holders and (among is None or among(member))
        )

    def reach(self, now: float) -> Reach:
        """Names for what requests are short of at present: equal for those of which none fits where one does not.

        The members that they may go to; and for a LoRA adapter any slot, or those where it is in use. Not while no member has room at
        all: then the first that is tried stands for all. Those that are split, where others must not be, never stand for these.
        """
        reach, disaggregation = self._reach(now), self.disaggregation
        if disaggregation is None or disaggregation.settings.local_prefill:
            return reach
        return lambda request: (disaggregation.apart(request), reach(request))

    def _reach(self, now: float) -> Reach:
        members, holders, within_s = self.fleet.members, self.lora.holders, self.settings.queue.hold_above_s
        if not holders or all(member.backlog_s(now) > within_s for member in members):
            return attrgetter("subset")
        used = {name for member in members if member.load.lora is not None for name in member.load.lora.in_use}

        def reach(request: Request) -> Hashable:
            having = holders.get(request.model or "")
            if having is None:
                return request.subset
            among = None if len(having) == len(members) else frozenset(having)
            return request.model if request.model in used else True, among, request.subset

        return reach

    def awaits_slot(self, request: Request, members: Iterable[Member], now: float) -> bool:
        """Whether on all of these every slot is in use for other LoRA adapters than the one that the request needs."""
        wanted = self.lora.wanted(request.model)
        return wanted is not None and not any(member.has_slot(wanted, now) for member in members)

    def _prefillers(self, request: Request, disaggregation: Disaggregation, now: float) -> list[Member]:
        """Who may compute its prompt for another. Those that are out are tried, for want of better ones, only where none can do without."""
        found = self._able(request, now, disaggregation.helps)
        return [m for m in found if m.state(now) in _WELL] if disaggregation.settings.local_prefill else found

    def serves(self, model: str) -> bool:
        """Whether the pool has the model; True for any while neither configuration nor replicas have named one."""
        return self.names(model) or not (self.lora.models or self.settings.models)

    def ask(self, request: Request, members: Sequence[Member], now: float, held_s: float = 0.0) -> Ask:
        """Estimate what the request is in tokens, where its prefix lies, and what seconds are worth among these members.

        `held_s`: how long it has waited here.
        """
        tokens, output = self.size(request)
        hits, exact = self.caches.hits(request, tokens)
        others = sum([member.strangers for member in members])
        if len(self.peers):
            others += sum([member.others.requests for member in members if member.others is not None])
        ours = sum([len(member.load) for member in members]) if others else 0
        prices = self.traffic.prices(len(members), others / max(ours, 1), now)
        slack_s = PEERS_SLACK_S if len(self.peers) else 0.0
        ask = Ask(request, max(tokens, 1), output, hits, prices, slack_s, exact=exact)
        if self.lora.holders:
            ask.adapter = self.lora.wanted(request.model)
        if self.disaggregation is not None and self.disaggregation.apart(request):
            prefillers = self._prefillers(request, self.disaggregation, now)
            within_s = None if request.slo_ttft_s is None else request.slo_ttft_s - held_s
            self.disaggregation.plan(ask, members, prefillers, within_s, now)
        return ask

    def settled(self, ask: Ask, ranking: Ranking) -> Ranking:
        """A ranking as it is acted on."""
        if ask.split is None or self.disaggregation is None:
            return ranking
        return self.disaggregation.settled(ask, ranking)

    # --- prompts computed for others ---

    def book(self, flight: Flight, ask: Ask, now: float) -> None:
        """Reserve the replica that computes the prompt of a flight."""
        assert ask.split is not None
        assert self.disaggregation is not None
        unseen_s = unseen(ask.split.member, now) * ask.prices.unseen_s
        by_side_car = self.disaggregation.settings.bootstrap_port is None
        leg = book(flight, ask.split, unseen_s, now, tried_again=by_side_car).flight
        self.disaggregation.legs.arrived(leg.prediction.prefill_s, now)
        self.caches.placed(leg.id, leg.address, ask.request)

    def leg_computed(self, flight: Flight, replica_ttft_s: float, now: float) -> None:
        """The first token of a split flight came."""
        assert flight.leg is not None
        leg, member = flight.leg.flight, self.fleet.get(flight.leg.flight.address)
        if member is not None and member.load.has_leg(leg) and self.disaggregation is not None:
            if flight.at == flight.address:
                learn(self.disaggregation, flight, member, replica_ttft_s)
            after_s = flight.leg.transfer_s + flight.prediction.prefill_s
            member.load.leg_done(leg, max(min(flight.routed_at + replica_ttft_s, now) - after_s, flight.routed_at))
        leg_ended(self, flight, now, begun=True, failed=False)

    # --- what was told and what came of requests ---

    def told(self, fact: PeerFact, now: float) -> None:
        """Another router told something of itself."""
        if isinstance(fact, PeerGone):
            peer = self.peers.gone(fact.peer)
            if peer is not None:
                self.fleet.loaded(fact.peer, dict.fromkeys(peer.loads), now, now)
                self.fleet.judged(peer.judgements, self.peers, now)
            return
        peer = self.peers.heard(fact.peer, now)
        if peer is None:
            return
        match fact:
            case PeerReported(loads=loads, age_s=age_s):
                if not fact.whole:  # what is not whole is only kept of members: so it is bounded
                    loads = tuple(load for load in loads if self.fleet.get(load.address) is not None)
                self.fleet.loaded(fact.peer, peer.take(loads, fact.number, fact.whole), now - age_s, now)
            case PeerJudged(judgements=judgements):
                told = trusted(judgements, len(self.fleet))
                known, peer.judgements = peer.judgements, {a: (j, now) for a, j in told.items()}
                self.fleet.judged({**known, **peer.judgements}, self.peers, now)
            case PeerServed(tenants=tenants):
                for priority, tenant, tokens in peer.served.since(tenants):
                    self.admission.charged_elsewhere(priority, tenant, tokens, now)

    def settle_prefix(self, flight: Flight, outcome: Outcome, now: float) -> None:
        """Where the prompt's blocks lie now: with whoever computed them."""
        index, chosen = self.caches.index, flight.address
        self.caches.pending.remove(flight.id)
        begun = outcome.end is End.OK or flight.first_token_at is not None or bool(outcome.response_bytes)
        computed_by = (outcome.served or chosen) if begun and not failed(outcome) else None
        if computed_by != chosen:
            index.withdraw(chosen, flight.blocks, flight.id)
        # Only of members: the index would keep room for ever for a replica that left while this ran.
        holder = self.fleet.get(computed_by) if flight.blocks.hashes and computed_by is not None else None
        if holder is not None and holder.state(now) is not State.GONE:
            index.keep(holder.address, flight.blocks)

    def judge(self, flight: Flight, outcome: Outcome, moved: bool, now: float) -> None:
        """What the end says of the health of whoever had the request. 4xx is the client's fault, and no evidence."""
        chosen, last = self.fleet.get(flight.address), self.fleet.get(outcome.served or flight.address)
        by_leg = suspected(flight, outcome, now)  # then the proxy found the same with whoever else it asked
        if chosen is not None and moved and not by_leg:
            chosen.failed(now, flight)
        if last is not None:
            if _fell(outcome) and not by_leg:
                last.failed(now, flight)
            elif outcome.end is End.OK and outcome.duration_s is not None:
                restarted = last.answered(outcome.duration_s, now, flight)
                if restarted:
                    self.caches.restarted(last.address, now)
        if chosen is not None:
            chosen.health.released(flight.id)


def leg_ended(pool: Pool, flight: Flight, now: float, begun: bool, failed: bool) -> None:
    """The prefill of a flight on another replica is over, one way or the other. `begun`: a token came, so it was computed.

    `failed`: the replica that was to answer said 5xx. It does so for one that prefills and fails (llm-d's side-car), and then stands
    for each of those that answer; so the one that prefills is suspected. Without it requests go elsewhere, and who fails then shows.
    """
    assert flight.leg is not None
    leg, flight.leg = flight.leg.flight, None
    pool.caches.pending.remove(leg.id)
    if not begun:
        pool.index.withdraw(leg.address, leg.blocks, leg.id)
    member = pool.fleet.get(leg.address)
    if member is None or not member.load.has_leg(leg):
        return  # it left, or is another process now
    member.load.close_leg(leg, now)
    if begun:
        member.worked(now)
        member.health.succeeded(leg.routed_at, now)
        if leg.blocks.hashes and member.state(now) is not State.GONE:
            pool.index.keep(member.address, leg.blocks)
    elif failed:
        member.failed(now, leg)
    member.health.released(leg.id)


def _fell(outcome: Outcome) -> bool:
    """Whether the replica failed the request, even if under status 200."""
    return outcome.broken or outcome.end in (End.UNREACHABLE, End.UPSTREAM_ERROR)


def starts(pool: Pool, request: Request) -> bool:
    """Whether the pool is empty because nobody asked for anything, and its first replica comes now that somebody does."""
    scaling = pool.settings.scaling
    return scaling is not None and scaling.from_zero and not len(pool.fleet) and pool.admission.holds(request)


def came(pool: Pool, ask: Ask, members: Sequence[Member], now: float) -> None:
    """Note the work that a request brings, on the one of these where it is least; nothing where nobody wants to know."""
    if pool.scaling is None:
        return
    output_tokens = ask.output_tokens * ask.request.samples
    if not members:
        prefill_s = NOBODY.prefill_s(NOBODY.work_s(ask.prompt_tokens, 0))
        pool.scaling.arrived(Asked(NOBODY, ask.prompt_tokens, 0, prefill_s, output_tokens), now)
        return
    at, best = _prompt(ask, members, now)
    uncached = max(ask.prompt_tokens - best.cached_tokens, 1)
    pool.scaling.arrived(Asked(at.speed, uncached, best.cached_tokens, best.prefill_s, output_tokens), now)


def work_of(ask: Ask, members: Sequence[Member], now: float) -> Work:
    """What a request comes to where it costs least: on the replica that has the most of its prompt. Without any: on none yet."""
    if not members:
        prefill_s = NOBODY.prefill_s(NOBODY.work_s(ask.prompt_tokens, 0))
        tokens = charge_tokens(ask.prompt_tokens, ask.output_tokens * ask.request.samples)
        return Work(tokens, prefill_s, NOBODY.base_s + prefill_s)
    at, best = _prompt(ask, members, now)
    tokens = charge_tokens(ask.prompt_tokens - best.cached_tokens, ask.output_tokens * ask.request.samples)
    return Work(tokens, best.prefill_s, at.speed.base_s + best.prefill_s)


def _prompt(ask: Ask, members: Sequence[Member], now: float) -> tuple[Member, Prediction]:
    """Who computes the prompt, or would with the least work, and what it sees there."""
    if ask.split is not None:
        return ask.split.member, ask.split.prediction
    return min(((member, predict(ask, member, now)) for member in members), key=_prefill_s)


def _prefill_s(at: tuple[Member, Prediction]) -> float:
    return at[1].prefill_s


def first_to_come(pool: Pool, now: float) -> bool:
    """Whether a pool that may be empty only has members that nothing was heard of, or that the proxy may not know yet.

    Where there are others its fallback would take the request to one of them. Here it has nobody, and would answer with 503.
    """
    if pool.settings.scaling is None or not pool.settings.scaling.from_zero:
        return False
    return all(m.state(now) is State.STARTING or now < m.joined_at + KNOWN_S for m in pool.fleet.members)


def nobody_yet(pool: Pool, now: float) -> bool:
    """Whether there is nobody that anything could be sent to."""
    return pool.fleet.absent(now) or first_to_come(pool, now)
