"""usage.lua in the real Envoy: the usage event is read and taken out, everything else passes byte for byte and at once."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
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


def event(**fields: Any) -> bytes:
    head = {"id": "chatcmpl-87810837a26a6395", "object": "chat.completion.chunk", "created": 1795215103, "model": "m"}
    return b"data: " + json.dumps({**head, **fields}, separators=(",", ":")).encode() + b"\n\n"


def token(text: str, **more: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}], **more)


COUNTS = {
    "prompt_tokens": 14,
    "total_tokens": 22,
    "completion_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 4},
}
USAGE = event(choices=[], usage=COUNTS, system_fingerprint="vllm-0.32.0-a47651d5")
DONE = b"data: [DONE]\n\n"
TOKENS = (token(" rece"), token('{"choices":[],"usage":{"prompt_tokens":1}}'), token("ET"))
READ = (14, 8, 4)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Proxy:
    """Envoy before a replica that answers as the test says; the path of a request is the number of its answer."""

    config: Config
    client: aiohttp.ClientSession
    answers: list[Answer]
    first: int = 0
    """Number of the first answer of this test."""

    async def ask(self, answer: Answer, headers: dict[str, str]) -> bytes:
        async with self.open(answer, headers) as response:
            assert response.status == 200
            body: bytes = await response.read()
            return body

    def open(self, answer: Answer, headers: dict[str, str]) -> Any:
        self.answers.append(answer)
        return self.client.post(f"http://{self.config.envoy.listen}/{len(self.answers) - 1}", headers=headers)

    async def stripped(self, *pieces: bytes, gap_s: float = 0.03) -> bytes:
        return await self.ask(lambda r: stream(r, pieces, gap_s=gap_s), STRIP_ON)

    async def counted(self) -> list[tuple[int | None, int | None, int | None]]:
        """Prompt, completion and cached tokens that Envoy noted of each request of this test, in the order of their end."""

        def entries() -> list[dict[str, Any]]:
            path = self.config.envoy.access_log
            assert path is not None
            lines = path.read_text().splitlines() if path.exists() else []
            return [e for e in map(json.loads, lines) if int(e["path"][1:]) >= self.first]

        await until(lambda: len(entries()) == len(self.answers) - self.first)
        return [(e["prompt_tokens"], e["completion_tokens"], e["cached_tokens"]) for e in entries()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    answers: list[Answer] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        return await answers[int(request.path[1:])](request)

    async with Backend(answer) as backend:
        config = steering.config(tmp_path_factory.mktemp("envoy"), backend.address, progress_interval_s=None)
        everything = aiohttp.TCPConnector(limit=0)
        async with EnvoyProcess(steering.steered(config)), aiohttp.ClientSession(connector=everything) as client:
            yield Proxy(config, client, answers)


@pytest.fixture
def proxy(shared: Proxy) -> Proxy:
    return replace(shared, first=len(shared.answers))


async def test_the_usage_event_goes_wherever_the_stream_is_cut(proxy: Proxy) -> None:
    head, tail = b"".join(TOKENS), DONE
    whole = head + USAGE + tail
    cuts = range(len(head) - 4, len(head + USAGE) + 5)
    results = await asyncio.gather(*(proxy.stripped(whole[:cut], whole[cut:]) for cut in cuts))
    wrong = [cut for cut, result in zip(cuts, results, strict=True) if result != head + tail]
    assert not wrong
    assert await proxy.counted() == [READ] * len(cuts)


async def test_any_chunking_gives_the_stream_without_the_event(proxy: Proxy) -> None:
    rng = random.Random(7)
    whole = b"".join((*TOKENS, b": keep-alive\n\n", USAGE, DONE))

    def pieces() -> list[bytes]:
        cuts = sorted(rng.sample(range(1, len(whole)), rng.randint(1, 12)))
        return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

    results = await asyncio.gather(*(proxy.stripped(*pieces()) for _ in range(60)))
    assert set(results) == {whole.replace(USAGE, b"")}


async def test_byte_by_byte(proxy: Proxy) -> None:
    whole = b"".join((TOKENS[1], USAGE, DONE))
    assert await proxy.stripped(*(bytes([b]) for b in whole), gap_s=0.001) == TOKENS[1] + DONE


SPACED = USAGE.replace(b":", b": ").replace(b",", b" , ")


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        pytest.param((*TOKENS, USAGE, DONE), (*TOKENS, DONE), id="an event a chunk, the usage alone in one"),
        pytest.param((b"".join((*TOKENS, USAGE, DONE)),), (*TOKENS, DONE), id="all in one chunk"),
        pytest.param((*TOKENS, USAGE), TOKENS, id="nothing after it"),
        pytest.param((USAGE,), (), id="nothing else"),
        pytest.param((*TOKENS, SPACED, DONE), (*TOKENS, DONE), id="spaces in the JSON"),
    ],
)
async def test_shapes_of_streams(proxy: Proxy, pieces: tuple[bytes, ...], wanted: tuple[bytes, ...]) -> None:
    assert await proxy.stripped(*pieces) == b"".join(wanted)


async def test_line_ends_of_two_bytes(proxy: Proxy) -> None:
    pieces = [p.replace(b"\n", b"\r\n") for p in (*TOKENS, USAGE, DONE)]
    whole = b"".join(pieces)
    cut = whole.index(pieces[3]) + len(pieces[3])
    wanted = whole.replace(pieces[3], b"")
    results = await asyncio.gather(*(proxy.stripped(whole[:at], whole[at:]) for at in range(cut - 5, cut + 1)))
    assert set(results) == {wanted}


@pytest.mark.parametrize(
    "whole",
    [
        pytest.param(b"".join((*TOKENS, DONE)), id="no usage event"),
        pytest.param(b"".join(token("a", usage=COUNTS) for _ in range(3)) + DONE, id="usage in events with choices"),
        pytest.param(b"".join(TOKENS) + DONE.rstrip(), id="no blank line at the end"),
        pytest.param(b"".join(TOKENS) + USAGE[:100], id="cut off within an event"),
        pytest.param(token("x" * 200_000) + token("y" * 200_000), id="large events"),
        pytest.param(b"data: " + b"z" * 200_000, id="large and no event at all"),
        pytest.param(b'data: {"error": {"message": "m", "code": 500}}\n\n' + DONE, id="an error"),
        pytest.param(event(choices=[], prompt_filter_results=[]) + DONE, id="no choices and no usage"),
        pytest.param(b"\n\n\r\n\r\n\n", id="blank lines"),
    ],
)
async def test_other_streams_pass_unchanged_with_the_mark(proxy: Proxy, whole: bytes) -> None:
    cuts = sorted({1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1})
    results = await asyncio.gather(*(proxy.stripped(whole[:cut], whole[cut:]) for cut in cuts))
    assert [result == whole for result in results] == [True] * len(cuts)


async def test_without_the_mark_the_usage_event_stays(proxy: Proxy) -> None:
    pieces = (*TOKENS, USAGE, DONE)
    assert await proxy.ask(lambda r: stream(r, pieces, gap_s=0.01), {}) == b"".join(pieces)
    assert await proxy.counted() == [READ]


async def test_no_event_waits_for_the_next(proxy: Proxy) -> None:
    """The replica sends each event only after the client has seen the one before it, so one held back ends in a timeout."""
    seen = asyncio.Queue[None]()

    async def in_step(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in TOKENS:
            await response.write(piece)
            await asyncio.wait_for(seen.get(), 5)
        await response.write(USAGE + DONE)
        return response

    async with asyncio.timeout(10), proxy.open(in_step, STRIP_ON) as response:
        for piece in TOKENS:
            assert await response.content.readexactly(len(piece)) == piece
            seen.put_nowait(None)
        assert await response.read() == DONE


async def test_a_stream_with_a_length_loses_it(proxy: Proxy) -> None:
    async def with_length(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"".join((*TOKENS, USAGE, DONE)), content_type="text/event-stream")

    assert await proxy.ask(with_length, STRIP_ON) == b"".join((*TOKENS, DONE))


async def test_json_is_read_with_and_without_the_mark(proxy: Proxy) -> None:
    body = json.dumps({"choices": [], "usage": COUNTS, "prompt_logprobs": None}).encode()

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    assert await proxy.ask(answer, STRIP_ON) == body
    assert await proxy.ask(answer, {}) == body
    assert await proxy.counted() == [READ] * 2


async def test_json_usage_is_read_wherever_the_body_is_cut(proxy: Proxy) -> None:
    said = '"usage":{"prompt_tokens":99}'
    body = json.dumps({"choices": [said], "usage": COUNTS, "kv": {"usage": None, "more": "usage"}}).encode()
    begin = body.index(b'"usage": {"prompt_tokens": 14') - 2
    cuts = range(begin, begin + 170)
    answers = [(body[:cut], body[cut:]) for cut in cuts]

    def answer(pieces: tuple[bytes, bytes]) -> Answer:
        return lambda r: stream(r, pieces, gap_s=0.03, content_type="application/json; charset=utf-8")

    results = await asyncio.gather(*(proxy.ask(answer(pieces), {}) for pieces in answers))
    assert set(results) == {body}
    assert await proxy.counted() == [READ] * len(cuts)


async def test_the_responses_api_is_read(proxy: Proxy) -> None:
    usage = {"input_tokens": 14, "output_tokens": 8, "input_tokens_details": {"cached_tokens": 4}, "total_tokens": 22}
    done = {"type": "response.completed", "response": {"output": ["x" * 20_000], "usage": usage}}
    events = (
        b'event: response.created\ndata: {"response":{"usage":null}}\n\n',
        b"data: " + json.dumps(done).encode() + b"\n\n",
    )

    async def as_json(request: web.Request) -> web.StreamResponse:
        return web.json_response(done["response"])

    assert await proxy.ask(lambda r: stream(r, events), {}) == b"".join(events)
    await proxy.ask(as_json, {})
    assert await proxy.counted() == [READ] * 2
