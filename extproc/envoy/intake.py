"""From the head and body of a request to the answer for the proxy: reads the body, asks the router, decides on rewriting."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Protocol

from extproc.config import Config
from extproc.core.types import End, Fact, Outcome, Reject, Request, Route, Verdict
from extproc.envoy.exchange import Answer, Head, Refuse, Rules, Steer
from extproc.openai import errors, requests
from extproc.openai.requests import MAX_SESSION, Parsed

PRIORITY_HEADER = "x-request-priority"
MAX_PRIORITY = 1_000_000
"""Priorities beyond are taken for this one: it orders requests, and further digits order nothing."""
KEY_BYTES = 32
DIGEST_BYTES = 8
"""Of a tenant's hash: enough that a million tenants collide with a chance of 3e-8."""


class Router(Protocol):
    """What the shells here need of `extproc.core.router.Router`."""

    def arrive(self, request: Request, now: float) -> Verdict:
        """Route or reject; a route opens a flight."""

    def finish(self, flight_id: str, outcome: Outcome, now: float) -> object:
        """End a flight; one that is not open changes nothing."""

    def learn(self, fact: Fact, now: float) -> object:
        """Take in a fact."""


@dataclass
class FakeRouter:
    """Gives the verdicts it was handed, in turn, the last one for ever; remembers what it was told and when."""

    verdicts: list[Verdict] = field(default_factory=list)
    arrived: list[tuple[Request, float]] = field(default_factory=list)
    finished: list[tuple[str, Outcome, float]] = field(default_factory=list)
    learned: list[tuple[Fact, float]] = field(default_factory=list)

    def arrive(self, request: Request, now: float) -> Verdict:
        self.arrived.append((request, now))
        return self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]

    def finish(self, flight_id: str, outcome: Outcome, now: float) -> None:
        self.finished.append((flight_id, outcome, now))

    def learn(self, fact: Fact, now: float) -> None:
        self.learned.append((fact, now))


class Intake:
    """Decides one request after the other; keeps nothing between them."""

    def __init__(self, router: Router, config: Config, key: bytes | None = None) -> None:
        """`key` is for the hashes of tenants, up to 64 bytes; random per process when not given."""
        self._router = router
        self._requests = config.requests
        self._asks_usage = {pool.name: pool.usage.ask for pool in config.pools}
        self._names_pool = len(config.pools) > 1
        self._key = key or secrets.token_bytes(KEY_BYTES)

    @property
    def headers(self) -> frozenset[str]:
        """The request headers that are read, lower case."""
        tenant = self._requests.tenant_header
        named = {PRIORITY_HEADER, self._requests.session_header.lower()}
        return frozenset(named | {tenant.lower()} if tenant else named)

    @property
    def rules(self) -> Rules:
        """What the streams need to know."""
        limit = self._requests.max_body_bytes
        return Rules(limit, lambda head: requests.is_read(head.method, head.path), errors.too_large(limit))

    def decide(self, head: Head, body: bytes | None, now: float, rewritable: bool = False) -> Answer:
        """Steer to a replica, which opens a flight, or refuse. `now` is in the router's seconds."""
        parsed = requests.read(head.method, head.path, body, head.content_length)
        if not isinstance(parsed, Parsed):
            return Refuse(errors.of_bad_request(parsed))
        verdict = self._router.arrive(self._with_head(parsed.request, head), now)
        if isinstance(verdict, Reject):
            return Refuse(errors.of_refusal(verdict))
        try:
            return self._steer(verdict, parsed, body if rewritable else None)
        except Exception:
            self.abandon(verdict.flight, now)  # the request passes unrouted, and nobody would report its end
            raise

    def abandon(self, flight: str, now: float) -> None:
        """End a flight that the proxy never heard of: the client left before the answer."""
        self._router.finish(flight, Outcome(End.CLIENT_GONE), now)

    def _steer(self, route: Route, parsed: Parsed, body: bytes | None) -> Steer:
        pool = route.decision.pool
        asks = body is not None and self._asks_usage.get(pool, False)
        changed = requests.with_usage(parsed, body) if asks and body is not None else None
        return Steer(
            flight=route.flight,
            destination=",".join(route.endpoints),
            body=changed,
            strip_usage=changed is not None,
            pool=pool if self._names_pool else None,
        )

    def _with_head(self, request: Request, head: Head) -> Request:
        """The request with what its headers say; those of the body stand where the headers are silent."""
        headers = head.headers or {}
        changes: dict[str, object] = {}
        session = headers.get(self._requests.session_header.lower())
        if session and len(session) <= MAX_SESSION:
            changes["session"] = session
        if (priority := _priority(headers.get(PRIORITY_HEADER))) is not None:
            changes["priority"] = priority
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
