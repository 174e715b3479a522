from __future__ import annotations

import pytest

from extproc.core.admission.drain import RETRY_AFTER_S, Drain


def steady(rate: float, seconds: int) -> Drain:
    """Draining at so many tokens a second, a tenth of them ten times a second."""
    drain = Drain()
    drain.start(0.0)
    for i in range(1, 10 * seconds + 1):
        drain.sent(rate / 10, i / 10)
    return drain


def test_nothing_is_known_before_anything_was_seen() -> None:
    drain = Drain()
    assert drain.retry_after_s(1000, 5.0) is None
    drain.start(5.0)
    drain.sent(1000, 5.1)
    assert drain.rate(5.2) is None
    assert drain.rate(6.0) is not None


@pytest.mark.parametrize("seconds", [2, 5, 60])
def test_a_steady_rate_is_measured_from_the_first_seconds_on(seconds: int) -> None:
    assert steady(500.0, seconds).rate(float(seconds)) == pytest.approx(500.0, rel=0.06)


def test_the_rate_follows_a_change() -> None:
    drain = steady(500.0, 60)
    for i in range(1, 301):
        drain.sent(100.0, 60 + i / 10)
    assert drain.rate(90.0) == pytest.approx(1000.0, rel=0.06)


def test_time_without_a_queue_does_not_count() -> None:
    drain = steady(500.0, 20)
    before = drain.rate(20.0)
    drain.stop(20.0)
    assert drain.rate(500.0) == before
    drain.start(500.0)
    assert drain.rate(500.1) == pytest.approx(before, rel=0.05)


def test_a_stall_counts() -> None:
    assert steady(500.0, 20).rate(40.0) == pytest.approx(500.0 * 0.12, rel=0.2)


def test_when_to_come_again_follows_from_what_waits_and_is_bounded() -> None:
    drain = steady(500.0, 20)
    assert drain.retry_after_s(5000, 20.0) == pytest.approx(10.0, rel=0.06)
    assert drain.retry_after_s(1, 20.0) == RETRY_AFTER_S[0]
    assert drain.retry_after_s(1e9, 20.0) == RETRY_AFTER_S[1]
