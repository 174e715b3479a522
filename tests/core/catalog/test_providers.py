"""A provider as a target: flights without replicas, prices, budgets, and what its failures do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.core.catalog.providers import BELIEVED_S, FAILURES, OUT_S, TENANTS
from extproc.core.catalog.settings import ProviderSettings
from extproc.core.router import Router
from extproc.core.types import (
    Decision,
    End,
    Outcome,
    Progressed,
    Refusal,
    Reject,
    Remove,
    Route,
    Usage,
)
from tests.core.catalog.support import at, catalog, chat, model, placed, pools, target
from tests.core.support import Log, ok, text, usage

PRICED = ProviderSettings("cloud", prompt_dollars=2.0, output_dollars=10.0)


def outside(settings: ProviderSettings = PRICED, observer: Log | None = None) -> Router:
    """A pool without anybody, and a provider behind it."""
    of = model(target("a"), fallback=(target("cloud", engine="gpt-4o"),))
    made = pools("a", configured=catalog(of, providers=[settings]), observer=observer)
    made.learn(Remove("a", at("a")), 0.0)
    return made


def test_a_provider_takes_what_the_pool_cannot() -> None:
    log = Log()
    made = outside(observer=log)
    route = placed(made, chat(text(400), output=50), 1.0)
    assert route.endpoints == ()
    assert (route.decision.pool, route.decision.model, route.decision.policy) == ("cloud", "gpt-4o", "provider")
    assert route.decision.target is not None
    assert route.decision.target.to == "cloud"
    assert route.patience_s is None
    assert made.in_flight == len(made.steering.providers["cloud"]) == 1
    assert [d.pool for d in log.decisions] == ["cloud"]
    assert made.steering.spilled == {("chat", "cloud", Refusal.NO_REPLICAS): 1}
    made.learn(Progressed(route.flight, 0.3, 0.3, 100, "1.2.3.4:443"), 1.5)
    made.check()
    made.finish(route.flight, ok("1.2.3.4:443", ttft_s=0.3, usage=usage(100, 20)), 2.0)
    made.check()
    assert made.in_flight == len(made.steering.providers["cloud"]) == 0
    (ended,) = log.ends
    assert (ended.moved, ended.output_tokens, log.rejects) == (False, 20, [])


def test_a_flight_there_that_nobody_ends_is_swept() -> None:
    made = outside()
    placed(made, chat(text(400)), 0.0)
    assert made.expire(1000.0) == 1
    assert len(made.steering.providers["cloud"]) == 0


def test_what_is_paid_is_what_usage_says() -> None:
    made = outside()
    cloud = made.steering.providers["cloud"]
    route = placed(made, chat(text(4000), output=1000), 0.0)
    expected = (1000 * 2.0 + 256 * 10.0) / 1e6
    assert cloud.dollars.spent(0.0) == pytest.approx(expected)
    assert cloud.paid_dollars == 0.0
    made.finish(route.flight, ok(usage=usage(1200, 30)), 1.0)
    assert cloud.paid_dollars == pytest.approx(1200 * 2e-6 + 30 * 10e-6)
    assert cloud.dollars.spent(1.0) == pytest.approx(cloud.paid_dollars)
    assert cloud.tokens.spent(1.0) == pytest.approx(1230)
    assert cloud.used_tokens == {"prompt": 1200, "output": 30}


@pytest.mark.parametrize(
    ("outcome", "prompt", "output"),
    [
        (Outcome(End.UNREACHABLE), 0, 0),
        (Outcome(End.CLIENT_ERROR, status=400, response_bytes=200), 0, 0),
        (Outcome(End.OK, status=200, response_bytes=1800, duration_s=1.0), 1000, 10),
        (Outcome(End.CLIENT_GONE, status=200, response_bytes=900), 1000, 5),
        (Outcome(End.UPSTREAM_ERROR, status=200, response_bytes=900), 1000, 5),
        (Outcome(End.TIMEOUT, status=504, response_bytes=100), 0, 0),
        (Outcome(End.LOST), 0, 0),
    ],
)
def test_without_usage_what_began_is_paid_by_estimate(outcome: Outcome, prompt: int, output: int) -> None:
    made = outside()
    route = placed(made, chat(text(4000)), 0.0)
    made.finish(route.flight, outcome, 1.0)
    assert dict(made.steering.providers["cloud"].used_tokens) == {"prompt": prompt, "output": output}
    assert made.steering.providers["cloud"].tokens.spent(1.0) == pytest.approx(prompt + output)


def test_each_of_several_answers_is_reserved_for() -> None:
    made = outside()
    placed(made, chat(text(4000), samples=3), 0.0)
    assert made.steering.providers["cloud"].tokens.spent(0.0) == pytest.approx(1000 + 3 * 256)


def test_a_flight_that_is_lost_is_paid_as_far_as_it_was_heard_of() -> None:
    made = outside()
    route = placed(made, chat(text(4000)), 0.0)
    made.learn(Progressed(route.flight, 0.3, 0.3, 1800, None), 1.0)
    assert made.expire(100_000.0) == 1
    assert made.steering.providers["cloud"].used_tokens == {"prompt": 1000, "output": 10}


@pytest.mark.parametrize(
    "settings",
    [
        ProviderSettings("cloud", prompt_dollars=2.0, output_dollars=10.0, daily_dollars=0.0100),
        ProviderSettings("cloud", daily_tokens=2600),
    ],
)
def test_no_more_is_sent_there_than_the_budget_allows(settings: ProviderSettings) -> None:
    made = outside(settings)
    wanted = chat(text(4000))  # 1000 tokens and 256 expected
    first, second = placed(made, wanted, 0.0), placed(made, wanted, 0.0)
    refused = made.arrive(wanted, 0.0)
    assert isinstance(refused, Reject)
    assert refused.refusal is Refusal.NO_REPLICAS, "what the first option said"
    made.finish(first.flight, ok(usage=usage(1000, 1)), 1.0)
    made.finish(second.flight, ok(usage=usage(1000, 1)), 1.0)
    placed(made, chat(text(400), output=10), 2.0)


def test_a_budget_that_is_spent_is_said_where_there_is_nobody_else() -> None:
    only = catalog(model(target("cloud")), providers=[ProviderSettings("cloud", daily_tokens=100)])
    refused = pools("a", configured=only).arrive(chat(text(4000)), 0.0)
    assert isinstance(refused, Reject)
    assert refused.refusal is Refusal.BUDGET


def test_a_provider_that_fails_is_passed_over_for_a_while() -> None:
    made = outside()
    for i in range(FAILURES):
        route = placed(made, chat(text(400)), float(i))
        made.finish(route.flight, Outcome(End.UPSTREAM_ERROR, status=502), float(i))
    refused = made.arrive(chat(text(400)), 3.0)
    assert isinstance(refused, Reject)
    again = placed(made, chat(text(400)), 2.0 + 5.0)
    made.finish(again.flight, ok(), 8.0)
    assert not made.steering.providers["cloud"].absent(8.0)


def test_an_answer_between_them_makes_failures_count_anew() -> None:
    made = outside()
    for outcome in (*[Outcome(End.TIMEOUT)] * (FAILURES - 1), ok(), Outcome(End.TIMEOUT)):
        made.finish(placed(made, chat(text(400)), 0.0).flight, outcome, 0.0)
    assert not made.steering.providers["cloud"].absent(0.0)


@pytest.mark.parametrize(
    ("outcome", "out"),
    [
        (Outcome(End.CLIENT_ERROR, status=400), False),
        (Outcome(End.CLIENT_ERROR, status=404), False),
        (Outcome(End.CLIENT_ERROR, status=429), True),
        (Outcome(End.OK, status=200, broken=True), True),
        (Outcome(End.CLIENT_GONE), False),
    ],
)
def test_of_other_ends_those_count_that_are_no_fault_of_the_request(outcome: Outcome, out: bool) -> None:
    made = outside()
    for _ in range(FAILURES):
        made.finish(placed(made, chat(text(400)), 0.0).flight, outcome, 0.0)
    assert made.steering.providers["cloud"].absent(1.0) is out


def test_a_subset_hint_leaves_no_way_out() -> None:
    refused = outside().arrive(chat(text(400), subset=frozenset({"10.9.9.9:1"})), 0.0)
    assert isinstance(refused, Reject)


def test_who_cannot_have_a_first_token_in_time_is_not_sent_there() -> None:
    assert isinstance(outside().arrive(chat(text(400), slo_ttft_s=0.1), 0.0), Reject)
    assert isinstance(outside().arrive(chat(text(400), slo_ttft_s=2.0), 0.0), Route)


def test_what_would_be_sent_there_is_explained_and_reserves_nothing() -> None:
    made = pools("a", configured=catalog(model(target("cloud")), providers=[PRICED]))
    decision = made.explain(chat(text(400)), 0.0)
    assert isinstance(decision, Decision)
    assert (decision.pool, decision.flight) == ("cloud", "")
    assert len(made.steering.providers["cloud"]) == 0
    assert made.steering.providers["cloud"].dollars.spent(0.0) == 0.0


def test_a_budget_that_is_spent_is_explained_as_it_would_be_met() -> None:
    made = pools("a", configured=catalog(model(target("cloud")), providers=[replace(PRICED, daily_tokens=900)]))
    asked = chat(text(1200))
    assert isinstance(made.explain(asked, 0.0), Decision)
    placed(made, asked, 0.0)
    explained = made.explain(asked, 1.0)
    assert isinstance(explained, Reject)
    assert explained.refusal is Refusal.BUDGET
    assert explained == made.arrive(asked, 1.0)


def test_what_was_spent_and_learned_outlives_a_change_while_nothing_is_in_flight() -> None:
    made = outside()
    made.finish(placed(made, chat(text(4000)), 0.0).flight, ok(usage=usage(1000, 10)), 1.0)
    before = made.steering.providers["cloud"]
    made.learn(catalog(model(target("a"), fallback=(target("cloud"),)), providers=[PRICED]), 2.0)
    assert made.steering.providers["cloud"] is before
    assert before.tokens.spent(2.0) == 1010


def test_another_price_keeps_what_was_spent_and_a_flight_outlives_its_provider() -> None:
    made = outside()
    route = placed(made, chat(text(4000)), 0.0)
    of = model(target("a"), fallback=(target("cloud"),))
    cheaper = ProviderSettings("cloud", prompt_dollars=1.0, output_dollars=1.0, daily_dollars=1.0)
    made.learn(catalog(of, providers=[cheaper]), 1.0)
    cloud = made.steering.providers["cloud"]
    assert cloud.dollars.limit == 1.0
    assert cloud.dollars.spent(1.0) > 0.0
    made.finish(route.flight, ok(usage=usage(1000, 1000)), 2.0)
    assert cloud.paid_dollars == pytest.approx(0.002)
    last = placed(made, chat(text(4000)), 3.0)
    made.learn(catalog(), 4.0)
    made.finish(last.flight, ok(usage=Usage(1, 1)), 5.0)
    made.check()
    assert made.in_flight == 0


def fail(made: Router, *routes: Route, now: float) -> None:
    for route in routes:
        made.finish(route.flight, Outcome(End.UPSTREAM_ERROR, status=502), now)


def test_a_provider_that_was_out_is_tried_by_one_request_at_a_time() -> None:
    made = outside()
    fail(made, *(placed(made, chat(text(400)), 0.0) for _ in range(FAILURES)), now=1.0)
    trial = placed(made, chat(text(400)), 1.0 + OUT_S[0])
    assert isinstance(made.arrive(chat(text(400)), 6.0), Reject), "while the first finds out"
    fail(made, trial, now=6.5)
    assert isinstance(made.arrive(chat(text(400)), 6.5 + OUT_S[1] - 0.1), Reject), "longer after each failure"
    silent = placed(made, chat(text(400)), 17.0)
    again = placed(made, chat(text(400)), 17.0 + OUT_S[0])
    made.finish(again.flight, ok(), 23.0)
    for _ in range(2):
        placed(made, chat(text(400)), 23.0)
    made.finish(silent.flight, Outcome(End.CLIENT_GONE), 24.0)


def test_requests_that_fail_together_are_one_failure_more_and_none_is_lost() -> None:
    made = outside()
    cloud = made.steering.providers["cloud"]
    fail(made, *[placed(made, chat(text(40)), 0.0) for _ in range(2000)], now=1.0)
    assert (made.in_flight, len(cloud)) == (0, 0)
    assert not cloud.absent(1.0 + OUT_S[0])


def test_it_stays_out_for_a_minute_at_most_however_long_it_fails() -> None:
    made, now = outside(), 0.0
    for _ in range(2000):
        fail(made, placed(made, chat(text(40)), now), now=now)
        now += OUT_S[-1]


def test_slow_answers_of_long_ago_do_not_keep_those_in_haste_away() -> None:
    made = outside()
    slow = placed(made, chat(text(400), stream=True), 0.0)
    made.finish(slow.flight, ok(ttft_s=100.0, usage=usage(100, 20)), 100.0)
    hasty = chat(text(400), slo_ttft_s=2.0)
    assert isinstance(made.arrive(hasty, 101.0), Reject)
    assert placed(made, hasty, 100.0 + BELIEVED_S).decision.prediction.ttft_s <= 2.0


BOUNDS = [
    ProviderSettings("cloud", prompt_dollars=2.0, output_dollars=10.0, tenant_dollars=0.0100),
    ProviderSettings("cloud", tenant_tokens=2600),
]


@pytest.mark.parametrize("settings", BOUNDS)
def test_what_one_tenant_has_spent_is_nothing_to_another(settings: ProviderSettings) -> None:
    made = outside(settings)
    one, other, nobody = (chat(text(4000), tenant=tenant) for tenant in ("a", "b", None))
    first, _ = placed(made, one, 0.0), placed(made, one, 0.0)
    assert isinstance(made.arrive(one, 0.0), Reject)
    placed(made, other, 0.0)
    placed(made, nobody, 0.0)
    made.finish(first.flight, ok(usage=usage(100, 1)), 1.0)
    placed(made, one, 2.0)


def test_a_tenant_that_has_spent_its_part_is_told_when_to_come_again() -> None:
    settings = ProviderSettings("cloud", tenant_tokens=2000, daily_tokens=10_000)
    made = pools("a", configured=catalog(model(target("cloud")), providers=[settings]))
    wanted = chat(text(4000), tenant="a")
    placed(made, wanted, 0.0)
    refused = made.arrive(wanted, 600.0)
    assert isinstance(refused, Reject)
    assert (refused.refusal, refused.retry_after_s) == (Refusal.BUDGET, 24 * 3600 - 600.0)


def test_bounds_of_tenants_may_come_and_go() -> None:
    made, wanted = outside(BOUNDS[1]), chat(text(4000), tenant="a")
    routes = [placed(made, wanted, 0.0), placed(made, wanted, 0.0)]
    of = model(target("a"), fallback=(target("cloud", engine="gpt-4o"),))
    made.learn(catalog(of, providers=[replace(BOUNDS[1], tenant_tokens=3800)]), 1.0)
    routes.append(placed(made, wanted, 1.0))
    assert isinstance(made.arrive(wanted, 1.0), Reject)
    made.learn(catalog(of, providers=[replace(BOUNDS[1], tenant_tokens=None)]), 2.0)
    routes.append(placed(made, wanted, 2.0))
    for route in routes:
        made.finish(route.flight, ok(usage=usage(1000, 10)), 3.0)
    assert made.steering.providers["cloud"].tokens.spent(3.0) == pytest.approx(4 * 1010)


def test_only_so_many_tenants_are_remembered() -> None:
    made = outside(BOUNDS[1])
    cloud = made.steering.providers["cloud"]
    for i in range(TENANTS + 10):
        made.finish(placed(made, chat(text(4), tenant=f"t{i}"), 0.0).flight, ok(usage=usage(1, 1)), 0.0)
    assert len(cloud._of_tenants) == TENANTS
