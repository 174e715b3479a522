"""Requests whose replica fails before it answers go to the next; responses that have begun are left alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from extproc.config import Config
from extproc.envoy import bootstrap, codec, endpoints, names
from extproc.envoy.exchange import Part, SetDestination, Steer
from extproc.pb.envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from tests.envoy import steering
from tests.envoy.steering import PICK
from tests.support.backend import Backend, Handler
from tests.support.envoy import EnvoyProcess
from tests.support.processor import Processor
from tests.support.waiting import until

pytestmark = pytest.mark.envoy


async def ok(request: web.Request) -> web.StreamResponse:
    return web.Response(text="ok")


async def dies(request: web.Request) -> web.StreamResponse:
    """As a process that is killed: the request was read, and the connection breaks."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


def says(status: int) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="no")

    return answer


def begins(breaks: bool = False, first_s: float = 0.0) -> Handler:
    """A stream: headers at once, an event after `first_s`, and then the end in one way or another."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(first_s)
        await response.write(b"data: {}\n\n")
        if breaks:
            await asyncio.sleep(0.05)
            assert request.transport is not None
            request.transport.abort()
        return response

    return answer


class At:
    """Envoy before replicas; each request is to go to them in their order."""

    def __init__(self, config: Config, client: aiohttp.ClientSession, replicas: list[Backend]) -> None:
        self.config, self.client, self.replicas = config, client, replicas

    def post(self, **headers: str) -> Any:
        listed = ",".join(r.address for r in self.replicas)
        url = f"http://{self.config.envoy.listen}/v1/chat/completions"
        return self.client.post(url, data=b"{}", headers={PICK: listed, **headers})

    async def status(self, **headers: str) -> int:
        async with self.post(**headers) as response:
            await response.read()
            return int(response.status)

    @property
    def tried(self) -> list[int]:
        """How often each replica was asked."""
        return [len(r.received) for r in self.replicas]

    async def entry(self) -> dict[str, Any]:
        """The access log's only line."""
        path = self.config.envoy.access_log
        assert path is not None
        line = await until(lambda: path.exists() and path.read_text())
        found: dict[str, Any] = json.loads(line)
        return found


@asynccontextmanager
async def steered(directory: Path, *handlers: Handler, **envoy: Any) -> AsyncIterator[At]:
    """Request headers stand in for extproc."""
    async with AsyncExitStack() as exits:
        replicas = [await exits.enter_async_context(Backend(handler)) for handler in handlers]
        config = steering.config(directory, *(r.address for r in replicas), progress_interval_s=None, **envoy)
        await exits.enter_async_context(EnvoyProcess(steering.steered(config)))
        yield At(config, await exits.enter_async_context(aiohttp.ClientSession()), replicas)


# --- death and refusal ------------------------------------------------------------------------------------------------


async def test_a_replica_that_dies_before_the_headers_costs_no_request(tmp_path: Path) -> None:
    async with steered(tmp_path, dies, ok) as at:
        assert await at.status() == 200
        assert at.tried == [1, 1]
        assert (await at.entry())["attempts"] == 2


async def test_a_request_that_kills_is_sent_no_more_often_than_retries_says(tmp_path: Path) -> None:
    async with steered(tmp_path, dies, dies, dies, ok, retries=2) as at:
        assert await at.status() == 503
        assert at.tried == [1, 1, 1, 0]


async def test_resets_need_not_be_retried(tmp_path: Path) -> None:
    async with steered(tmp_path, dies, ok, retry_resets=False) as at:
        assert await at.status() == 503
        assert at.tried == [1, 0]


async def test_a_stream_that_has_begun_is_not_begun_again(tmp_path: Path) -> None:
    async with steered(tmp_path, begins(breaks=True), ok) as at:
        with pytest.raises(aiohttp.ClientPayloadError):
            await at.status()
        assert at.tried == [1, 0]


@pytest.mark.parametrize(("status", "moves"), [(500, True), (502, True), (503, True), (504, False), (429, False)])
async def test_statuses_after_which_the_next_is_asked(tmp_path: Path, status: int, moves: bool) -> None:
    async with steered(tmp_path, says(status), ok) as at:
        assert await at.status() == (200 if moves else status)
        assert at.tried == [1, int(moves)]


async def test_the_statuses_can_be_chosen(tmp_path: Path) -> None:
    async with steered(tmp_path, says(500), ok, retry_statuses=[503]) as at:
        assert await at.status() == 500
        assert at.tried == [1, 0]


async def test_an_error_on_all_of_them_is_passed_on(tmp_path: Path) -> None:
    async with steered(tmp_path, says(500), says(500), says(500)) as at:
        assert await at.status() == 500
        assert at.tried == [1, 1, 1]


# --- patience ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def patient(directory: Path, patience_s: float | None, *handlers: Handler, **envoy: Any) -> AsyncIterator[At]:
    """With an extproc whose answers say how long a replica may take."""
    async with AsyncExitStack() as exits:
        replicas = [await exits.enter_async_context(Backend(handler)) for handler in handlers]
        config = steering.config(directory, *(r.address for r in replicas), progress_interval_s=None, **envoy)
        steer = Steer("f1", ",".join(r.address for r in replicas), patience_s=patience_s)
        answer = ext_proc.ProcessingResponse.FromString(codec.answer(SetDestination(Part.BODY, steer)))
        await exits.enter_async_context(Processor(config.listen.grpc, lambda *_: answer))
        endpoints.create_if_missing(config)
        proxy = await exits.enter_async_context(EnvoyProcess(bootstrap.render(config)))
        await until(lambda: healthy(proxy))
        yield At(config, await exits.enter_async_context(aiohttp.ClientSession()), replicas)


async def healthy(envoy: EnvoyProcess) -> bool:
    name = f"cluster.{names.SERVICE_CLUSTER}.membership_healthy"
    return (await envoy.stats(name))[name] == 1


async def test_a_replica_that_accepts_and_never_answers_is_given_up(tmp_path: Path) -> None:
    async with patient(tmp_path, 0.3, silent, ok) as at:
        assert await at.status() == 200
        assert at.tried == [1, 1]
        entry = await at.entry()
        assert (entry["attempts"], entry["replica"]) == (2, at.replicas[1].address)
        assert not any(names.PATIENCE_HEADER in r.headers for b in at.replicas for r in b.received)


async def test_a_stream_that_has_begun_gets_all_the_time(tmp_path: Path) -> None:
    async with patient(tmp_path, 0.2, begins(first_s=0.8), ok) as at:
        assert await at.status() == 200
        assert at.tried == [1, 0]


async def test_when_none_answers_the_client_is_told_in_the_end(tmp_path: Path) -> None:
    """Nobody is cut off who might still answer, so it is the idle timeout that ends this."""
    async with patient(tmp_path, 0.2, silent, silent, silent, stream_idle_timeout_s=1.5) as at:
        assert await at.status() == 504
        assert at.tried == [1, 1, 1]


async def test_when_all_are_slow_the_first_to_answer_wins(tmp_path: Path) -> None:
    async def late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1.0)
        return web.Response()

    async with patient(tmp_path, 0.2, late, silent, silent) as at:
        assert await at.status() == 200
        assert at.tried == [1, 1, 1]
        entry = await at.entry()
        assert (entry["attempts"], entry["replica"]) == (3, at.replicas[0].address)


async def test_a_client_sets_no_limits(tmp_path: Path) -> None:
    async def late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return web.Response()

    theirs = {names.PATIENCE_HEADER: "100", "x-envoy-upstream-rq-timeout-ms": "100", "x-envoy-max-retries": "0"}
    async with patient(tmp_path, None, late, ok) as at:
        assert await at.status(**theirs) == 200
        assert at.tried == [1, 0]


# --- without extproc --------------------------------------------------------------------------------------------------


async def test_envoys_own_choice_leaves_out_the_unhealthy_and_the_draining(tmp_path: Path) -> None:
    """The file of members is all that it has to go by while extproc is away."""
    async with Backend() as a, Backend() as b, Backend() as c:
        config = steering.config(tmp_path, a.address, b.address, c.address)
        whole = bootstrap.render(config)
        endpoints.create_if_missing(config)
        path = config.envoy.endpoints_file
        path.write_text(marked(path.read_text(), {a.port: "UNHEALTHY", b.port: "DRAINING"}))
        async with EnvoyProcess(whole), aiohttp.ClientSession() as client:
            for _ in range(20):
                async with client.post(f"http://{config.envoy.listen}/v1/chat/completions", data=b"{}") as response:
                    assert (response.status, await response.text()) == (200, c.address)


def marked(text: str, health: dict[int, str]) -> str:
    """The file of members with the health of some of them changed, by port."""
    page = json.loads(text)
    for member in page["resources"][0]["endpoints"][0]["lb_endpoints"]:
        port = member["endpoint"]["address"]["socket_address"]["port_value"]
        if port in health:
            member["health_status"] = health[port]
    return json.dumps(page)
