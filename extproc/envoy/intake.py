"""From the head and body of a request to the answer for the proxy: reads the body, asks the router, decides on rewriting."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from extproc.config import Config
from extproc.core.account import Account
from extproc.core.record import record
from extproc.core.types import Api, End, Fact, Outcome, Reject, Request, Route, Turn, Verdict, Wait
from extproc.envoy.exchange import Answer, Data, Head, Refuse, Rules, Steer
from extproc.envoy.identity import Identity, Who, hashed
from extproc.openai import body as bodies
from extproc.openai import errors, requests
from extproc.openai.errors import HttpError
from extproc.openai.keys import Keys, tenant_key
from extproc.openai.ratelimit import allowance_headers
from extproc.openai.reading import Reading, Task
from extproc.openai.requests import MAX_SESSION, Limits, Parsed

PRIORITY_HEADER = "x-request-priority"
SLO_HEADER = "x-slo-ttft-ms"
MAX_PRIORITY = 1_000_000
"""Priorities beyond are taken for this one: it orders requests, and further digits order nothing."""
KEY_BYTES = 32
SALTED = (Api.CHAT, Api.COMPLETIONS, Api.RESPONSES)
"""Where vLLM 0.32 reads `cache_salt`."""
UNCOUNTED = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that count towards no limit: they list models, and generate nothing."""


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
Salting = Callable[[bytes | None], bytes]
"""The body with a tenant's salt: the one given, or where that is None the client's own."""


@record
class Hold:
    """A request whose turn has not come."""

    ticket: str
    steer: Callable[[Route], Answer]
    """The answer, once it is routed."""


class Intake:
    """Decides one request after the other; keeps nothing between them."""

    def __init__(self, router: Router, config: Config, key: bytes | None = None, keys: Keys | None = None) -> None:
        """`key` is the secret for the hashes of tenants and API keys; random per process when not given. `keys` are those known."""
        self._router = router
        self._requests = config.requests
        self._limits = Limits(config.requests.max_json_depth, config.requests.max_prompt_blocks)
        self._asks_usage = {pool.name: pool.usage.ask for pool in config.pools}
        self._names_pool = len(config.pools) > 1
        self._endpoints = config.envoy.endpoints
        # Where no other replica would be asked, the end of patience is an error for the client.
        self._rescues = config.envoy.retries > 0 and config.envoy.retry_resets and config.envoy.endpoints > 1
        secret = key or secrets.token_bytes(KEY_BYTES)
        tenants = config.tenants
        self._key = tenant_key(secret)
        self.identity = (
            None if tenants is None else Identity(tenants, config.requests.tenant_header, secret, self._key, keys)
        )
        self._isolates = tenants is not None and tenants.isolate_prefixes

    @property
    def headers(self) -> frozenset[str]:
        """The request headers that are read, lower case."""
        tenant = self._requests.tenant_header
        named = {PRIORITY_HEADER, SLO_HEADER, self._requests.session_header.lower()}
        return frozenset(
            named | ({tenant.lower()} if tenant else set()) | (self.identity.headers if self.identity else set())
        )

    @property
    def rules(self) -> Rules:
        """What the streams need to know."""
        limit = self._requests.max_body_bytes
        return Rules(limit, lambda head: requests.is_read(head.method, head.path), errors.too_large(limit))

    def decide(self, head: Head, body: Data | None, now: float, rewritable: bool = False) -> Answer | Hold:
        """Steer to a replica, which opens a flight, or refuse, or hold. `now` is in the router's seconds."""
        who = self._who(head)
        if isinstance(who, HttpError):
            return Refuse(who)
        data = None if body is None else bytes(body)  # which copies only what is a view
        parsed = requests.read(head.method, head.path, data, head.content_length, self._limits_of(who))
        if not isinstance(parsed, Parsed):
            return Refuse(errors.of_bad_request(parsed))
        request = self._with_head(parsed.request, head, len(data or b""), who)
        if data is None or not rewritable:
            return self._decide(request, None, now)
        salting = self._salting(who, parsed, data)
        return self._decide(request, lambda: requests.with_usage(parsed, data), now, salting)

    def task(self, head: Head, rewritable: bool = False) -> Task | Refuse:
        """What somebody else has to read of a body, for `decide_read`; a refusal where nothing is to be read of it."""
        who = self._who(head)
        if isinstance(who, HttpError):
            return Refuse(who)
        return Task(head.method, head.path, self._limits_of(who), rewritable and any(self._asks_usage.values()))

    def decide_read(
        self, head: Head, body: Data, reading: Reading, now: float, rewritable: bool = False
    ) -> Answer | Hold:
        """As `decide`, for a body that was read elsewhere."""
        parsed, change, who = reading.result, reading.usage, self._who(head, again=True)
        if isinstance(who, HttpError):
            return Refuse(who)
        if not isinstance(parsed, Parsed):
            return Refuse(errors.of_bad_request(parsed))
        request = self._with_head(parsed.request, head, len(body), who)
        changed = None if change is None else lambda: change.apply(body)
        return self._decide(request, changed, now, self._salting(who, parsed, body) if rewritable else None)

    def _decide(
        self, request: Request, changed: Changed | None, now: float, salting: Salting | None = None
    ) -> Answer | Hold:
        verdict = self._router.arrive(request, now)
        if isinstance(verdict, Wait):
            return Hold(verdict.ticket, lambda route: self._steered(route, changed, now, salting))
        if isinstance(verdict, Reject):
            return Refuse(errors.of_refusal(verdict))
        return self._steered(verdict, changed, now, salting)

    def resume(self, hold: Hold, verdict: Route | Reject) -> Answer:
        """The wait is over."""
        return hold.steer(verdict) if isinstance(verdict, Route) else Refuse(errors.of_refusal(verdict))

    def leave(self, hold: Hold, now: float) -> None:
        """The client left before its turn came."""
        self._router.leave(hold.ticket, now)

    def _steered(self, route: Route, changed: Changed | None, now: float, salting: Salting | None) -> Answer:
        try:
            return self._steer(route, changed, salting)
        except Exception:
            self.abandon(route.flight, now)  # the request passes unrouted, and nobody would report its end
            raise

    def abandon(self, flight: str, now: float) -> None:
        """End a flight that the proxy never heard of: the client left before the answer."""
        self._router.finish(flight, Outcome(End.CLIENT_GONE), now)

    def _steer(self, route: Route, changed: Changed | None, salting: Salting | None) -> Steer:
        pool = route.decision.pool
        asking = changed() if changed is not None and self._asks_usage.get(pool, False) else None
        return Steer(
            flight=route.flight,
            destination=",".join(route.endpoints[: self._endpoints]),
            body=asking if salting is None else salting(asking),
            strip_usage=asking is not None,
            pool=pool if self._names_pool else None,
            patience_s=route.patience_s if self._rescues else None,
            ratelimit=allowance_headers(route.allowance),
        )

    # --- who asks ---

    def accounts(self, head: Head) -> list[Account]:
        """Every account that the request may be counted for, before its model is known; none where it is not counted."""
        who = self._who(head, again=True)
        counted = isinstance(who, Who) and head.method not in UNCOUNTED
        return who.plan.accounts(who.tenant) if counted and isinstance(who, Who) else []

    def _who(self, head: Head, again: bool = False) -> Who | HttpError | None:
        """None where there are no tenants. `again` does not count it as another request."""
        if self.identity is None:
            return None
        return self.identity.of(head, counts=not again)

    def _limits_of(self, who: Who | None) -> Limits:
        if who is None or not self._isolates:
            return self._limits
        return Limits(self._limits.max_depth, self._limits.max_blocks, who.tenant)

    def _salting(self, who: Who | None, parsed: Parsed, body: Data) -> Salting | None:
        """Put the tenant's salt into the body, where engines are to keep their caches apart."""
        if who is None or not who.cache_salt or parsed.request.api not in SALTED:
            return None
        assert self.identity is not None
        salt = self.identity.salt(who, parsed.cache_salt)
        return lambda changed: bodies.salted(body if changed is None else changed, salt)

    def _of_tenant(self, request: Request, head: Head, who: Who) -> dict[str, object]:
        """What its tenant makes of a request."""
        headers, plan = head.headers or {}, who.plan
        asked = _priority(headers.get(PRIORITY_HEADER))
        if asked is None and request.priority:
            asked = request.priority
        counted = head.method not in UNCOUNTED
        return {
            "tenant": who.tenant,
            "account": plan.account(who.tenant, request.model) if counted else None,
            "priority": plan.priority if asked is None else min(asked, plan.priority),
            "slo_ttft_s": _slo_s(headers.get(SLO_HEADER)) or plan.slo_ttft_s,
        }

    def _with_head(self, request: Request, head: Head, body_bytes: int, who: Who | None) -> Request:
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
        if who is not None:
            changes |= self._of_tenant(request, head, who)
        elif tenant and (named := headers.get(tenant.lower())):
            changes["tenant"] = hashed(named, self._key)
        if head.subset is not None:
            changes["subset"] = head.subset
        return replace(request, **changes) if changes else request  # type: ignore[arg-type]


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
