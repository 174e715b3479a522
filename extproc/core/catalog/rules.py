"""Whether a request meets a rule."""

from __future__ import annotations

from collections.abc import Callable

from extproc.core.catalog.settings import When
from extproc.core.types import Request

Size = Callable[[], tuple[float, float]]
"""Expected prompt tokens, and output tokens of one sample; asked only where they matter."""


def meets(when: When, request: Request, size: Size) -> bool:
    """Whether all that the rule names holds for the request. What is not known of the request, a tenant say, is none of those named."""
    return _asks(when, request) and may_ask(when, request) and (not when.weighs or _fits(when, *size()))


def may_ask(when: When, request: Request) -> bool:
    """Whether the rule leaves it to whoever asks."""
    if not when.tenants and not when.tiers:
        return True
    return request.tenant in when.tenants or request.tier in when.tiers


def _asks(when: When, request: Request) -> bool:
    if when.tools is not None and when.tools is not request.tools:
        return False
    if when.images is not None and when.images is not request.media:
        return False
    if when.quality and request.quality not in when.quality:
        return False
    return request.quality not in when.quality_not


def _fits(when: When, prompt_tokens: float, output_tokens: float) -> bool:
    return _between(prompt_tokens, when.prompt_tokens_at_least, when.prompt_tokens_below) and _between(
        output_tokens, when.output_tokens_at_least, when.output_tokens_below
    )


def _between(value: float, least: int | None, below: int | None) -> bool:
    return (least is None or value >= least) and (below is None or value < below)
