"""Errors as clients see them, against recorded answers of vLLM 0.32."""

from __future__ import annotations

import ast
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.types import Refusal, Reject
from extproc.openai.errors import (
    ANSWERS,
    MAX_ALIASES,
    BadRequest,
    HttpError,
    of_bad_request,
    of_refusal,
    printable,
    too_large,
    unauthorized,
)
from tests.openai.samples import FOLDER, sample


def test_unknown_model_is_answered_as_vllm_does() -> None:
    for name in ("unknown_model", "too_long_stream"):
        recorded = sample(name)
        ours = of_refusal(Reject(Refusal.UNKNOWN_MODEL, "nope", ("tiny",)))
        assert (ours.status, ours.body) == (recorded.status, recorded.body)


def test_absence_has_the_type_of_vllms_own_refusals() -> None:
    text = (FOLDER / "err_503_admission.txt").read_text()
    found = re.search(r"'(\{\"error\".*\})'", text)
    assert found
    recorded = json.loads(ast.literal_eval(found[0]))["error"]
    for refusal in (Refusal.NO_REPLICAS, Refusal.SUBSET_EMPTY):
        ours = json.loads(of_refusal(Reject(refusal)).body)["error"]
        assert ours | {"message": None} == recorded | {"message": None}


def test_every_refusal_has_an_answer() -> None:
    assert set(ANSWERS) == set(Refusal)


@pytest.mark.parametrize("refusal", Refusal)
def test_only_contention_and_absence_say_when_to_come_back(refusal: Refusal) -> None:
    answer = of_refusal(Reject(refusal, "m", retry_after_s=2.1))
    assert dict(answer.headers).get("retry-after") == ("3" if answer.status in (429, 503) else None)


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (59.01, "60")])
def test_retry_after_is_whole_seconds_and_never_zero(seconds: float, header: str) -> None:
    assert dict(of_refusal(Reject(Refusal.NO_REPLICAS, retry_after_s=seconds)).headers)["retry-after"] == header


CODES = ("rate_limit_exceeded", "context_length_exceeded", "invalid_api_key", "model_not_found")
"""OpenAI's words, where its clients act on them."""


@pytest.mark.parametrize(
    "error",
    [
        of_bad_request(BadRequest("no")),
        of_bad_request(BadRequest("no", "Bad Request", "body.model", 422)),
        too_large(1024),
        unauthorized(presented=True),
        *(of_refusal(Reject(refusal, "m", ("a", "b"))) for refusal in Refusal),
    ],
)
def test_every_error_has_the_same_shape(error: HttpError) -> None:
    body = json.loads(error.body)
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["code"] in (error.status, *CODES)
    assert dict(error.headers)["content-type"] == "application/json"


def test_too_large_names_the_limit() -> None:
    assert too_large(1024).status == 413
    assert b"larger than 1024 bytes" in too_large(1024).body


def test_without_known_models_none_are_offered() -> None:
    message = json.loads(of_refusal(Reject(Refusal.UNKNOWN_MODEL, "m")).body)["error"]["message"]
    assert message == "The model `m` does not exist."


def test_the_list_of_models_is_bounded() -> None:
    known = tuple(f"m{i}" for i in range(1000))
    message = json.loads(of_refusal(Reject(Refusal.UNKNOWN_MODEL, "x", known)).body)["error"]["message"]
    assert message.endswith(f"m{MAX_ALIASES - 1} and {1000 - MAX_ALIASES} more.")


def test_a_model_name_is_repeated_without_tricks() -> None:
    assert printable("a\nb`c\u202e\ud800") == "a?b?c??"
    assert printable("x" * 200) == "x" * 128 + "..."
    assert printable("模型-7b") == "模型-7b"


@given(st.text(alphabet=st.characters()))
def test_any_model_name_can_be_answered(name: str) -> None:
    answer = of_refusal(Reject(Refusal.UNKNOWN_MODEL, name, (name,)))
    assert "\n" not in json.loads(answer.body)["error"]["message"]
    assert len(answer.body) < 2500
