"""What is left to a client, in the headers that OpenAI's API has for it."""

from __future__ import annotations

import math

from extproc.core.account import Allowance

Headers = tuple[tuple[str, str], ...]


def allowance_headers(allowance: Allowance | None) -> Headers:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`, of the limits that there are."""
    if allowance is None:
        return ()
    found: list[tuple[str, str]] = []
    for of, quota in (("requests", allowance.requests), ("tokens", allowance.tokens)):
        if quota is not None:
            values = (("limit", quota.limit), ("remaining", quota.remaining), ("reset", duration(quota.reset_s)))
            found += [(f"x-ratelimit-{what}-{of}", str(value)) for what, value in values]
    return tuple(found)


def duration(seconds: float) -> str:
    """As OpenAI writes it, and Go: `120ms`, `6s`, `8.64s`, `6m0s`, `1h0m0s`. Rounded up to milliseconds."""
    ms = math.ceil(seconds * 1000 - 1e-3)
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(max(ms, 0), 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if minutes or hours:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text
