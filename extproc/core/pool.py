"""Replicas that serve the same models, with what is known of them and of the requests for them: one of the router's parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from extproc.core.admission.admission import Admission, Work
from extproc.core.admission.fairness import charge_tokens
from extproc.core.fleet import Changed, Fleet, Member
from extproc.core.flights import Flight
from extproc.core.health.states import State
from extproc.core.peers import PEERS_SLACK_S, Peers, trusted
from extproc.core.policies import Policy, create
from extproc.core.prediction import Ask, company, predict
from extproc.core.prefix.index import PrefixIndex
from extproc.core.scaling.autoscaler import NOBODY, Asked, Autoscaler
from extproc.core.settings import PoolSettings
from extproc.core.tokens import OutputTokens, PromptTokens, ResponseBytes
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
    Usage,
)

KNOWN_S: Final = 0.5
"""After so long the proxy has read of a new member: a file is written and watched, which takes some tens of milliseconds."""


class Pool:
    """Replicas that serve the same models, and what was learned of requests for them."""

    def __init__(self, settings: PoolSettings, changed: Changed) -> None:
        """`changed` is told of each change of a replica's health."""
        self.settings = settings
        self.policy: Policy = create(settings.policy, settings.policy_options)
        self.fleet = Fleet(settings.scraped, settings.stale_after_s, settings.health, changed)
        self.index = PrefixIndex()
        self.prompt_tokens = PromptTokens()
        self.output_tokens = OutputTokens()
        self.response_bytes = ResponseBytes()
        self.traffic = Traffic()
        self.admission = Admission(settings.queue)
        self.scaling = Autoscaler(settings.scaling) if settings.scaling else None
        self.listed = False
        """Whether its members were ever told of; a pool that is not known yet is not empty."""
        self.peers = Peers()

    def __repr__(self) -> str:
        return f"<pool {self.settings.name} {self.settings.policy} {len(self.fleet)} replicas>"

    @property
    def models(self) -> tuple[str, ...]:
        """Configured names first, then what replicas list, LoRA adapters included."""
        served = (name for member in self.fleet.members for name in member.models)
        return tuple(dict.fromkeys((*self.settings.models, *served)))

    def configure(self, settings: PoolSettings) -> None:
        """Go on with other settings. A policy that stays keeps what it has learned."""
        before, self.settings = self.settings, settings
        if (before.policy, before.policy_options) != (settings.policy, settings.policy_options):
            self.policy = create(settings.policy, settings.policy_options)
        self.fleet.configure(settings.stale_after_s, settings.health)
        self.admission.configure(settings.queue)
        if settings.scaling is None:
            self.scaling = None
        elif self.scaling is None:
            self.scaling = Autoscaler(settings.scaling)
        else:
            self.scaling.configure(settings.scaling)

    def serves(self, model: str) -> bool:
        """Whether the pool has the model; True for any while neither configuration nor replicas have named one."""
        if model in self.settings.models:
            return True
        members = self.fleet.members
        if any(model in member.models for member in members):
            return True
        return not self.settings.models and not any(member.models for member in members)

    def size(self, request: Request) -> tuple[int, float]:
        """Expected prompt tokens, and output tokens of one sample."""
        tokens = request.prompt_tokens
        if tokens is None:
            tokens = self.prompt_tokens.estimate(request.model, request.prompt_bytes or 0)
        return tokens, self.output_tokens.estimate(
            request.model, request.api, request.tenant, request.max_output_tokens
        )

    def ask(self, request: Request, members: Sequence[Member], now: float) -> Ask:
        """Estimate what the request is in tokens, where its prefix lies, and what seconds are worth among these members."""
        tokens, output = self.size(request)
        per_byte = tokens / request.prompt_bytes if request.prompt_bytes else 0.0
        hits = {a: n * per_byte for a, n in self.index.match(request.blocks).items()} if request.blocks.hashes else {}
        others = sum([member.strangers for member in members])
        if len(self.peers):
            others += sum([member.others.requests for member in members if member.others is not None])
        ours = sum([len(member.load) for member in members]) if others else 0
        prices = self.traffic.prices(len(members), others / max(ours, 1), now)
        slack_s = PEERS_SLACK_S if len(self.peers) else 0.0
        return Ask(request, max(tokens, 1), output, hits, prices, slack_s)

    # --- what was told and what came of requests ---

    def told(self, fact: PeerFact, now: float) -> None:
        """Another router told something of itself."""
        if isinstance(fact, PeerGone):
            peer = self.peers.gone(fact.peer)
            if peer is not None:
                self.fleet.loaded(fact.peer, peer.loads, {}, now, now)
                self.fleet.judged(peer.judgements, self.peers, now)
            return
        peer = self.peers.heard(fact.peer, now)
        if peer is None:
            return
        match fact:
            case PeerReported(loads=loads, age_s=age_s):
                before, peer.loads = peer.loads, {load.address: load for load in loads}
                self.fleet.loaded(fact.peer, before, peer.loads, now - age_s, now)
            case PeerJudged(judgements=judgements):
                told = trusted(judgements, len(self.fleet))
                known, peer.judgements = peer.judgements, {a: (j, now) for a, j in told.items()}
                self.fleet.judged({**known, **peer.judgements}, self.peers, now)
            case PeerServed(tenants=tenants):
                for priority, tenant, tokens in peer.served.since(tenants):
                    self.admission.charged_elsewhere(priority, tenant, tokens, now)

    def settle_prefix(self, flight: Flight, outcome: Outcome, now: float) -> None:
        """Where the prompt's blocks lie now: with whoever computed them."""
        index, chosen = self.index, flight.address
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
        if chosen is not None and moved:
            chosen.failed(now, flight)
        if last is not None:
            if _fell(outcome):
                last.failed(now, flight)
            elif outcome.end is End.OK and outcome.duration_s is not None:
                restarted = last.answered(outcome.duration_s, now, flight)
                if restarted:
                    self.index.clear(last.address)
        if chosen is not None:
            chosen.health.released(flight.id)

    def learn_tokens(self, flight: Flight, outcome: Outcome) -> int | None:
        """Correct the estimates by usage. Returns the output tokens, estimated from the response's size if need be."""
        usage = outcome.usage or Usage()
        if (
            usage.prompt_tokens is not None
            and flight.model is not None
            and flight.prompt_bytes
            and not flight.exact_tokens
        ):
            self.prompt_tokens.learn(flight.model, flight.prompt_bytes, usage.prompt_tokens)
        size = outcome.response_bytes
        if usage.completion_tokens is not None:
            if size and whole(outcome):
                self.response_bytes.learn(flight.model, flight.api, flight.stream, size, usage.completion_tokens)
            output: int | None = usage.completion_tokens
        elif size and outcome.end in (End.OK, End.CLIENT_GONE) and flight.output_tokens:
            output = self.response_bytes.tokens(flight.model, flight.api, flight.stream, size)
        else:
            output = None
        if output is not None and whole(outcome) and flight.output_tokens:
            each = max(round(output / flight.samples), 1)
            self.output_tokens.learn(flight.model, flight.api, flight.tenant, each)
        return output


def learn_speed(member: Member, flight: Flight, outcome: Outcome, output_tokens: int | None, now: float) -> None:
    """Correct what is believed of the replica's cache and speed by a response that it gave in whole, alone.

    `output_tokens`: of all samples, reported or estimated; None when nothing tells.
    """
    usage = outcome.usage
    if usage and usage.cached_tokens is not None and flight.hit_bytes and flight.prompt_bytes:
        member.hit(flight.prompt_tokens * flight.hit_bytes / flight.prompt_bytes, usage.cached_tokens)
    if not flight.shows_first_token or not output_tokens or output_tokens < 8 or flight.samples > 1:
        return
    if outcome.duration_s is not None and outcome.ttft_s is not None:
        sequences, kv_tokens = _mean(flight.company, company(member, now))
        step_s = (outcome.duration_s - outcome.ttft_s) / (output_tokens - 1)
        member.speed.learn_step(sequences + 1, kv_tokens + flight.prompt_tokens, step_s)


def _mean(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    """The company of a request changes while it runs: halfway between what it found and what it leaves."""
    return (before[0] + after[0]) / 2, (before[1] + after[1]) / 2


def whole(outcome: Outcome) -> bool:
    """Whether the response is all that was to come: only such a one tells lengths and speeds."""
    return outcome.end is End.OK and not outcome.broken


def _fell(outcome: Outcome) -> bool:
    """Whether the replica failed the request, even if under status 200."""
    return outcome.broken or outcome.end in (End.UNREACHABLE, End.UPSTREAM_ERROR)


def failed(outcome: Outcome) -> bool:
    """Whether the replica answered with an error instead of running the request. One that broke off later did run it."""
    return outcome.end is End.CLIENT_ERROR or (outcome.status is not None and outcome.status >= 400)


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
    at, best = min(((m, predict(ask, m, now)) for m in members), key=lambda pair: pair[1].prefill_s)
    uncached = max(ask.prompt_tokens - best.cached_tokens, 1)
    pool.scaling.arrived(Asked(at.speed, uncached, best.cached_tokens, best.prefill_s, output_tokens), now)


def work_of(ask: Ask, members: Sequence[Member], now: float) -> Work:
    """What a request comes to where it costs least: on the replica that has the most of its prompt. Without any: on none yet."""
    if not members:
        prefill_s = NOBODY.prefill_s(NOBODY.work_s(ask.prompt_tokens, 0))
        tokens = charge_tokens(ask.prompt_tokens, ask.output_tokens * ask.request.samples)
        return Work(tokens, prefill_s, NOBODY.base_s + prefill_s)
    best = min((predict(ask, member, now) for member in members), key=_prefill_s)
    tokens = charge_tokens(ask.prompt_tokens - best.cached_tokens, ask.output_tokens * ask.request.samples)
    return Work(tokens, best.prefill_s, members[0].speed.base_s + best.prefill_s)


def _prefill_s(prediction: Prediction) -> float:
    return prediction.prefill_s


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
