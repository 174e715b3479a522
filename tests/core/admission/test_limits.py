"""Limits through the router: who is refused and for how long, and that every path undoes what it counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.account import Account, Most, Rate
from extproc.core.admission import limits
from extproc.core.admission.settings import QueueSettings
from extproc.core.router import Router
from extproc.core.types import Api, End, Outcome, Refusal, Reject, Remove, Request, Route, Wait
from tests.core.support import POOL, Log, address, ok, only, request, router, text, usage

FREE = Account("t", "free", requests=Rate(10, 10))
TOKENS = Account("t", "free", tokens=Rate(1000, 1000))
ONE = Account("t", "free", in_flight=Most(1))


def ask(account: Account, *, tokens: int = 100, **fields: Any) -> Request:
    """A request of a known size, without output."""
    return request(api=Api.EMBEDDINGS, output=0, prompt_tokens=tokens, account=account, **fields)


def refused(made: Router, wanted: Request, now: float = 0.0) -> Reject:
    verdict = made.arrive(wanted, now)
    assert isinstance(verdict, Reject)
    made.check()
    return verdict


def passed(made: Router, wanted: Request, now: float = 0.0) -> Route:
    verdict = made.arrive(wanted, now)
    assert isinstance(verdict, Route), verdict
    made.check()
    return verdict


# --- which limit ------------------------------------------------------------------------------------------------------


def test_the_eleventh_request_is_refused_and_told_when_to_come_again() -> None:
    made = router()
    left = [passed(made, ask(FREE)).allowance for _ in range(10)]
    assert [a.requests.remaining for a in left if a and a.requests] == list(range(9, -1, -1))
    reject = refused(made, ask(FREE))
    assert (reject.refusal, reject.limit) == (Refusal.RATE_LIMITED, 10)
    assert reject.retry_after_s == pytest.approx(6.0)
    assert reject.allowance is not None
    assert reject.allowance.requests is not None
    assert reject.allowance.requests.remaining == 0
    assert reject.allowance.requests.reset_s == pytest.approx(60.0)
    passed(made, ask(FREE), 6.0)


def test_explaining_says_the_refusal_and_counts_nothing() -> None:
    made = router()
    for _ in range(20):
        assert not isinstance(made.explain(ask(FREE), 0.0), Reject)
    for _ in range(10):
        passed(made, ask(FREE))
    before = (dict(made.limits.results), made.limits.allowance(FREE, 0.0))
    explained = made.explain(ask(FREE), 0.0)
    assert isinstance(explained, Reject)
    assert explained.refusal is Refusal.RATE_LIMITED
    assert explained.retry_after_s == pytest.approx(6.0)
    assert (dict(made.limits.results), made.limits.allowance(FREE, 0.0)) == before


def test_tenants_do_not_share_and_requests_without_an_account_are_free() -> None:
    made = router()
    for _ in range(10):
        passed(made, ask(FREE))
    passed(made, ask(replace(FREE, tenant="another")))
    assert passed(made, request()).allowance is None


def test_a_model_that_is_counted_apart_has_a_meter_of_its_own() -> None:
    made = router()
    apart = replace(FREE, requests=Rate(1, 1, "m"))
    for _ in range(10):
        passed(made, ask(FREE))
    passed(made, ask(apart))
    refused(made, ask(apart))


def test_in_flight_is_counted_until_the_end() -> None:
    made = router()
    route = passed(made, ask(ONE))
    assert refused(made, ask(ONE)).refusal is Refusal.CONCURRENCY
    made.finish(route.flight, ok(), 1.0)
    passed(made, ask(ONE), 1.0)


def test_a_prompt_that_can_never_pass_is_told_so() -> None:
    made = router()
    reject = refused(made, ask(replace(FREE, max_prompt_tokens=500), tokens=501))
    assert (reject.refusal, reject.limit, reject.retry_after_s) == (Refusal.PROMPT_TOO_LONG, 500, None)
    assert refused(made, ask(TOKENS, tokens=1001)).refusal is Refusal.PROMPT_TOO_LONG
    passed(made, ask(TOKENS, tokens=1000))


def test_the_longest_wait_is_told_where_two_limits_are_in_the_way() -> None:
    made = router()
    both = Account("t", "free", requests=Rate(10, 1), tokens=Rate(600, 600))
    passed(made, ask(both, tokens=600))
    reject = refused(made, ask(both, tokens=600))
    assert reject.refusal is Refusal.TOKENS_LIMITED
    assert reject.retry_after_s == pytest.approx(60.0)
    reject = refused(made, ask(both, tokens=1))
    assert reject.refusal is Refusal.RATE_LIMITED
    assert reject.retry_after_s == pytest.approx(6.0)


def test_nothing_is_counted_of_a_request_that_is_refused_for_another_reason() -> None:
    made = router()
    nowhere = ask(FREE, subset=frozenset({"10.9.9.9:1"}))
    for _ in range(20):
        assert refused(made, nowhere).refusal is Refusal.SUBSET_EMPTY
    assert passed(made, ask(FREE)).allowance == made.limits.allowance(FREE, 0.0)
    assert made.limits._meter(("t", "requests", "")).quota(FREE.requests or Rate(1, 1), 0.0).remaining == 9


# --- tokens are settled -----------------------------------------------------------------------------------------------


def left(made: Router, now: float = 0.0) -> int:
    quota = made.limits.allowance(TOKENS, now).tokens
    assert quota is not None
    return quota.remaining


@pytest.mark.parametrize(
    ("outcome", "remains"),
    [
        (ok(usage=usage(150, 50)), 800),  # by what was reported
        (ok(usage=usage(60, 20)), 920),
        (ok(usage=usage(1500, 500)), 0),  # a debt
        (Outcome(End.LOST), 900),  # nobody knows: the estimate stands
        (Outcome(End.CLIENT_ERROR, 400), 1000),
        (Outcome(End.UNREACHABLE), 1000),
        (Outcome(End.UPSTREAM_ERROR, 500), 1000),
        (Outcome(End.CLIENT_GONE), 1000),  # before any replica had it
        (Outcome(End.CLIENT_GONE, served=address(0)), 900),  # one did, and computed the prompt
    ],
    ids=lambda value: value.end.value if isinstance(value, Outcome) else str(value),
)
def test_tokens_are_settled_by_what_came_of_it(outcome: Outcome, remains: int) -> None:
    made = router()
    route = passed(made, ask(TOKENS))
    assert left(made) == 900
    made.finish(route.flight, outcome, 0.0)
    made.check()
    assert left(made) == remains


def test_a_debt_is_paid_before_the_next_request() -> None:
    made = router()
    route = passed(made, ask(TOKENS))
    made.finish(route.flight, ok(usage=usage(1500, 500)), 0.0)
    assert refused(made, ask(TOKENS), 60.0).refusal is Refusal.TOKENS_LIMITED
    passed(made, ask(TOKENS), 66.1)


@pytest.mark.parametrize(
    ("outcome", "remains"),
    [
        (Outcome(End.UNREACHABLE), 10),
        (Outcome(End.UPSTREAM_ERROR, 500), 10),
        (Outcome(End.CLIENT_GONE), 10),
        (Outcome(End.UPSTREAM_ERROR, 200, response_bytes=100, served=address(0)), 9),
        (Outcome(End.CLIENT_ERROR, 400), 9),
        (Outcome(End.CLIENT_GONE, served=address(0)), 9),
        (ok(), 9),
    ],
    ids=str,
)
def test_a_request_that_failed_by_our_fault_is_given_back(outcome: Outcome, remains: int) -> None:
    made = router()
    made.finish(passed(made, ask(FREE)).flight, outcome, 0.0)
    quota = made.limits.allowance(FREE, 0.0).requests
    assert quota is not None
    assert quota.remaining == remains


# --- held requests ----------------------------------------------------------------------------------------------------


def full(**queue: Any) -> Router:
    """One replica that is busy for seconds."""
    made = router(1, queue=QueueSettings(**queue))
    for i in range(3):
        made.arrive(request(text(200_000, i), output=10, subset=only(0)), 0.0)
    return made


def test_a_held_request_counts_and_its_turn_moves_the_count_to_the_flight() -> None:
    made = full()
    wait = made.arrive(ask(ONE), 0.0)
    assert isinstance(wait, Wait)
    made.check()
    assert wait.ticket in made.limits
    assert refused(made, ask(ONE)).refusal is Refusal.CONCURRENCY
    [turn] = [turn for turn in made.release(1.0) if turn.ticket == wait.ticket]
    assert isinstance(turn.verdict, Route)
    assert turn.verdict.allowance is not None
    assert turn.verdict.flight in made.limits
    assert wait.ticket not in made.limits
    made.check()
    made.finish(turn.verdict.flight, ok(), 2.0)
    passed_or_held = made.arrive(ask(ONE), 2.0)
    assert not isinstance(passed_or_held, Reject)


def test_who_leaves_while_held_has_taken_nothing() -> None:
    made = full()
    wait = made.arrive(ask(FREE), 0.0)
    assert isinstance(wait, Wait)
    made.leave(wait.ticket, 0.5)
    made.check()
    quota = made.limits.allowance(FREE, 0.5).requests
    assert quota is not None
    assert quota.remaining == 10


def test_nor_has_who_waited_in_vain() -> None:
    made = full(max_wait_s=1.0)
    wait = made.arrive(ask(FREE), 0.0)
    assert isinstance(wait, Wait)
    [turn] = [turn for turn in made.turns(1.5) if turn.ticket == wait.ticket]
    assert isinstance(turn.verdict, Reject)
    made.check()
    assert wait.ticket not in made.limits
    quota = made.limits.allowance(FREE, 1.5).requests
    assert quota is not None
    assert quota.remaining == 10


# --- bounds and invariants --------------------------------------------------------------------------------------------


def test_the_number_of_meters_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_METERS", 100)
    made = router()
    for i in range(500):
        passed(made, ask(replace(FREE, tenant=f"t{i}")))
    assert "100 meters" in repr(made.limits)


STEPS = st.sampled_from(["arrive", "arrive", "arrive", "end", "lose", "leave", "turns", "gone", "time"])


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(STEPS, st.integers(0, 5)), max_size=60))
def test_after_all_ends_nothing_is_in_flight_whatever_happened(steps: list[tuple[str, int]]) -> None:
    made = router(2, queue=QueueSettings(max_wait_s=5.0), observer=Log(), flight_ttl_s=30.0)
    now, flights, tickets = 0.0, [], []
    account = Account("t", "free", "", Rate(60, 30), Rate(500_000, 500_000), Most(8), 100_000)
    for step, n in steps:
        if step == "arrive":
            verdict = made.arrive(request(text(40_000 * n, n), output=20, account=account), now)
            if isinstance(verdict, Route):
                flights.append(verdict.flight)
            elif isinstance(verdict, Wait):
                tickets.append(verdict.ticket)
        elif step == "end" and flights:
            made.finish(flights.pop(n % len(flights)), ok(usage=usage(10 * n, n)), now)
        elif step == "lose" and flights:
            made.finish(flights.pop(), Outcome(End.UNREACHABLE), now)
        elif step == "leave" and tickets:
            made.leave(tickets.pop(), now)
        elif step == "gone":
            made.learn(Remove(POOL, address(0)), now)
        elif step == "time":
            now += n
            made.expire(now)
        flights += [t.verdict.flight for t in made.turns(now) if isinstance(t.verdict, Route)]
        made.check()
    flights += [t.verdict.flight for t in made.release(now) if isinstance(t.verdict, Route)]
    for flight in flights:
        made.finish(flight, ok(), now)
    made.expire(now + 100.0)
    made.check()
    assert list(made.limits.counted) == []
    assert not made.limits.in_flight.here
