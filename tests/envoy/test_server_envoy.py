"""What a real Envoy does with our answers. One Envoy for each test; about a second each."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from extproc.core.types import Refusal, Reject, Verdict
from extproc.envoy.intake import FakeRouter
from extproc.envoy.server import Server
from tests.envoy import lab, replicas
from tests.envoy.setup import (
    ADMIN,
    BUFFERED,
    CHAT,
    DUPLEX,
    DUPLEX_BOTH,
    LISTEN,
    NOBODY,
    SEND,
    SERVICE,
    STRICT,
    A,
    B,
    prompt,
    route,
    served,
)

pytestmark = pytest.mark.envoy

MEGABYTES_3 = 3_000_000


class At:
    def __init__(self, session: aiohttp.ClientSession, router: FakeRouter, server: Server) -> None:
        self.session, self.router, self.server = session, router, server

    async def post(self, path: str, data: bytes, chunked: bool = False, **headers: str) -> tuple[int, Any, Any]:
        """Status, parsed body and headers of the response."""

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(data), 100_000):
                yield data[at : at + 100_000]

        given: Any = pieces() if chunked else io.BytesIO(data)
        url = f"http://127.0.0.1:{LISTEN}{path}"
        async with self.session.post(url, data=given, headers=headers) as response:
            return response.status, json.loads(await response.read()), response.headers

    async def arrives(self, path: str, data: bytes, chunked: bool = False) -> Any:
        """What the replica got, which must be these bytes."""
        status, seen, _ = await self.post(path, data, chunked)
        assert status == 200
        assert (seen["size"], seen["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        return seen


@asynccontextmanager
async def running(
    folder: Path,
    verdicts: list[Verdict],
    processing: dict[str, str] = BUFFERED,
    pools: dict[str, list[int]] | None = None,
    **more: Any,
) -> AsyncIterator[At]:
    pools = pools or {"a": [A, B, NOBODY]}
    router, server = served(verdicts, pools)
    config = lab.bootstrap(LISTEN, ADMIN, SERVICE, pools, lab.ext_proc(processing, mutation_rules=STRICT, **more))
    await server.start()
    try:
        async with (
            lab.replica(A, replicas.echo("a")),
            lab.replica(B, replicas.echo("b")),
            lab.envoy(config, folder),
            aiohttp.ClientSession() as session,
        ):
            yield At(session, router, server)
    finally:
        await server.stop(0.1)


async def test_buffered_the_pick_in_the_body_answer_counts_and_the_rpc_ends(tmp_path: Path) -> None:
    async with running(tmp_path, [route(B)]) as at:
        for size in (10, 10, 10, MEGABYTES_3):
            seen = await at.arrives(CHAT, prompt(size))
            assert seen["name"] == "b"
            assert int(seen["headers"]["content-length"]) == len(prompt(size))
        assert at.server.streams.steered == 4
        await lab.until(lambda: len(at.router.finished) == 4)
        assert {outcome.served for _, outcome, _ in at.router.finished} == {f"127.0.0.1:{B}"}


async def test_the_second_of_the_list_gets_the_whole_body_when_the_first_is_down(tmp_path: Path) -> None:
    async with running(tmp_path, [route(NOBODY, B)]) as at:
        for size in (10, MEGABYTES_3):
            assert (await at.arrives(CHAT, prompt(size)))["name"] == "b"
        await lab.until(lambda: len(at.router.finished) == 2)
        assert [outcome.attempts for _, outcome, _ in at.router.finished] == [2, 2]


async def test_ending_after_the_header_answer_lets_an_unread_body_pass(tmp_path: Path) -> None:
    async with running(tmp_path, [route(B)]) as at:
        for size, chunked in ((10, False), (500_000, False), (2_500_000, True)):
            assert (await at.arrives("/tokenize", b"y" * size, chunked))["name"] == "b"
        seen = await asyncio.gather(*(at.arrives("/tokenize", b"y" * 50_000) for _ in range(20)))
        assert {s["name"] for s in seen} == {"b"}


async def test_a_rewritten_body_arrives_with_its_length(tmp_path: Path) -> None:
    async with running(tmp_path, [route(B)]) as at:
        sent = prompt(10, stream=True)
        status, seen, _ = await at.post(CHAT, sent)
        assert (status, seen["name"]) == (200, "b")
        assert seen["size"] > len(sent)
        assert int(seen["headers"]["content-length"]) == seen["size"]


async def test_errors_carry_type_and_retry_after(tmp_path: Path) -> None:
    async with running(tmp_path, [Reject(Refusal.NO_REPLICAS)]) as at:
        status, body, headers = await at.post(CHAT, prompt(10))
        assert (status, headers["content-type"], headers["retry-after"]) == (503, "application/json", "1")
        assert body["error"]["code"] == 503
        status, body, headers = await at.post(CHAT, b"{")
        assert (status, headers["content-type"], body["error"]["code"]) == (400, "application/json", 400)


async def test_the_pool_header_of_a_body_answer_selects_the_cluster(tmp_path: Path) -> None:
    pools = {"a": [A], "b": [B]}
    async with running(tmp_path, [route(B, pool="b"), route(A, pool="a")], pools=pools) as at:
        first, second = [await at.arrives(CHAT, prompt(10)) for _ in range(2)]
        assert (first["name"], first["headers"]["x-extproc-pool"]) == ("b", "b")
        assert (second["name"], second["headers"]["x-extproc-pool"]) == ("a", "a")


@pytest.mark.parametrize("processing", [DUPLEX, DUPLEX_BOTH], ids=["request", "both ways"])
async def test_full_duplex(tmp_path: Path, processing: dict[str, str]) -> None:
    async with running(tmp_path, [route(B)], processing) as at:
        for size, chunked in ((10, False), (MEGABYTES_3, False), (MEGABYTES_3, True)):
            assert (await at.arrives(CHAT, prompt(size), chunked))["name"] == "b"
            assert (await at.arrives("/tokenize", b"y" * size, chunked))["name"] == "b"
        sent = prompt(100_000, stream=True)
        status, seen, _ = await at.post(CHAT, sent)
        assert (status, seen["name"]) == (200, "b")
        assert (seen["size"] > len(sent)) == (processing is DUPLEX_BOTH), "usage is asked for where it can be read"
        at.router.verdicts[:] = [Reject(Refusal.NO_REPLICAS)]
        status, body, _ = await at.post(CHAT, prompt(10))
        assert (status, body["error"]["code"]) == (503, 503)
        assert (at.server.streams.unexpected, at.server.streams.failed) == (0, 0)


STREAMED = {**SEND, "request_body_mode": "STREAMED"}
PARTIAL = {**SEND, "request_body_mode": "BUFFERED_PARTIAL"}
NONE = {**SEND, "request_body_mode": "NONE"}


@pytest.mark.parametrize(
    ("processing", "early"),
    [(STREAMED, False), (STREAMED, True), (PARTIAL, False), (NONE, False)],
    ids=["streamed", "streamed early", "partial", "none"],
)
async def test_other_modes_are_steered_and_leave_the_body_whole(
    tmp_path: Path, processing: dict[str, str], early: bool
) -> None:
    more: dict[str, Any] = {"send_body_without_waiting_for_header_response": True} if early else {}
    async with running(tmp_path, [route(B)], processing, **more) as at:
        for size, chunked in ((10, False), (MEGABYTES_3, False), (MEGABYTES_3, True)):
            assert (await at.arrives(CHAT, prompt(size), chunked))["name"] == "b"
            assert (await at.arrives("/tokenize", b"y" * size, chunked))["name"] == "b"
        assert (at.server.streams.steered, at.server.streams.abandoned) == (6, 0)
