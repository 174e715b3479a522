from __future__ import annotations

from extproc.core.types import End, Outcome, Progressed
from extproc.envoy.exchange import Report
from extproc.envoy.intake import FakeRouter
from extproc.envoy.responses import EVERY_S, Responses

A = "10.0.0.1:8000"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(clock: Clock, responses: Responses, at: float, *report: object, **more: bool) -> None:
    clock.now = at
    responses.take(Report("f1", *report, **more))  # type: ignore[arg-type]


def test_progress_is_told_now_and_then_and_the_end_once() -> None:
    clock, router = Clock(), FakeRouter()
    responses = Responses(router, clock)
    responses.begin("f1")
    told(clock, responses, 0.5, 200, A, 10, over=False)
    told(clock, responses, 0.6, 200, A, 20, over=False)
    told(clock, responses, 0.5 + EVERY_S, 200, A, 30, over=False)
    assert router.learned == [(Progressed("f1", 0.5, 0.5, 10, A), 0.5), (Progressed("f1", 0.5, 0.5, 30, A), 1.5)]
    assert len(responses) == 1
    told(clock, responses, 2.0, 200, A, 40, over=True)
    outcome = Outcome(End.OK, 200, A, ttft_s=0.5, replica_ttft_s=0.5, duration_s=2.0, response_bytes=40)
    assert router.finished == [("f1", outcome, 2.0)]
    assert len(responses) == 0


def test_without_a_body_there_is_no_first_token() -> None:
    clock, router = Clock(), FakeRouter()
    responses = Responses(router, clock)
    responses.begin("f1")
    told(clock, responses, 1.0, 503, None, 0, over=True)
    ((_, outcome, _),) = router.finished
    assert (outcome.end, outcome.ttft_s) == (End.UPSTREAM_ERROR, None)


def test_one_that_is_cut_is_nothing_against_the_replica() -> None:
    clock, router = Clock(), FakeRouter()
    responses = Responses(router, clock)
    responses.begin("f1")
    told(clock, responses, 1.0, 200, A, 5, over=True, cut=True)
    assert router.finished[0][1].end is End.CLIENT_GONE
