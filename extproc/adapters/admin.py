"""The HTTP port: metrics, probes, a look inside, and drains.

Nothing here routes or reserves, and no GET changes anything. The two POSTs that drain are refused to browsers: whoever can reach
this port may drain, and a page that the operator happens to look at must not be able to (every browser sends `Origin` with a POST,
its own pages included: Fetch Standard, "append a request Origin header").
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Final

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from extproc.adapters.recorder import Recorder, decision_view
from extproc.core.account import Account, Allowance, Quota
from extproc.core.fleet import Member
from extproc.core.lora import Held
from extproc.core.ranks import endpoint_of
from extproc.core.router import Router
from extproc.core.types import DrainAsked, DrainEnded, Fact, Reject, Request
from extproc.openai import errors, requests

_PATHS: Final = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/responses"}
"""Where a body with that key belongs, for `explain` without `?path=`."""

_BRIEFLY: Final = ("pool", "replica", "state", "reason", "since_s", "drain_left_s", "in_flight")
"""What the page, and the answer to a drain, show of each replica."""

MAX_SHOWN: Final = 500
"""Decisions on one page: more would hold up requests, at 20 us each."""
MAX_EXPLAINED_BYTES: Final = 1 << 20
"""Of a body to explain: it is read beside requests, in the same process."""

_PAGE: Final = """<!doctype html><meta charset="utf-8"><title>extproc</title>
<style>body{font:15px/1.5 system-ui;margin:2rem;max-width:60rem}td,th{padding:.2rem .8rem;text-align:right}</style>
<h1>extproc</h1><ul>
<li><a href="/metrics">/metrics</a> for Prometheus
<li><a href="/debug/replicas">/debug/replicas</a> what is known of each replica
<li><a href="/debug/decisions?n=20">/debug/decisions?n=20</a> the last decisions and how they ended
<li>POST /debug/explain: a request body in, the decision it would get out
<li>POST /replicas/drain?replica=ip:port[&amp;within_s=120], /replicas/undrain?replica=ip:port: nothing new there, and again
<li><a href="/livez">/livez</a>, <a href="/readyz">/readyz</a></ul>"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request as the router would be asked."""

    request: Request
    tokens: str | None = None
    """Whether its prompt was tokenized, or why not, in the words of `extproc_tokenized_prompts_total`; None where nothing tokenizes."""


Asked = Callable[[str, Mapping[str, str], bytes, str | None, str | None], Awaitable[Wanted | errors.HttpError]]
"""What a path, headers by their lower-case names and a body ask of the router, or the refusal; and who asks, by tenant and tier, where
that is not to be told from the headers."""


async def read(
    path: str, _headers: Mapping[str, str], body: bytes, _tenant: str | None, _tier: str | None
) -> Wanted | errors.HttpError:
    """`Asked` where there are no tenants and no tokenizers."""
    parsed = requests.read("POST", path, body)
    return errors.of_bad_request(parsed) if isinstance(parsed, errors.BadRequest) else Wanted(parsed.request)


class Admin:
    """Handlers over one router."""

    def __init__(
        self,
        router: Router,
        recorder: Recorder,
        registry: CollectorRegistry,
        clock: Callable[[], float],
        ready: Callable[[], str | None],
        max_body_bytes: int,
        learn: Callable[[Fact], None],
        asked: Asked = read,
    ) -> None:
        """`ready` returns None, or why extproc is not ready. `learn` takes the drains asked for here, `asked` reads requests."""
        self._router = router
        self._recorder = recorder
        self._registry = registry
        self._clock = clock
        self._ready = ready
        self._max_body_bytes = max_body_bytes
        self._learn = learn
        self._asked = asked

    def application(self) -> web.Application:
        app = web.Application(client_max_size=min(self._max_body_bytes, MAX_EXPLAINED_BYTES))
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/metrics", self._metrics),
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/debug/replicas", self._replicas),
                web.get("/debug/decisions", self._decisions),
                web.post("/debug/explain", self._explain),
                web.post("/replicas/drain", self._drain),
                web.post("/replicas/undrain", self._undrain),
            ]
        )
        return app

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(text=_PAGE + _table(self._views()), content_type="text/html")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _livez(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        why = self._ready()
        return web.Response(text="ok\n") if why is None else web.Response(text=f"{why}\n", status=503)

    async def _replicas(self, _: web.Request) -> web.Response:
        return _json(self._views())

    async def _decisions(self, request: web.Request) -> web.Response:
        text = request.query.get("n", "50")
        if not text.isdecimal():
            return _refused(400, f"n must be a number, not {text[:20]!r}")
        return _json([record.view() for record in self._recorder.last(min(int(text[:9]), MAX_SHOWN))])

    async def _explain(self, request: web.Request) -> web.Response:
        """Errors are those that the client would get. Who it is says `?tenant=` and `&tier=`, else the headers, as of any request."""
        body, query = await request.read(), request.query
        headers = {name.lower(): value for name, value in request.headers.items()}
        asked = await self._asked(
            query.get("path") or _path_of(body), headers, body, query.get("tenant"), query.get("tier") or None
        )
        if isinstance(asked, errors.HttpError):
            return _http(asked)
        now = self._clock()
        decision = self._router.explain(asked.request, now)
        if isinstance(decision, Reject):
            return _http(errors.of_refusal(decision))
        account = asked.request.account
        told = {} if account is None else account_view(account, self._router.limits.allowance(account, now))
        return _json({**decision_view(decision), "tokens": asked.tokens, **told})

    async def _drain(self, request: web.Request) -> web.Response:
        """`within_s`: the replica ends so many seconds from now, whatever runs there."""
        text = request.query.get("within_s")
        within_s = None if text is None else _seconds(text)
        if text is not None and within_s is None:
            return _refused(400, f"within_s must be a number of seconds, 0 or more, not {text[:20]!r}")
        return self._tell(request, lambda pool, address: DrainAsked(pool, address, within_s))

    async def _undrain(self, request: web.Request) -> web.Response:
        return self._tell(request, DrainEnded)

    def _tell(self, request: web.Request, fact: Callable[[str, str], Fact]) -> web.Response:
        """Learn a fact on the replica that the request names, in each pool that has it, and answer with its new state.

        An address is that of every data parallel rank behind it, `ip:port/2` that of one.
        """
        if "Origin" in request.headers:
            return _refused(403, "not for browsers; use curl, or extproc drain")
        named, only = request.query.get("replica"), request.query.get("pool")
        if not named:
            return _refused(400, "replica is missing; add ?replica=ip:port")
        members = [(pool, m.address) for pool, m in self._router.members() if only in (None, pool)]
        meant = [(pool, address) for pool, address in members if named in (address, endpoint_of(address))]
        if not meant:
            where = "any pool" if only is None else f"a pool {only[:64]!r}"
            return _refused(404, f"no replica {named[:64]!r} in {where}; GET /debug/replicas lists them")
        for pool, address in meant:
            self._learn(fact(pool, address))
        told = [view for view in self._views() if (view["pool"], view["replica"]) in meant]
        return _json([{key: view[key] for key in _BRIEFLY} for view in told])

    def _views(self) -> list[dict[str, Any]]:
        now = self._clock()
        return [member_view(pool, member, self._router, now) for pool, member in self._router.members()]


def _table(views: list[dict[str, Any]]) -> str:
    """The replicas, briefly, as HTML."""
    rows = (f"<tr><td>{'<td>'.join(escape(_cell(view[key])) for key in _BRIEFLY)}" for view in views)
    return f"<table><tr><th>{'<th>'.join(_BRIEFLY)}{''.join(rows)}</table>"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _refused(status: int, why: str) -> web.Response:
    return _json({"error": why}, status)


def member_view(pool: str, member: Member, router: Router, now: float) -> dict[str, Any]:
    """One replica as JSON. Unknown is null."""
    sample, health, exact = member.sample, member.health, router.pools[pool].caches.exact
    state, reason, since = health.why(now)
    drain_left_s = health.drain_left_s(now)
    return {
        "pool": pool,
        "replica": member.address,
        "labels": dict(member.replica.labels),
        "weight": member.replica.weight,
        "state": state.value,
        "reason": reason.value,
        "since_s": round(now - since, 3),
        "drain_left_s": None if drain_left_s is None else round(drain_left_s, 3),
        "in_flight": len(member.load),
        "prefilling": member.load.prefilling(now),
        "decoding": member.load.decoding(now),
        "prefilling_for_others": len(member.load.legs),
        "held_tokens": round(member.load.held_tokens),
        "queued_prompt_tokens": member.load.queued_tokens(now),
        "backlog_s": round(member.load.backlog_s(now), 6),
        "sample_age_s": None if member.sampled_at is None else round(now - member.sampled_at, 3),
        "late_scrapes": member.late_scrapes,
        "engine": member.engine,
        "gpu_use": member.gpu_use(now),
        "sample": None
        if sample is None
        else {
            "running": sample.running,
            "waiting": sample.waiting,
            "kv_usage": sample.kv_usage,
            "block_size": sample.block_size,
            "num_blocks": sample.num_blocks,
        },
        "strangers": member.strangers,
        "models": list(member.models),
        "adapters": adapters_view(member.load.lora),
        "latency_s": member.latency_s,
        "index_bytes": router.pools[pool].index.held_bytes(member.address),
        "exact_blocks": exact.held(member.address) if exact.knows(member.address) else None,
        "learned": {
            "prefill_factor": round(member.speed.prefill_factor, 4),
            "decode_factor": round(member.speed.decode_factor, 4),
            "base_s": round(member.speed.base_s, 5),
            "hit_trust": round(member.hit_trust, 4),
            "cache_share": round(member.cache_share, 4),
        },
    }


def adapters_view(held: Held | None) -> dict[str, Any] | None:
    """LoRA adapters of a replica as JSON; null while nothing was heard of any, or sent for any."""
    if held is None:
        return None
    return {"slots": held.slots, "held": list(held.names), "in_flight": held.in_use}


def account_view(account: Account, left: Allowance) -> dict[str, Any]:
    """Whose a request is, and what is left to it before it, as JSON. null is no limit."""
    return {
        "tenant": account.tenant,
        "tier": account.tier,
        "left": {"requests": _quota_view(left.requests), "tokens": _quota_view(left.tokens)},
    }


def _quota_view(quota: Quota | None) -> dict[str, Any] | None:
    if quota is None:
        return None
    return {"limit": quota.limit, "remaining": quota.remaining, "reset_s": round(quota.reset_s, 3)}


def _path_of(body: bytes) -> str:
    """The API that a body is for, by its keys; chat when it cannot be told, whose error then says what is missing."""
    try:
        keys = orjson.loads(body)
    except orjson.JSONDecodeError:
        keys = {}
    return next((path for key, path in _PATHS.items() if isinstance(keys, dict) and key in keys), _PATHS["messages"])


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def _http(error: errors.HttpError) -> web.Response:
    return web.Response(status=error.status, body=error.body, headers=dict(error.headers))
