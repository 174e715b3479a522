from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.core.health.replica import Streak
from extproc.core.health.states import Reason, State
from extproc.core.types import Probe

from .watch import S, Watched

READY = (State.READY, Reason.ANSWERS)
BACK = (State.SLOW_STARTING, Reason.ANSWERS)


def failed(watched: Watched, n: int, now: float) -> None:
    for _ in range(n):
        watched.health.failed(now, now)


def opened(now: float = 0.0) -> Watched:
    """Out since `now`, because requests failed."""
    made = Watched()
    failed(made, S.failures, now)
    made.news()
    return made


def test_so_many_in_a_row_out_and_so_many_in_a_row_back() -> None:
    streak = Streak()
    seen = [streak.seen(good, S) for good in (False, False, True, False, False, False)]
    assert (seen, streak.out) == ([False] * 6, True)
    assert [streak.seen(good, S) for good in (True, False, True)] == [False] * 3
    assert (streak.seen(True, S), streak.out) == (True, False)


def test_a_member_is_ready_at_once_or_when_it_is_heard_of() -> None:
    assert Watched().news() == [READY]
    scraped = Watched(scraped=True)
    scraped.health.probed(Probe.LIVE, ok=True, now=1.0)
    assert scraped.news() == [(State.STARTING, Reason.JOINED)]
    scraped.health.probed(Probe.READY, ok=True, now=2.0)
    assert scraped.news() == [READY]


def test_a_later_member_starts_slowly() -> None:
    made = Watched(slow_from=0.0)
    assert made.news() == [(State.SLOW_STARTING, Reason.JOINED)]
    assert [made.health.share(t) for t in (0.0, 2.5, 10.0, 99.0)] == [0.0, 0.25, 1.0, 1.0]
    made.health.expire(S.slow_start_s, None)
    made.health.expire(S.slow_start_s + 1.0, None)
    assert made.news() == [READY]


def test_slow_start_can_be_off() -> None:
    assert Watched(replace(S, slow_start_s=0.0), slow_from=0.0).news() == [READY]


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "reason"), [(Probe.LIVE, Reason.CHECKS_FAILED), (Probe.READY, Reason.NO_MODEL)], ids=str
)
def test_checks_take_out_and_bring_back(probe: Probe, reason: Reason) -> None:
    made = Watched()
    for n in range(S.failures):
        made.health.probed(probe, ok=False, now=float(n))
    assert made.news() == [READY, (State.SUSPECT, reason), (State.OPEN, reason)]
    made.health.expire(1000.0, None)
    made.health.probed(probe, ok=True, now=1000.0)
    assert made.news() == []
    made.health.probed(probe, ok=True, now=1001.0)
    assert made.news() == [BACK]


def test_a_check_of_one_kind_does_not_make_up_for_another() -> None:
    made = Watched()
    for n in range(2 * S.failures):
        made.health.probed(Probe.LIVE if n % 2 else Probe.READY, ok=bool(n % 2), now=float(n))
    assert made.health.why(6.0)[:2] == (State.OPEN, Reason.NO_MODEL)


def test_a_deep_check_is_a_request() -> None:
    made = Watched()
    for _ in range(S.failures):
        made.health.probed(Probe.DEEP, ok=False, now=0.0)
    assert made.news() == [READY, (State.SUSPECT, Reason.REQUEST_FAILED), (State.OPEN, Reason.REQUESTS_FAILED)]
    for now in (1.0, 1.5):
        made.health.probed(Probe.DEEP, ok=True, now=now)
    assert made.news() == [(State.PROBATION, Reason.TRIAL), BACK]


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_refused_and_then_answering_is_another_process() -> None:
    made = Watched(scraped=True)
    made.health.heard(0.0)
    made.health.refused(1.0)
    made.health.refused(2.0)
    assert made.news() == [(State.STARTING, Reason.JOINED), READY, (State.OPEN, Reason.REFUSED)]
    made.health.expire(500.0, None)
    assert (made.health.unreachable(500.0), made.health.restarts) == (True, 0)
    made.health.probed(Probe.LIVE, ok=True, now=500.0)
    assert (made.health.unreachable(500.0), made.health.restarts) == (False, 1)
    made.health.heard(501.0)
    made.health.heard(502.0)
    assert made.news() == [(State.STARTING, Reason.RESTARTED), (State.SLOW_STARTING, Reason.RESTARTED)]
    assert made.health.restarts == 1


def test_a_restart_forgets_what_was_held_against_the_process_before() -> None:
    made = opened()
    for _ in range(S.failures):
        made.health.probed(Probe.LIVE, ok=False, now=0.5)
    made.health.drain(30.0, 0.5)
    made.health.heard(1.0, other=True)
    assert made.health.why(1.0)[:2] == (State.SLOW_STARTING, Reason.RESTARTED)
    assert made.health.drain_left_s(1.0) is None
    failed(made, S.failures - 1, 20.0)
    assert made.health.state(20.0) is State.SUSPECT


def test_a_request_that_is_answered_shows_that_something_listens_again() -> None:
    made = Watched()
    made.health.refused(5.0)
    made.health.succeeded(4.0, 6.0)
    assert made.health.state(6.0) is State.OPEN, "it was sent before"
    made.health.succeeded(6.0, 7.0)
    assert made.health.state(7.0) is State.SLOW_STARTING


# --- requests ---------------------------------------------------------------------------------------------------------


def test_failures_suspect_then_open_then_trial_then_back() -> None:
    made = Watched()
    failed(made, 1, 0.0)
    failed(made, 2, 1.0)
    made.health.expire(1.9, None)
    assert made.news() == [READY, (State.SUSPECT, Reason.REQUEST_FAILED), (State.OPEN, Reason.REQUESTS_FAILED)]
    made.health.expire(2.0, None)
    made.health.expire(2.25, None)
    assert made.news() == [(State.PROBATION, Reason.TRIAL)]
    made.health.succeeded(2.3, 3.0)
    made.health.succeeded(3.0, 4.0)
    assert made.news() == [BACK]


def test_a_trial_that_fails_takes_out_for_twice_as_long() -> None:
    made = opened()
    made.health.failed(1.0, 1.5)
    assert made.news() == [(State.PROBATION, Reason.TRIAL), (State.OPEN, Reason.REQUESTS_FAILED)]
    assert (made.health.state(3.4), made.health.state(3.5)) == (State.OPEN, State.PROBATION)


def test_checks_do_not_bring_back_what_requests_took_out() -> None:
    """A vLLM that shuts down answers its checks with 200."""
    made = opened()
    for n in range(10):
        for probe in (Probe.LIVE, Probe.READY):
            made.health.probed(probe, ok=True, now=1.0 + n)
        made.health.heard(1.0 + n)
    assert made.news() == [(State.PROBATION, Reason.TRIAL)]


def test_a_page_that_answers_ends_suspicion_once_and_not_twice() -> None:
    made = Watched()
    failed(made, 1, 0.0)
    made.health.heard(0.1)
    assert made.health.state(0.1) is State.READY
    failed(made, 1, 0.2)
    made.health.heard(0.3)
    assert made.health.state(0.3) is State.SUSPECT


def test_what_goes_on_while_the_new_fails_is_a_process_that_shuts_down() -> None:
    made = Watched()
    for now in (0.0, 1.0, 2.0):
        made.health.failed(now, now, working=True)
    assert made.health.why(2.0)[:2] == (State.DRAINING, Reason.SHUTTING_DOWN)
    made.health.expire(20.0, -1.0)
    assert made.health.state(20.0) is State.DRAINING, "nothing is tried there while its work lasts"
    made.health.expire(21.0, None)
    assert (made.health.state(21.9), made.health.state(22.0)) == (State.DRAINING, State.PROBATION)


def test_shutting_down_has_an_end_whatever_runs_there() -> None:
    made = Watched()
    for now in (0.0, 1.0, 2.0):
        made.health.failed(now, now, working=True)
    made.health.expire(2.0 + S.max_open_s, -1.0)
    assert made.health.state(2.0 + S.max_open_s) is State.PROBATION


# --- silence ----------------------------------------------------------------------------------------------------------


def test_silence_suspects_then_opens_and_only_work_ends_it() -> None:
    made = Watched()
    made.health.silent_for(S.hang_s / 2, 2.5)
    made.health.heard(2.6)
    made.health.probed(Probe.LIVE, ok=True, now=2.7)
    made.health.silent_for(4.0, 4.0)
    assert made.news() == [READY, (State.SUSPECT, Reason.SILENT)]
    made.health.silent_for(S.hang_s, 5.0)
    made.health.heard(6.0)
    made.health.expire(500.0, 0.0)
    assert made.news() == [(State.OPEN, Reason.SILENT)]
    made.health.worked(501.0)
    assert made.news() == [BACK]


def test_suspicion_of_silence_ends_with_work() -> None:
    made = Watched()
    made.health.silent_for(S.hang_s / 2, 2.5)
    made.health.worked(3.0)
    assert made.news() == [READY, (State.SUSPECT, Reason.SILENT), READY]


def test_a_hung_replica_whose_clients_left_gets_one_on_trial_that_may_hang_again() -> None:
    made = Watched()
    made.health.silent_for(S.hang_s, 5.0)
    made.health.expire(10.0, None)
    made.health.expire(11.0, None)
    assert made.news() == [READY, (State.OPEN, Reason.SILENT), (State.PROBATION, Reason.TRIAL)]
    made.health.tried("a", 11.0)
    made.health.silent_for(S.hang_s, 16.0)
    assert (made.news(), made.health.trial) == ([(State.OPEN, Reason.SILENT)], None)
    made.health.expire(17.0, None)
    assert (made.health.state(18.9), made.health.state(19.0)) == (State.OPEN, State.PROBATION)


# --- sleep ------------------------------------------------------------------------------------------------------------


def test_who_sleeps_is_out_and_who_woke_is_as_new() -> None:
    made = Watched()
    assert not made.health.slept(False, 1.0)
    assert not made.health.slept(True, 2.0)
    made.health.heard(3.0)
    made.health.probed(Probe.LIVE, ok=True, now=3.0)
    assert not made.health.slept(True, 4.0)
    assert made.news() == [READY, (State.OPEN, Reason.ASLEEP)]
    assert made.health.unreachable(5.0)
    assert made.health.slept(False, 6.0)
    assert made.news() == [(State.SLOW_STARTING, Reason.RESTARTED)]
    assert not made.health.unreachable(6.0)


# --- drain ------------------------------------------------------------------------------------------------------------


def test_a_drain_by_call_lasts_until_it_is_ended() -> None:
    made = Watched()
    made.health.drain(None, 1.0)
    failed(made, 1, 2.0)
    made.health.expire(1e6, None)
    assert made.news() == [READY, (State.DRAINING, Reason.ASKED)]
    made.health.drain_ended(1e6)
    assert made.news() == [BACK]


def test_a_notice_drains_until_the_replica_is_taken_away() -> None:
    made = Watched()
    made.health.drain(120.0, 10.0)
    assert made.health.drain_left_s(40.0) == 90.0
    made.health.expire(129.9, None)
    assert made.news() == [READY, (State.DRAINING, Reason.NOTICE)]
    assert made.health.state(130.0) is State.GONE
    made.health.expire(130.1, None)
    made.health.expire(130.3, None)
    assert made.news() == [(State.GONE, Reason.NOTICE)]
    made.health.refused(131.0)
    made.health.heard(200.0)
    assert made.news()[-1] == (State.SLOW_STARTING, Reason.RESTARTED), "another took its address"


def test_who_lists_it_wants_it_drained() -> None:
    made = Watched(drain=True)
    made.health.drain_ended(1.0)
    made.health.listed(True, 2.0)
    assert made.news() == [(State.DRAINING, Reason.ASKED)]
    made.health.listed(False, 3.0)
    assert made.news() == [BACK]


def test_nothing_listens_where_it_drained_to_its_end() -> None:
    made = Watched()
    made.health.drain(None, 1.0)
    made.health.refused(2.0)
    assert made.health.unreachable(2.0)
    made.health.heard(3.0)
    assert made.health.state(3.0) is State.DRAINING, "who asked has not said that it may come back"


def test_leaving_is_the_last_word() -> None:
    made = Watched()
    made.health.left(1.0)
    made.health.heard(2.0)
    made.health.worked(2.0)
    assert made.news() == [READY, (State.GONE, Reason.LEFT)]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_reading_changes_nothing_and_sees_what_time_has_changed() -> None:
    made = opened()
    assert made.health.why(0.5) == (State.OPEN, Reason.REQUESTS_FAILED, 0.0)
    assert made.health.why(1.5) == (State.PROBATION, Reason.TRIAL, 1.0)
    assert made.health.state(1.5) is State.PROBATION
    assert made.news() == []
    assert repr(made.health) == "open by requests_failed"


def test_other_thresholds_hold_from_now_on() -> None:
    made = Watched()
    failed(made, 1, 0.0)
    made.health.configure(replace(S, failures=2))
    failed(made, 1, 0.1)
    assert made.health.state(0.1) is State.OPEN
