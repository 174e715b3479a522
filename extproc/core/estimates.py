"""What requests for one pool or provider amount to in tokens, learned from the usage that comes back."""

from __future__ import annotations

from extproc.core.flights import Flight
from extproc.core.tokens import OutputTokens, PromptTokens, ResponseBytes
from extproc.core.types import End, Outcome, Request, Usage


class Estimates:
    """Of a pool, or of a provider."""

    def __init__(self) -> None:
        self.prompt_tokens = PromptTokens()
        self.output_tokens = OutputTokens()
        self.response_bytes = ResponseBytes()

    def size(self, request: Request, model: str | None = None) -> tuple[int, float]:
        """Expected prompt tokens, and output tokens of one sample. `model` stands in for the request's own, where it is called otherwise here."""
        model, tokens = model or request.model, request.prompt_tokens
        if tokens is None:
            tokens = self.prompt_tokens.estimate(model, request.prompt_bytes or 0)
        return tokens, self.output_tokens.estimate(model, request.api, request.tenant, request.max_output_tokens)

    def learn_tokens(self, flight: Flight, outcome: Outcome) -> int | None:
        """Correct the estimates by usage. Returns the output tokens, estimated from the response's size if need be."""
        usage = outcome.usage or Usage()
        if (
            usage.prompt_tokens is not None
            and flight.model is not None
            and flight.prompt_bytes
            and not flight.exact_tokens
        ):
            self.prompt_tokens.learn(flight.model, flight.prompt_bytes, usage.prompt_tokens)
        size = outcome.response_bytes
        if usage.completion_tokens is not None:
            if size and whole(outcome):
                self.response_bytes.learn(flight.model, flight.api, flight.stream, size, usage.completion_tokens)
            output: int | None = usage.completion_tokens
        elif size and outcome.end in (End.OK, End.CLIENT_GONE) and flight.output_tokens:
            output = self.response_bytes.tokens(flight.model, flight.api, flight.stream, size)
        else:
            output = None
        if output is not None and whole(outcome) and flight.output_tokens:
            each = max(round(output / flight.samples), 1)
            self.output_tokens.learn(flight.model, flight.api, flight.tenant, each)
        return output


def whole(outcome: Outcome) -> bool:
    """Whether the response is all that was to come: only such a one tells lengths and speeds."""
    return outcome.end is End.OK and not outcome.broken


def failed(outcome: Outcome) -> bool:
    """Whether the replica answered with an error instead of running the request. One that broke off later did run it."""
    return outcome.end is End.CLIENT_ERROR or (outcome.status is not None and outcome.status >= 400)
