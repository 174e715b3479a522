"""What a request counts as, and what a row comes to."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from tests.chaos import rows
from tests.chaos.rows import Decided, Kind, Marks, Row, Seen, Sent, Verdict

A, B = "127.0.0.1:1", "127.0.0.1:2"


def sent(at: float = 0.0, **changes: Any) -> Sent:
    """A stream that B answered well: headers after 0.1 s, text after 0.2 s, the end after 1 s."""
    told = {
        "id": f"r{at}",
        "tenant": "t",
        "stream": True,
        "sent_at": at,
        "status": 200,
        "began_at": at + 0.1,
        "replica": B,
        "first_at": at + 0.2,
        "ended_at": at + 1.0,
    }
    return Sent(**{**told, **changes})


def killed(at: float = 5.0, over: float = 10.0, begun_until: float = inf) -> Marks:
    """A was killed."""
    return Marks(at, over, over, (A,), {A: begun_until})


# --- requests -----------------------------------------------------------------------------------------------------------


def test_a_whole_answer_is_well() -> None:
    assert rows.verdict(sent(), killed()) is Verdict.WELL


@pytest.mark.parametrize("status", [400, 500, 503, 504, None])
def test_other_answers_and_none_are_errors(status: int | None) -> None:
    failed = sent(status=status, error="text", replica=None, began_at=None)
    assert rows.verdict(failed, killed()) is Verdict.AVOIDABLE


def test_429_is_a_refusal_and_no_error() -> None:
    assert rows.verdict(sent(status=429, error="text"), killed()) is Verdict.REFUSED


def test_a_client_that_left_has_no_complaint() -> None:
    assert rows.verdict(sent(status=None, error="gone", left=True), killed()) is Verdict.LEFT


def test_a_stream_that_had_begun_on_the_killed_replica_is_lost_for_good() -> None:
    assert rows.verdict(sent(4.5, replica=A, error="broke off"), killed()) is Verdict.UNAVOIDABLE


@pytest.mark.parametrize(
    "changes",
    [
        {"replica": B},  # another replica, which is well
        {"stream": False},  # nothing had reached the client
        {"status": 500},  # it did not begin
        {"status": None, "began_at": None, "replica": None},
        {"ended_at": 4.9},  # before the fault
    ],
)
def test_anything_else_that_breaks_then_could_have_been_saved(changes: dict[str, Any]) -> None:
    broke = sent(4.5, **{"replica": A, "error": "broke off", **changes})
    assert rows.verdict(broke, killed()) is Verdict.AVOIDABLE


def test_a_stream_sent_to_a_hung_replica_could_have_been_saved() -> None:
    hung = killed(begun_until=5.0)
    assert rows.verdict(sent(4.8, replica=A, error="no end"), hung) is Verdict.UNAVOIDABLE
    assert rows.verdict(sent(5.2, replica=A, error="no end"), hung) is Verdict.AVOIDABLE


def test_time_to_first_token_is_that_of_streams() -> None:
    assert sent(1.0).ttft_s == pytest.approx(0.2)
    assert sent(1.0, first_at=None, ended_at=31.0, error="no end").ttft_s == 30.0
    assert sent(stream=False).ttft_s is None
    assert sent(status=429).ttft_s is None
    assert sent(left=True).ttft_s is None


# --- rows ---------------------------------------------------------------------------------------------------------------


def test_a_row_counts_each_request_once() -> None:
    requests = [
        sent(0.0),
        sent(4.5, replica=A, error="broke off", ended_at=5.0),
        sent(6.0, status=503, error="no healthy upstream", replica=None, first_at=None, ended_at=9.5),
        sent(7.0, status=429, error="full"),
        sent(8.0, left=True, error="gone"),
    ]
    found = rows.row("replica kill -9", Kind.DEAD, killed(), Seen(requests, leftover=1))
    assert found == Row("replica kill -9", 5, 2, 1, 1, 0.0, None, 3.5, 1)


def test_detection_ends_with_the_last_new_request_for_the_replica() -> None:
    decided = {str(at): Decided(at, first) for at, first in ((4.9, A), (5.3, A), (6.0, B), (10.5, A))}
    assert rows.detect_s(Kind.DEAD, killed(), Seen([], decided)) == pytest.approx(0.3)
    # Envoy's own retries and fallback reach it too.
    assert rows.detect_s(Kind.FAILING, killed(), Seen([], decided, accepted=[5.7])) == pytest.approx(0.7)
    assert rows.detect_s(Kind.DEAD, killed(), Seen([])) == 0.0
    # Between its start and the moment when we see that it answers, extproc may well have seen it.
    early = Marks(5.0, 9.0, 10.0, (A,))
    assert rows.detect_s(Kind.DEAD, early, Seen([], {**decided, "early": Decided(9.5, A)})) == pytest.approx(0.3)
    assert rows.detect_s(Kind.AROUND, killed(), Seen([], decided)) is None
    assert rows.detect_s(Kind.DEAD, Marks(), Seen([], decided)) is None


def test_extproc_is_missed_when_the_first_answer_comes_without_it() -> None:
    marks = Marks(5.0, 8.0, 8.0)
    requests = [sent(4.9), sent(5.1, began_at=5.6), sent(5.2, began_at=5.9), sent(8.3), sent(9.0)]
    seen = Seen(requests, by_fallback=frozenset({"r4.9", "r5.1", "r5.2", "r8.3"}))
    assert rows.detect_s(Kind.EXTPROC, marks, seen) == pytest.approx(0.6)
    assert rows.recover_s(Kind.EXTPROC, marks, seen) == pytest.approx(0.3)
    assert rows.detect_s(Kind.EXTPROC, marks, Seen(requests)) is None
    assert rows.recover_s(Kind.EXTPROC, marks, Seen(requests)) == 0.0


def test_a_replica_is_back_when_it_answers_a_request_that_was_routed_after_its_return() -> None:
    requests = [sent(4.0, replica=A), sent(10.5), sent(11.0, replica=A, error="broke"), sent(12.0, replica=A)]
    assert rows.recover_s(Kind.DEAD, killed(), Seen(requests)) == 2.0
    assert rows.recover_s(Kind.DEAD, killed(), Seen(requests[:3])) is None


def test_a_held_request_counts_from_its_decision() -> None:
    held = sent(7.0, replica=A, began_at=10.5, first_at=10.6, ended_at=11.0)
    assert rows.recover_s(Kind.DEAD, killed(), Seen([held])) is None
    assert rows.recover_s(Kind.DEAD, killed(), Seen([held], {held.id: Decided(10.4, A)})) == pytest.approx(0.4)


def test_overload_is_over_with_the_last_slow_stream() -> None:
    marks = Marks(5.0, 10.0, 10.0)
    requests = [sent(1.0), sent(9.0, first_at=12.0), sent(11.0, first_at=12.5), sent(13.0, first_at=13.9)]
    assert rows.recover_s(Kind.LOAD, marks, Seen(requests)) == 1.0
    assert rows.recover_s(Kind.LOAD, marks, Seen(requests[:1])) == 0.0


def test_a_busy_fleet_may_be_slower_before_that_counts_as_slow() -> None:
    before = sent(1.0, first_at=2.5)
    assert rows.recover_s(Kind.LOAD, Marks(5.0, 10.0, 10.0), Seen([before, sent(11.0, first_at=13.5)])) == 0.0


def test_details_say_why_and_how_often() -> None:
    failed = [sent(at, status=503, error="no healthy upstream") for at in (6.0, 7.0)]
    decided = {"x": Decided(4.0, A, 2.0), "y": Decided(4.0, B, 9.0)}
    found = rows.details(Kind.HUNG, killed(), Seen([sent(), *failed], decided, frozenset({"r6.0"}), {"r6.0": "UH"}))
    assert found == {
        "errors": {
            "avoidable: 503: no healthy upstream [UH]": {"count": 1, "after_s": [1.0, 1.0]},
            "avoidable: 503: no healthy upstream [not in the log]": {"count": 1, "after_s": [1.0, 1.0]},
        },
        "by_fallback": 1,
        "ttft_s": {"t": [0.2, 0.2]},
        "detect_limit_s": 6.0,
    }


# --- targets ------------------------------------------------------------------------------------------------------------


def good(**changes: Any) -> Row:
    told = {"fault": "f", "sent": 10, "errors": 1, "unavoidable": 1, "refused": 3, "leftover": 0}
    return Row(**{**told, "detect_s": 0.9, "recover_s": 1.4, "worst_ttft_s": 9.0, **changes})


@pytest.mark.parametrize("kind", Kind)
def test_a_row_within_all_targets_misses_none(kind: Kind) -> None:
    assert list(rows.missed(good(), kind)) == []


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        (Kind.AROUND, {"errors": 3}, "2 avoidable errors"),
        (Kind.AROUND, {"leftover": 2}, "2 in flight or queued left over"),
        (Kind.DEAD, {"detect_s": 1.2}, "detected after 1.20 s, not 1 s"),
        (Kind.DEAD, {"detect_s": None}, "detected after no time at all, not 1 s"),
        (Kind.HUNG, {"detect_s": 6.1}, "detected after 6.10 s, not 6 s"),
        (Kind.EXTPROC, {"detect_s": 1.6}, "detected after 1.60 s, not 1.5 s"),
        (Kind.EXTPROC, {"recover_s": 1.6}, "routed by fallback for 1.60 s after its return, not 1.5 s"),
        (Kind.FAILING, {"recover_s": None}, "did not recover while the load ran"),
    ],
)
def test_what_is_missed_is_said(kind: Kind, changes: dict[str, Any], line: str) -> None:
    assert list(rows.missed(good(**changes), kind, hung_limit=6.0)) == [line]


def test_failing_replicas_have_no_limit_to_be_found_out() -> None:
    assert list(rows.missed(good(detect_s=5.0), Kind.FAILING)) == []
