from __future__ import annotations

import pytest

from extproc.core.account import Allowance, Quota
from extproc.core.types import Refusal, Reject
from extproc.openai.errors import of_refusal, unauthorized
from extproc.openai.ratelimit import allowance_headers, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (-1.0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1.0, "1s"),
        (8.64, "8.64s"),
        (59.9996, "1m0s"),
        (60.0, "1m0s"),
        (360.0, "6m0s"),
        (72.5, "1m12.5s"),
        (3600.0, "1h0m0s"),
        (6.0000000001, "6s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_only_limits_that_there_are_have_headers() -> None:
    assert allowance_headers(None) == ()
    assert allowance_headers(Allowance()) == ()
    assert allowance_headers(Allowance(tokens=Quota(1000, 10, 59.4))) == (
        ("x-ratelimit-limit-tokens", "1000"),
        ("x-ratelimit-remaining-tokens", "10"),
        ("x-ratelimit-reset-tokens", "59.4s"),
    )


def test_a_refusal_has_them_too() -> None:
    left = Allowance(requests=Quota(10, 0, 60.0))
    answer = of_refusal(Reject(Refusal.RATE_LIMITED, "m", retry_after_s=6.0000000001, allowance=left, limit=10))
    headers = dict(answer.headers)
    assert answer.status == 429
    assert headers["retry-after"] == "6", "not 7, for a rounding error"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert b"Rate limit of 10 requests per minute reached" in answer.body
    assert b'"code":"rate_limit_exceeded"' in answer.body


def test_who_is_unknown_is_told_what_is_wrong_but_not_his_key() -> None:
    assert b"Incorrect API key" in unauthorized(presented=True).body
    assert b"did not provide" in unauthorized(presented=False).body
    assert unauthorized(presented=True).status == 401
