"""From the head and body of a request to the answer for the proxy: reads the body, asks the router, decides on rewriting."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Protocol

from extproc.config import Config
from extproc.core.record import record
from extproc.core.types import End, Fact, Outcome, Reject, Request, Route, Turn, Verdict, Wait
from extproc.envoy.exchange import Answer, Data, Head, Refuse, Rules, Steer
from extproc.openai import errors, requests
from extproc.openai.reading import Reading, Task
from extproc.openai.requests import MAX_SESSION, Limits, Parsed

PRIORITY_HEADER = "x-request-priority"
SLO_HEADER = "x-slo-ttft-ms"
MAX_PRIORITY = 1_000_000
"""Priorities beyond are taken for this one: it orders requests, and further digits order nothing."""
KEY_BYTES = 32
DIGEST_BYTES = 8
"""Of a tenant's hash: enough that a million tenants collide with a chance of 3e-8."""


class Router(Protocol):
    """What the shells here need of `extproc.core.router.Router`."""

    def arrive(self, request: Request, now: float) -> Verdict:
        """Route or reject; a route opens a flight."""

    def leave(self, ticket: str, now: float) -> object:
        """End a wait; one that is over changes nothing."""

    def turns(self, now: float) -> list[Turn]:
        """Waits that end now."""

    def release(self, now: float) -> list[Turn]:
        """All waits end now."""

    def next_wakeup(self) -> float | None:
        """When to ask for turns next."""

    @property
    def holding(self) -> int:
        """Requests held."""

    def finish(self, flight_id: str, outcome: Outcome, now: float) -> object:
        """End a flight; one that is not open changes nothing."""

    def forget(self, flight_id: str, now: float) -> bool:
        """End a flight of which nothing was reported; whether it was open, and so."""

    def learn(self, fact: Fact, now: float) -> object:
        """Take in a fact."""


@dataclass
class FakeRouter:
    """Gives the verdicts it was handed, in turn, the last one for ever; remembers what it was told and when.

    The ends of waits are put into `due` by the test.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    arrived: list[tuple[Request, float]] = field(default_factory=list)
    finished: list[tuple[str, Outcome, float]] = field(default_factory=list)
    learned: list[tuple[Fact, float]] = field(default_factory=list)
    due: list[Turn] = field(default_factory=list)
    wakeup: float | None = None
    left: list[str] = field(default_factory=list)
    held: int = 0

    def arrive(self, request: Request, now: float) -> Verdict:
        self.arrived.append((request, now))
        verdict = self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]
        self.held += isinstance(verdict, Wait)
        return verdict

    def leave(self, ticket: str, now: float) -> None:  # noqa: ARG002 - the seam's
        self.left.append(ticket)
        self.held -= 1

    def turns(self, now: float) -> list[Turn]:  # noqa: ARG002 - the seam's
        turns, self.due = self.due, []
        self.held -= len(turns)
        return turns

    def release(self, now: float) -> list[Turn]:
        return self.turns(now)

    def next_wakeup(self) -> float | None:
        return self.wakeup

    @property
    def holding(self) -> int:
        return self.held

    def finish(self, flight_id: str, outcome: Outcome, now: float) -> None:
        self.finished.append((flight_id, outcome, now))

    def forget(self, flight_id: str, now: float) -> bool:
        self.finish(flight_id, Outcome(End.CLIENT_GONE), now)
        return True

    def learn(self, fact: Fact, now: float) -> None:
        self.learned.append((fact, now))


Changed = Callable[[], bytes | None]
"""The body to send instead, where usage is to be asked for; None where there is nothing to change."""


@record
class Hold:
    """A request whose turn has not come."""

    ticket: str
    steer: Callable[[Route], Answer]
    """The answer, once it is routed."""


class Intake:
    """Decides one request after the other; keeps nothing between them."""

    def __init__(self, router: Router, config: Config, key: bytes | None = None) -> None:
        """`key` is for the hashes of tenants, up to 64 bytes; random per process when not given."""
        self._router = router
        self._requests = config.requests
        self._limits = Limits(config.requests.max_json_depth, config.requests.max_prompt_blocks)
        self._asks_usage = {pool.name: pool.usage.ask for pool in config.pools}
        self._names_pool = len(config.pools) > 1
        # Where no other replica would be asked, the end of patience is an error for the client.
        self._rescues = config.envoy.retries > 0 and config.envoy.retry_resets
        self._key = key or secrets.token_bytes(KEY_BYTES)

    @property
    def headers(self) -> frozenset[str]:
        """The request headers that are read, lower case."""
        tenant = self._requests.tenant_header
        named = {PRIORITY_HEADER, SLO_HEADER, self._requests.session_header.lower()}
        return frozenset(named | {tenant.lower()} if tenant else named)

    @property
    def rules(self) -> Rules:
        """What the streams need to know."""
        limit = self._requests.max_body_bytes
        return Rules(limit, lambda head: requests.is_read(head.method, head.path), errors.too_large(limit))

    def decide(self, head: Head, body: Data | None, now: float, rewritable: bool = False) -> Answer | Hold:
        """Steer to a replica, which opens a flight, or refuse, or hold. `now` is in the router's seconds."""
        data = None if body is None else bytes(body)  # which copies only what is a view
        parsed = requests.read(head.method, head.path, data, head.content_length, self._limits)
        if not isinstance(parsed, Parsed):
            return Refuse(errors.of_bad_request(parsed))
        request = self._with_head(parsed.request, head, len(data or b""))
        if data is None or not rewritable:
            return self._decide(request, None, now)
        return self._decide(request, lambda: requests.with_usage(parsed, data), now)

    def task(self, head: Head, rewritable: bool = False) -> Task:
        """What somebody else has to read of a body, for `decide_read`."""
        return Task(head.method, head.path, self._limits, rewritable and any(self._asks_usage.values()))

    def decide_read(self, head: Head, body: Data, reading: Reading, now: float) -> Answer | Hold:
        """As `decide`, for a body that was read elsewhere."""
        parsed, change = reading.result, reading.usage
        if not isinstance(parsed, Parsed):
            return Refuse(errors.of_bad_request(parsed))
        request = self._with_head(parsed.request, head, len(body))
        return self._decide(request, None if change is None else lambda: change.apply(body), now)

    def _decide(self, request: Request, changed: Changed | None, now: float) -> Answer | Hold:
        verdict = self._router.arrive(request, now)
        if isinstance(verdict, Wait):
            return Hold(verdict.ticket, lambda route: self._steered(route, changed, now))
        if isinstance(verdict, Reject):
            return Refuse(errors.of_refusal(verdict))
        return self._steered(verdict, changed, now)

    def resume(self, hold: Hold, verdict: Route | Reject) -> Answer:
        """The wait is over."""
        return hold.steer(verdict) if isinstance(verdict, Route) else Refuse(errors.of_refusal(verdict))

    def leave(self, hold: Hold, now: float) -> None:
        """The client left before its turn came."""
        self._router.leave(hold.ticket, now)

    def _steered(self, route: Route, changed: Changed | None, now: float) -> Answer:
        try:
            return self._steer(route, changed)
        except Exception:
            self.abandon(route.flight, now)  # the request passes unrouted, and nobody would report its end
            raise

    def abandon(self, flight: str, now: float) -> None:
        """End a flight that the proxy never heard of: the client left before the answer."""
        self._router.finish(flight, Outcome(End.CLIENT_GONE), now)

    def _steer(self, route: Route, changed: Changed | None) -> Steer:
        pool = route.decision.pool
        body = changed() if changed is not None and self._asks_usage.get(pool, False) else None
        return Steer(
            flight=route.flight,
            destination=",".join(route.endpoints),
            body=body,
            strip_usage=body is not None,
            pool=pool if self._names_pool else None,
            patience_s=route.patience_s if self._rescues else None,
        )

    def _with_head(self, request: Request, head: Head, body_bytes: int) -> Request:
        """The request with what its headers say; those of the body stand where the headers are silent."""
        headers = head.headers or {}
        changes: dict[str, object] = {"body_bytes": body_bytes} if body_bytes else {}
        session = headers.get(self._requests.session_header.lower())
        if session and len(session) <= MAX_SESSION:
            changes["session"] = session
        if (priority := _priority(headers.get(PRIORITY_HEADER))) is not None:
            changes["priority"] = priority
        if (slo_s := _slo_s(headers.get(SLO_HEADER))) is not None:
            changes["slo_ttft_s"] = slo_s
        tenant = self._requests.tenant_header
        if tenant and (named := headers.get(tenant.lower())):
            changes["tenant"] = self._hash(named)
        if head.subset is not None:
            changes["subset"] = head.subset
        return replace(request, **changes) if changes else request  # type: ignore[arg-type]

    def _hash(self, name: str) -> str:
        return blake2b(name.encode("utf-8", "replace"), digest_size=DIGEST_BYTES, key=self._key).hexdigest()


def _priority(text: str | None) -> int | None:
    """None for what is no integer: a wrong header must not cost the request."""
    if text is None or not 0 < len(text) <= 20:
        return None
    try:
        value = int(text)
    except ValueError:
        return None
    return max(-MAX_PRIORITY, min(MAX_PRIORITY, value))


def _slo_s(text: str | None) -> float | None:
    """Seconds, of a header in milliseconds; None for what is no positive number."""
    if text is None or not 0 < len(text) <= 20 or not text.isdecimal():
        return None
    return int(text) / 1000.0 or None
