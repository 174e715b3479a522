"""The four ways in which a vLLM 0.32 fails while it says that it is well, replayed from recordings, on the whole router."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.core.health.settings import HealthSettings
from extproc.core.health.states import Reason, State
from extproc.core.observers import HealthChanged
from extproc.core.router import Router
from extproc.core.types import (
    DrainAsked,
    DrainEnded,
    End,
    NotSampled,
    Outcome,
    Probe,
    Probed,
    Progressed,
    Reset,
    Route,
    Sample,
    Sampled,
    ScrapeFailure,
    Stalled,
)
from tests.core.support import POOL, Log, address, chosen, member, ok, only, replicas, request, route, router, text

from . import recorded

S = HealthSettings()
BAD, GOOD = address(0), address(1)
TICK_S = 0.25
AT = 100.0
"""When the fault comes."""


class Changes(Log):
    """Keeps the transitions of the bad one."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[State, Reason]] = []

    def health_changed(self, change: HealthChanged) -> None:
        if change.address == BAD:
            self.told.append((change.after, change.reason))


@pytest.fixture
def log() -> Changes:
    return Changes()


@pytest.fixture
def made(log: Changes) -> Router:
    """Two replicas that have been well for long."""
    made = router(2, observer=log, scraped=True)
    for i in range(2):
        sampled(made, i, 1.0, generated_tokens=1000.0)
    made.expire(50.0)
    log.told.clear()
    return made


def sampled(made: Router, i: int, now: float, **fields: Any) -> None:
    made.learn(Sampled(POOL, address(i), Sample(running=0, waiting=0, **fields)), now)


def sent(made: Router, now: float, i: int = 0, **fields: Any) -> Route:
    """A request that goes to that replica."""
    return route(made, request(text(2000, int(now * 1000)), output=100, subset=only(i), **fields), now)


def state(made: Router, now: float) -> tuple[State, Reason]:
    return member(made).health.why(now)[:2]


def ticks(made: Router, start: float, end: float) -> list[float]:
    return [start + TICK_S * n for n in range(int((end - start) / TICK_S) + 1)]


# --- 1. the engine hangs, everything else answers ---------------------------------------------------------------------


def says_it_is_well(made: Router, now: float) -> None:
    """What the recording has of a hung engine: every check is answered with 200, and the gauges say that it is idle."""
    answers, gauges = recorded.answers("health_hang"), recorded.gauges("health_hang")
    made.learn(Probed(POOL, BAD, Probe.LIVE, ok=answers["/health"] == 200), now)
    made.learn(Probed(POOL, BAD, Probe.READY, ok=answers["/v1/models"] == 200), now)
    running, waiting = int(gauges["num_requests_running"]), int(gauges["num_requests_waiting"])
    made.learn(Sampled(POOL, BAD, Sample(running, waiting, generated_tokens=1000.0)), now)


def test_the_recording_shows_the_trap() -> None:
    assert set(recorded.answers("health_hang").values()) == {200}
    assert set(recorded.gauges("health_hang").values()) == {0.0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_hung_engine_is_out_within_the_configured_time(made: Router, log: Changes, stream: bool) -> None:
    flight = sent(made, AT, stream=stream).flight
    for now in ticks(made, AT, AT + S.hang_s):
        if now == int(now) and now > AT:
            made.learn(Progressed(flight, None, None, 0), now)
        says_it_is_well(made, now)
        made.expire(now)
    assert log.told == [(State.SUSPECT, Reason.SILENT), (State.OPEN, Reason.SILENT)]
    assert {chosen(made, request(text(2000, n), output=10), AT + S.hang_s) for n in range(20)} == {GOOD}


def test_a_stream_that_stops_half_way_is_seen(made: Router, log: Changes) -> None:
    flight = sent(made, AT).flight
    made.learn(Progressed(flight, 0.1, 0.1, 400), AT + 1.0)
    for now in ticks(made, AT + 1.0, AT + 1.0 + S.hang_s):
        if now == int(now):
            made.learn(Progressed(flight, 0.1, 0.1, 400), now)
        says_it_is_well(made, now)
        made.expire(now)
    assert log.told[-1] == (State.OPEN, Reason.SILENT)


def hung(made: Router) -> tuple[str, float]:
    flight = sent(made, AT).flight
    for now in ticks(made, AT, AT + S.hang_s):
        made.learn(Progressed(flight, None, None, 0), now)
        made.expire(now)
    assert state(made, now) == (State.OPEN, Reason.SILENT)
    return flight, now


def test_a_hung_engine_is_back_with_its_first_sign_of_work(made: Router, log: Changes) -> None:
    flight, now = hung(made)
    for later in (now + 10.0, now + 60.0):
        made.learn(Progressed(flight, None, None, 0), later)
        says_it_is_well(made, later)
        made.expire(later)
        assert state(made, later) == (State.OPEN, Reason.SILENT), "no client is sent there while one waits in vain"
    made.learn(Progressed(flight, 65.0, 65.0, 40), now + 65.0)
    assert log.told[-1] == (State.SLOW_STARTING, Reason.ANSWERS)


def test_where_the_clients_have_left_one_is_sent_on_trial_after_a_while(made: Router) -> None:
    flight, now = hung(made)
    made.finish(flight, Outcome(End.CLIENT_GONE), now)
    made.expire(now)
    assert state(made, now + S.open_s - 0.01) == (State.OPEN, Reason.SILENT)
    assert state(made, now + S.open_s) == (State.PROBATION, Reason.TRIAL)


def test_work_for_others_is_a_sign(made: Router, log: Changes) -> None:
    """A long wait for a first token, while the counters move: it is busy with what came past us."""
    flight = sent(made, AT).flight
    for n, now in enumerate(ticks(made, AT, AT + 30.0)):
        made.learn(Progressed(flight, None, None, 0), now)
        sampled(made, 0, now, generated_tokens=1000.0 + n)
        made.expire(now)
    assert log.told == []


def test_when_the_access_log_is_cut_nobody_is_thought_to_hang(made: Router, log: Changes) -> None:
    """No reports and no ends: the flights are gone, or not, and idle replicas stand still by right."""
    sent(made, AT)
    sent(made, AT, stream=False)
    for now in ticks(made, AT, AT + 60.0):
        says_it_is_well(made, now)
        made.expire(now)
    assert log.told == []


def test_a_router_that_stood_still_blames_nobody(made: Router, log: Changes) -> None:
    flight = sent(made, AT).flight
    made.learn(Stalled(20.0), AT + 20.0)
    made.learn(Progressed(flight, None, None, 0), AT + 20.1)
    made.expire(AT + 20.2)
    assert log.told == []


# --- 2. it shuts down, and says so only to new requests ---------------------------------------------------------------


def test_a_replica_that_shuts_down_gets_nothing_new_and_finishes_what_it_has(made: Router, log: Changes) -> None:
    stream = sent(made, AT - 1.0).flight
    size = refused = 0
    for poll in recorded.polls("sigterm_drain"):
        now = AT + poll.at
        for fact in poll.facts(BAD):
            made.learn(fact, now)
        if poll.status["new-req"] == 500 and state(made, now)[0] is not State.DRAINING:
            made.finish(sent(made, now).flight, Outcome(End.UPSTREAM_ERROR, 500, BAD, duration_s=0.01), now)
            refused += 1
        if poll.status["health"] == 200:  # the stream that ran before goes on until its end
            size += 100
            made.learn(Progressed(stream, 0.1, 0.1, size), now + 0.1)
        made.expire(now + 0.2)
        if refused == S.failures:
            assert chosen(made, request(), now + 0.2) == GOOD
    assert refused == S.failures, "no request more is spent on it, and no trial while it lasts"
    assert [s for s in log.told if s[0] in (State.DRAINING, State.OPEN)] == [
        (State.DRAINING, Reason.SHUTTING_DOWN),
        (State.OPEN, Reason.REFUSED),
    ]


def test_checks_and_pages_stay_green_while_it_shuts_down() -> None:
    during = [p for p in recorded.polls("sigterm_drain") if p.status["new-req"] == 500]
    assert len(during) >= 10
    assert {p.status["health"] for p in during} == {p.status["metrics"] for p in during} == {200}


# --- 3. it ends at once, and what ran ends under status 200 -----------------------------------------------------------


def test_answers_that_were_broken_off_under_200_take_it_out(made: Router, log: Changes) -> None:
    assert '"finish_reason":"abort"' in recorded.text("sigterm_default")
    flights = [sent(made, AT - 1.0).flight for _ in range(S.failures)]
    for flight in flights:
        made.finish(flight, Outcome(End.OK, 200, BAD, duration_s=1.0, response_bytes=900, broken=True), AT)
    assert log.told == [(State.SUSPECT, Reason.REQUEST_FAILED), (State.OPEN, Reason.REQUESTS_FAILED)]
    for poll in recorded.polls("sigterm_default"):
        for fact in poll.facts(BAD):
            made.learn(fact, AT + poll.at)
    assert state(made, AT + 10.0) == (State.OPEN, Reason.REFUSED)


def test_an_answer_broken_off_teaches_no_length(made: Router) -> None:
    before = made.pools[POOL].output_tokens.estimate("m", request().api, None, None)
    for n in range(30):
        flight = sent(made, AT + n).flight
        made.finish(flight, Outcome(End.OK, 200, BAD, duration_s=1.0, response_bytes=10, broken=True), AT + n)
    assert made.pools[POOL].output_tokens.estimate("m", request().api, None, None) == before


# --- 4. its engine dies, its server lives on for a moment -------------------------------------------------------------


def test_an_engine_that_was_killed_is_out_before_its_server_is_gone(made: Router, log: Changes) -> None:
    assert 'data: {"error":' in recorded.text("engine_killed_stream")
    flights = [sent(made, AT - 1.0).flight for _ in range(2)]
    killed = recorded.polls("engine_killed_stream")
    for flight in flights:
        made.finish(flight, Outcome(End.OK, 200, BAD, duration_s=1.0, response_bytes=600, broken=True), AT)
    out_at = None
    for poll in killed:
        now = AT + poll.at
        for fact in poll.facts(BAD):
            made.learn(fact, now)
        if out_at is None and chosen(made, request(text(500, int(now * 1e3))), now) == GOOD:
            out_at = poll.at
        made.expire(now)
    assert out_at is not None
    assert out_at <= 0.25
    opened = [told for told in log.told if told[0] is State.OPEN]
    assert opened[0] == (State.OPEN, Reason.CHECKS_FAILED), "health said 503 for a moment"
    assert state(made, AT + 10.0) == (State.OPEN, Reason.REFUSED)


# --- what follows from a state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [Outcome(End.CLIENT_ERROR, 400, BAD), Outcome(End.CLIENT_GONE), Outcome(End.LOST)])
def test_a_trial_that_tells_nothing_makes_room_for_the_next(made: Router, log: Changes, outcome: Outcome) -> None:
    for n in range(S.failures):
        made.finish(sent(made, AT).flight, Outcome(End.UPSTREAM_ERROR, 500, BAD), AT + n / 10)
    now = AT + 5.0
    made.expire(now)
    trial = sent(made, now)
    assert chosen(made, request(), now) == GOOD
    made.finish(trial.flight, outcome, now)
    assert member(made).health.trial is None
    assert log.told[-1] == (State.PROBATION, Reason.TRIAL)


def test_the_first_token_of_a_trial_lets_the_next_one_in(made: Router, log: Changes) -> None:
    for n in range(S.failures):
        made.finish(sent(made, AT).flight, Outcome(End.UPSTREAM_ERROR, 500, BAD), AT + n / 10)
    now = AT + 5.0
    for n in range(S.successes):
        made.expire(now + n)
        trial = sent(made, now + n).flight
        assert member(made).health.trial == trial
        made.learn(Progressed(trial, 0.1, 0.1, 100), now + n + 0.5)
    assert log.told[-2:] == [(State.PROBATION, Reason.TRIAL), (State.SLOW_STARTING, Reason.ANSWERS)]


def test_the_end_of_a_trial_is_not_counted_again(made: Router) -> None:
    for n in range(S.failures):
        made.finish(sent(made, AT).flight, Outcome(End.UPSTREAM_ERROR, 500, BAD), AT + n / 10)
    now = AT + 5.0
    trial = sent(made, now).flight
    made.learn(Progressed(trial, 0.1, 0.1, 100), now + 0.5)
    made.finish(trial, ok(BAD), now + 1.0)
    assert state(made, now + 1.0) == (State.PROBATION, Reason.TRIAL)


def test_when_all_are_out_the_decision_says_so(made: Router) -> None:
    for i in range(2):
        made.learn(NotSampled(POOL, address(i), ScrapeFailure.LATE), AT)
        for _ in range(S.failures):
            flight = sent(made, AT, i).flight
            made.finish(flight, Outcome(End.UPSTREAM_ERROR, 500, address(i)), AT)
    decision = route(made, request(), AT).decision
    assert (decision.reason, set(decision.endpoints)) == ("failed_open", {BAD, GOOD})
    explained = made.explain(request(), AT)
    assert getattr(explained, "reason", None) == "failed_open"


def test_a_restart_seen_by_a_check_empties_the_cache_in_the_index(made: Router) -> None:
    flight = sent(made, AT).flight
    made.finish(flight, ok(BAD), AT + 1.0)
    assert made.pools[POOL].index.held_bytes(BAD) > 0
    made.learn(NotSampled(POOL, BAD, ScrapeFailure.REFUSED), AT + 2.0)
    made.learn(Probed(POOL, BAD, Probe.LIVE, ok=True), AT + 3.0)
    assert made.pools[POOL].index.held_bytes(BAD) == 0
    assert state(made, AT + 3.0) == (State.STARTING, Reason.RESTARTED)
    made.finish(sent(made, AT + 3.0).flight, ok(BAD), AT + 3.2)
    sampled(made, 0, AT + 4.0, generated_tokens=5.0)
    assert state(made, AT + 4.0) == (State.SLOW_STARTING, Reason.RESTARTED)
    assert made.pools[POOL].index.held_bytes(BAD) > 0, "the page is the first of the new process, not of yet another"


def test_a_restart_seen_by_an_answer_empties_it_too(made: Router) -> None:
    made.finish(sent(made, AT).flight, ok(BAD), AT + 1.0)
    made.learn(NotSampled(POOL, BAD, ScrapeFailure.REFUSED), AT + 2.0)
    made.finish(sent(made, AT + 3.0).flight, ok(BAD), AT + 3.5)
    assert made.pools[POOL].index.held_bytes(BAD) == 0
    assert state(made, AT + 3.5) == (State.STARTING, Reason.RESTARTED)


def test_a_restart_that_only_the_counters_show_is_told_once(made: Router, log: Changes) -> None:
    sampled(made, 0, AT, generated_tokens=5.0)
    sampled(made, 0, AT + 1.0, generated_tokens=6.0)
    assert log.told == [(State.SLOW_STARTING, Reason.RESTARTED)]


def test_a_notice_forgets_the_prefixes_when_its_time_has_come(made: Router, log: Changes) -> None:
    running = sent(made, AT).flight
    made.finish(sent(made, AT).flight, ok(BAD), AT + 1.0)
    made.learn(DrainAsked(POOL, BAD, within_s=30.0), AT + 2.0)
    assert chosen(made, request(), AT + 3.0) == GOOD
    assert made.pools[POOL].index.held_bytes(BAD) > 0, "what still runs there may be followed by more of its kind"
    made.expire(AT + 32.0)
    assert log.told == [(State.DRAINING, Reason.NOTICE), (State.GONE, Reason.NOTICE)]
    made.finish(running, ok(BAD), AT + 33.0)
    assert made.pools[POOL].index.held_bytes(BAD) == 0
    made.check()


def test_a_drain_by_call_lets_running_work_finish(made: Router, log: Changes) -> None:
    running = sent(made, AT).flight
    made.learn(DrainAsked(POOL, BAD), AT)
    assert chosen(made, request(), AT) == GOOD
    made.finish(running, ok(BAD), AT + 5.0)
    made.learn(DrainEnded(POOL, BAD), AT + 6.0)
    assert log.told == [(State.DRAINING, Reason.ASKED), (State.SLOW_STARTING, Reason.ANSWERS)]


def test_leaving_is_told_before_the_series_go(made: Router) -> None:
    order: list[str] = []

    class Order(Changes):
        def health_changed(self, change: HealthChanged) -> None:
            order.append(change.after.value)

        def left(self, pool: str, address: str) -> None:
            order.append("left")

    made = router(1, observer=Order())
    made.learn(Reset(POOL, ()), 1.0)
    assert order == ["ready", "gone", "left"]
    made.learn(Reset(POOL, replicas(1)), 2.0)
    made.check()
