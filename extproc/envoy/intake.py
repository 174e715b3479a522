"""From the head and body of a request to the answer for the proxy: reads the body, asks the router, decides on rewriting."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from extproc.config import Config
from extproc.core.account import Account
from extproc.core.catalog.listing import Listed
from extproc.core.ranks import endpoint_of, rank_of
from extproc.core.record import record
from extproc.core.types import Api, End, Fact, Outcome, Reject, Request, Route, Turn, Verdict, Wait
from extproc.envoy.exchange import Answer, Data, Head, Refuse, Reply, Rules, Steer
from extproc.envoy.identity import Identity, Who, hashed
from extproc.envoy.rewriting import NotFoundInBody, Rewriting
from extproc.openai import errors, listing, requests
from extproc.openai.body import Change, applied
from extproc.openai.errors import HttpError
from extproc.openai.keys import Keys, tenant_key
from extproc.openai.ratelimit import allowance_headers
from extproc.openai.reading import Reading, Task
from extproc.openai.requests import MAX_SESSION, Limits, Parsed
from extproc.openai.tokens import Place, Question, Tokenized

PRIORITY_HEADER = "x-request-priority"
SLO_HEADER = "x-slo-ttft-ms"
OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
"""What names an InferenceObjective under the endpoint picker protocol; of both the first counts."""
QUALITY_HEADER = "x-quality"
MAX_QUALITY = 64
"""Longest value of it that is kept, characters."""
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

    def listed(self, who: Request, now: float) -> tuple[Listed, ...]:
        """The models that can be asked for."""

    def reachable(self, model: str | None) -> list[tuple[str, str | None]]:
        """Pools where a request for the model may go, and the LoRA adapter that it is there."""


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
    models: tuple[Listed, ...] = ()
    asked_for: list[tuple[Request, float]] = field(default_factory=list)

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

    def listed(self, who: Request, now: float) -> tuple[Listed, ...]:
        self.asked_for.append((who, now))
        return self.models

    def reachable(self, model: str | None) -> list[tuple[str, str | None]]:  # noqa: ARG002 - the seam's
        return [("default", None)]


@record
class Ready:
    """A request that was read and is to be decided."""

    request: Request
    rewriting: Rewriting | None = None
    """None where the body cannot be changed any more."""

    @property
    def question(self) -> Question:
        """What to ask of a tokenizer, but for the adapter."""
        return Question(self.request.api, salt=self.rewriting.salt if self.rewriting is not None else None)

    def tokenized(self, known: Tokenized | None) -> Request:
        """The request with its prompt as the engine will have it, where that is known."""
        if known is None:
            return self.request
        by_us = self.request.prompt_tokens is None
        return replace(self.request, tokens=known.blocks, prompt_tokens=known.prompt_tokens, tokenized=by_us)


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
        self._apart = frozenset(p.name for p in config.pools if p.disaggregation is not None)
        self._mirrors = any(p.mirrors for p in config.pools)
        self._limits = Limits(
            config.requests.max_json_depth, config.requests.max_prompt_blocks, transfers=not self._apart
        )
        # Of a provider always: it is paid by what its usage says.
        asked = {pool.name: pool.usage.ask for pool in config.pools}
        self._asks_usage = {**asked, **dict.fromkeys((provider.name for provider in config.providers), True)}
        self._names_pool = config.names_cluster
        self._endpoints = config.envoy.endpoints
        self._retries = config.envoy.retries
        # Where no other replica would be asked, the end of patience is an error for the client.
        self._rescues = config.envoy.retries > 0 and config.envoy.retry_resets and config.envoy.endpoints > 1
        secret = key or secrets.token_bytes(KEY_BYTES)
        tenants = config.tenants
        self._key = tenant_key(secret)
        self.identity = (
            None if tenants is None else Identity(tenants, config.requests.tenant_header, secret, self._key, keys)
        )
        self._isolates = tenants is not None and tenants.isolate_prefixes
        self._passes = config.undecided_pass

        self.configure(config)

    def configure(self, config: Config) -> None:
        """Go on with other models; nothing else is taken over."""
        self._has_catalog = bool(config.models)
        self._lists = self._has_catalog or len(config.pools) > 1
        words = any(model.estimate == "words" for model in config.models)
        self._limits = replace(self._limits, named=not self._has_catalog, words=words)
        self._canonical = {alias: model.name for model in config.models for alias in model.aliases}

    def hashed(self, tenant: str) -> str:
        """The name of a tenant as requests bear it."""
        return hashed(tenant, self._key)

    @property
    def headers(self) -> frozenset[str]:
        """The request headers that are read, lower case."""
        tenant = self._requests.tenant_header
        named = {PRIORITY_HEADER, SLO_HEADER, QUALITY_HEADER, self._requests.session_header.lower()}
        named |= set(OBJECTIVE_HEADERS) if self._requests.objectives else set()
        return frozenset(
            named | ({tenant.lower()} if tenant else set()) | (self.identity.headers if self.identity else set())
        )

    @property
    def rules(self) -> Rules:
        """What the streams need to know."""
        limit = self._requests.max_body_bytes
        return Rules(
            limit,
            lambda head: requests.is_read(head.method, head.path),
            errors.too_large(limit),
            self._refused,
            self._passes,
        )

    def decide(self, head: Head, body: Data | None, now: float, rewritable: bool = False) -> Answer | Hold:
        """Steer to a replica, which opens a flight, or refuse, or hold. `now` is in the router's seconds."""
        ready = self.read(head, body, now, rewritable)
        return self.proceed(ready, now) if isinstance(ready, Ready) else ready

    def read(self, head: Head, body: Data | None, now: float, rewritable: bool = False) -> Ready | Answer:
        """The first half of `decide`: what the router is asked, or the answer where it is not."""
        who = self._who(head)
        if isinstance(who, HttpError):
            return Refuse(who)
        if self._lists and (wanted := listing.asked(head.method, head.path)) is not None:
            return Reply(listing.response(wanted, self._router.listed(self._with_head(Request(), head, 0, who), now)))
        data = None if body is None else bytes(body)  # which copies only what is a view
        parsed = requests.read(head.method, head.path, data, head.content_length, self._limits_of(who))
        if not isinstance(parsed, Parsed):
            return Refuse(errors.of_bad_request(parsed))
        request = self._with_head(parsed.request, head, len(data or b""), who)
        if data is None or not rewritable:
            return Ready(request)
        usage = partial(requests.usage_change, parsed, data) if head.usage_is_read else _no_change
        span = partial(requests.model_span, parsed, data)
        rewriting = Rewriting(data, request.model, usage, span, self._salt(who, parsed))
        return self._ready(request, rewriting, mirrors=head.mirrors)

    def task(self, head: Head, rewritable: bool = False) -> Task | Refuse:
        """What somebody else has to read of a body, for `decide_read`; a refusal where nothing is to be read of it."""
        who = self._who(head)
        if isinstance(who, HttpError):
            return Refuse(who)
        wants_usage = rewritable and any(self._asks_usage.values())
        return Task(head.method, head.path, self._limits_of(who), wants_usage, rewritable and self._has_catalog)

    def decide_read(
        self, head: Head, body: Data, reading: Reading, now: float, rewritable: bool = False
    ) -> Answer | Hold:
        """As `decide`, for a body that was read elsewhere."""
        ready = self.take(head, body, reading, rewritable)
        return self.proceed(ready, now) if isinstance(ready, Ready) else ready

    def take(self, head: Head, body: Data, reading: Reading, rewritable: bool = False) -> Ready | Refuse:
        """As `read`, for a body that was read elsewhere."""
        parsed, who = reading.result, self._who(head, again=True)
        if isinstance(who, HttpError):
            return Refuse(who)
        if not isinstance(parsed, Parsed):
            return Refuse(errors.of_bad_request(parsed))
        request = self._with_head(parsed.request, head, len(body), who)
        if not rewritable:
            return Ready(request)
        usage = (lambda: reading.usage) if head.usage_is_read else _no_change
        rewriting = Rewriting(body, request.model, usage, lambda: reading.model, self._salt(who, parsed))
        return self._ready(request, rewriting, mirrors=head.mirrors)

    def proceed(self, ready: Ready, now: float, known: Tokenized | None = None) -> Answer | Hold:
        """The second half of `decide`. `known`: the prompt as the engine will have it."""
        return self._decide(ready.tokenized(known), ready.rewriting, now)

    def places(self, ready: Ready) -> list[Place]:
        """Where the request may go."""
        return [Place(pool, lora) for pool, lora in self._router.reachable(ready.request.model)]

    def asked(self, head: Head, body: bytes, tenant: str | None = None, tier: str | None = None) -> Ready | HttpError:
        """What `read` gives, or the refusal. Counts nothing; `tenant` is taken to be who asks, whatever the head says."""
        if self.identity is None or tenant is None:
            who = self._who(head, again=True)
        else:
            who = self.identity.named(tenant, tier)
        if isinstance(who, HttpError):
            return who
        parsed = requests.read(head.method, head.path, body, None, self._limits_of(who))
        if not isinstance(parsed, Parsed):
            return errors.of_bad_request(parsed)
        request = self._with_head(parsed.request, head, len(body), who)
        rewriting = Rewriting(body, request.model, _no_change, _no_change, self._salt(who, parsed))
        return self._ready(request, rewriting, mirrors=True)

    def _ready(self, request: Request, rewriting: Rewriting, *, mirrors: bool) -> Ready:
        """What can be changed, and copied where the proxy does so."""
        return Ready(replace(request, mirrorable=True) if mirrors and self._mirrors else request, rewriting)

    def _decide(self, request: Request, rewriting: Rewriting | None, now: float) -> Answer | Hold:
        """`rewriting` is None where the body cannot be changed any more."""
        verdict = self._router.arrive(request, now)
        if isinstance(verdict, Wait):
            return Hold(verdict.ticket, lambda route: self._steered(route, request.model, rewriting, now))
        if isinstance(verdict, Reject):
            return Refuse(errors.of_refusal(verdict))
        return self._steered(verdict, request.model, rewriting, now)

    def resume(self, hold: Hold, verdict: Route | Reject) -> Answer:
        """The wait is over."""
        return hold.steer(verdict) if isinstance(verdict, Route) else Refuse(errors.of_refusal(verdict))

    def leave(self, hold: Hold, now: float) -> None:
        """The client left before its turn came."""
        self._router.leave(hold.ticket, now)

    def _steered(self, route: Route, asked: str | None, rewriting: Rewriting | None, now: float) -> Answer:
        """`asked` is the model as the client names it."""
        if rewriting is None and route.decision.target is not None and route.decision.model != asked:
            self.abandon(route.flight, now)
            return Refuse(errors.not_renamed())
        try:
            return self._steer(route, rewriting)
        except NotFoundInBody:
            self.abandon(route.flight, now)
            return Refuse(errors.of_bad_request(errors.NAME_NOT_FOUND))
        except Exception:
            self.abandon(route.flight, now)  # the request passes unrouted, and nobody would report its end
            raise

    def abandon(self, flight: str, now: float) -> None:
        """End a flight that the proxy never heard of: the client left before the answer."""
        self._router.finish(flight, Outcome(End.CLIENT_GONE), now)

    def _steer(self, route: Route, rewriting: Rewriting | None) -> Steer:
        decision, pool = route.decision, route.decision.pool
        asking: list[Change] = []
        others: list[Change] = []
        if rewriting is not None:
            asking = rewriting.asking() if self._asks_usage.get(pool, False) else []
            others = rewriting.renaming(decision.model) if decision.target is not None else []
            others += rewriting.salting() if route.endpoints else []  # no provider knows that key
        prefiller, mirror = decision.prefiller, None
        if rewriting is not None and prefiller is not None and decision.bootstrap_port is not None:
            others += rewriting.pairing(prefiller, decision.bootstrap_port)
            prefiller, mirror = None, prefiller
        changes = [*asking, *others]
        destination, rank = ",".join(route.endpoints[: self._endpoints]), None
        if "/" in destination:  # data parallel ranks
            rank = rank_of(destination.partition(",")[0])
            destination = ",".join(map(endpoint_of, destination.split(",")))
        return Steer(
            flight=route.flight,
            destination=destination,
            body=applied(rewriting.body, changes) if rewriting is not None and changes else None,
            strip_usage=bool(asking),
            pool=pool if self._names_pool else None,
            # Another could take no part in what two engines have begun with each other.
            patience_s=route.patience_s if self._rescues and mirror is None else None,
            ratelimit=allowance_headers(route.allowance),
            rank=rank,
            prefiller=prefiller or ("" if pool in self._apart else None),
            mirror=mirror,
            # Beyond those that are named Envoy would take any member, also one that only computes prompts.
            retries=None if mirror is None else min(destination.count(","), self._retries),
        )

    # --- who asks ---

    def accounts(self, head: Head) -> list[Account]:
        """Every account that the request may be counted for, before its model is known; none where it is not counted."""
        who = self._who(head, again=True)
        return who.plan.accounts(who.tenant) if isinstance(who, Who) and head.method not in UNCOUNTED else []

    def _refused(self, head: Head) -> HttpError | None:
        """401 for whoever is not known, before the body is sent: it would take up room for nothing."""
        if not isinstance(self._who(head, again=True), HttpError):
            return None
        who = self._who(head)  # now it counts, for nothing else will be asked of it
        return who if isinstance(who, HttpError) else None

    def _who(self, head: Head, again: bool = False) -> Who | HttpError | None:
        """None where there are no tenants. `again` does not count it as another request."""
        if self.identity is None:
            return None
        return self.identity.of(head, counts=not again)

    def _limits_of(self, who: Who | None) -> Limits:
        if who is None or not self._isolates:
            return self._limits
        return replace(self._limits, salt=who.tenant)

    def _salt(self, who: Who | None, parsed: Parsed) -> str | None:
        """What is to go into the body, where engines are to keep their caches apart."""
        if who is None or not who.cache_salt or parsed.request.api not in SALTED:
            return None
        assert self.identity is not None
        return self.identity.salt(who, parsed.cache_salt)

    def _of_tenant(self, request: Request, head: Head, who: Who) -> dict[str, object]:
        """What its tenant makes of a request."""
        headers, plan = head.headers or {}, who.plan
        asked = self._priority(headers)
        if asked is None and request.priority:
            asked = request.priority
        counted = head.method not in UNCOUNTED
        return {
            "tenant": who.tenant,
            "tier": plan.tier,
            "account": plan.account(who.tenant, self._canonical.get(request.model or "", request.model))
            if counted
            else None,
            "priority": plan.priority if asked is None else min(asked, plan.priority),
            "slo_ttft_s": _slo_s(headers.get(SLO_HEADER)) or plan.slo_ttft_s,
        }

    def _priority(self, headers: Mapping[str, str]) -> int | None:
        """What the headers ask for; None where they ask for none."""
        asked = _priority(headers.get(PRIORITY_HEADER))
        if asked is not None or not self._requests.objectives:
            return asked
        objective = next((headers[name] for name in OBJECTIVE_HEADERS if name in headers), "")
        return self._requests.objectives.get(objective)

    def _with_head(self, request: Request, head: Head, body_bytes: int, who: Who | None) -> Request:
        """The request with what its headers say; those of the body stand where the headers are silent."""
        headers = head.headers or {}
        changes: dict[str, object] = {"body_bytes": body_bytes} if body_bytes else {}
        session = headers.get(self._requests.session_header.lower())
        if session and len(session) <= MAX_SESSION:
            changes["session"] = session
        if (priority := self._priority(headers)) is not None:
            changes["priority"] = priority
        if (slo_s := _slo_s(headers.get(SLO_HEADER))) is not None:
            changes["slo_ttft_s"] = slo_s
        if self._has_catalog and (quality := headers.get(QUALITY_HEADER)):
            changes["quality"] = quality[:MAX_QUALITY]
        tenant = self._requests.tenant_header
        if who is not None:
            changes |= self._of_tenant(request, head, who)
        elif tenant and (named := headers.get(tenant.lower())):
            changes["tenant"] = hashed(named, self._key)
        if head.subset is not None:
            changes["subset"] = head.subset
        return replace(request, **changes) if changes else request  # type: ignore[arg-type]


def _no_change() -> None:
    """To a body whose usage nobody would read: the client would get an event that it did not ask for."""


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
