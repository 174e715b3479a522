"""The HTTP port: metrics, probes, and a look inside. Read-only: nothing here routes, reserves or changes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from extproc.adapters.recorder import Recorder, decision_view
from extproc.core.fleet import Member
from extproc.core.router import Router
from extproc.core.types import Reject
from extproc.openai import errors, requests

_PATHS: Final = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/responses"}
"""Where a body with that key belongs, for `explain` without `?path=`."""

_PAGE: Final = """<!doctype html><meta charset="utf-8"><title>extproc</title>
<style>body{font:15px/1.5 system-ui;margin:2rem;max-width:60rem}td,th{padding:.2rem .8rem;text-align:right}</style>
<h1>extproc</h1><ul>
<li><a href="/metrics">/metrics</a> for Prometheus
<li><a href="/debug/replicas">/debug/replicas</a> what is known of each replica
<li><a href="/debug/decisions?n=20">/debug/decisions?n=20</a> the last decisions and how they ended
<li>POST /debug/explain: a request body in, the decision it would get out
<li><a href="/livez">/livez</a>, <a href="/readyz">/readyz</a></ul>"""


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
    ) -> None:
        """`ready` returns None, or why extproc is not ready."""
        self._router = router
        self._recorder = recorder
        self._registry = registry
        self._clock = clock
        self._ready = ready
        self._max_body_bytes = max_body_bytes

    def application(self) -> web.Application:
        app = web.Application(client_max_size=self._max_body_bytes)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/metrics", self._metrics),
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/debug/replicas", self._replicas),
                web.get("/debug/decisions", self._decisions),
                web.post("/debug/explain", self._explain),
            ]
        )
        return app

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(text=_PAGE, content_type="text/html")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _livez(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        why = self._ready()
        return web.Response(text="ok\n") if why is None else web.Response(text=f"{why}\n", status=503)

    async def _replicas(self, _: web.Request) -> web.Response:
        now = self._clock()
        return _json([member_view(pool, member, self._router, now) for pool, member in self._router.members()])

    async def _decisions(self, request: web.Request) -> web.Response:
        text = request.query.get("n", "50")
        if not text.isdecimal():
            return _json({"error": f"n must be a number, not {text[:20]!r}"}, status=400)
        return _json([record.view() for record in self._recorder.last(int(text))])

    async def _explain(self, request: web.Request) -> web.Response:
        """Errors are those that the client would get."""
        body = await request.read()
        path = request.query.get("path") or _path_of(body)
        parsed = requests.read("POST", path, body)
        if isinstance(parsed, errors.BadRequest):
            return _http(errors.of_bad_request(parsed))
        decision = self._router.explain(parsed.request, self._clock())
        if isinstance(decision, Reject):
            return _http(errors.of_refusal(decision))
        return _json(decision_view(decision))


def member_view(pool: str, member: Member, router: Router, now: float) -> dict[str, Any]:
    """One replica as JSON. Unknown is null."""
    sample = member.sample
    return {
        "pool": pool,
        "replica": member.address,
        "labels": dict(member.replica.labels),
        "weight": member.replica.weight,
        "state": member.readiness(now).value,
        "in_flight": len(member.load),
        "prefilling": member.load.prefilling(now),
        "decoding": member.load.decoding(now),
        "held_tokens": round(member.load.held_tokens),
        "queued_prompt_tokens": member.load.queued_tokens(now),
        "backlog_s": round(member.load.backlog_s(now), 6),
        "sample_age_s": None if member.sampled_at is None else round(now - member.sampled_at, 3),
        "late_scrapes": member.late_scrapes,
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
        "latency_s": member.latency_s,
        "index_bytes": router.pools[pool].index.held_bytes(member.address),
        "learned": {
            "prefill_factor": round(member.speed.prefill_factor, 4),
            "decode_factor": round(member.speed.decode_factor, 4),
            "base_s": round(member.speed.base_s, 5),
            "hit_trust": round(member.hit_trust, 4),
            "cache_share": round(member.cache_share, 4),
        },
    }


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
