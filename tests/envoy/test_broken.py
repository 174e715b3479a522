"""usage.lua in the real Envoy: a response that fails under status 200 is noted, and nothing that a model or a client wrote is taken for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from extproc.config import Config
from tests.envoy import steering
from tests.envoy.steering import STRIP_ON
from tests.support.backend import Backend, stream
from tests.support.envoy import EnvoyProcess
from tests.support.waiting import until

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
RECORDED = Path(__file__).parents[1] / "fixtures" / "vllm-0.32"
DONE = b"data: [DONE]\n\n"
KEPT_ALIVE = b": keep-alive\n\n" * 50
ERROR = b'data: {"error": {"message": "m", "type": "InternalServerError", "param": null, "code": 500}}\n\n'


def recorded(name: str) -> bytes:
    """The events at the end of a stream of a real vLLM."""
    text = (RECORDED / f"{name}.txt").read_text()
    return text[text.index("data: ") : text.index("stream curl exit")].encode()


def completion(reason: str | None, text: str = " It") -> dict[str, Any]:
    choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}]
    return {"id": "cmpl-a98e", "object": "text_completion", "created": 1795216278, "model": "tiny", "choices": choices}


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


TOKENS = event(completion(None)) * 3


@dataclass
class Proxy:
    """Envoy before a replica that answers as the test says; the path of a request is the number of its answer."""

    config: Config
    client: aiohttp.ClientSession
    answers: list[Answer]
    first: int = 0
    """Number of the first answer of this test."""

    async def ask(self, answer: Answer, headers: dict[str, str]) -> bytes:
        self.answers.append(answer)
        url = f"http://{self.config.envoy.listen}/{len(self.answers) - 1}"
        async with self.client.post(url, headers=headers) as response:
            body: bytes = await response.read()
            return body

    async def streamed(self, *pieces: bytes, strip: bool = False) -> bytes:
        return await self.ask(lambda r: stream(r, pieces, gap_s=0.03), STRIP_ON if strip else {})

    async def plain(self, body: bytes, status: int = 200, content_type: str = "application/json") -> bytes:
        async def answer(request: web.Request) -> web.StreamResponse:
            return web.Response(body=body, status=status, content_type=content_type)

        return await self.ask(answer, {})

    async def noted(self) -> list[bool]:
        """Of each request of this test, in their order, whether Envoy noted a failure."""

        def entries() -> list[dict[str, Any]]:
            path = self.config.envoy.access_log
            assert path is not None
            lines = path.read_text().splitlines() if path.exists() else []
            return [e for e in map(json.loads, lines) if int(e["path"][1:]) >= self.first]

        await until(lambda: len(entries()) == len(self.answers) - self.first)
        return [e["broken"] is True for e in sorted(entries(), key=lambda e: int(e["path"][1:]))]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    answers: list[Answer] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        return await answers[int(request.path[1:])](request)

    async with Backend(answer) as backend:
        directory = tmp_path_factory.mktemp("envoy")
        config = steering.config(directory, backend.address, progress_interval_s=None, retries=0)
        everything = aiohttp.TCPConnector(limit=0)
        async with EnvoyProcess(steering.steered(config)), aiohttp.ClientSession(connector=everything) as client:
            yield Proxy(config, client, answers)


@pytest.fixture
def proxy(shared: Proxy) -> Proxy:
    return replace(shared, first=len(shared.answers))


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("name", ["engine_killed_stream", "sigterm_default"])
async def test_what_a_real_engine_said_as_it_died_is_noted(proxy: Proxy, name: str, strip: bool) -> None:
    tail = recorded(name)
    assert await proxy.streamed(KEPT_ALIVE, TOKENS, tail, strip=strip) == KEPT_ALIVE + TOKENS + tail
    assert await proxy.streamed(KEPT_ALIVE, tail, strip=strip) == KEPT_ALIVE + tail
    assert await proxy.noted() == [True, True]


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("last", [ERROR, event(completion("abort"))], ids=["error", "abort"])
async def test_it_is_noted_wherever_the_stream_is_cut(proxy: Proxy, last: bytes, strip: bool) -> None:
    whole = TOKENS + last + DONE
    cuts = range(len(TOKENS) - 3, len(TOKENS + last) + 3)
    results = await asyncio.gather(*(proxy.streamed(whole[:cut], whole[cut:], strip=strip) for cut in cuts))
    assert set(results) == {whole}
    assert await proxy.noted() == [True] * len(cuts)


async def test_the_first_event_in_pieces(proxy: Proxy) -> None:
    whole = event(completion("abort"))
    cuts = range(1, 60)
    await asyncio.gather(*(proxy.streamed(whole[:cut], whole[cut:]) for cut in cuts))
    assert await proxy.noted() == [True] * len(cuts)


async def test_a_whole_response_that_was_aborted_or_is_an_error(proxy: Proxy) -> None:
    await proxy.plain(json.dumps(completion("abort", "text " * 50_000)).encode())
    await proxy.plain(b'{"error": {"message": "m", "code": 500}}')
    await proxy.plain(b'{"error":"overloaded"}')
    assert await proxy.noted() == [True] * 3


SAID = '{"error": {}} data: {"error": {"finish_reason":"abort"}} "finish_reason": "abort"'
"""What a model may write, and a client ask it to."""
ECHO = {"finish_reason": "abort", "error": {"type": "string"}, "choices": [{"finish_reason": "abort"}]}
"""What a client may have repeated by the Responses API."""


async def test_what_a_model_wrote_is_no_failure(proxy: Proxy) -> None:
    texts = [event(completion(None, SAID)), event(completion("stop", '"finish_reason":"abort"'))]
    await proxy.streamed(*texts, DONE)
    await proxy.streamed(*texts, DONE, strip=True)
    await proxy.plain(json.dumps(completion("stop", SAID)).encode())
    await proxy.plain(json.dumps([SAID]).encode())
    assert await proxy.noted() == [False] * 4


async def test_what_a_client_has_repeated_is_no_failure(proxy: Proxy) -> None:
    response = {"id": "resp_1", "metadata": ECHO, "tools": [{"parameters": {"properties": ECHO}}], "error": None}
    created = b"event: response.created\n" + event({"response": {**response, "object": "response"}})
    own = b"event: response.created\n" + event({"id": "r", "created_at": 1, "metadata": ECHO, "object": "response"})
    await proxy.streamed(created, DONE)
    await proxy.streamed(own, DONE)
    await proxy.plain(json.dumps({**response, "object": "response"}).encode())
    assert await proxy.noted() == [False] * 3


async def test_an_error_with_its_own_status_is_no_failure_under_200(proxy: Proxy) -> None:
    await proxy.plain(b'{"error": {"message": "m", "code": 400}}', status=400)
    assert await proxy.noted() == [False]


async def test_other_kinds_of_content_are_not_read(proxy: Proxy) -> None:
    await proxy.plain(b'{"error": "x"}', content_type="text/plain")
    assert await proxy.noted() == [False]
