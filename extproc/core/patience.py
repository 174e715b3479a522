"""How long a replica may take to begin its response before the request is worth sending elsewhere.

A replica that accepts requests and never answers looks idle, and what is in flight there would wait for ever. The proxy can ask the
next one as long as no response header has come, so what counts is when headers come: vLLM 0.32 sends those of a stream at once (8 to
35 ms, even while the request queues), those of a whole response with its last token.

Too short a patience is worse than none: the request is run again for nothing, and after the last attempt it fails.
"""

from __future__ import annotations

from typing import Final

from extproc.core.health.settings import HealthSettings
from extproc.core.types import Api, Decision, Request

GENERATES: Final = (Api.CHAT, Api.COMPLETIONS, Api.RESPONSES)
SLACK: Final = 2.0
"""On top of `hang_factor` for whole responses: without a label for its GPU the prior of a replica's speed may be off by 4 to 5,
and a replica that only ever answers as a whole teaches nothing of its decode."""


def patience_s(request: Request, decision: Decision, settings: HealthSettings) -> float | None:
    """Seconds, or None where nothing bounds the answer, or there is no other replica to ask.

    1. A stream is late when its first token is: as long as that takes, though headers come earlier.
    2. A whole response must fit, at the length that the client allows and not the expected one, for long answers are no failure.
       Without `max_tokens` any length is right.
    3. Paths that are not read may do anything.
    """
    if request.api is Api.OTHER or len(decision.endpoints) < 2:
        return None
    ttft_s = decision.prediction.ttft_s
    if request.stream:
        return max(settings.hang_s, settings.hang_factor * ttft_s)
    decode_s = _longest_decode_s(request, decision)
    if decode_s is None:
        return None
    return settings.hang_s + SLACK * settings.hang_factor * (ttft_s + decode_s)


def _longest_decode_s(request: Request, decision: Decision) -> float | None:
    """Seconds for as many tokens as the client allows, at the predicted time of a step."""
    if request.api not in GENERATES:
        return 0.0
    if request.max_output_tokens is None:
        return None
    steps = request.max_output_tokens - 1
    if steps <= 0:
        return 0.0
    expected = decision.output_tokens - 1.0
    return decision.prediction.decode_s / expected * steps if expected > 0 else None
