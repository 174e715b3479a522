"""Late binding through the router: who is held, when its turn comes, and that every wait ends once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.admission.settings import QueueSettings
from extproc.core.observers import Held, Several, Waited
from extproc.core.router import Router
from extproc.core.settings import PoolSettings
from extproc.core.types import (
    Api,
    Configured,
    Decision,
    End,
    NotSampled,
    Outcome,
    Refusal,
    Reject,
    Remove,
    Reset,
    Route,
    Sample,
    Sampled,
    ScrapeFailure,
    Turn,
    Verdict,
    Wait,
)

from .support import POOL, Log, address, member, ok, only, replicas, request, router, sample, text

LONG = 200_000
"""Bytes of a prompt that keeps an H100 busy for seconds."""
ON = QueueSettings()


class Waits(Log):
    """Keeps the waits too."""

    def __init__(self) -> None:
        super().__init__()
        self.holds: list[Held] = []
        self.waits: list[Waited] = []

    def held(self, held: Held) -> None:
        self.holds.append(held)

    def waited(self, waited: Waited) -> None:
        self.waits.append(waited)


def busy(n: int = 2, now: float = 0.0, **given: Any) -> tuple[Router, list[Route]]:
    """A router whose replicas have seconds of prefill each, and these flights."""
    given.setdefault("queue", ON)
    made = router(n, **given)
    routes = []
    for i in range(n):
        verdict = made.arrive(request(text(LONG, 1000 + i), output=10, subset=only(i)), now)
        assert isinstance(verdict, Route)
        routes.append(verdict)
    return made, routes


def short(seed: int = 0, **fields: Any) -> Any:
    return request(text(2000, seed), output=10, **fields)


def wait(made: Router, wanted: Any, now: float = 0.0) -> Wait:
    verdict = made.arrive(wanted, now)
    assert isinstance(verdict, Wait), verdict
    made.check()
    return verdict


def tickets(turns: list[Turn]) -> list[str]:
    return [turn.ticket for turn in turns]


def refusals(turns: list[Turn]) -> list[Refusal]:
    return [turn.verdict.refusal for turn in turns if isinstance(turn.verdict, Reject)]


def routed(turns: list[Turn]) -> list[Route]:
    return [turn.verdict for turn in turns if isinstance(turn.verdict, Route)]


# --- when to hold -------------------------------------------------------------------------------------------------------


def test_a_request_is_held_while_all_would_let_it_wait_and_placed_when_one_is_done() -> None:
    made, routes = busy()
    held = wait(made, short())
    assert made.holding == 1
    assert made.turns(0.0) == []
    made.finish(routes[1].flight, ok(routes[1].endpoints[0], ttft_s=0.5), 1.0)
    (turn,) = made.turns(1.0)
    assert turn.ticket == held.ticket
    assert isinstance(turn.verdict, Route)
    assert turn.verdict.endpoints[0] == address(1)
    assert (made.holding, made.in_flight, made.turns(1.0)) == (0, 2, [])
    made.check()


def test_a_request_that_one_would_take_soon_goes_where_the_policy_says() -> None:
    made, _ = busy(1)
    made.learn(Reset(POOL, replicas(2)), 0.0)
    verdict = made.arrive(short(), 0.0)
    assert isinstance(verdict, Route)
    assert verdict.endpoints[0] == address(1)


def test_it_is_placed_when_queued_prefill_is_predicted_done_and_that_moment_is_named() -> None:
    made, _ = busy(1)
    wait(made, short())
    backlog_s = member(made).load.backlog_s(0.0)
    assert backlog_s > 1.0
    assert made.turns(0.0) == []
    now = 0.0
    while made.holding:
        at = made.next_wakeup()
        assert at is not None
        assert at > now
        now = at
        made.turns(now)
    assert now == pytest.approx(backlog_s - ON.hold_above_s, abs=0.01)


def test_those_who_come_while_others_are_held_wait_for_their_turn() -> None:
    made, routes = busy(1)
    first = wait(made, short(1))
    made.finish(routes[0].flight, ok(), 1.0)
    second = wait(made, short(2), 1.0)
    assert tickets(made.turns(1.0)) == [first.ticket, second.ticket]


def test_a_round_of_turns_never_overfills_a_replica() -> None:
    made, routes = busy(2)
    held = [wait(made, request(text(40_000, i), output=10)) for i in range(20)]
    for each in routes:
        made.finish(each.flight, ok(), 1.0)
    ended = made.turns(1.0)
    made.check()
    assert 2 <= len(ended) < len(held)
    for i in range(2):
        load = member(made, i).load
        one_s = max(flight.prediction.prefill_s for flight in load)
        assert load.backlog_s(1.0) <= ON.hold_above_s + one_s


def test_the_replica_is_chosen_when_the_turn_comes() -> None:
    """The prefix it shares with one that was sent off meanwhile did not exist when it came."""
    made, routes = busy(2)
    head = text(60_000, 5)
    for tail in range(2):
        wait(made, request(head + text(400, tail), output=10))
    made.finish(routes[0].flight, ok(), 1.0)
    first = routed(made.turns(1.0))
    while len(first) < 2:
        at = made.next_wakeup()
        assert at is not None
        first += routed(made.turns(at))
    assert first[1].decision.prediction.cached_tokens > 10_000
    assert first[1].endpoints[0] == first[0].endpoints[0]


@pytest.mark.parametrize("api", [Api.OTHER, Api.CHAT])
def test_what_has_no_prompt_is_never_held(api: Api) -> None:
    made, _ = busy()
    wait(made, short())
    bare = replace(short(), api=api, prompt_bytes=None)
    assert isinstance(made.arrive(bare, 0.0), Route)


def test_switched_off_nothing_is_held() -> None:
    made, _ = busy(queue=QueueSettings(enabled=False))
    assert all(isinstance(made.arrive(short(i), 0.0), Route) for i in range(50))


def test_switched_off_while_requests_are_held_they_are_placed() -> None:
    made, _ = busy()
    wait(made, short())
    made.learn(Configured(POOL, PoolSettings(POOL, scraped=False, queue=QueueSettings(enabled=False))), 0.0)
    assert len(routed(made.turns(0.0))) == 1


def test_explaining_a_held_request_tells_where_it_would_go_now() -> None:
    made, _ = busy()
    wait(made, short())
    assert isinstance(made.explain(short(), 0.0), Decision)
    assert made.holding == 1


# --- decode-bound -------------------------------------------------------------------------------------------------------


def full(running: int = 50, waiting: int = 20) -> Router:
    """One replica that has answered in 5 s, and on which requests wait though none is prefilling."""
    made = router(1, queue=ON, scraped=True)
    sample(made, 0, running=0, waiting=0)
    done = made.arrive(short(99), 0.0)
    assert isinstance(done, Route)
    made.finish(done.flight, ok(done.endpoints[0], ttft_s=0.05, duration_s=5.0), 0.1)
    sample(made, 0, 0.1, running=running, waiting=waiting)
    return made


def test_full_slots_hold_requests_though_no_prefill_is_queued() -> None:
    made = full()
    assert member(made).load.backlog_s(0.2) == 0.0
    wait(made, short(), 0.2)
    assert made.turns(0.2) == []


def test_a_sample_with_nothing_waiting_does_not_let_all_go_at_once() -> None:
    """Of 50 slots it can be no more than a few: those that come free within the bound."""
    made = full()
    for i in range(40):
        wait(made, short(i), 0.2)
    assert made.turns(0.2) == []
    sample(made, 0, 0.7, running=48, waiting=0)
    sent = len(routed(made.turns(0.7)))
    assert 2 <= sent <= 12
    sample(made, 0, 1.2, running=55, waiting=0)  # it runs more than was thought: there are more slots
    assert len(routed(made.turns(1.2))) > 12


def test_full_kv_blocks_hold_requests() -> None:
    made = router(1, queue=ON, scraped=True)
    sample(made, 0, running=0, waiting=0, block_size=16, num_blocks=1000)
    done = made.arrive(short(99), 0.0)
    assert isinstance(done, Route)
    made.finish(done.flight, ok(done.endpoints[0], ttft_s=0.05, duration_s=20.0), 0.1)
    flights = []
    for i in range(30):
        verdict = made.arrive(request(text(8000, i), output=200), 0.1 + i)
        if isinstance(verdict, Wait):
            break
        assert isinstance(verdict, Route)
        flights.append(verdict)
        sample(made, 0, 0.5 + i, running=i + 1, waiting=0, block_size=16, num_blocks=1000)
    assert made.holding == 1
    assert member(made).load.backlog_s(20.0) == 0.0
    sample(made, 0, 20.0, running=len(flights), waiting=0, block_size=16, num_blocks=1000)
    assert made.turns(20.0) == []
    made.finish(flights[0].flight, ok(ttft_s=0.1, duration_s=20.0), 20.0)
    assert len(routed(made.turns(20.0))) == 1


def test_a_prompt_that_never_fits_does_not_stand_in_the_way() -> None:
    made = full(running=1, waiting=0)
    sample(made, 0, 0.2, running=1, waiting=0, block_size=16, num_blocks=100)
    assert isinstance(made.arrive(short(1), 0.2), Route)
    fits = wait(made, request(text(5000, 2), output=10), 0.3)
    huge = wait(made, request(text(20_000, 3), output=1, priority=5), 0.3)
    assert tickets(made.turns(0.3)) == [huge.ticket]
    assert fits.ticket != huge.ticket


# --- nobody there -------------------------------------------------------------------------------------------------------


def refuse_all(made: Router, n: int, now: float) -> None:
    """Nothing listens there, as often as it takes to believe it."""
    for i in range(n):
        for _ in range(5):
            made.learn(NotSampled(POOL, address(i), ScrapeFailure.REFUSED), now)


def test_while_every_replica_refuses_connections_requests_are_held_and_then_placed() -> None:
    made = router(2, queue=ON, scraped=True)
    refuse_all(made, 2, 0.0)
    held = wait(made, short(), 0.0)
    assert made.turns(1.0) == []
    sample(made, 1, 2.0, running=0, waiting=0)
    assert tickets(made.turns(2.0)) == [held.ticket]


def test_absence_has_its_own_limit_and_its_own_answer() -> None:
    made = router(2, queue=QueueSettings(absent_wait_s=3.0), scraped=True)
    refuse_all(made, 2, 0.0)
    wait(made, short(), 0.0)
    made.turns(0.0)
    at = made.next_wakeup()
    while at is not None and at < 3.0:
        assert made.turns(at) == []
        at = made.next_wakeup()
    assert refusals(made.turns(3.0)) == [Refusal.ABSENT]


def test_a_pool_without_members_answers_at_once() -> None:
    made = router(0, queue=ON)
    verdict = made.arrive(short(), 0.0)
    assert isinstance(verdict, Reject)
    assert verdict.refusal is Refusal.NO_REPLICAS


def test_those_held_outlive_the_last_member_for_a_while() -> None:
    made, _ = busy(1)
    held = wait(made, short())
    made.learn(Remove(POOL, address(0)), 1.0)
    assert made.turns(1.0) == []
    made.learn(Reset(POOL, replicas(1)), 2.0)
    assert tickets(made.turns(2.0)) == [held.ticket]


def test_a_subset_that_is_gone_is_refused_when_its_turn_comes() -> None:
    made, _ = busy(2)
    wait(made, short(subset=only(1)))
    made.learn(Remove(POOL, address(1)), 1.0)
    assert refusals(made.turns(1.0)) == [Refusal.SUBSET_EMPTY]


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_an_slo_that_nobody_can_meet_is_refused_at_once_and_others_are_not() -> None:
    made, _ = busy(2, queue=QueueSettings(hold_above_s=60.0))
    verdict = made.arrive(short(slo_ttft_s=0.5), 0.0)
    assert isinstance(verdict, Reject)
    assert verdict.refusal is Refusal.SLO
    assert isinstance(made.arrive(short(), 0.0), Route)


def test_the_policy_chooses_among_those_that_can_meet_the_slo() -> None:
    made = router(2, "session_affinity", queue=ON)
    first = made.arrive(request(text(LONG, 1), session="s"), 0.0)
    assert isinstance(first, Route)
    patient = made.arrive(short(session="s"), 0.0)
    hurried = made.arrive(short(session="s", slo_ttft_s=0.5), 0.0)
    assert isinstance(patient, Route)
    assert isinstance(hurried, Route)
    assert patient.endpoints[0] == first.endpoints[0] != hurried.endpoints[0]


def test_when_the_turn_comes_too_late_for_the_slo_it_is_refused() -> None:
    """Its deadline is later: there would be time, had one of higher priority not taken the place before it."""
    made, _ = busy(1, queue=QueueSettings(hold_above_s=1.0))
    free_s = member(made).load.backlog_s(0.0)
    wait(made, request(text(40_000, 2), output=10, priority=1), 0.0)
    held = wait(made, request(text(2000, 3), output=10, slo_ttft_s=free_s + 0.2), 0.0)
    assert tickets(made.turns(free_s - 0.99)) != [held.ticket]
    at = made.next_wakeup()
    assert at is not None
    ended = made.turns(at)
    assert (tickets(ended), refusals(ended)) == ([held.ticket], [Refusal.SLO])
    assert at < held.deadline - 0.5


def test_a_refusal_says_when_to_come_again_once_the_drain_is_known() -> None:
    made, _ = busy(1, queue=QueueSettings(max_requests=20, hold_above_s=0.1))
    for i in range(20):
        wait(made, request(text(20_000, i), output=10))
    early = made.arrive(request(text(40_000, 77), output=10), 0.0)
    assert isinstance(early, Reject)
    assert early.retry_after_s is None
    now = 0.0
    while made.holding > 10:
        at = made.next_wakeup()
        assert at is not None
        now = at
        made.turns(now)
    while not isinstance(late := made.arrive(request(text(40_000, 500 + made.holding), output=10), now), Reject):
        pass
    assert late.refusal is Refusal.QUEUE_FULL
    assert late.retry_after_s is not None
    assert 1.0 <= late.retry_after_s <= 60.0


def test_more_flights_than_allowed_are_refused_and_the_held_stay_held() -> None:
    made = router(1, queue=QueueSettings(enabled=False), max_flights=2)
    for i in range(2):
        assert isinstance(made.arrive(short(i), 0.0), Route)
    verdict = made.arrive(short(3), 0.0)
    assert isinstance(verdict, Reject)
    assert verdict.refusal is Refusal.OVERLOADED


def test_turns_do_not_pass_the_bound_of_flights_either() -> None:
    made, routes = busy(1, max_flights=2)
    for i in range(3):
        wait(made, short(i))
    made.finish(routes[0].flight, ok(), 1.0)
    assert len(made.turns(1.0)) == 2
    assert made.in_flight == 2
    assert made.turns(1.0) == []


# --- ends ---------------------------------------------------------------------------------------------------------------


def test_leaving_frees_the_place_at_once_and_only_once() -> None:
    log = Waits()
    made, _ = busy(queue=QueueSettings(max_requests=1), observer=log)
    first = wait(made, short(1))
    made.leave(first.ticket, 0.5)
    made.leave(first.ticket, 0.5)
    made.leave("nobody", 0.5)
    assert made.holding == 0
    wait(made, short(2), 0.5)
    assert [(w.held.ticket, w.waited_s, w.verdict) for w in log.waits] == [(first.ticket, 0.5, None)]


def test_release_places_all_however_long_they_wait_there() -> None:
    made, _ = busy()
    held = [wait(made, short(i)).ticket for i in range(5)]
    ended = made.release(0.1)
    assert sorted(tickets(ended)) == sorted(held)
    assert len(routed(ended)) == 5
    assert (made.holding, made.release(0.1), made.turns(0.1)) == (0, [], [])


def test_release_refuses_where_nobody_can_be_reached() -> None:
    made = router(1, queue=ON, scraped=True)
    refuse_all(made, 1, 0.0)
    wait(made, short())
    assert refusals(made.release(0.1)) == [Refusal.STOPPING]


def test_observers_hear_of_the_begin_and_the_end_of_each_wait() -> None:
    log = Waits()
    made, routes = busy(1, observer=Several(log), queue=QueueSettings(max_wait_s=5.0))
    one = wait(made, short(1, priority=3, tenant="t"), 0.0)
    two = wait(made, short(2, subset=frozenset({"10.9.9.9"}) | only(0)), 0.0)
    assert [(h.pool, h.ticket, h.priority, h.tenant) for h in log.holds] == [
        (POOL, one.ticket, 3, "t"),
        (POOL, two.ticket, 0, None),
    ]
    made.finish(routes[0].flight, ok(), 1.0)
    made.turns(1.0)
    assert [(w.held.ticket, w.waited_s, type(w.verdict)) for w in log.waits] == [
        (one.ticket, 1.0, Route),
        (two.ticket, 1.0, Route),
    ]
    assert len(log.decisions) == 3


# --- whatever comes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrive:
    prompt: int
    priority: int
    tenant: str | None
    subset: frozenset[str] | None
    slo_ttft_s: float | None


@dataclass(frozen=True, slots=True)
class Finish:
    which: int
    end: End


@dataclass(frozen=True, slots=True)
class Leave:
    which: int


PROMPTS = [text(size, size) for size in (0, 500, 5000, 50_000, 200_000)]
where = st.integers(0, 2).map(address)
arrivals = st.builds(
    Arrive,
    st.integers(0, 4),
    st.integers(0, 2),
    st.sampled_from(["a", "b", None]),
    st.one_of(st.none(), st.none(), st.frozensets(where, min_size=1, max_size=2)),
    st.sampled_from([None, None, None, 0.2, 3.0]),
)
events = st.one_of(
    arrivals,
    arrivals,
    arrivals,
    st.builds(Finish, st.integers(0, 50), st.sampled_from(End)),
    st.builds(Leave, st.integers(0, 50)),
    st.builds(
        Sampled,
        st.just(POOL),
        where,
        st.builds(
            Sample,
            running=st.integers(0, 20),
            waiting=st.integers(0, 20),
            block_size=st.just(16),
            num_blocks=st.sampled_from([None, 500, 5000]),
        ),
    ),
    st.builds(NotSampled, st.just(POOL), where, st.sampled_from(ScrapeFailure)),
    st.builds(Remove, st.just(POOL), where),
    st.builds(Reset, st.just(POOL), st.integers(0, 3).map(replicas)),
)


class Driver:
    """Plays events, asks for turns after each, and counts what became of every request."""

    def __init__(self, scraped: bool) -> None:
        self.queue = QueueSettings(max_requests=6, max_bytes=500_000, max_wait_s=8.0, absent_wait_s=2.0)
        self.log = Waits()
        self.router = router(2, queue=self.queue, observer=self.log, scraped=scraped, max_flights=15, flight_ttl_s=20.0)
        self.now = 0.0
        self.count: Counter[str] = Counter()
        self.waiting: set[str] = set()
        self.flights: list[str] = []

    def took(self, verdict: Verdict) -> None:
        match verdict:
            case Route(flight=flight):
                self.count["routed"] += 1
                self.flights.append(flight)
            case Reject():
                self.count["refused"] += 1
            case Wait(ticket=ticket, deadline=deadline):
                assert ticket not in self.waiting
                assert deadline > self.now
                self.waiting.add(ticket)

    def play(self, event: Any) -> None:
        match event:
            case Arrive():
                self.count["arrived"] += 1
                wanted = request(
                    PROMPTS[event.prompt],
                    output=100,
                    priority=event.priority,
                    tenant=event.tenant,
                    subset=event.subset,
                    slo_ttft_s=event.slo_ttft_s,
                    body_bytes=len(PROMPTS[event.prompt]),
                )
                self.took(self.router.arrive(wanted, self.now))
            case Finish(which=which, end=end):
                if self.flights:
                    self.router.finish(self.flights[which % len(self.flights)], Outcome(end), self.now)
            case Leave(which=which):
                if self.waiting:
                    gone = sorted(self.waiting)[which % len(self.waiting)]
                    self.router.leave(gone, self.now)
                    self.waiting.remove(gone)
                    self.count["left"] += 1
            case fact:
                self.router.learn(fact, self.now)
        self.turns()

    def turns(self) -> None:
        for turn in self.router.turns(self.now):
            self.waiting.remove(turn.ticket)
            self.took(turn.verdict)

    def pass_time(self, until: float) -> None:
        """Ask for turns at each moment that the router names, which it must not do for ever."""
        looks = 0
        while (at := self.router.next_wakeup()) is not None and at <= until:
            looks += 1
            assert looks < 2000
            self.now = max(self.now, at)
            self.router.expire(self.now)
            self.turns()
        self.now = until


@settings(max_examples=150, deadline=None)
@given(script=st.lists(st.tuples(events, st.floats(0.0, 3.0)), max_size=40), scraped=st.booleans())
def test_every_request_ends_once_and_the_bounds_hold(script: list[tuple[Any, float]], scraped: bool) -> None:
    driver = Driver(scraped)
    for event, wait_s in script:
        driver.pass_time(driver.now + wait_s)
        driver.play(event)
        made = driver.router
        made.check()
        count = driver.count
        assert made.holding == len(driver.waiting) <= driver.queue.max_requests
        assert count["arrived"] == count["routed"] + count["refused"] + count["left"] + made.holding
        assert made.in_flight <= 15
        assert made.pools[POOL].admission.queue.bytes <= driver.queue.max_bytes
        at = made.next_wakeup()
        assert not made.holding or (at is not None)
    driver.pass_time(driver.now + 8.0)
    assert (driver.router.holding, driver.waiting) == (0, set())
    assert len(driver.log.holds) == len(driver.log.waits)
    assert Counter(w.held.ticket for w in driver.log.waits) == Counter(h.ticket for h in driver.log.holds)
    driver.router.expire(driver.now + 21.0)
    assert driver.router.in_flight == 0


@settings(max_examples=40, deadline=None)
@given(script=st.lists(st.tuples(events, st.floats(0.0, 3.0)), max_size=40))
def test_the_same_events_give_the_same_turns(script: list[tuple[Any, float]]) -> None:
    one, other = Driver(False), Driver(False)
    for driver in (one, other):
        for event, wait_s in script:
            driver.pass_time(driver.now + wait_s)
            driver.play(event)
    assert repr(one.log.waits) == repr(other.log.waits)
    assert repr(one.log.decisions) == repr(other.log.decisions)
