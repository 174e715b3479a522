"""A provider as a target: it has no replicas, only a price, a budget, and what its answers have shown.

What a request will cost is reserved when it is sent, and settled when it has ended, so that requests in flight count.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from extproc.core.catalog.budget import Budget
from extproc.core.catalog.settings import ProviderSettings
from extproc.core.estimates import Estimates, whole
from extproc.core.flights import Flight
from extproc.core.record import record
from extproc.core.types import Blocks, Decision, End, Outcome, Prediction, Refusal, Reject, Request, Route

POLICY: Final = "provider"
"""Stands for policy and reason in its decisions: there was nobody to choose among."""
FAILURES: Final = 3
"""Failed requests in a row after which a provider is passed over, as for a replica."""
OUT_S: Final = (5.0, 60.0)
"""Seconds for which it is then passed over; they double while it goes on failing."""
REFUSED: Final = frozenset({401, 403, 429})
"""Statuses below 500 that are no fault of the request: the credentials are wrong, or the provider has enough of us."""
TTFT_S: Final = 0.5
"""Prior: seconds to its first token."""
TOKEN_S: Final = 0.02
"""Prior: seconds from one output token to the next."""
GAIN: Final = 0.1
"""Of what an answer tells, against what is believed."""
UNREAD: Final = Blocks()


@record
class Cost:
    """Of one request."""

    dollars: float
    tokens: float


class Provider(Estimates):
    """One API elsewhere."""

    def __init__(self, settings: ProviderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.dollars = Budget(settings.daily_dollars)
        self.tokens = Budget(settings.daily_tokens)
        self.paid_dollars = 0.0
        """In all, as far as settled."""
        self.used_tokens: Counter[str] = Counter()
        """Prompt and output, likewise."""
        self._reserved: dict[str, Cost] = {}
        self._failures = 0
        self._out_until: float | None = None
        self._ttft_s = TTFT_S
        self._token_s = TOKEN_S

    def __repr__(self) -> str:
        return f"<provider {self.settings.name}, {len(self._reserved)} in flight, {self.dollars!r} dollars>"

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._reserved)

    def configure(self, settings: ProviderSettings) -> None:
        """Go on with other prices and budgets; what is in flight is settled by the new ones."""
        self.settings = settings
        self.dollars.limit, self.tokens.limit = settings.daily_dollars, settings.daily_tokens

    def absent(self, now: float) -> bool:
        """Whether it is passed over because it fails."""
        return self._out_until is not None and now < self._out_until

    def route(self, request: Request, flight: str, ttl_s: float, now: float) -> tuple[Route, Flight] | Reject:
        """Send the request there, or say why not. `request` is aimed here; `flight` is the id for it, `ttl_s` as in the ledger."""
        if request.subset is not None:  # the proxy allows certain replicas alone
            return Reject(Refusal.SUBSET_EMPTY, request.model)
        if self.absent(now):
            assert self._out_until is not None
            return Reject(Refusal.ABSENT, request.model, retry_after_s=self._out_until - now)
        prompt_tokens, output_tokens = self.size(request)
        if request.slo_ttft_s is not None and self._ttft_s > request.slo_ttft_s:
            return Reject(Refusal.SLO, request.model)
        cost = self._cost(prompt_tokens, output_tokens * request.samples)
        if (spent := self._over_budget(cost, now)) is not None:
            return Reject(Refusal.BUDGET, request.model, retry_after_s=spent.wait_s(now))
        self._reserve(flight, cost, now)
        decision = self.decide(request, flight, now)
        return Route(flight, (), decision), self._flight(request, decision, ttl_s, now)

    def decide(self, request: Request, flight: str, now: float) -> Decision:
        """The record of sending the request there; changes nothing."""
        prompt_tokens, output_tokens = self.size(request)
        cap = request.max_output_tokens
        decode_s = max(output_tokens - 1.0, 0.0) * self._token_s
        return Decision(
            at=now,
            flight=flight,
            pool=self.settings.name,
            model=request.model,
            api=request.api,
            policy=POLICY,
            reason=POLICY,
            endpoints=(),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            prediction=Prediction(0, self._ttft_s, 0.0, decode_s, 0.0, 0.0, self._ttft_s),
            candidates=(),
            output_p90_tokens=self.output_tokens.p90(request.model, request.api, request.tenant, cap),
            target=request.target,
        )

    def settle(self, flight: Flight, outcome: Outcome, now: float) -> int | None:
        """The flight ended: learn from it, and pay for it. Returns the output tokens, estimated from the response's size if need be."""
        output_tokens = self.learn_tokens(flight, outcome)
        self._judge(outcome, now)
        self._learn_speed(flight, outcome, output_tokens)
        prompt = outcome.usage.prompt_tokens if outcome.usage is not None else None
        if prompt is None:  # told by nobody: paid for, as far as it can be known, where an answer began
            prompt = flight.prompt_tokens if _begun(outcome) else 0
        cost = self._cost(prompt, output_tokens or 0)
        reserved = self._reserved.pop(flight.id, None)
        if reserved is not None:
            self.dollars.spend(cost.dollars - reserved.dollars, now)
            self.tokens.spend(cost.tokens - reserved.tokens, now)
        self.paid_dollars += cost.dollars
        self.used_tokens["prompt"] += prompt
        self.used_tokens["output"] += output_tokens or 0
        return output_tokens

    # --- parts of the above ---

    def _cost(self, prompt_tokens: float, output_tokens: float) -> Cost:
        prices = self.settings
        dollars = (prompt_tokens * prices.prompt_dollars + output_tokens * prices.output_dollars) / 1e6
        return Cost(dollars, prompt_tokens + output_tokens)

    def _over_budget(self, cost: Cost, now: float) -> Budget | None:
        """The budget that the request would exceed."""
        if not self.dollars.allows(cost.dollars, now):
            return self.dollars
        return None if self.tokens.allows(cost.tokens, now) else self.tokens

    def _reserve(self, flight: str, cost: Cost, now: float) -> None:
        self._reserved[flight] = cost
        self.dollars.spend(cost.dollars, now)
        self.tokens.spend(cost.tokens, now)

    def _judge(self, outcome: Outcome, now: float) -> None:
        if _failed(outcome):
            self._failures += 1
            if self._failures >= FAILURES:
                self._out_until = now + min(OUT_S[0] * 2.0 ** (self._failures - FAILURES), OUT_S[1])
        elif outcome.end in (End.OK, End.CLIENT_ERROR):
            self._failures, self._out_until = 0, None

    def _learn_speed(self, flight: Flight, outcome: Outcome, output_tokens: int | None) -> None:
        if not whole(outcome) or not flight.shows_first_token or outcome.ttft_s is None:
            return
        self._ttft_s += GAIN * (outcome.ttft_s - self._ttft_s)
        if outcome.duration_s is not None and output_tokens is not None and output_tokens > 1:
            token_s = (outcome.duration_s - outcome.ttft_s) / (output_tokens - 1)
            self._token_s += GAIN * (max(token_s, 0.0) - self._token_s)

    def _flight(self, request: Request, decision: Decision, ttl_s: float, now: float) -> Flight:
        return Flight(
            id=decision.flight,
            pool=decision.pool,
            address="",
            model=request.model,
            api=request.api,
            tenant=request.tenant,
            stream=request.stream,
            blocks=UNREAD,
            prompt_bytes=request.prompt_bytes,
            prompt_tokens=decision.prompt_tokens,
            output_tokens=decision.output_tokens,
            samples=request.samples,
            hit_bytes=0,
            prediction=decision.prediction,
            work_s=0.0,
            unseen_s=0.0,
            company=(0.0, 0.0),
            exact_tokens=request.prompt_tokens is not None,
            routed_at=now,
            expires_at=now + ttl_s,
            heard_at=now,
            reported_at=now,
            output_p90_tokens=decision.output_p90_tokens,
            target=request.target,
        )


def _begun(outcome: Outcome) -> bool:
    return bool(outcome.response_bytes) and (outcome.status or 0) < 400


def _failed(outcome: Outcome) -> bool:
    if outcome.end in (End.UNREACHABLE, End.UPSTREAM_ERROR, End.TIMEOUT):
        return True
    return outcome.broken or (outcome.end is End.CLIENT_ERROR and outcome.status in REFUSED)
