"""Requests that the proxy gives to another replica than the one chosen, and replicas that wait for a trial."""

from __future__ import annotations

import pytest

from extproc.core.health.states import State
from extproc.core.router import Router
from extproc.core.types import End, NotSampled, Outcome, Progressed, Sample, Sampled, ScrapeFailure
from tests.core.support import POOL, address, member, ok, only, request, route, router, text

BAD, GOOD = address(0), address(1)


@pytest.fixture
def made() -> Router:
    return router(2, scraped=False)


def sent(made: Router, i: int = 0, now: float = 0.0, seed: int = 0) -> str:
    return route(made, request(text(2000, seed), output=50, subset=only(i)), now).flight


def test_the_load_goes_along(made: Router) -> None:
    flight = sent(made)
    made.learn(Progressed(flight, None, None, 0, GOOD), 6.0)
    assert [len(member(made, i).load) for i in (0, 1)] == [0, 1]
    made.check()
    made.finish(flight, ok(GOOD), 7.0)
    assert [len(member(made, i).load) for i in (0, 1)] == [0, 0]
    made.check()


def test_it_may_come_back(made: Router) -> None:
    """Of two that are asked the first may answer after all."""
    flight = sent(made)
    made.learn(Progressed(flight, None, None, 0, GOOD), 6.0)
    made.learn(Progressed(flight, 7.0, 7.0, 100, BAD), 7.0)
    assert [len(member(made, i).load) for i in (0, 1)] == [1, 0]
    made.check()
    made.finish(flight, ok(BAD), 8.0)
    made.check()


def test_what_another_brings_is_no_sign_of_work(made: Router) -> None:
    """A stopped replica was taken for well because the alternate's bytes counted as its own."""
    flight = sent(made)
    heard, speed = member(made).heard_at, member(made).speed.prefill_factor
    made.learn(Progressed(flight, 6.5, 0.1, 500, GOOD), 7.0)
    assert member(made).heard_at == heard
    assert member(made, 1).heard_at == 7.0
    assert member(made).speed.prefill_factor == speed


def test_to_a_stranger_or_one_that_left_it_takes_its_load_along(made: Router) -> None:
    flight = sent(made)
    made.learn(Progressed(flight, None, None, 0, "10.9.9.9:1"), 6.0)
    assert len(member(made).load) == 0
    made.check()
    made.finish(flight, ok("10.9.9.9:1"), 7.0)
    made.check()


def test_on_probation_the_next_request_is_a_trial(made: Router) -> None:
    """Whatever the policy says: here all prompts are cached on the other."""
    warm = request(text(4000), output=50)
    made.finish(route(made, request(text(4000), output=50, subset=only(1)), 0.0).flight, ok(GOOD), 1.0)
    failed = Outcome(End.UPSTREAM_ERROR, 500, BAD)
    for n in range(3):
        made.finish(sent(made, now=2.0, seed=n), failed, 2.1)
    assert member(made).state(2.2) is State.OPEN
    made.expire(3.5)
    assert member(made).state(3.5) is State.PROBATION
    assert route(made, warm, 3.5).endpoints[0] == GOOD
    made.expire(5.0)
    trial = route(made, warm, 5.0)
    assert (trial.endpoints, trial.decision.reason) == ((BAD, GOOD), "trial")
    assert route(made, warm, 5.0).endpoints[0] == GOOD, "one at a time"
    made.finish(trial.flight, ok(BAD), 5.5)
    made.expire(5.6)
    assert member(made).state(5.6) in (State.PROBATION, State.SLOW_STARTING)


def test_what_the_process_before_had_says_nothing_of_the_new_one() -> None:
    made = router(2, scraped=True)
    for i in (0, 1):
        made.learn(Sampled(POOL, address(i), Sample(running=0, waiting=0, generated_tokens=1.0)), 0.0)
    flight = route(made, request(text(2000), output=50, subset=only(0), stream=True), 50.0).flight
    made.learn(NotSampled(POOL, BAD, ScrapeFailure.REFUSED), 51.0)
    for now in range(52, 70):
        made.learn(Progressed(flight, None, None, 0, BAD), float(now))  # the proxy has not noticed yet
        made.learn(Sampled(POOL, BAD, Sample(running=0, waiting=0, generated_tokens=0.0)), float(now))
        made.expire(float(now))
        assert member(made).state(float(now)) in (State.SLOW_STARTING, State.READY)
