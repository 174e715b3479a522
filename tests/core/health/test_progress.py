from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from extproc.core.flights import Flight
from extproc.core.health.progress import silence_s
from extproc.core.health.settings import HealthSettings
from extproc.core.types import Api
from tests.core.support import flight

S = HealthSettings(hang_s=5.0, hang_factor=3.0)


def running(now: float, **fields: Any) -> Flight:
    """A stream that was routed at 0 with a first token predicted after 1 s, and is still reported."""
    return replace(flight("f", prefill_s=1.0), **{"reported_at": now - 0.5, **fields})


def silent(*flights: Flight, now: float, heard_at: float = 0.0, counted: bool = False) -> float:
    return silence_s(flights, heard_at, counted, S, now)


def test_a_stream_without_its_first_byte_is_overdue_after_a_multiple_of_what_was_predicted() -> None:
    assert silent(running(2.9), now=2.9) == 0.0
    assert silent(running(3.0), now=3.0) == 3.0
    slow = replace(running(29.0), prediction=replace(flight("f").prediction, prefill_s=10.0))
    assert silent(replace(slow, reported_at=29.0), now=29.9) == 0.0
    assert silent(replace(slow, reported_at=29.0), now=30.0) == 30.0


def test_a_stream_that_began_is_silent_from_its_last_bytes_on() -> None:
    began = running(103.0, first_token_at=2.0, response_bytes=500, heard_at=100.0)
    assert silent(began, now=103.0) == 3.0


def test_any_sign_of_work_counts_for_all() -> None:
    assert silent(running(9.0), now=9.0, heard_at=7.0) == 0.0
    assert silent(running(9.0), now=9.0, heard_at=5.0) == 4.0


def test_no_work_is_no_silence() -> None:
    assert silent(now=1000.0) == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        {"reported_at": 0.0},  # never: its entries may be lost
        {"reported_at": 6.0},  # long ago: its end may be lost
        {"reported_at": 9.0, "heard_at": 9.0},  # the last report brought bytes
        {"api": Api.OTHER},  # nobody knows how long it may take
    ],
)
def test_without_evidence_nothing_is_overdue(fields: dict[str, Any]) -> None:
    assert silent(running(10.0), now=10.0) == 10.0
    assert silent(running(10.0, **fields), now=10.0) == 0.0


def test_of_a_whole_response_only_counters_tell_and_without_them_patience_is_long() -> None:
    whole = running(0.0, stream=False, output_p90_tokens=300)
    assert whole.prediction.decode_s == 1.0
    assert whole.output_tokens == 100.0
    at = replace(whole, reported_at=11.9)
    assert silent(at, now=11.9, counted=True) == 11.9
    assert silent(at, now=11.9) == 0.0
    assert (
        silent(at, now=12.0) == 12.0
    )  # three times a second of prefill and three of decode: nine in ten are done by then


def test_where_nothing_is_generated_the_answer_is_the_first_sign() -> None:
    embedding = running(3.0, stream=False, output_tokens=0.0, api=Api.EMBEDDINGS)
    assert silent(embedding, now=3.0) == 3.0
