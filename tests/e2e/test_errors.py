"""What is refused, by whom, in which words; what is odd and passes all the same; and that no log repeats a prompt."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from extproc.core.types import End
from extproc.envoy import names
from extproc.sim.backend import Backend as Replica
from tests.e2e.stack import CHAT, Json, Stack, chat, replica, stack
from tests.support.waiting import until

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

LIMIT = 300_000
SECRET = "the-prompt-of-a-client"


@dataclass
class Scene:
    running: Stack
    simulated: Replica
    directory: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    directory = tmp_path_factory.mktemp("stack")
    (directory / "nobody.json").write_text("[]")
    async with AsyncExitStack() as exits:
        simulated = await exits.enter_async_context(replica())
        pools: list[Json] = [
            {"name": "main", "models": ["sim"], "replicas": [simulated.address]},
            {"name": "empty", "models": ["nobody"], "discovery": {"file": {"path": "nobody.json"}}},
        ]
        requests = {"max_body_bytes": LIMIT}
        envoy = {"access_log": str(directory / "access.log")}
        async with stack(directory, *pools, requests=requests, envoy=envoy, ready=False) as running:
            await until(lambda: (directory / "endpoints.main.json").exists())
            yield Scene(running, simulated, directory)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def settles(scene: Scene) -> AsyncIterator[None]:
    await scene.running.seen()
    yield
    await scene.running.settled()


REFUSED = {
    "broken JSON": (b'{"model": "sim", "messages": [{"content": "' + SECRET.encode(), 400, "Bad Request"),
    "no JSON at all": (b"\xff\xfe" + SECRET.encode(), 400, "Bad Request"),
    "no object": (b'["' + SECRET.encode() + b'"]', 400, "Bad Request"),
    "no messages": (json.dumps({"model": "sim", "prompt": SECRET}).encode(), 400, "Bad Request"),
    "wrong type": (json.dumps(chat(SECRET) | {"max_tokens": "many"}).encode(), 400, "Bad Request"),
    "out of range": (json.dumps(chat(SECRET) | {"max_tokens": 0}).encode(), 400, "BadRequestError"),
    "unknown model": (json.dumps(chat(SECRET) | {"model": "nope"}).encode(), 404, "NotFoundError"),
    "no replica": (json.dumps(chat(SECRET) | {"model": "nobody"}).encode(), 503, "Service Unavailable"),
    "too large": (json.dumps(chat(SECRET + "x" * LIMIT)).encode(), 413, "Request Entity Too Large"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_refusal_is_an_openai_error_and_repeats_nothing(
    scene: Scene, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    body, status, kind = REFUSED[case]
    served = scene.simulated.served
    with caplog.at_level(logging.DEBUG):
        async with scene.running.post(body, headers={"authorization": f"Bearer {SECRET}"}) as response:
            assert (response.status, response.content_type) == (status, "application/json")
            answer = await response.read()
    error = json.loads(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, status)
    assert ("retry-after" in response.headers) == (status == 503)
    assert SECRET.encode() not in answer
    assert SECRET not in caplog.text
    assert scene.simulated.served == served
    assert scene.running.app.router.in_flight == 0


async def test_no_log_of_envoy_repeats_a_prompt_or_a_key(scene: Scene) -> None:
    await scene.running.served(chat(SECRET), path=f"{CHAT}?key={SECRET}", headers={"authorization": f"Bearer {SECRET}"})
    log = scene.directory / "access.log"
    await until(lambda: log.exists() and scene.simulated.address in log.read_text())
    assert SECRET not in log.read_text()
    assert SECRET not in scene.running.envoy.log()


async def test_a_body_of_just_the_limit_passes(scene: Scene) -> None:
    frame = len(json.dumps(chat(user="")))
    body = json.dumps(chat(user="x" * (LIMIT - frame))).encode()
    assert len(body) == LIMIT
    assert await scene.running.served(body) == scene.simulated.address


async def test_a_length_above_the_limit_is_refused_before_the_body_is_sent(scene: Scene) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: {LIMIT + 1}\r\nconnection: close\r\n\r\n"
    answer = await raw(scene, head.encode())
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].endswith(f"{LIMIT} bytes.")


async def test_a_chunked_body_far_above_the_limit_is_refused_by_envoy(scene: Scene) -> None:
    """Envoy's buffer is full before extproc sees the body: 413 all the same, though not in our JSON."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * (LIMIT // 10)

    try:
        async with scene.running.client.post(f"{scene.running.url}{CHAT}", data=pieces()) as response:
            assert response.status == 413
    except aiohttp.ClientConnectionError:
        pass  # Envoy answers and closes while the client still sends
    assert scene.running.app.router.in_flight == 0
    await scene.running.served()


async def test_a_chunked_body_arrives_whole(scene: Scene) -> None:
    body = json.dumps(chat("word " * 8_000)).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 10_000):
            yield body[at : at + 10_000]

    async with scene.running.client.post(f"{scene.running.url}{CHAT}", data=pieces()) as response:
        assert response.status == 200
    record = await scene.running.ended()
    assert record.decision.prompt_tokens > 8_000


async def test_a_chunked_stream_request_gets_its_usage_asked_for(scene: Scene) -> None:
    """A rewritten body is sent with its length, whatever the framing it came in."""
    body = json.dumps(chat("word " * 1_000, stream=True)).encode()

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:1_000]
        yield body[1_000:]

    async with scene.running.client.post(f"{scene.running.url}{CHAT}", data=pieces()) as response:
        assert (response.status, b"usage" in await response.read()) == (200, False)
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.usage is not None


async def test_a_compressed_body_is_refused_as_the_engine_would(scene: Scene) -> None:
    """Neither we nor vLLM unpack request bodies: to both a gzip is no JSON."""
    packed = gzip.compress(json.dumps(chat(SECRET)).encode())
    async with scene.running.post(packed, headers={"content-encoding": "gzip"}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == "There was an error parsing the body"


@pytest.mark.parametrize("size", [None, 0], ids=["no body", "content-length 0"])
async def test_an_empty_post_is_answered_by_the_replica(scene: Scene, size: int | None) -> None:
    head = "" if size is None else f"content-length: {size}\r\n"
    answer = await raw(scene, f"POST {CHAT} HTTP/1.1\r\nhost: h\r\n{head}connection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert f"{names.REPLICA_HEADER}: {scene.simulated.address}".encode() in answer
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.end is End.CLIENT_ERROR


async def raw(scene: Scene, request: bytes) -> bytes:
    """The response to bytes as they are, until Envoy closes."""
    host, _, port = scene.running.config.envoy.listen.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


async def test_models_and_unknown_paths_pass_to_a_replica(scene: Scene) -> None:
    async with scene.running.client.get(f"{scene.running.url}/v1/models") as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["sim"]
    async with scene.running.post(b"{}", path="/v2/rerank") as response:
        assert (response.status, await response.json()) == (404, {"detail": "Not Found"})
        assert response.headers[names.REPLICA_HEADER] == scene.simulated.address
    async with scene.running.client.get(f"{scene.running.url}{CHAT}") as response:
        assert (response.status, await response.json()) == (405, {"detail": "Method Not Allowed"})


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
async def test_other_methods_get_the_replicas_own_answer(scene: Scene, method: str) -> None:
    async with scene.running.client.request(method, f"{scene.running.url}{CHAT}") as through:
        pass
    async with scene.running.client.request(method, f"http://{scene.simulated.address}{CHAT}") as direct:
        pass
    assert (through.status, through.headers.get("allow")) == (direct.status, direct.headers.get("allow"))


async def test_a_client_that_stops_in_the_middle_of_its_body_leaves_nothing(scene: Scene) -> None:
    host, _, port = scene.running.config.envoy.listen.rpartition(":")
    opened = scene.running.app.router.in_flight
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\n".encode() + b'{"model"')
    await writer.drain()
    writer.close()
    await scene.running.served()
    assert opened == 0
