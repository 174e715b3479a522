from __future__ import annotations

import math

import pytest

from extproc.core.health.breaker import Breaker, Window
from extproc.core.health.settings import HealthSettings
from extproc.core.health.states import Reason

S = HealthSettings(
    failures=3, successes=2, window_s=30.0, failure_rate=0.5, min_requests=10, open_s=1.0, max_open_s=8.0
)


def fails(breaker: Breaker, n: int, now: float) -> Reason | None:
    why = None
    for _ in range(n):
        why = breaker.failed(now, now)
    return why


def test_the_window_forgets_bucket_by_bucket() -> None:
    window = Window(10.0)
    for second in range(10):
        window.count(second % 2 == 0, float(second))
    assert window.failed_of(9.0) == (5, 10)
    assert window.failed_of(10.0) == (5, 9)
    assert window.failed_of(14.5) == (3, 5)
    assert window.failed_of(1000.0) == (0, 0)
    window.count(False, 1000.0)
    assert window.failed_of(1000.5) == (1, 1)


def test_so_many_failures_in_a_row_and_a_success_between_begins_anew() -> None:
    breaker = Breaker(S)
    assert fails(breaker, 2, 1.0) is None
    assert not breaker.succeeded(1.0, 2.0)
    assert fails(breaker, 2, 3.0) is None
    assert breaker.failed(3.0, 3.0) is Reason.REQUESTS_FAILED


def test_the_success_of_a_request_sent_before_the_failures_does_not_count_against_them() -> None:
    """A process that shuts down finishes what it has."""
    breaker = Breaker(S)
    assert fails(breaker, 2, 5.0) is None
    breaker.succeeded(1.0, 6.0)
    assert breaker.failed(6.0, 6.0) is Reason.REQUESTS_FAILED


def test_too_large_a_share_of_enough_requests() -> None:
    breaker = Breaker(S)
    whys = []
    for n in range(12):
        now = 1.0 + n / 10
        if n % 3 == 0:
            breaker.succeeded(now, now)
        else:
            whys.append(breaker.failed(now, now))
    # The tenth request is the first from which a share is taken: six of nine had failed before it.
    assert whys == [None] * 6 + [Reason.FAILURE_RATE] * 2


def test_a_share_at_the_bound_is_borne() -> None:
    breaker = Breaker(S)
    for n in range(40):
        now = n / 10
        breaker.succeeded(now, now)
        assert breaker.failed(now, now) is None


def open_times(breaker: Breaker, n: int, now: float) -> list[float]:
    times = []
    for _ in range(n):
        breaker.open(Reason.REQUESTS_FAILED, now)
        times.append(breaker.until - now)
        now = breaker.until
    return times


def test_times_out_double_to_a_bound_and_fall_back_after_a_window_of_good_health() -> None:
    breaker = Breaker(S)
    assert open_times(breaker, 5, 0.0) == [1.0, 2.0, 4.0, 8.0, 8.0]
    breaker.close(100.0)
    assert open_times(breaker, 1, 100.0 + S.window_s - 1.0) == [8.0], "it was well for too short a time"
    breaker.close(200.0)
    assert open_times(breaker, 2, 200.0 + S.window_s) == [1.0, 2.0]


def test_trials_close_it_or_open_it_again() -> None:
    breaker = Breaker(S)
    breaker.open(Reason.REQUESTS_FAILED, 0.0)
    assert (breaker.half_open(0.9), breaker.half_open(1.0)) == (False, True)
    assert not breaker.succeeded(1.0, 1.5)
    assert breaker.failed(1.0, 1.6) is Reason.REQUESTS_FAILED
    breaker.open(Reason.REQUESTS_FAILED, 1.6)
    assert not breaker.succeeded(4.0, 4.1)
    assert breaker.succeeded(4.0, 4.2)
    assert breaker.reason is None


def test_a_failure_while_it_is_open_makes_it_no_longer() -> None:
    """Where all are out requests are sent all the same; each of them may fail."""
    breaker = Breaker(S)
    breaker.open(Reason.REQUESTS_FAILED, 0.0)
    assert fails(breaker, 10, 0.5) is None
    assert breaker.until == 1.0


@pytest.mark.parametrize("change", ["open", "close"])
def test_requests_sent_before_it_changed_say_nothing(change: str) -> None:
    breaker = Breaker(S)
    breaker.open(Reason.REQUESTS_FAILED, 10.0)
    if change == "close":
        breaker.close(20.0)
    before = breaker.since - 0.1
    assert [breaker.failed(before, 30.0) for _ in range(20)] == [None] * 20
    assert not any(breaker.succeeded(before, 30.0) for _ in range(20))


def test_held_open_until_its_work_is_gone() -> None:
    breaker = Breaker(S)
    breaker.open(Reason.SILENT, 0.0, math.inf)
    assert breaker.until == math.inf
    breaker.let_go(50.0)
    breaker.let_go(50.5)
    assert breaker.until == 51.0
    breaker.open(Reason.SHUTTING_DOWN, 60.0, 5.0)
    breaker.let_go(64.5)
    assert breaker.until == 65.0, "no longer than it was to be held"


def test_repr_is_a_status_line() -> None:
    breaker = Breaker(S)
    fails(breaker, 2, 0.0)
    assert repr(breaker) == "<breaker closed, 2 failures in a row>"
    breaker.open(Reason.FAILURE_RATE, 2.0)
    assert repr(breaker) == "<breaker failure_rate until 3.000, 0 successes since>"
