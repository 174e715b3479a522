"""The reading of one body as a value that another process can be given, and what comes back from it: pure, and small whatever the body."""

from __future__ import annotations

from enum import Enum

from extproc.core.record import record
from extproc.openai import requests
from extproc.openai.body import Change, Span
from extproc.openai.errors import BadRequest
from extproc.openai.requests import Limits, Parsed

TOO_COMPLEX = BadRequest("There was an error parsing the body: it is too complex", "Bad Request")
"""The answer to a body that takes more time or memory than bodies of its size do."""


@record
class Task:
    """What to read a body as."""

    method: str
    path: str
    limits: Limits
    wants_usage: bool = False
    """Find out too how to ask for usage."""
    wants_model: bool = False
    """Find out too where the model is named."""


@record
class Reading:
    """What a body says."""

    result: Parsed | BadRequest
    usage: Change | None = None
    """How to have the engine tell usage; None where that was not asked for, or nothing is to be changed."""
    model: Span | None = None
    """Where the body names its model; None where that was not asked for, or it is not found."""


class NotRead(Enum):
    """Why a body was not read, through no fault of its own."""

    BUSY = "busy"  # too many are waiting, or for too long
    FAILED = "failed"  # nothing could be started to read it


def perform(task: Task, body: bytes) -> Reading:
    """Read it here and now."""
    result = requests.read(task.method, task.path, body, limits=task.limits)
    if not isinstance(result, Parsed):
        return Reading(result)
    return Reading(
        result,
        requests.usage_change(result, body) if task.wants_usage else None,
        requests.model_span(result, body) if task.wants_model else None,
    )
