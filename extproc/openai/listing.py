"""The answers to `GET /v1/models` and `GET /v1/models/{model}`, for all that the service serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import orjson

from extproc.core.catalog.listing import Listed
from extproc.core.types import Refusal, Reject
from extproc.openai.errors import HttpError, of_refusal

PATH = "/v1/models"
OWNER = "extproc"


def asked(method: str, path: str) -> str | None:
    """The model that the request wants to be told of, empty for all; None for other requests. `path` may carry a query."""
    path = path.partition("?")[0]
    if method != "GET" or not path.startswith(PATH):
        return None
    rest = path[len(PATH) :]
    if rest in ("", "/"):
        return ""
    return unquote(rest[1:]) if rest[0] == "/" else None


def response(wanted: str, models: Sequence[Listed]) -> HttpError:
    """`wanted` as `asked` gives it. A name may contain slashes. A model that is not among these is answered with 404."""
    if not wanted:
        return _ok({"object": "list", "data": [_view(each) for each in models]})
    found = next((each for each in models if each.name == wanted), None)
    if found is None:
        return of_refusal(Reject(Refusal.MODEL_NOT_FOUND, wanted, tuple(each.name for each in models)))
    return _ok(_view(found))


def _view(listed: Listed) -> dict[str, Any]:
    """The form of OpenAI's API, with `root` and `parent` as vLLM has them. When a model was created nobody tells us."""
    return {
        "id": listed.name,
        "object": "model",
        "created": 0,
        "owned_by": OWNER,
        "root": listed.root,
        "parent": listed.parent,
    }


def _ok(value: dict[str, Any]) -> HttpError:
    return HttpError(200, orjson.dumps(value), (("content-type", "application/json"),))
