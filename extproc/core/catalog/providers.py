"""A provider as a target: it has no replicas, only a price, a budget, and what its answers have shown.

What a request will cost is reserved when it is sent, and settled when it has ended, so that requests in flight count.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from extproc.core.catalog.budget import Bounds, Budget, Cost, Purse
from extproc.core.catalog.settings import ProviderSettings
from extproc.core.estimates import Estimates, whole
from extproc.core.flights import Flight
from extproc.core.record import record
from extproc.core.tokens import Bounded
from extproc.core.types import Blocks, Decision, End, Outcome, Prediction, Refusal, Reject, Request, Route

POLICY: Final = "provider"
"""Stands for policy and reason in its decisions: there was nobody to choose among."""
FAILURES: Final = 3
"""Failed requests in a row after which a provider is passed over, as for a replica."""
OUT_S: Final = (5.0, 10.0, 20.0, 40.0, 60.0)
"""Seconds for which it is then passed over, and after each further failure."""
TOO_MANY: Final = 429
"""The status below 500 that is no fault of the request. Of what else is about our account Envoy has made 503."""
TTFT_S: Final = 0.5
"""Prior: seconds to its first token."""
TOKEN_S: Final = 0.02
"""Prior: seconds from one output token to the next."""
GAIN: Final = 0.1
"""Of what an answer tells, against what is believed."""
BELIEVED_S: Final = 60.0
"""For so long a provider is taken to be as slow as it was: requests in haste are all kept from a slow one, and would never learn better."""
TENANTS: Final = 4096
"""Tenants whose spending is known, the latest; names come from clients, so that their number has no bound."""
UNREAD: Final = Blocks()
UNBOUNDED: Final = Bounds()


@record
class Reserved:
    """For a request in flight."""

    cost: Cost
    purses: tuple[Purse, ...]
    """Of which it is paid."""


class Provider(Estimates):
    """One API elsewhere."""

    def __init__(self, settings: ProviderSettings) -> None:
        super().__init__()
        self.settings = settings
        self._all = Purse(_of_all(settings))
        self.dollars, self.tokens = self._all.dollars, self._all.tokens
        self._of_tenants: Bounded[str | None, Purse] = Bounded(TENANTS)
        self.paid_dollars = 0.0
        """In all, as far as settled."""
        self.used_tokens: Counter[str] = Counter()
        """Prompt and output, likewise."""
        self._reserved: dict[str, Reserved] = {}
        self._failures = 0
        self._out_since = -math.inf
        """When it was last found to fail."""
        self._out_until: float | None = None
        """None while it is well; from then on one request at a time finds out."""
        self._ttft_s = TTFT_S
        self._token_s = TOKEN_S
        self._believed_until = 0.0

    def __repr__(self) -> str:
        return f"<provider {self.settings.name}, {len(self._reserved)} in flight, {self.dollars!r} dollars>"

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._reserved)

    def configure(self, settings: ProviderSettings) -> None:
        """Go on with other prices and budgets; what is in flight is settled by the new ones."""
        self.settings = settings
        self._all.bound(_of_all(settings))

    def absent(self, now: float) -> bool:
        """Whether it is passed over because it fails."""
        return self._out_until is not None and now < self._out_until

    def route(self, request: Request, flight: str, ttl_s: float, now: float) -> tuple[Route, Flight] | Reject:
        """Send the request there, or say why not. `request` is aimed here; `flight` is the id for it, `ttl_s` as in the ledger."""
        if (refused := self.refusal(request, now)) is not None:
            return refused
        self._reserve(flight, Reserved(self._cost_of(request), self._purses(request.tenant)), now)
        if self._out_until is not None:  # this one finds out; the others go elsewhere meanwhile
            self._out_until = now + OUT_S[0]
        decision = self.decide(request, flight, now)
        return Route(flight, (), decision), self._flight(request, decision, ttl_s, now)

    def refusal(self, request: Request, now: float) -> Reject | None:
        """Why the request would not be sent there now; None where it would be. Changes nothing."""
        if request.subset is not None:  # the proxy allows certain replicas alone
            return Reject(Refusal.SUBSET_EMPTY, request.model)
        if self.absent(now):
            assert self._out_until is not None
            return Reject(Refusal.ABSENT, request.model, retry_after_s=self._out_until - now)
        if request.slo_ttft_s is not None and self._first_token_s(now) > request.slo_ttft_s:
            return Reject(Refusal.SLO, request.model)
        spent = _lacking((self._all, self._purse(request.tenant)), self._cost_of(request), now)
        return None if spent is None else Reject(Refusal.BUDGET, request.model, retry_after_s=spent.wait_s(now))

    def decide(self, request: Request, flight: str, now: float) -> Decision:
        """The record of sending the request there; changes nothing."""
        prompt_tokens, output_tokens = self.size(request)
        cap, ttft_s = request.max_output_tokens, self._first_token_s(now)
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
            prediction=Prediction(0, ttft_s, 0.0, decode_s, 0.0, 0.0, ttft_s),
            candidates=(),
            output_p90_tokens=self.output_tokens.p90(request.model, request.api, request.tenant, cap),
            target=request.target,
        )

    def settle(self, flight: Flight, outcome: Outcome, now: float) -> int | None:
        """The flight ended: learn from it, and pay for it. Returns the output tokens, estimated from the response's size if need be."""
        output_tokens = self.learn_tokens(flight, outcome)
        self._judge(flight, outcome, now)
        self._learn_speed(flight, outcome, output_tokens, now)
        prompt, output = self._used(flight, outcome, output_tokens)
        cost = self._cost(prompt, output)
        reserved = self._reserved.pop(flight.id, None)
        if reserved is not None:
            more = Cost(cost.dollars - reserved.cost.dollars, cost.tokens - reserved.cost.tokens)
            for purse in reserved.purses:
                purse.spend(more, now)
        self.paid_dollars += cost.dollars
        self.used_tokens["prompt"] += prompt
        self.used_tokens["output"] += output
        return output_tokens

    # --- parts of the above ---

    def _cost_of(self, request: Request) -> Cost:
        """Expected."""
        prompt_tokens, output_tokens = self.size(request)
        return self._cost(prompt_tokens, output_tokens * request.samples)

    def _cost(self, prompt_tokens: float, output_tokens: float) -> Cost:
        prices = self.settings
        dollars = (prompt_tokens * prices.prompt_dollars + output_tokens * prices.output_dollars) / 1e6
        return Cost(dollars, prompt_tokens + output_tokens)

    def _used(self, flight: Flight, outcome: Outcome, output_tokens: int | None) -> tuple[int, int]:
        """Prompt and output tokens to be paid for. What nobody told is estimated where an answer began, though it may not have ended."""
        size = _received(flight, outcome)
        prompt = outcome.usage.prompt_tokens if outcome.usage is not None else None
        if prompt is None:
            prompt = flight.prompt_tokens if size else 0
        if output_tokens is None and size and flight.output_tokens:
            output_tokens = self.response_bytes.tokens(flight.model, flight.api, flight.stream, size)
        return prompt, output_tokens or 0

    @property
    def _bounds(self) -> Bounds:
        """Of one tenant."""
        return Bounds(self.settings.tenant_dollars, self.settings.tenant_tokens)

    def _purse(self, tenant: str | None) -> Purse:
        """What a tenant has spent, to be looked at."""
        purse = self._of_tenants.get(tenant) or Purse(self._bounds)
        purse.bound(self._bounds)  # which may have changed
        return purse

    def _purses(self, tenant: str | None) -> tuple[Purse, ...]:
        """Those that a request of this tenant is paid of."""
        if self._bounds == UNBOUNDED:
            return (self._all,)
        return self._all, self._of_tenants.learned(tenant, lambda: Purse(self._bounds))

    def _reserve(self, flight: str, reserved: Reserved, now: float) -> None:
        self._reserved[flight] = reserved
        for purse in reserved.purses:
            purse.spend(reserved.cost, now)

    def _judge(self, flight: Flight, outcome: Outcome, now: float) -> None:
        if _failed(outcome):
            if flight.routed_at >= self._out_since:  # those sent before tell nothing new
                self._failures += 1
                self._pass_over(now)
        elif outcome.end in (End.OK, End.CLIENT_ERROR):
            self._failures, self._out_until = 0, None

    def _pass_over(self, now: float) -> None:
        if self._failures >= FAILURES:
            self._out_since = now
            self._out_until = now + OUT_S[min(self._failures - FAILURES, len(OUT_S) - 1)]

    def _first_token_s(self, now: float) -> float:
        return self._ttft_s if now < self._believed_until else min(self._ttft_s, TTFT_S)

    def _learn_speed(self, flight: Flight, outcome: Outcome, output_tokens: int | None, now: float) -> None:
        if not whole(outcome) or not flight.shows_first_token or outcome.ttft_s is None:
            return
        self._believed_until = now + BELIEVED_S
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


def _of_all(settings: ProviderSettings) -> Bounds:
    return Bounds(settings.daily_dollars, settings.daily_tokens)


def _lacking(purses: tuple[Purse, ...], cost: Cost, now: float) -> Budget | None:
    return next((lacks for purse in purses if (lacks := purse.lacks(cost, now)) is not None), None)


def _received(flight: Flight, outcome: Outcome) -> int:
    """Bytes of the answer; 0 of an error. Of a flight whose end nobody told: as far as was heard."""
    return 0 if (outcome.status or 0) >= 400 else outcome.response_bytes or flight.response_bytes


def _failed(outcome: Outcome) -> bool:
    if outcome.end in (End.UNREACHABLE, End.UPSTREAM_ERROR, End.TIMEOUT):
        return True
    return outcome.broken or (outcome.end is End.CLIENT_ERROR and outcome.status == TOO_MANY)
