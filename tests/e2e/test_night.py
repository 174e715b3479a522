"""Clients at their worst: nothing stays open, nothing is logged as a mistake of ours, and memory comes back."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from io import BytesIO

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.apart import Scene, apart
from tests.e2e.stack import CHAT, chat, gathered
from tests.support.process import rss_bytes
from tests.support.waiting import until

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: {{}}\r\n\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    # A client may leave in the millisecond in which its request is decided. Envoy then never hears of the flight, so never tells of
    # its end, and the sweep has to: here after thirty intervals without a word.
    requests = {"flight_ttl_s": 3}
    async with apart(tmp_path_factory.mktemp("night"), requests=requests) as running, running.envoy():
        await running.decides_all()
        yield running


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def survives(scene: Scene) -> AsyncIterator[None]:
    """After each test all flights have ended, the next request is decided as ever, and no line of the log complains."""
    yield
    await scene.decides_all()
    assert [line for line in scene.served.log().splitlines() if " INFO " not in line] == []


async def sent(scene: Scene, pieces: Sequence[bytes], *, half_close: bool = False, answered: bool = True) -> bytes:
    """The first line of the answer to bytes as they are; empty where the connection is closed without one."""
    host, _, port = scene.config.envoy.listen.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if half_close:
            writer.write_eof()
        async with asyncio.timeout(20):
            return (await reader.read(200)).partition(b"\r\n")[0] if answered else b""
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_random_bytes_are_refused_by_envoy(scene: Scene) -> None:
    noise = random.Random(1)
    answers = await gathered(50, lambda _: sent(scene, [noise.randbytes(2_000)]))
    assert set(answers) <= {b"HTTP/1.1 400 Bad Request", b""}


async def test_random_bodies_are_refused_by_us(scene: Scene) -> None:
    noise = random.Random(2)

    async def one(_: int) -> bytes:
        body = noise.randbytes(noise.randint(1, 5_000))
        return await sent(scene, [HEAD.format(len(body)).encode(), body])

    assert set(await gathered(50, one)) == {b"HTTP/1.1 400 Bad Request"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model":"sim","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        (b'{"model":"sim","messages":[],"max_tokens":1' + b"0" * 5_000 + b"}", 400),
        (b'{"model":"\\ud800","messages":[{"role":"user","content":"\\ud800"}]}', 404),
        (b'{"model":"sim","messages":[{"role":"user","content":"\\u0000\\ud800"}],"max_tokens":2}', 200),
        (b'{"model":"x","model":"sim","messages":[{"role":"user","content":"a"}],"max_tokens":2}', 200),
    ],
    ids=["deep lists", "deep objects", "huge number", "surrogate as model", "surrogate in the prompt", "doubled key"],
)
async def test_odd_json_gets_an_answer(scene: Scene, body: bytes, status: int) -> None:
    url = f"http://{scene.config.envoy.listen}{CHAT}"
    async with scene.http.post(url, data=body) as response:
        assert response.status == status, await response.read()


async def test_a_slow_body_is_waited_for(scene: Scene) -> None:
    body = json.dumps(chat()).encode()
    pieces = [HEAD.format(len(body)).encode(), *(body[i : i + 1] for i in range(len(body)))]
    assert await sent(scene, pieces) == b"HTTP/1.1 200 OK"


async def test_connections_that_end_early_leave_nothing(scene: Scene) -> None:
    body = json.dumps(chat()).encode()
    head = HEAD.format(len(body)).encode()
    await gathered(50, lambda _: sent(scene, [head, body[:20]], answered=False))
    await gathered(50, lambda _: sent(scene, [head, body], answered=False))
    # To Envoy a client that closes its side has left, even with its request complete.
    assert await sent(scene, [head, body[:20]], half_close=True) == b""
    await until(scene.empty, timeout_s=20)


async def test_five_hundred_streams_at_once_and_as_many_abandoned(scene: Scene) -> None:
    url = f"http://{scene.config.envoy.listen}{CHAT}"

    async def one(i: int) -> int:
        async with scene.http.post(url, json=chat(f"{i}", stream=True, max_tokens=100, ignore_eos=True)) as response:
            await response.content.readany()
            if i % 2:
                response.close()
            else:
                assert (await response.read()).endswith(b"[DONE]\n\n")
            return response.status

    assert set(await gathered(1_000, one, at_once=1_000)) == {200}
    await until(scene.empty, timeout_s=20)


async def test_memory_comes_back_after_large_bodies(scene: Scene) -> None:
    """Four at once of 29 MB. What the allocator keeps is bounded: a second round adds little to the first."""
    url = f"http://{scene.config.envoy.listen}{CHAT}"
    body = json.dumps(chat(user="x" * 29_000_000)).encode()

    async def one(_: int) -> int:
        async with scene.http.post(url, data=BytesIO(body)) as response:
            return response.status

    async def peak() -> int:
        for _ in range(2):
            assert await gathered(4, one) == [200] * 4
        return rss_bytes(scene.served.pid)

    first = await peak()
    second = await peak()
    assert first < 600 << 20
    assert second < first + (120 << 20)


async def test_an_upgrade_is_not_taken_where_bodies_are_read(scene: Scene) -> None:
    with pytest.raises(aiohttp.ClientError):
        async with scene.http.ws_connect(f"http://{scene.config.envoy.listen}{CHAT}"):
            pass
