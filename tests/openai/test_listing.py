"""`/v1/models` in the form of OpenAI's API."""

from __future__ import annotations

import json

import pytest

from extproc.core.catalog.listing import Listed
from extproc.openai.listing import asked, response

MODELS = (Listed("chat", "chat"), Listed("gpt-4o", "chat"), Listed("org/adapter", "org/adapter", "base"))


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [
        ("GET", "/v1/models", ""),
        ("GET", "/v1/models/", ""),
        ("GET", "/v1/models?limit=3", ""),
        ("GET", "/v1/models/chat", "chat"),
        ("GET", "/v1/models/org/adapter", "org/adapter"),
        ("GET", "/v1/models/org%2Fadapter?x=1", "org/adapter"),
        ("POST", "/v1/models", None),
        ("GET", "/v1/modelsx", None),
        ("GET", "/v1/model", None),
        ("GET", "/version", None),
    ],
)
def test_what_is_asked_for(method: str, path: str, wanted: str | None) -> None:
    assert asked(method, path) == wanted


def test_the_list() -> None:
    answer = response("", MODELS)
    assert (answer.status, answer.headers) == (200, (("content-type", "application/json"),))
    body = json.loads(answer.body)
    assert body["object"] == "list"
    assert [(m["id"], m["root"], m["parent"]) for m in body["data"]] == [
        ("chat", "chat", None),
        ("gpt-4o", "chat", None),
        ("org/adapter", "org/adapter", "base"),
    ]
    assert body["data"][0] == {
        "id": "chat",
        "object": "model",
        "created": 0,
        "owned_by": "extproc",
        "root": "chat",
        "parent": None,
    }


def test_one_model_or_none() -> None:
    assert json.loads(response("org/adapter", MODELS).body)["id"] == "org/adapter"
    missing = response("nope", MODELS)
    assert missing.status == 404
    assert json.loads(missing.body)["error"]["code"] == "model_not_found"
