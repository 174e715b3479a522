"""The recorder keeps the newest decisions and how they ended."""

from __future__ import annotations

from random import Random

from extproc.adapters.recorder import Recorder
from extproc.core.router import PoolSettings, Router
from extproc.core.types import Api, End, Outcome, Replica, Request, Reset, Route, Usage


def _routed(recorder: Recorder, count: int) -> tuple[Router, list[str]]:
    router = Router([PoolSettings("p", scraped=False)], Random(1), recorder)
    router.learn(Reset("p", (Replica("10.0.0.1:1"), Replica("10.0.0.2:1"))), 0.0)
    verdicts = [router.arrive(Request(Api.CHAT, "m", prompt_bytes=100), float(i)) for i in range(count)]
    return router, [v.flight for v in verdicts if isinstance(v, Route)]


def test_keeps_the_newest_and_lists_them_newest_first() -> None:
    recorder = Recorder(3)
    _, flights = _routed(recorder, 5)
    assert [r.decision.flight for r in recorder.last(10)] == flights[:1:-1]
    assert [r.decision.flight for r in recorder.last(1)] == flights[-1:]
    assert recorder.last(0) == []


def test_none_are_kept_when_switched_off() -> None:
    recorder = Recorder(0)
    _routed(recorder, 5)
    assert recorder.last(10) == []


def test_a_record_shows_the_decision_and_its_end() -> None:
    recorder = Recorder(3)
    router, (flight,) = _routed(recorder, 1)
    assert recorder.last(1)[0].view()["outcome"] is None
    router.finish(flight, Outcome(End.OK, 200, "10.0.0.1:1", 1, 0.5, 0.4, 2.0, 900, Usage(30, 12, 16)), 3.0)
    view = recorder.last(1)[0].view()
    assert view["endpoints"][0] in ("10.0.0.1:1", "10.0.0.2:1")
    assert {c["replica"] for c in view["candidates"]} == {"10.0.0.1:1", "10.0.0.2:1"}
    assert (view["output_tokens"], view["output_p90_tokens"]) == (256, 590)
    assert (view["predicted"]["cached_tokens"], view["predicted"]["prefix_source"]) == (0, "none")
    assert view["outcome"]["end"] == "ok"
    assert (view["outcome"]["prompt_tokens"], view["outcome"]["cached_tokens"]) == (30, 16)
    assert view["outcome"]["output_tokens"] == 12
