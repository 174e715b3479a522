"""A Kubernetes API server of a few lines over HTTP: list by pages, watch, bookmarks, 410, rights, and what goes wrong.

Its objects are those of a `FakeKube`; a FakeKube that breaks watches resets connections here.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from extproc.adapters.discovery.kube_api import (
    BrokenError,
    Event,
    FakeKube,
    GoneError,
    KubeError,
    Listed,
    Object,
    Query,
    Resource,
)
from tests.support.ports import free_port

METADATA = "as=PartialObjectMetadata"


@dataclass
class KubeServer:
    """HTTP on 127.0.0.1 for the length of a block."""

    kube: FakeKube = field(default_factory=FakeKube)
    port: int = field(default_factory=free_port)
    tls: ssl.SSLContext | None = None
    token: str | None = None
    """When it is not None, others get 401."""
    forbidden: set[str] = field(default_factory=set)
    """Resources (plural) that may not be read."""
    unknown: set[str] = field(default_factory=set)
    """Resources that this server does not have."""
    status: int | None = None
    """When it is not None, the answer to everything, with a body that is no Status."""
    delay_s: float = 0.0
    """Before each answer."""
    gone_in_stream: bool = False
    """Tell of a version that is too old by an event, as servers do whose cache has moved on, instead of by the status."""
    raw: bytes | None = None
    """When it is not None, what a watch says instead, before it is held."""
    page: bytes | None = None
    """When it is not None, what a list says instead."""
    ends_at_once: bool = False
    """Watches end when they begin."""
    half_lines: int = 0
    """So many more events are cut in the middle of their line, and the connection with them."""
    asked: list[web.Request] = field(default_factory=list)
    _pages: dict[str, tuple[Listed, int]] = field(default_factory=dict)
    _runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/apis/{group}/{version}/namespaces/{namespace}/{plural}", self._answer)
        app.router.add_get("/api/{version}/namespaces/{namespace}/{plural}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.tls, reuse_address=True).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._runner is not None
        self.kube.break_watches()
        await self._runner.cleanup()

    def asks(self, plural: str) -> list[web.Request]:
        """The requests for one resource, in order."""
        return [request for request in self.asked if request.match_info["plural"] == plural]

    def kubeconfig(self, path: Path, **user: Any) -> Path:
        """Write one for this server, with the namespace `prod`."""
        scheme = "https" if self.tls else "http"
        config = {
            "current-context": "test",
            "clusters": [{"name": "c", "cluster": {"server": f"{scheme}://127.0.0.1:{self.port}"}}],
            "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u", "namespace": "prod"}}],
            "users": [{"name": "u", "user": user}],
        }
        path.write_text(json.dumps(config))
        return path

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        await asyncio.sleep(self.delay_s)
        if (refusal := self._refusal(request)) is not None:
            return refusal
        try:
            if request.query.get("watch") == "true":
                return await self._watch(request)
            if self.page is not None:
                return web.Response(body=self.page, content_type="application/json")
            return web.json_response(self._list(request))
        except GoneError as e:
            return _status(410, "Expired", str(e))
        except KubeError as e:
            return _status(503, "ServiceUnavailable", str(e))

    def _refusal(self, request: web.Request) -> web.Response | None:
        plural, namespace = request.match_info["plural"], request.match_info["namespace"]
        if self.status is not None:
            return web.Response(status=self.status, text="upstream connect error")
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized", "Unauthorized")
        if plural in self.unknown:
            return web.Response(status=404, text="404 page not found\n")
        if plural in self.forbidden:
            group = request.match_info.get("group", "")
            resource = f"{plural}.{group}" if group else plural
            verb = "watch" if "watch" in request.query else "list"
            text = (
                f'{resource} is forbidden: User "system:serviceaccount:{namespace}:extproc" cannot {verb} resource '
                f'"{plural}" in API group "{group}" in the namespace "{namespace}"'
            )
            return _status(403, "Forbidden", text)
        return None

    def _list(self, request: web.Request) -> dict[str, Any]:
        token = request.query.get("continue", "")
        listed, start = self._pages.pop(token) if token else (self._listed(_query(request)), 0)
        end = start + int(request.query["limit"])
        metadata = {"resourceVersion": listed.version}
        if end < len(listed.items):
            metadata["continue"] = f"{listed.version}:{end}"
            self._pages[metadata["continue"]] = (listed, end)
        return {"kind": "List", "metadata": metadata, "items": [_shown(request, i) for i in listed.items[start:end]]}

    def _listed(self, query: Query) -> Listed:
        """FakeKube lists at once, so its coroutine needs no loop."""
        try:
            self.kube.list(query).send(None)
        except StopIteration as done:
            listed: Listed = done.value
            return listed
        raise AssertionError("it waited")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        if self.raw is not None:
            await answer.prepare(request)
            await answer.write(self.raw)
            await asyncio.sleep(float(request.query["timeoutSeconds"]))
            return answer
        if self.ends_at_once:
            await answer.prepare(request)
            return answer
        events = self.kube.watch(
            _query(request), request.query["resourceVersion"], float(request.query["timeoutSeconds"])
        )
        try:
            first = asyncio.ensure_future(anext(events))
            await asyncio.wait([first], timeout=0.01)  # a version that is too old shows at once
            if first.done() and isinstance(first.exception(), GoneError) and not self.gone_in_stream:
                raise GoneError(str(first.exception()))
            await answer.prepare(request)
            await self._write(answer, request, await first)
            async for event in events:
                await self._write(answer, request, event)
        except StopAsyncIteration:
            return answer
        except GoneError as e:
            if not answer.prepared:
                raise
            await answer.write(
                json.dumps({"type": "ERROR", "object": _failure(410, "Expired", str(e))}).encode() + b"\n"
            )
        except BrokenError:
            if request.transport is not None:  # the client may have gone first
                request.transport.abort()
        return answer

    async def _write(self, answer: web.StreamResponse, request: web.Request, event: Event) -> None:
        """Bookmarks only to those who ask for them."""
        if event.kind == "BOOKMARK" and request.query.get("allowWatchBookmarks") != "true":
            return
        line = json.dumps({"type": event.kind, "object": _shown(request, event.item)}).encode() + b"\n"
        if self.half_lines:
            self.half_lines -= 1
            await answer.write(line[: len(line) // 2])
            raise BrokenError("cut in the middle of a line")
        await answer.write(line)


def _query(request: web.Request) -> Query:
    found = request.match_info
    name = request.query.get("fieldSelector", "").removeprefix("metadata.name=")
    resource = Resource(found["plural"], found["version"], found.get("group", ""))
    return Query(resource, found["namespace"], request.query.get("labelSelector"), name or None)


def _shown(request: web.Request, item: Object) -> Object:
    if METADATA in request.headers["Accept"]:
        return {"kind": "PartialObjectMetadata", "metadata": item["metadata"]}
    return item


def _failure(code: int, reason: str, text: str) -> dict[str, Any]:
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return {**status, "code": code, "reason": reason, "message": text}


def _status(code: int, reason: str, text: str) -> web.Response:
    return web.json_response(_failure(code, reason, text), status=code)
