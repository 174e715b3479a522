"""The facade of the core: requests and facts come in here, verdicts go out. Wiring only; the parts do the work.

One object decides in production, in the simulator and in the benchmarks. It is driven from one thread, and every call returns
at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from extproc.core.admission.settings import QueueSettings
from extproc.core.fleet import Fleet, Member
from extproc.core.flights import Flight, Ledger
from extproc.core.health.settings import HealthSettings
from extproc.core.observers import Ended, Observer, Quiet
from extproc.core.policies import Policy, create
from extproc.core.prediction import Ask, company, predict
from extproc.core.prefix.index import PrefixIndex
from extproc.core.tokens import OutputTokens, PromptTokens, ResponseBytes
from extproc.core.traffic import Traffic
from extproc.core.types import (
    Add,
    Change,
    Decision,
    End,
    Fact,
    NotSampled,
    Outcome,
    Prediction,
    Progressed,
    Refusal,
    Reject,
    Remove,
    Request,
    Reset,
    Route,
    Sampled,
    Scored,
    Serves,
    Turn,
    Usage,
    Verdict,
)

SILENT_S: Final = 3.0
"""A replica with work that gives no sign for so long is not counted on: longer than any step, or the wait between scrapes."""
ENDPOINTS: Final = 3
"""Length of the list given to Envoy: the best and two alternates for its retries."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What the core needs to know of a pool's configuration."""

    name: str
    models: tuple[str, ...] = ()
    policy: str = "predicted"
    policy_options: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    scraped: bool = True
    """Whether samples are to be expected; without, members count as ready at once."""
    stale_after_s: float = 10.0
    health: HealthSettings = field(default_factory=HealthSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)


class Pool:
    """Replicas that serve the same models, and what was learned of requests for them."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.policy: Policy = create(settings.policy, settings.policy_options)
        self.fleet = Fleet(settings.scraped, settings.stale_after_s)
        self.index = PrefixIndex()
        self.prompt_tokens = PromptTokens()
        self.output_tokens = OutputTokens()
        self.response_bytes = ResponseBytes()
        self.traffic = Traffic()

    def __repr__(self) -> str:
        return f"<pool {self.settings.name} {self.settings.policy} {len(self.fleet)} replicas>"

    @property
    def models(self) -> tuple[str, ...]:
        """Configured names first, then what replicas list, LoRA adapters included."""
        served = (name for member in self.fleet.members for name in member.models)
        return tuple(dict.fromkeys((*self.settings.models, *served)))

    def serves(self, model: str) -> bool:
        """Whether the pool has the model; True for any while neither configuration nor replicas have named one."""
        if model in self.settings.models:
            return True
        members = self.fleet.members
        if any(model in member.models for member in members):
            return True
        return not self.settings.models and not any(member.models for member in members)

    def ask(self, request: Request, members: Sequence[Member], now: float) -> Ask:
        """Estimate what the request is in tokens, where its prefix lies, and what seconds are worth among these members."""
        tokens = request.prompt_tokens
        if tokens is None:
            tokens = self.prompt_tokens.estimate(request.model, request.prompt_bytes or 0)
        output = self.output_tokens.estimate(request.model, request.api, request.tenant, request.max_output_tokens)
        per_byte = tokens / request.prompt_bytes if request.prompt_bytes else 0.0
        hits = {a: n * per_byte for a, n in self.index.match(request.blocks).items()} if request.blocks.hashes else {}
        others = sum([member.strangers for member in members])
        ours = sum([len(member.load) for member in members]) if others else 0
        prices = self.traffic.prices(len(members), others / max(ours, 1), now)
        return Ask(request, max(tokens, 1), output, hits, prices)


class Router:
    """Requests to replicas. `now` is seconds on any one monotonic scale."""

    def __init__(
        self,
        pools: Sequence[PoolSettings],
        rng: Random,
        observer: Observer | None = None,
        flight_ttl_s: float = 120.0,
    ) -> None:
        """`rng` breaks ties and draws for the policies that draw; its first bits name this process in flight ids."""
        self._pools = {settings.name: Pool(settings) for settings in pools}
        self._first = next(iter(self._pools.values()))
        self._rng = rng
        self._observer = observer or Quiet()
        self._ttl_s = flight_ttl_s
        self._ledger = Ledger()
        self._boot = f"{rng.getrandbits(32):08x}"
        self._count = 0

    def __repr__(self) -> str:
        return f"<router {list(self._pools.values())} {self._ledger!r}>"

    @property
    def pools(self) -> Mapping[str, Pool]:
        return self._pools

    @property
    def in_flight(self) -> int:
        """Open flights."""
        return len(self._ledger)

    # --- requests -----------------------------------------------------------------------------------------------------

    def arrive(self, request: Request, now: float) -> Verdict:
        """Choose a replica and reserve it, in one call: the next request already sees this one's load."""
        pool = self._pool_of(request)
        if pool is None:
            reject = Reject(Refusal.UNKNOWN_MODEL, request.model, self._known_models())
            self._observer.refused(reject, None)
            return reject
        members = pool.fleet.candidates(now, request.subset)
        if not members:
            reject = self._nobody(pool, request)
            self._observer.refused(reject, pool.settings.name)
            return reject
        ask = pool.ask(request, members, now)
        ranking = pool.policy.rank(ask, members, now, self._rng)
        best = ranking.order[0][1]
        prediction = predict(ask, best, now)
        top = ranking.order[:ENDPOINTS]
        self._count += 1
        decision = self._decision(
            f"{self._boot}-{self._count:x}", pool, ask, ranking.reason, top, prediction, now, listed=ENDPOINTS
        )
        pool.policy.took(ask, best)  # after the record of what it looked at
        self._reserve(decision, pool, ask, best, now)
        self._observer.decided(decision)
        return Route(decision.flight, decision.endpoints, decision)

    def explain(self, request: Request, now: float) -> Decision | Reject:
        """The decision that `arrive` would take, with every candidate in it. Reserves nothing and changes nothing."""
        pool = self._pool_of(request)
        if pool is None:
            return Reject(Refusal.UNKNOWN_MODEL, request.model, self._known_models())
        members = pool.fleet.candidates(now, request.subset)
        if not members:
            return self._nobody(pool, request)
        ask = pool.ask(request, members, now)
        state = self._rng.getstate()
        ranking = pool.policy.rank(ask, members, now, self._rng)
        self._rng.setstate(state)
        prediction = predict(ask, ranking.order[0][1], now)
        return self._decision("", pool, ask, ranking.reason, ranking.order, prediction, now, listed=len(members))

    def turns(self, now: float) -> list[Turn]:
        """The waits that end now: routed, reserved like those of `arrive`, or refused. To be asked after every call that
        may free or take a place, and at `next_wakeup`; nothing held costs nothing.
        """
        return []

    def release(self, now: float) -> list[Turn]:
        """All waits end now, each with the best replica that there is, however long its queue: this process stops."""
        return []

    @property
    def holding(self) -> int:
        """Requests held."""
        return 0

    def leave(self, ticket: str, now: float) -> None:
        """The client of a held request left. Tickets that do not wait change nothing."""

    def finish(self, flight_id: str, outcome: Outcome, now: float) -> None:
        """A flight ended. Ids that are not open are counted and change nothing: late, doubled, or another process's."""
        flight = self._ledger.close(flight_id)
        if flight is None:
            self._observer.unknown_flight(outcome)
            return
        self._end(flight, outcome, now)

    # --- facts --------------------------------------------------------------------------------------------------------

    def learn(self, fact: Fact, now: float) -> None:
        """Take in something from outside. Facts on pools, replicas or flights that are not known change nothing."""
        if isinstance(fact, Progressed):
            self._progressed(fact, now)
            return
        pool = self._pools.get(fact.pool)
        if pool is None:
            return
        if isinstance(fact, Reset | Add | Remove):
            self._changed(pool, fact, now)
            return
        member = pool.fleet.get(fact.address)
        if member is None:
            return
        match fact:
            case Sampled(sample=sample):
                if member.sampled(sample, now):
                    pool.index.clear(member.address)
                if capacity := sample.kv_capacity_tokens:
                    model = next(iter(pool.settings.models or member.models), None)
                    per_token = pool.prompt_tokens.bytes_per_token(model)
                    pool.index.set_capacity(member.address, capacity * per_token * member.cache_share)
            case NotSampled(why=why):
                member.not_sampled(why)
            case Serves(models=models):
                member.models = models

    def expire(self, now: float) -> int:
        """Close the flights whose end was never reported. Returns how many."""
        lost = self._ledger.expired(now)
        for flight in lost:
            self._ledger.close(flight.id)
            self._end(flight, Outcome(End.LOST), now)
        return len(lost)

    def next_wakeup(self) -> float | None:
        """When `expire` has something to do next, if nothing else happens."""
        return self._ledger.next_expiry()

    # --- parts of the above -------------------------------------------------------------------------------------------

    def _pool_of(self, request: Request) -> Pool | None:
        if request.model is None:
            return self._first
        if len(self._pools) == 1:
            return self._first if self._first.serves(request.model) else None
        return next((pool for pool in self._pools.values() if pool.serves(request.model)), None)

    def _known_models(self) -> tuple[str, ...]:
        return tuple(model for pool in self._pools.values() for model in pool.models)

    def _nobody(self, pool: Pool, request: Request) -> Reject:
        """No member is allowed: because there is none at all, or by the request's own hint."""
        by_hint = request.subset is not None and len(pool.fleet) > 0
        return Reject(Refusal.SUBSET_EMPTY if by_hint else Refusal.NO_REPLICAS, request.model)

    def _decision(
        self,
        flight: str,
        pool: Pool,
        ask: Ask,
        reason: str,
        order: Sequence[tuple[float, Member]],
        prediction: Prediction,
        now: float,
        listed: int,
    ) -> Decision:
        return Decision(
            at=now,
            flight=flight,
            pool=pool.settings.name,
            model=ask.request.model,
            api=ask.request.api,
            policy=pool.policy.name,
            reason=reason,
            endpoints=tuple(member.replica.address for _, member in order[:ENDPOINTS]),
            prompt_tokens=ask.prompt_tokens,
            output_tokens=ask.output_tokens,
            prediction=prediction,
            candidates=tuple(
                Scored(member.replica.address, score, pool.policy.terms(ask, member, now))
                for score, member in order[:listed]
            ),
            output_p90_tokens=pool.output_tokens.p90(
                ask.request.model, ask.request.api, ask.request.tenant, ask.request.max_output_tokens
            ),
        )

    def _reserve(self, decision: Decision, pool: Pool, ask: Ask, member: Member, now: float) -> None:
        request, prediction = ask.request, decision.prediction
        together = company(member, now)
        flight = Flight(
            id=decision.flight,
            pool=decision.pool,
            address=member.replica.address,
            model=request.model,
            api=request.api,
            tenant=request.tenant,
            stream=request.stream,
            blocks=request.blocks,
            prompt_bytes=request.prompt_bytes,
            prompt_tokens=ask.prompt_tokens,
            output_tokens=ask.output_tokens,
            samples=request.samples,
            hit_bytes=self._hit_bytes(ask, member),
            prediction=prediction,
            work_s=(member.load.backlog_s(now) + prediction.prefill_s) / member.speed.prefill_factor,
            unseen_s=(together[0] - len(member.load)) * ask.prices.unseen_s,
            company=together,
            exact_tokens=request.prompt_tokens is not None,
            routed_at=now,
            expires_at=now + self._ttl_s,
            output_p90_tokens=decision.output_p90_tokens,
        )
        self._ledger.open(flight)
        pool.traffic.arrived(prediction.prefill_s, now)
        member.load.open(flight, now)
        if request.blocks.hashes:
            pool.index.insert(member.replica.address, request.blocks, flight.id)

    def _hit_bytes(self, ask: Ask, member: Member) -> int:
        hit = ask.hit_tokens.get(member.replica.address)
        return round(hit * (ask.request.prompt_bytes or 0) / ask.prompt_tokens) if hit else 0

    def _changed(self, pool: Pool, change: Change, now: float) -> None:
        for address in pool.fleet.apply(change, now):
            pool.index.forget(address)
            self._observer.left(pool.settings.name, address)

    def _progressed(self, fact: Progressed, now: float) -> None:
        flight = self._ledger.get(fact.flight)
        if flight is None:
            return
        self._ledger.touch(flight, now + self._ttl_s)
        grown = fact.response_bytes > flight.response_bytes
        flight.response_bytes = fact.response_bytes
        member = self._pools[flight.pool].fleet.get(flight.address)
        if member is None or not member.load.has(flight):
            return
        if grown:
            member.heard_at = now
        if flight.first_token_at is not None:
            return
        if flight.shows_first_token and fact.replica_ttft_s is not None:
            self._first_token(member, flight, fact.replica_ttft_s, now)
        elif fact.replica_ttft_s is None and (flight.shows_first_token or _silent(member, flight, now)):
            member.load.still_prefilling(flight, now)

    def _first_token(self, member: Member, flight: Flight, replica_ttft_s: float, now: float) -> None:
        member.load.first_token(flight, min(flight.routed_at + replica_ttft_s, now))
        if flight.prompt_bytes:
            waited_s = flight.prediction.queue_s
            member.speed.learn_ttft(flight.work_s, replica_ttft_s, waited_s, flight.unseen_s)

    def _end(self, flight: Flight, outcome: Outcome, now: float) -> None:
        """Everything that the end of a flight changes."""
        pool = self._pools[flight.pool]
        member = pool.fleet.get(flight.address)
        if member is not None and not member.load.has(flight):
            member = None  # it left and came back meanwhile: another process, which never had the flight
        moved = outcome.served is not None and outcome.served != flight.address
        if member is not None:
            self._leave(member, flight, outcome, moved, now)
        self._settle_prefix(pool, flight, outcome)
        self._judge(pool, flight, outcome, moved, now)
        output_tokens = self._learn_tokens(pool, flight, outcome)
        if outcome.end is End.OK and outcome.duration_s is not None:
            ttft_s = outcome.ttft_s if flight.shows_first_token and outcome.ttft_s else flight.prediction.ttft_s
            pool.traffic.answered(min(ttft_s, outcome.duration_s), max(outcome.duration_s - ttft_s, 0.0))
        if member is not None and not moved and outcome.end is End.OK:
            self._learn_speed(member, flight, outcome, output_tokens, now)
        self._observer.ended(Ended(flight, outcome, moved, output_tokens))

    def _leave(self, member: Member, flight: Flight, outcome: Outcome, moved: bool, now: float) -> None:
        """Take the flight's load off the replica."""
        # The first byte of an error says nothing of prefill: learning from it would make a failing replica look fast.
        told = flight.shows_first_token and flight.first_token_at is None and not moved and not _failed(outcome)
        if told and outcome.replica_ttft_s is not None:
            self._first_token(member, flight, outcome.replica_ttft_s, now)
        member.load.close(flight, now)

    def _settle_prefix(self, pool: Pool, flight: Flight, outcome: Outcome) -> None:
        """Where the prompt's blocks lie now: with whoever computed them."""
        index, chosen = pool.index, flight.address
        begun = outcome.end is End.OK or flight.first_token_at is not None or bool(outcome.response_bytes)
        computed_by = (outcome.served or chosen) if begun and not _failed(outcome) else None
        if computed_by != chosen:
            index.withdraw(chosen, flight.blocks, flight.id)
        # Only of members: the index would keep room for ever for a replica that left while this ran.
        if flight.blocks.hashes and computed_by is not None and pool.fleet.get(computed_by) is not None:
            index.keep(computed_by, flight.blocks)

    def _judge(self, pool: Pool, flight: Flight, outcome: Outcome, moved: bool, now: float) -> None:
        """Pass over a replica that failed a request until it is heard of again; 4xx is the client's fault, not its."""
        chosen, last = pool.fleet.get(flight.address), pool.fleet.get(outcome.served or flight.address)
        if chosen is not None and moved:
            chosen.failed(now)
        if last is None:
            return
        if outcome.end in (End.UNREACHABLE, End.UPSTREAM_ERROR):
            last.failed(now)
        elif outcome.end is End.OK and outcome.served is not None and outcome.duration_s is not None:
            last.answered(outcome.duration_s, now)

    def _learn_tokens(self, pool: Pool, flight: Flight, outcome: Outcome) -> int | None:
        """Correct the estimates by usage. Returns the output tokens, estimated from the response's size if need be."""
        usage = outcome.usage or Usage()
        if (
            usage.prompt_tokens is not None
            and flight.model is not None
            and flight.prompt_bytes
            and not flight.exact_tokens
        ):
            pool.prompt_tokens.learn(flight.model, flight.prompt_bytes, usage.prompt_tokens)
        size = outcome.response_bytes
        if usage.completion_tokens is not None:
            if size and outcome.end is End.OK:
                pool.response_bytes.learn(flight.model, flight.api, flight.stream, size, usage.completion_tokens)
            output: int | None = usage.completion_tokens
        elif size and outcome.end in (End.OK, End.CLIENT_GONE) and flight.output_tokens:
            output = pool.response_bytes.tokens(flight.model, flight.api, flight.stream, size)
        else:
            output = None
        if output is not None and outcome.end is End.OK and flight.output_tokens:
            each = max(round(output / flight.samples), 1)
            pool.output_tokens.learn(flight.model, flight.api, flight.tenant, each)
        return output

    def _learn_speed(
        self, member: Member, flight: Flight, outcome: Outcome, output_tokens: int | None, now: float
    ) -> None:
        usage = outcome.usage
        if usage and usage.cached_tokens is not None and flight.hit_bytes and flight.prompt_bytes:
            member.hit(flight.prompt_tokens * flight.hit_bytes / flight.prompt_bytes, usage.cached_tokens)
        if not flight.shows_first_token or not output_tokens or output_tokens < 8 or flight.samples > 1:
            return
        if outcome.duration_s is not None and outcome.ttft_s is not None:
            sequences, kv_tokens = _mean(flight.company, company(member, now))
            step_s = (outcome.duration_s - outcome.ttft_s) / (output_tokens - 1)
            member.speed.learn_step(sequences + 1, kv_tokens + flight.prompt_tokens, step_s)

    # --- inspection ---------------------------------------------------------------------------------------------------

    def members(self) -> Iterable[tuple[str, Member]]:
        """Every replica with the name of its pool."""
        for name, pool in self._pools.items():
            for member in pool.fleet.members:
                yield name, member

    def check(self) -> None:
        """Raise AssertionError if the ledger, the loads and the index disagree; for tests and simulations."""
        self._ledger.check()
        for name, pool in self._pools.items():
            pool.index.check()
            assert pool.index.addresses <= {member.address for member in pool.fleet.members}, pool
            for member in pool.fleet.members:
                member.load.check()
                for flight in member.load:
                    assert self._ledger.get(flight.id) is flight, flight
                    assert (flight.pool, flight.address) == (name, member.address), flight
        for flight in self._ledger:
            at = self._pools[flight.pool].fleet.get(flight.address)
            # One that joined since then is another process at the same address: it never had the flight.
            assert at is None or at.load.has(flight) or flight.routed_at <= at.joined_at, flight


def _mean(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    """The company of a request changes while it runs: halfway between what it found and what it leaves."""
    return (before[0] + after[0]) / 2, (before[1] + after[1]) / 2


def _silent(member: Member, flight: Flight, now: float) -> bool:
    """Whether a response that comes as a whole is overdue on a replica that gives no sign of work: it may hang.

    Overdue alone says little, for the length of an answer is a guess; a replica at work moves its counters.
    """
    due = flight.routed_at + flight.prediction.ttft_s + flight.prediction.decode_s
    return now > due and now - member.heard_at > SILENT_S


def _failed(outcome: Outcome) -> bool:
    """Whether the replica answered with an error instead of running the request. One that broke off later did run it."""
    return outcome.end is End.CLIENT_ERROR or (outcome.status is not None and outcome.status >= 400)
