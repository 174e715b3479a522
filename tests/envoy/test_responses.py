from __future__ import annotations

from extproc.core.types import End, Outcome, Progressed, Usage
from extproc.envoy.exchange import Report
from extproc.envoy.intake import FakeRouter
from extproc.envoy.responses import EVERY_S, Responses

A = "10.0.0.1:8000"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(clock: Clock, responses: Responses, at: float, *report: object, **more: object) -> None:
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


def test_of_a_silent_one_is_told_that_it_is_awaited() -> None:
    """As by the access log's periodic entries: it would be closed as lost else, and its replica be believed to be done with it."""
    clock, router = Clock(), FakeRouter()
    responses = Responses(router, clock)
    responses.begin("f1")
    clock.now = 0.5
    responses.begin("f2")
    for at in (EVERY_S - 0.1, EVERY_S, EVERY_S + 0.1):
        clock.now = at
        responses.remind()
    assert router.learned == [(Progressed("f1", None, None, 0), EVERY_S)]
    told(clock, responses, 1.2, 200, A, 10, over=False)
    clock.now = 2.5
    responses.remind()
    assert router.learned[1:] == [
        (Progressed("f1", 1.2, 1.2, 10, A), 1.2),
        (Progressed("f2", None, None, 0), 2.5),
        (Progressed("f1", 1.2, 1.2, 10, A), 2.5),
    ]


def test_what_the_response_says_of_itself_is_in_the_outcome() -> None:
    clock, router = Clock(), FakeRouter()
    responses = Responses(router, clock)
    responses.begin("f1")
    told(clock, responses, 1.0, 200, A, 5, over=True, usage=Usage(3, 2, 1), broken=True)
    ((_, outcome, _),) = router.finished
    assert (outcome.end, outcome.usage, outcome.broken) == (End.UPSTREAM_ERROR, Usage(3, 2, 1), True)


def test_without_headers_of_the_response_its_end_is_nothing_against_the_replica() -> None:
    clock, router = Clock(), FakeRouter()
    responses = Responses(router, clock)
    responses.begin("f1")
    told(clock, responses, 1.0, None, None, 5, over=True)
    assert router.finished[0][1].end is End.OK


def test_one_that_is_cut_is_nothing_against_the_replica() -> None:
    clock, router = Clock(), FakeRouter()
    responses = Responses(router, clock)
    responses.begin("f1")
    told(clock, responses, 1.0, 200, A, 5, over=True, cut=True)
    assert router.finished[0][1].end is End.CLIENT_GONE
