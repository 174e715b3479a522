"""Against a server that speaks just enough; the clock is real, so times are checked by order and not by value."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from extproc.sim.client import UNFINISHED, Limits, Load, Record
from extproc.sim.workload import Session, Turn
from tests.support.ports import free_port

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


async def streamed(request: web.Request, *texts: str, done: bool = True) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for text in texts:
        await response.write(event(text))
    if done:
        await response.write(b"data: [DONE]\n\n")
    return response


def session(name: str = "s", starts_s: float = 0.0, turns: int = 1) -> Session:
    return Session(name, starts_s, 0, "be brief", tuple(Turn(f"turn {n}", 5, 0.0) for n in range(turns)))


async def test_each_turn_carries_the_answers_before_it_and_the_session() -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append((request.headers["x-session-id"], await request.json()))
        return await streamed(request, f"answer {len(seen)}", "!")

    async with server(handler) as url:
        records = await Load(url, "m").run([session("abc", turns=2)])
    assert [r.error for r in records] == [None, None]
    assert [name for name, _ in seen] == ["abc", "abc"]
    assert [m["content"] for m in seen[1][1]["messages"]] == ["be brief", "turn 0", "answer 1!", "turn 1"]


async def test_a_record_tells_first_text_end_and_tokens() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await streamed(request, "a", "b", "c")

    async with server(handler) as url:
        (record,) = await Load(url, "m").run([session()])
    assert record.ttft_s is not None
    assert 0 < record.ttft_s <= record.e2e_s
    assert (record.status, record.output_tokens, record.prompt_tokens) == (200, 3, None)


async def test_sessions_do_not_wait_for_each_other() -> None:
    both = asyncio.Barrier(2)

    async def handler(request: web.Request) -> web.StreamResponse:
        await both.wait()
        return await streamed(request, "a")

    async with server(handler) as url:
        records = await Load(url, "m", limits=Limits(request_s=5)).run([session("a"), session("b")])
    assert [r.error for r in records] == [None, None]


async def test_an_error_status_is_recorded_and_the_session_goes_on_without_that_turn() -> None:
    bodies: list[dict[str, Any]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        if len(bodies) == 1:
            return web.json_response({"error": {}}, status=503)
        return await streamed(request, "a")

    async with server(handler) as url:
        records = await Load(url, "m").run([session(turns=2)])
    assert [(r.status, r.error) for r in records] == [(503, "status 503"), (200, None)]
    assert [m["content"] for m in bodies[1]["messages"]] == ["be brief", "turn 1"]


async def test_a_stream_that_breaks_off_is_an_error() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await streamed(request, "a", done=False)

    async with server(handler) as url:
        (record,) = await Load(url, "m").run([session()])
    assert record.error == "broke off before [DONE]"


async def test_nothing_listening_is_an_error_without_a_status() -> None:
    (record,) = await Load(f"http://127.0.0.1:{free_port()}", "m").run([session()])
    assert record.status is None
    assert record.error is not None
    assert "ClientConnectorError" in record.error


async def test_a_request_without_end_is_given_up() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async with server(handler) as url:
        (record,) = await Load(url, "m", limits=Limits(request_s=0.1)).run([session()])
    assert record.error == "no end within 0.1 s"


async def test_the_end_of_the_load_cuts_what_runs_and_says_so() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async with server(handler) as url:
        (record,) = await Load(url, "m", limits=Limits(total_s=0.3)).run([session(), session("late", starts_s=60)])
    assert record.error == UNFINISHED


async def test_each_record_is_reported_as_it_comes() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await streamed(request, "a")

    reported: list[Record] = []
    async with server(handler) as url:
        load = Load(url, "m", on_record=reported.append)
        records = await load.run([session(turns=3)])
    assert reported == records
    assert "3 requests, 0 failed" in repr(load)
