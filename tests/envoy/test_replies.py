"""What Envoy answers by itself looks like what extproc answers; what others answered passes untouched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from extproc.config import Config
from extproc.envoy import bootstrap, names
from extproc.openai import errors
from extproc.pb.envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from tests.envoy import steering
from tests.support.backend import Backend, Handler
from tests.support.envoy import EnvoyProcess
from tests.support.processor import Processor
from tests.support.waiting import until

pytestmark = pytest.mark.envoy

CHAT = "/v1/chat/completions"
Send = Callable[[aiohttp.ClientSession, str], Any]


def post(client: aiohttp.ClientSession, url: str) -> Any:
    return client.post(f"{url}{CHAT}", data=b"{}")


async def answered(config: Config, send: Send = post) -> tuple[int, Any, str | None]:
    """Status, body as JSON, Retry-After."""
    async with EnvoyProcess(steering.steered(config)) as envoy, aiohttp.ClientSession() as client:
        await until(lambda: checked(envoy))
        async with send(client, f"http://{config.envoy.listen}") as response:
            assert response.content_type == "application/json"
            return response.status, await response.json(), response.headers.get("retry-after")


async def checked(envoy: EnvoyProcess) -> bool:
    """Whether Envoy knows if extproc is there."""
    prefix = f"cluster.{names.SERVICE_CLUSTER}.health_check."
    stats = await envoy.stats(prefix)
    return stats[f"{prefix}success"] + stats[f"{prefix}failure"] > 0


def is_error(body: Any, status: int, kind: str) -> bool:
    error = body["error"]
    return set(error) == {"message", "type", "param", "code"} and (error["code"], error["type"]) == (status, kind)


async def test_no_replica_that_can_be_reached(tmp_path: Path) -> None:
    status, body, retry_after = await answered(steering.config(tmp_path))
    assert (status, retry_after) == (503, "1")
    assert is_error(body, 503, "Service Unavailable")
    assert "127.0.0.1" not in json.dumps(body)


async def test_a_body_above_envoys_buffer_is_refused_in_the_words_of_extproc(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(
            40
        ):  # twice what a connection may buffer, which counts where it is more than the limit for bodies
            yield b"x" * 50_000

    def large(client: aiohttp.ClientSession, url: str) -> Any:
        return client.post(f"{url}{CHAT}", data=pieces())

    config = steering.config(tmp_path, requests={"max_body_bytes": 100_000}, message_timeout_s=10)
    async with Processor(config.listen.grpc, lambda *_: ext_proc.ProcessingResponse()):
        status, body, retry_after = await answered(config, large)
    assert (status, retry_after) == (413, None)
    assert body == json.loads(errors.too_large(100_000).body)


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def test_a_response_that_never_comes(tmp_path: Path) -> None:
    async with Backend(silent) as a:
        status, body, _ = await answered(steering.config(tmp_path, a.address, stream_idle_timeout_s=0.3))
    assert status == 504
    assert is_error(body, 504, "Gateway Timeout")


async def test_an_answer_that_is_no_http(tmp_path: Path) -> None:
    async def garbled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x00 garbled\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(garbled, "127.0.0.1", 0)
    address = "{}:{}".format(*server.sockets[0].getsockname())
    async with server:
        status, body, _ = await answered(steering.config(tmp_path, address))
    assert status == 502
    assert is_error(body, 502, "Bad Gateway")


def test_the_code_of_an_error_is_envoys_own_number(tmp_path: Path) -> None:
    """One that stands in the bootstrap would reach clients as "503.0", where that is written as YAML."""
    mappers = steering.manager(bootstrap.render(steering.config(tmp_path)))["local_reply_config"]["mappers"]
    bodies = [
        each["body_format_override"]["json_format"]["error"] for each in mappers if "body_format_override" in each
    ]
    assert len(bodies) > 5
    assert {body["code"] for body in bodies} == {"%RESPONSE_CODE%"}


async def test_broken_requests(tmp_path: Path) -> None:
    def escaped(client: aiohttp.ClientSession, url: str) -> Any:
        return client.post(URL(f"{url}/v1%2fchat", encoded=True), data=b"{}")

    status, body, _ = await answered(steering.config(tmp_path), escaped)
    assert status == 400
    assert is_error(body, 400, "BadRequestError")


async def test_with_fail_open_off_extproc_is_missed_as_a_service_that_is_not_there(tmp_path: Path) -> None:
    async with Backend() as a:
        status, body, retry_after = await answered(steering.config(tmp_path, a.address, fail_open=False))
        assert (status, retry_after, a.received) == (503, "1", [])
    assert is_error(body, 503, "Service Unavailable")


@pytest.mark.parametrize("status", [400, 404, 413, 500, 503, 504])
async def test_an_error_of_the_replica_is_its_own(tmp_path: Path, status: int) -> None:
    own = b'{"object": "error", "message": "as the engine says it"}'

    def says(status: int) -> Handler:
        async def answer(request: web.Request) -> web.StreamResponse:
            return web.Response(status=status, body=own, content_type="application/json")

        return answer

    async with Backend(says(status)) as a:
        got = await answered(steering.config(tmp_path, a.address))
    assert got == (status, json.loads(own), None)
