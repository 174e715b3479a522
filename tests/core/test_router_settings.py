"""Facts on the router itself: its settings change, and it stood still."""

from __future__ import annotations

from dataclasses import replace

from extproc.core.admission.settings import QueueSettings
from extproc.core.health.settings import HealthSettings
from extproc.core.types import Configured, End, Outcome, Progressed, Reset, Route, Stalled
from tests.core.support import POOL, Log, address, member, replicas, request, router, text


def test_other_settings_lose_nothing_that_was_learned() -> None:
    made = router(2)
    prompt = text(8_000)
    route = made.arrive(request(prompt), 0.0)
    assert isinstance(route, Route)
    made.finish(route.flight, Outcome(End.OK, status=200, duration_s=1.0, ttft_s=0.5, replica_ttft_s=0.5), 1.0)
    chosen = member(made, route.endpoints[0])
    index, speed = made.pools[POOL].index, chosen.speed
    settings = made.pools[POOL].settings
    made.learn(Configured(POOL, replace(settings, policy="least_request", health=HealthSettings(failures=7))), 2.0)
    pool = made.pools[POOL]
    assert pool.policy.name == "least_request"
    assert pool.settings.health.failures == 7
    assert pool.index is index
    assert member(made, route.endpoints[0]).speed is speed
    assert index.match(request(prompt).blocks)
    made.check()


def test_a_policy_that_stays_keeps_what_it_knows() -> None:
    made = router(3, "round_robin")
    policy = made.pools[POOL].policy
    made.learn(Configured(POOL, replace(made.pools[POOL].settings, models=("m", "n"))), 0.0)
    assert made.pools[POOL].policy is policy
    assert made.pools[POOL].serves("n")


def test_thresholds_reach_those_who_are_members_and_those_who_join() -> None:
    made = router(1, scraped=True)
    settings = replace(made.pools[POOL].settings, stale_after_s=1.0, health=HealthSettings(failures=7))
    made.learn(Configured(POOL, settings), 0.0)
    made.learn(Reset(POOL, replicas(2)), 1.0)
    assert [member(made, i).stale_after_s for i in (0, 1)] == [1.0, 1.0]
    assert [member(made, i).health.settings.failures for i in (0, 1)] == [7, 7]


def test_the_queue_takes_its_bounds() -> None:
    made = router(1)
    made.learn(Configured(POOL, replace(made.pools[POOL].settings, queue=QueueSettings(max_requests=3))), 0.0)
    assert made.pools[POOL].settings.queue.max_requests == 3


def test_settings_of_a_pool_that_is_not_there_change_nothing() -> None:
    made = router(1)
    made.learn(Configured("other", replace(made.pools[POOL].settings, name="other")), 0.0)
    assert list(made.pools) == [POOL]


def test_time_in_which_the_router_stood_still_expires_no_flight() -> None:
    log = Log()
    made = router(2, observer=log, flight_ttl_s=3.0)
    flights = [verdict.flight for _ in range(3) if isinstance(verdict := made.arrive(request("Hi"), 0.0), Route)]
    made.learn(Progressed(flights[0], None, None, 0), 1.0)
    made.learn(Stalled(60.0), 61.5)
    assert made.expire(61.5) == 0
    assert made.next_wakeup() is not None
    assert made.expire(63.5) == 2  # as if it were 3.5 s
    assert made.expire(64.5) == 1
    assert {end.outcome.end for end in log.ends} == {End.LOST}
    made.check()


def test_silence_while_the_router_stood_still_is_none() -> None:
    made = router(1)
    before = member(made, 0).heard_at
    made.learn(Stalled(5.0), 5.0)
    assert member(made, address(0)).heard_at == before + 5.0


def test_a_flight_that_nobody_ever_reported_is_forgotten() -> None:
    log = Log()
    made = router(2, observer=log)
    verdict = made.arrive(request("Hi"), 0.0)
    assert isinstance(verdict, Route)
    assert made.forget(verdict.flight, 3.0)
    assert [end.outcome.end for end in log.ends] == [End.CLIENT_GONE]
    assert not made.forget(verdict.flight, 3.0)
    made.check()


def test_a_flight_that_was_reported_is_not() -> None:
    made = router(2)
    verdict = made.arrive(request("Hi"), 0.0)
    assert isinstance(verdict, Route)
    made.learn(Progressed(verdict.flight, None, None, 0), 1.0)
    assert not made.forget(verdict.flight, 3.0)
    assert made.in_flight == 1
