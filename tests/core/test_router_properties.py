"""What holds whatever happens: random interleavings of everything that can come through the router's one door."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.policies import REGISTRY
from extproc.core.router import PoolSettings, Router
from extproc.core.types import (
    Add,
    Api,
    End,
    NotSampled,
    Outcome,
    Progressed,
    Reject,
    Remove,
    Replica,
    Request,
    Reset,
    Route,
    Sample,
    Sampled,
    ScrapeFailure,
    Serves,
    Usage,
)

from .support import A100, H100, MODEL, POOL, Log, address, replicas, request, router, text

POLICIES = sorted(REGISTRY)
ORDERED = ("round_robin", "token_aware", "weighted", "random", "power_of_two")
"""Policies for which the order of discovery counts: turns, the first of equals, and draws by position."""
FLEET = 5
PROMPTS = [text(size, seed) for size, seed in ((0, 0), (300, 1), (5000, 2), (70_000, 3))]
PROMPTS += [PROMPTS[2] + text(800, 4), PROMPTS[2] + text(3000, 5)]

# --- what may come ----------------------------------------------------------------------------------------------------

where = st.integers(0, FLEET - 1).map(address)
seconds = st.one_of(st.none(), st.floats(0.0, 30.0))
count = st.one_of(st.none(), st.integers(0, 100_000))


def _request(
    prompt: int, output: int | None, session: str | None, tenant: str | None, subset: Any, rest: int
) -> Request:
    return request(
        PROMPTS[prompt],
        output=output,
        session=session,
        tenant=tenant,
        subset=subset,
        api=(Api.CHAT, Api.COMPLETIONS, Api.EMBEDDINGS, Api.OTHER)[rest % 4],
        stream=rest % 3 > 0,
        samples=1 + rest % 2,
        prompt_tokens=17 if rest == 5 else None,
    )


requests = st.builds(
    _request,
    st.integers(0, len(PROMPTS) - 1),
    st.one_of(st.none(), st.integers(0, 4000)),
    st.one_of(st.none(), st.sampled_from("st")),
    st.one_of(st.none(), st.sampled_from("xy")),
    st.one_of(st.none(), st.none(), st.frozensets(where, max_size=3)),
    st.integers(0, 11),
)
outcomes = st.builds(
    Outcome,
    end=st.sampled_from(End),
    status=st.sampled_from([None, 200, 400, 500, 503]),
    served=st.one_of(st.none(), where),
    ttft_s=seconds,
    replica_ttft_s=seconds,
    duration_s=seconds,
    response_bytes=count,
    usage=st.one_of(st.none(), st.builds(Usage, count, count, count)),
)
samples = st.builds(
    Sample,
    running=st.one_of(st.none(), st.integers(0, 50)),
    waiting=st.one_of(st.none(), st.integers(0, 50)),
    kv_usage=st.one_of(st.none(), st.floats(0.0, 1.0)),
    block_size=st.sampled_from([None, 16]),
    num_blocks=st.sampled_from([None, 50, 5000]),
    prompt_tokens=st.one_of(st.none(), st.floats(0, 1e6)),
)
members = st.builds(
    Replica,
    where,
    st.sampled_from([H100, A100, {}, {"max_tokens_per_s": "100"}]),
    st.sampled_from([0.5, 1.0, 3.0]),
)


@dataclass(frozen=True, slots=True)
class Arrive:
    request: Request


@dataclass(frozen=True, slots=True)
class Finish:
    which: int
    outcome: Outcome
    times: int


@dataclass(frozen=True, slots=True)
class Progress:
    which: int
    ttft_s: float | None


@dataclass(frozen=True, slots=True)
class Expire:
    pass


Step = Arrive | Finish | Progress | Expire | Reset | Add | Remove | Sampled | NotSampled | Serves
steps: st.SearchStrategy[Step] = st.one_of(
    st.builds(Arrive, requests),
    st.builds(Arrive, requests),
    st.builds(Finish, st.integers(0, 50), outcomes, st.integers(1, 2)),
    st.builds(Progress, st.integers(0, 50), seconds),
    st.builds(Expire),
    st.builds(Reset, st.just(POOL), st.lists(members, max_size=4, unique_by=lambda r: r.address).map(tuple)),
    st.builds(Add, st.just(POOL), members),
    st.builds(Remove, st.just(POOL), where),
    st.builds(Sampled, st.just(POOL), where, samples),
    st.builds(NotSampled, st.just(POOL), where, st.sampled_from(ScrapeFailure)),
    st.builds(Serves, st.just(POOL), where, st.sampled_from([(), (MODEL,), (MODEL, "lora")])),
)
scripts = st.lists(st.tuples(steps, st.floats(0.0, 5.0)), max_size=50)


class Driver:
    """Plays a script on a router and keeps what came out."""

    def __init__(self, policy: str, seed: int = 1, scraped: bool = False) -> None:
        self.log = Log()
        self.router = router(3, policy, observer=self.log, seed=seed, scraped=scraped, flight_ttl_s=30.0)
        self.now = 0.0
        self.routed: list[str] = []
        self.ended: set[str] = set()

    def play(self, script: Iterable[tuple[Step, float]]) -> None:
        for step, wait in script:
            self.now += wait
            self.step(step)

    def step(self, step: Step) -> None:
        match step:
            case Arrive(request=wanted):
                verdict = self.router.arrive(wanted, self.now)
                if isinstance(verdict, Route):
                    self.routed.append(verdict.flight)
            case Finish(which=which, outcome=outcome, times=times):
                for _ in range(times):
                    self.router.finish(self._id(which), outcome, self.now)
            case Progress(which=which, ttft_s=ttft_s):
                self.router.learn(Progressed(self._id(which), ttft_s, ttft_s, 100), self.now)
            case Expire():
                self.router.expire(self.now)
            case fact:
                self.router.learn(fact, self.now)

    def _id(self, which: int) -> str:
        return self.routed[which % len(self.routed)] if self.routed else "nobody"

    def loads(self) -> list[Any]:
        return [member.load for _, member in self.router.members()]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(script=scripts, scraped=st.booleans())
def test_tokens_are_conserved_and_every_flight_ends_once(
    policy: str, script: list[tuple[Step, float]], scraped: bool
) -> None:
    driver = Driver(policy, scraped=scraped)
    for step, wait in script:
        driver.now += wait
        driver.step(step)
        driver.router.check()  # sums of every load, its queue, the ledger's equation, the index and its bounds
        for load in driver.loads():
            assert load.held_tokens >= 0.0
            assert load.backlog_s(driver.now) >= 0.0
            assert load.prefilling(driver.now) >= 0
            assert load.decoding(driver.now) >= 0
    driver.router.expire(driver.now + 31.0)
    driver.router.check()
    assert driver.router.in_flight == 0
    assert [ended.flight.id for ended in sorted(driver.log.ends, key=lambda e: driver.routed.index(e.flight.id))] == (
        driver.routed
    )
    for load in driver.loads():
        assert (len(load), load.held_tokens, load.output_tokens, load.backlog_s(driver.now)) == (0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(script=scripts, wanted=requests)
def test_explaining_changes_nothing(policy: str, script: list[tuple[Step, float]], wanted: Request) -> None:
    asked, silent = Driver(policy), Driver(policy)
    for step, wait in script:
        for driver in (asked, silent):
            driver.now += wait
        asked.router.explain(wanted, asked.now)
        for driver in (asked, silent):
            driver.step(step)
    assert repr(asked.log.decisions) == repr(silent.log.decisions)
    explained = asked.router.explain(wanted, asked.now)
    arrived = silent.router.arrive(wanted, silent.now)
    if isinstance(explained, Reject):
        assert arrived == explained
    else:
        assert isinstance(arrived, Route)
        taken = arrived.decision
        assert replace(explained, flight=taken.flight, candidates=explained.candidates[:3]) == taken


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15, deadline=None)
@given(script=scripts, seed=st.integers(0, 5))
def test_the_same_seed_and_facts_give_the_same_decisions(
    policy: str, script: list[tuple[Step, float]], seed: int
) -> None:
    one, other = Driver(policy, seed), Driver(policy, seed)
    one.play(script)
    other.play(script)
    assert repr(one.log.decisions) == repr(other.log.decisions)
    assert repr(one.log.ends) == repr(other.log.ends)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in ORDERED])
@settings(max_examples=25, deadline=None)
@given(
    arrivals=st.lists(requests.map(lambda r: replace(r, subset=None)), min_size=1, max_size=12),
    order=st.permutations(range(FLEET)),
)
def test_the_order_of_discovery_does_not_matter(policy: str, arrivals: list[Request], order: list[int]) -> None:
    straight, shuffled = (
        made_in_order(policy, range(FLEET)),
        made_in_order(policy, order),
    )
    for wanted in arrivals:
        one, other = straight.arrive(wanted, 0.0), shuffled.arrive(wanted, 0.0)
        assert isinstance(one, Route)
        assert isinstance(other, Route)
        # Without a prompt's head ties go by chance, but the same chance: the same seed.
        assert one.endpoints[0] == other.endpoints[0]


def made_in_order(policy: str, order: Iterable[int]) -> Router:
    made = Router([PoolSettings(POOL, policy=policy, scraped=False)], Random(1))
    fleet = replicas(FLEET)
    made.learn(Reset(POOL, tuple(fleet[i] for i in order)), 0.0)
    return made


@given(script=scripts)
@settings(max_examples=25, deadline=None)
def test_reading_the_gauges_changes_no_decision(script: list[tuple[Step, float]]) -> None:
    """What a metrics page or `/debug/replicas` reads between two requests."""
    read, unread = Driver("predicted"), Driver("predicted")
    for step, wait in script:
        for driver in (read, unread):
            driver.now += wait
        for load in read.loads():
            load.backlog_s(read.now + 10.0)
            load.prefilling(read.now)
            load.queued_tokens(read.now)
        for driver in (read, unread):
            driver.step(step)
    assert repr(read.log.decisions) == repr(unread.log.decisions)


@given(arrivals=st.lists(requests, min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_predictions_are_finite_and_not_negative(arrivals: list[Request]) -> None:
    driver = Driver("predicted")
    driver.play((Arrive(wanted), 0.1) for wanted in arrivals)
    for decision in driver.log.decisions:
        p = decision.prediction
        assert all(0.0 <= part < 1e6 for part in (p.queue_s, p.prefill_s, p.decode_s, p.delay_s))
        assert 0 <= p.cached_tokens < max(decision.prompt_tokens, 1)
