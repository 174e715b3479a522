"""The queue by itself, with a fleet that is a number of free places."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.admission.admission import RECENT_S, Admission, Work
from extproc.core.admission.queue import Entry
from extproc.core.admission.settings import QueueSettings
from extproc.core.flights import Flight
from extproc.core.types import Api, Decision, End, Outcome, Refusal, Reject, Request, Route, Usage, Wait
from tests.core.support import flight, ok

ANYWHERE = "anywhere"
X = frozenset({"x"})


class Fleet:
    """Free places, anywhere or on replica x alone. What it was asked to place is kept."""

    def __init__(self, admission: Admission, free: int = 0, free_x: int = 0) -> None:
        self.admission = admission
        self.free = {None: free, X: free_x}
        self.now = 0.0
        self.flights: list[Flight] = []
        self.placed: list[Entry] = []
        self.asked = 0

    def place(self, entry: Entry) -> Route | None:
        self.asked += 1
        subset = entry.request.subset
        where = subset if self.free[subset] or subset is not None else X
        if not self.free[where]:
            return None
        self.free[where] -= 1
        return self.send(entry.request, int(entry.tokens), entry)

    def send(self, request: Request, tokens: int, entry: Entry | None = None) -> Route:
        name = f"f{len(self.flights)}"
        sent = replace(flight(name, prompt_tokens=tokens, output_tokens=0.0, at=self.now), tenant=request.tenant)
        self.flights.append(sent)
        self.admission.sent(sent, request.priority, self.now)
        if entry is not None:
            self.placed.append(entry)
        return Route(name, ("x",), decision(name))


def decision(name: str) -> Decision:
    return Decision(0.0, name, "p", "m", Api.CHAT, "none", "none", ("x",), 1, 0.0, flight(name).prediction, ())


def admission(**given: Any) -> Admission:
    return Admission(QueueSettings(**given))


def wanted(tenant: str | None = None, **fields: Any) -> Request:
    return Request(api=Api.CHAT, prompt_bytes=400, body_bytes=10, tenant=tenant, **fields)


def work(tokens: float = 100.0, prefill_s: float = 0.1) -> Work:
    return Work(tokens, prefill_s, prefill_s + 0.01)


def held(
    made: Admission, name: str, request: Request | None = None, now: float = 0.0, work_: Work | None = None
) -> Wait | Reject:
    return made.hold(name, "p", request or wanted(), work_ or work(), False, now)


def turns(made: Admission, fleet: Fleet, now: float, absent: bool = False) -> list[str]:
    """What ended: the ticket, and the refusal if it is one."""
    fleet.now = now
    ended = made.turns(now, fleet.place, absent)
    made.plan(now, None)
    made.queue.check()
    return [
        entry.held.ticket if isinstance(verdict, Route) else f"{entry.held.ticket} {verdict.refusal}"
        for entry, verdict in ended
    ]


# --- order --------------------------------------------------------------------------------------------------------------


def test_places_go_to_the_first_in_order_and_no_further_than_they_reach() -> None:
    made = admission()
    fleet = Fleet(made, free=2)
    for name, priority in (("low", 0), ("high", 2), ("middle", 1)):
        held(made, name, wanted(priority=priority))
    assert turns(made, fleet, 0.0) == ["high", "middle"]
    assert turns(made, fleet, 0.1) == []
    assert len(made) == 1


def test_within_a_tenant_short_prompts_go_first_until_long_ones_have_aged() -> None:
    made = admission(ageing=0.1)
    fleet = Fleet(made)
    held(made, "long", now=0.0, work_=work(prefill_s=1.0))
    held(made, "short", now=8.0, work_=work(prefill_s=0.1))
    held(made, "late", now=9.5, work_=work(prefill_s=0.1))
    fleet.free[None] = 3
    assert turns(made, fleet, 9.5) == ["short", "long", "late"]


def test_tenants_take_turns_by_tokens() -> None:
    made = admission()
    fleet = Fleet(made)
    for i in range(4):
        held(made, f"big{i}", wanted("big"), work_=work(300))
    for i in range(8):
        held(made, f"small{i}", wanted("small"), work_=work(100))
    fleet.free[None] = 8
    counts = Counter(name[:-1] for name in turns(made, fleet, 0.0))
    assert counts == {"big": 2, "small": 6}


def test_the_worked_example_of_the_page() -> None:
    made = admission(ageing=0.0)
    fleet = Fleet(made)
    for name, priority, tenant, tokens, prefill_s in (
        ("A", 0, "red", 1200, 0.02),
        ("B", 0, "red", 9200, 0.2),
        ("C", 0, "blue", 2200, 0.04),
        ("D", 0, "blue", 2200, 0.04),
        ("E", 1, "red", 4200, 0.09),
    ):
        held(made, name, wanted(tenant, priority=priority), work_=work(tokens, prefill_s))
    fleet.free[None] = 5
    assert turns(made, fleet, 0.0) == ["E", "A", "C", "B", "D"]


def test_what_a_flight_really_used_is_charged_in_the_end() -> None:
    made = admission()
    fleet = Fleet(made, free=2)
    for name, tenant in (("a0", "a"), ("b0", "b"), ("a1", "a"), ("b1", "b")):
        held(made, name, wanted(tenant))
    assert turns(made, fleet, 0.0) == ["a0", "b0"]
    made.settle(fleet.flights[0], ok(usage=Usage(100, 500, 20)), 500)
    made.settle(fleet.flights[1], ok(usage=Usage(100, 10, 20)), 10)
    fleet.free[None] = 1
    assert turns(made, fleet, 1.0) == ["b1"]


def test_what_failed_is_not_charged() -> None:
    made = admission()
    fleet = Fleet(made, free=2)
    for name, tenant in (("a0", "a"), ("b0", "b"), ("a1", "a"), ("b1", "b")):
        held(made, name, wanted(tenant))
    turns(made, fleet, 0.0)
    made.settle(fleet.flights[1], Outcome(End.UNREACHABLE, 503), None)
    fleet.free[None] = 1
    assert turns(made, fleet, 1.0) == ["b1"]


def test_who_took_places_while_there_was_no_queue_for_a_moment_is_charged() -> None:
    made = admission()
    fleet = Fleet(made, free=1)
    held(made, "first")
    turns(made, fleet, 0.0)
    for _ in range(5):
        fleet.send(wanted("a"), 100)
    for name, tenant in (("b0", "b"), ("a0", "a"), ("b1", "b")):
        held(made, name, wanted(tenant), now=1.0)
    fleet.free[None] = 2
    assert turns(made, fleet, 1.0) == ["b0", "b1"]


def test_without_a_queue_for_a_while_nothing_is_counted_and_the_past_is_forgotten() -> None:
    made = admission()
    fleet = Fleet(made, free=1)
    held(made, "first")
    turns(made, fleet, 0.0)
    before = made.sent_tokens
    fleet.now = RECENT_S
    fleet.send(wanted("a"), 10_000)
    assert made.sent_tokens == before
    for name, tenant in (("a0", "a"), ("b0", "b")):
        held(made, name, wanted(tenant), now=RECENT_S)
    fleet.free[None] = 1
    assert turns(made, fleet, RECENT_S) == ["a0"]


def test_a_starved_request_goes_before_more_urgent_ones_while_it_has_a_share() -> None:
    made = admission(starved_after_s=5.0, starved_share=0.1)
    fleet = Fleet(made)
    for i in range(3):
        held(made, f"low{i}", now=0.0)
    for i in range(40):
        held(made, f"high{i}", wanted(priority=1), now=1.0)
    fleet.free[None] = 10
    assert all(name.startswith("high") for name in turns(made, fleet, 4.9))
    fleet.free[None] = 20
    ended = turns(made, fleet, 5.0)
    assert [i for i, name in enumerate(ended) if name.startswith("low")] == [0, 1, 11]
    assert made.starved_tokens == pytest.approx(300)
    assert made.sent_tokens == pytest.approx(3000)


def test_without_a_share_priority_is_absolute() -> None:
    made = admission(starved_share=0.0)
    fleet = Fleet(made)
    held(made, "low", now=0.0)
    for i in range(20):
        held(made, f"high{i}", wanted(priority=1), now=1.0)
    fleet.free[None] = 20
    assert "low" not in turns(made, fleet, 20.0)


def test_a_request_whose_replicas_are_full_is_passed_over() -> None:
    made = admission()
    fleet = Fleet(made, free=1)
    for i in range(5):
        held(made, f"only-x{i}", wanted(subset=X, priority=1))
    held(made, "any")
    assert turns(made, fleet, 0.0) == ["any"]
    assert fleet.asked == 2  # one of five alike tells of all
    fleet.free[X] = 1
    assert turns(made, fleet, 0.0) == ["only-x0"]


def test_one_that_may_go_anywhere_and_cannot_ends_the_round() -> None:
    made = admission()
    fleet = Fleet(made)
    for i in range(50):
        held(made, f"w{i}")
    assert turns(made, fleet, 0.0) == []
    assert fleet.asked == 1


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_the_newcomer_or_gives_up_another_in_the_next_round() -> None:
    made = admission(max_requests=2)
    fleet = Fleet(made)
    held(made, "first")
    held(made, "second")
    refused = held(made, "third", now=1.0)
    assert isinstance(refused, Reject)
    assert refused.refusal is Refusal.QUEUE_FULL
    assert isinstance(held(made, "urgent", wanted(priority=1), now=1.0), Wait)
    assert turns(made, fleet, 1.0) == ["second displaced"]


def test_a_wait_ends_at_its_deadline() -> None:
    made = admission(max_wait_s=3.0)
    fleet = Fleet(made)
    wait = held(made, "w", now=1.0)
    assert wait == Wait("w", 4.0)
    assert turns(made, fleet, 3.9) == []
    assert made.next_wakeup == 4.0
    assert turns(made, fleet, 4.0) == ["w deadline"]
    assert made.next_wakeup is None


def test_an_slo_ends_the_wait_while_its_first_token_could_still_have_come() -> None:
    made = admission()
    wait = held(made, "w", wanted(slo_ttft_s=2.0), work_=work(prefill_s=0.49))
    assert isinstance(wait, Wait)
    assert wait.deadline == pytest.approx(1.5)
    assert turns(made, Fleet(made), 1.5) == ["w slo"]


def test_an_slo_that_cannot_be_met_is_refused_at_once() -> None:
    made = admission()
    refused = held(made, "w", wanted(slo_ttft_s=0.05), work_=work(prefill_s=0.1))
    assert isinstance(refused, Reject)
    assert refused.refusal is Refusal.SLO


def draining(rate: float) -> Admission:
    """Has sent off so many tokens a second for ten seconds, and still holds 1000 more."""
    made = admission(max_requests=101)
    fleet = Fleet(made)
    for i in range(100 + 10):
        held(made, f"w{i}", work_=work(rate / 10)) if i < 100 else None
    for i in range(100):
        fleet.free[None] = 1
        turns(made, fleet, (i + 1) / 10) if i < 99 else None
    for i in range(10):
        held(made, f"r{i}", now=9.95, work_=work((1000 - rate / 10) / 10))
    return made


def test_a_newcomer_with_an_slo_is_refused_by_what_stands_before_it_and_how_fast_that_goes() -> None:
    made = draining(200.0)
    assert made.queue.tokens == pytest.approx(1000)
    assert isinstance(held(made, "patient", wanted(slo_ttft_s=8.0), now=9.95), Wait)
    hurried = held(made, "hurried", wanted(slo_ttft_s=4.0), now=9.95)
    assert isinstance(hurried, Reject)
    assert hurried.refusal is Refusal.SLO
    assert hurried.retry_after_s == pytest.approx(1100 / 200, rel=0.1)
    assert isinstance(held(made, "urgent", wanted(slo_ttft_s=4.0, priority=1), now=9.95), Wait)
    assert isinstance(held(made, "other", wanted("other", slo_ttft_s=4.0), now=9.95), Wait)


def test_while_nobody_can_be_reached_all_wait_for_so_long_and_no_longer() -> None:
    made = admission(absent_wait_s=5.0, max_wait_s=30.0)
    fleet = Fleet(made, free=9)
    made.hold("first", "p", wanted(), work(), True, 0.0)
    assert turns(made, fleet, 0.0, absent=True) == []
    made.hold("second", "p", wanted(), work(), True, 2.0)
    assert turns(made, fleet, 4.9, absent=True) == []
    assert made.next_wakeup == 5.0
    assert turns(made, fleet, 5.0, absent=True) == ["first absent"]
    assert turns(made, fleet, 6.0) == ["second"]


def test_a_wait_for_capacity_that_becomes_one_for_replicas_lasts_as_long_from_then() -> None:
    made = admission(absent_wait_s=5.0, max_wait_s=30.0)
    fleet = Fleet(made)
    held(made, "w", now=0.0)
    assert turns(made, fleet, 10.0, absent=True) == []
    assert turns(made, fleet, 14.9, absent=True) == []
    assert turns(made, fleet, 15.0, absent=True) == ["w absent"]


def test_absence_may_be_refused_at_once() -> None:
    refused = admission(absent_wait_s=0.0).hold("w", "p", wanted(), work(), True, 0.0)
    assert isinstance(refused, Reject)
    assert refused.refusal is Refusal.ABSENT


def test_release_ends_all_waits() -> None:
    made = admission()
    fleet = Fleet(made, free=1)
    held(made, "low")
    held(made, "high", wanted(priority=1))
    ended = made.release(0.0, fleet.place)
    assert [(e.held.ticket, isinstance(v, Route)) for e, v in ended] == [("high", True), ("low", False)]
    assert isinstance(ended[1][1], Reject)
    assert ended[1][1].refusal is Refusal.STOPPING
    assert not made.stirs


@pytest.mark.parametrize("request_", [Request(), Request(api=Api.CHAT), Request(api=Api.OTHER, prompt_bytes=5)])
def test_what_cannot_be_weighed_is_never_held(request_: Request) -> None:
    assert not admission().holds(request_)
    assert admission().holds(wanted())
    assert not admission(enabled=False).holds(wanted())


def test_a_lower_bound_applies_to_those_who_come() -> None:
    made = admission(max_requests=5)
    for i in range(5):
        held(made, f"w{i}")
    made.configure(QueueSettings(max_requests=2))
    assert len(made) == 5
    refused = held(made, "more")
    assert isinstance(refused, Reject)


# --- whatever comes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hold:
    priority: int
    tenant: str | None
    tokens: int
    size: int
    subset: frozenset[str] | None
    slo_ttft_s: float | None


@dataclass(frozen=True, slots=True)
class Free:
    subset: frozenset[str] | None
    places: int


@dataclass(frozen=True, slots=True)
class Leave:
    which: int


subsets = st.sampled_from([None, None, X])
steps = st.one_of(
    st.builds(
        Hold,
        st.integers(0, 2),
        st.sampled_from(["a", "b", None]),
        st.integers(1, 500),
        st.integers(0, 30),
        subsets,
        st.sampled_from([None, None, 0.5, 3.0]),
    ),
    st.builds(Free, subsets, st.integers(0, 3)),
    st.builds(Leave, st.integers(0, 30)),
    st.just("absent"),
)


class Book:
    """Plays a script and checks each dispatch against who was waiting."""

    def __init__(self) -> None:
        self.settings = QueueSettings(
            max_requests=8, max_bytes=100, max_wait_s=6.0, absent_wait_s=2.0, starved_after_s=1.0, starved_share=0.2
        )
        self.made = Admission(self.settings)
        self.fleet = Fleet(self.made)
        self.now = 0.0
        self.arrived = self.refused = self.left = self.routed = 0
        self.largest = 1.0

    def place(self, entry: Entry) -> Route | None:
        waiting = list(self.made.queue)
        free = {subset: self.fleet.free[subset] or self.fleet.free[X] for subset in (None, X)}
        free[X] = self.fleet.free[X]
        route = self.fleet.place(entry)
        if route is not None:
            overtaken = [e for e in waiting if e.held.priority > entry.held.priority and free[e.request.subset]]
            starved = self.now - entry.arrived_at >= self.settings.starved_after_s
            assert not overtaken or starved, (entry, overtaken)
        return route

    def play(self, step: Any) -> None:
        match step:
            case Hold():
                request = wanted(step.tenant, priority=step.priority, subset=step.subset, slo_ttft_s=step.slo_ttft_s)
                request = replace(request, body_bytes=step.size)
                self.arrived += 1
                self.largest = max(self.largest, float(step.tokens))
                made = self.made.hold(f"w{self.arrived}", "p", request, work(step.tokens), False, self.now)
                self.refused += isinstance(made, Reject)
            case Free(subset=subset, places=places):
                self.fleet.free[subset] = places
            case Leave(which=which):
                tickets = [entry.held.ticket for entry in self.made.queue]
                if tickets:
                    gone = tickets[which % len(tickets)]
                    assert self.made.leave(gone, self.now) is not None
                    assert self.made.leave(gone, self.now) is None
                    self.left += 1
        self.fleet.now = self.now
        for _, verdict in self.made.turns(self.now, self.place, step == "absent"):
            self.routed += isinstance(verdict, Route)
            self.refused += isinstance(verdict, Reject)
        self.made.plan(self.now, None)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(steps, st.floats(0.0, 2.0)), max_size=80))
def test_every_wait_ends_once_in_order_and_within_the_bounds(script: list[tuple[Any, float]]) -> None:
    book = Book()
    for step, wait_s in script:
        book.now += wait_s
        book.play(step)
        made = book.made
        made.queue.check()
        assert len(made) <= book.settings.max_requests
        assert made.queue.bytes <= book.settings.max_bytes
        assert book.arrived == book.routed + book.refused + book.left + len(made)
        assert made.starved_tokens <= 0.2 * made.sent_tokens + book.largest
        assert all(entry.deadline > book.now for entry in made.queue)
        if len(made):
            assert made.next_wakeup is not None
            assert made.next_wakeup > book.now
    book.now += 6.0
    book.play("absent")
    assert len(book.made) == 0
    assert book.arrived == book.routed + book.refused + book.left


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.integers(1, 400), min_size=30, max_size=30),
    places=st.lists(st.integers(0, 3), min_size=8, max_size=40),
)
def test_tenants_that_wait_all_along_get_the_same_but_for_two_requests(costs: list[int], places: list[int]) -> None:
    made = admission(max_requests=10_000)
    fleet = Fleet(made)
    got: Counter[str | None] = Counter()
    waiting = Counter({"a": 0, "b": 0, "c": 0})
    number = 0
    for i, free in enumerate(places):
        for tenant in "abc" if i >= 5 else "ab":
            while waiting[tenant] < 4:  # always backlogged
                number += 1
                held(made, f"w{number}", wanted(tenant), now=i / 10, work_=work(costs[number % 30]))
                waiting[tenant] += 1
        if i == 5:
            got = Counter()
        fleet.free[None] = free
        before = len(fleet.placed)
        turns(made, fleet, i / 10)
        for entry in fleet.placed[before:]:
            got[entry.held.tenant] += round(entry.tokens)
            waiting[str(entry.held.tenant)] -= 1
        served = [got[tenant] for tenant in ("abc" if i >= 5 else "ab")]
        assert max(served) - min(served) <= 2 * max(costs)
