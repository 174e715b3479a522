from __future__ import annotations

from typing import Any

import pytest

from extproc.core.health.settings import HealthSettings
from extproc.core.patience import SLACK, patience_s
from extproc.core.types import Api, Decision, Prediction, Request

SETTINGS = HealthSettings(hang_s=5.0, hang_factor=3.0)


def decided(ttft_s: float, decode_s: float = 0.0, output_tokens: float = 1.0, endpoints: int = 2) -> Decision:
    prediction = Prediction(0, ttft_s / 2, ttft_s / 2, decode_s, 0.0, 0.0, 0.0)
    addresses = tuple(f"10.0.0.{i}:80" for i in range(endpoints))
    return Decision(0.0, "f", "a", "m", Api.CHAT, "p", "r", addresses, 10, output_tokens, prediction, ())


def asked(**request: Any) -> Request:
    return Request(**{"api": Api.CHAT, "model": "m", **request})


@pytest.mark.parametrize(("ttft_s", "patience"), [(0.1, 5.0), (1.5, 5.0), (4.0, 12.0)])
def test_a_stream_gets_three_times_its_first_token_and_never_less_than_a_hang(ttft_s: float, patience: float) -> None:
    assert patience_s(asked(stream=True), decided(ttft_s, 60.0, 600.0), SETTINGS) == patience


def test_a_whole_response_must_fit_at_the_length_that_the_client_allows() -> None:
    """101 tokens were expected in one second; 1001 are allowed, and take ten."""
    request = asked(max_output_tokens=1001)
    assert patience_s(request, decided(2.0, 1.0, 101.0), SETTINGS) == pytest.approx(5.0 + SLACK * 3.0 * 12.0)


def test_an_answer_without_a_bound_may_take_any_time() -> None:
    assert patience_s(asked(), decided(2.0, 1.0, 101.0), SETTINGS) is None


def test_without_an_expectation_the_time_of_a_token_is_not_known() -> None:
    assert patience_s(asked(max_output_tokens=10), decided(2.0, 0.0, 1.0), SETTINGS) is None


@pytest.mark.parametrize("request_", [asked(max_output_tokens=1), asked(api=Api.EMBEDDINGS)], ids=["one", "embeddings"])
def test_what_generates_nothing_more_is_prefill_alone(request_: Request) -> None:
    assert patience_s(request_, decided(2.0), SETTINGS) == pytest.approx(5.0 + SLACK * 6.0)


def test_other_paths_may_do_anything() -> None:
    assert patience_s(Request(stream=True), decided(1.0), SETTINGS) is None


def test_without_another_replica_the_only_one_gets_all_the_time() -> None:
    assert patience_s(asked(stream=True), decided(1.0, endpoints=1), SETTINGS) is None
