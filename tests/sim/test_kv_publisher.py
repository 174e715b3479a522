"""KV events of a simulated replica: what they tell is what its cache holds."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio

from extproc.openai.simulated_prompt import chat_prompt, token_ids
from extproc.sim.backend import Backend
from extproc.sim.blocks import Copy
from extproc.sim.kv_publisher import END, KvPublisher
from extproc.sim.spec import BackendSpec
from tests.support.waiting import until


def spec(**more: Any) -> BackendSpec:
    return BackendSpec(labels={"gpu": "h100", "model_size": "8b"}, kv_events=0, time_scale=0.01, **more)


@asynccontextmanager
async def running(**more: Any) -> AsyncIterator[tuple[Backend, aiohttp.ClientSession]]:
    async with Backend(spec(**more)) as backend, aiohttp.ClientSession(f"http://{backend.address}") as http:
        yield backend, http


async def complete(http: aiohttp.ClientSession, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"model": "sim", "prompt": prompt, "max_tokens": 40, "ignore_eos": True, **more}
    async with http.post("/v1/completions", json=body) as response:
        assert response.status == 200
        found = await response.json()
        assert isinstance(found, dict)
        return found


def told(publisher: KvPublisher | None) -> list[dict[str, Any]]:
    assert publisher is not None
    return [event for _, payload in publisher._buffer for event in msgspec.msgpack.decode(payload)[1]]


def held(events: list[dict[str, Any]]) -> Counter[int]:
    """Copies of each block, as one who listens counts them."""
    found: Counter[int] = Counter()
    for event in events:
        if event["type"] == "BlockStored":
            found.update(event["block_hashes"])
        else:
            found.subtract(event["block_hashes"])
    assert min(found.values(), default=0) >= 0
    return +found


def cached(backend: Backend) -> Counter[int]:
    """What the engine's pool has."""
    pool = backend.engine.pool
    return Counter(key.hash if isinstance(key, Copy) else key for key in [*pool.held, *pool.idle])


async def test_events_tell_what_the_cache_holds_through_evictions() -> None:
    async with running(num_blocks=200, max_model_len=1000) as (backend, http):
        for n in range(12):
            await asyncio.gather(*(complete(http, f"{n % 5} {k} " + "word " * 250) for k in range(3)))
        for _ in range(2):
            await complete(http, "word" * 64)  # four blocks, of which the last is computed twice
        await until(lambda: not backend.in_flight)
        events = told(backend.publisher)
        assert held(events) == cached(backend)
        assert {event["type"] for event in events} == {"BlockStored", "BlockRemoved"}
        assert max(held(events).values()) == 2


async def test_a_request_that_is_broken_off_is_told_of_with_the_next_step() -> None:
    async with running() as (backend, http):
        asking = asyncio.create_task(complete(http, "word " * 100, max_tokens=100_000))
        await until(lambda: told(backend.publisher))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: not backend.in_flight)
        await complete(http, "another")
        assert held(told(backend.publisher)) == cached(backend)
        assert backend._chains is not None
        await until(lambda: not backend.in_flight)
        await complete(http, "and one more")
        assert len(backend._chains) <= 12  # of requests that are gone nothing is kept


async def test_token_ids_are_those_of_the_prompt() -> None:
    async with running(block_size=4) as (backend, http):
        messages = [
            {"role": "user", "content": "Tell me a story of sixteen tokens or more, please, and take your time."}
        ]
        async with http.post("/v1/chat/completions", json={"model": "sim", "messages": messages, "max_tokens": 1}) as r:
            usage = (await r.json())["usage"]
        first = told(backend.publisher)[0]
        ids = token_ids(chat_prompt(messages))
        assert usage["prompt_tokens"] == len(ids)
        assert first["token_ids"] == ids[: len(ids) // 4 * 4]
        assert (first["parent_block_hash"], first["block_size"]) == (None, 4)


async def test_adapter_and_salt_are_told() -> None:
    async with running(adapters=("french",)) as (backend, http):
        await complete(http, "word " * 40, model="french", cache_salt="pepper")
        event = told(backend.publisher)[0]
        assert (event["lora_name"], event["lora_id"]) == ("french", 1)
        assert event["extra_keys"] == [["french", "pepper"], *[["french"]] * (len(event["block_hashes"]) - 1)]


async def test_where_it_publishes() -> None:
    async with running() as (backend, http), http.get("/kv_event_sources") as response:
        source = (await response.json())["0"]
        assert backend.publisher is not None
        assert (source["endpoint"], source["replay_endpoint"]) == (
            backend.publisher.endpoint,
            backend.publisher.replay_endpoint,
        )
        assert source["endpoint"].startswith("tcp://127.0.0.1:")


async def test_a_replay_begins_where_it_is_asked_to_and_has_an_end() -> None:
    publisher = KvPublisher("127.0.0.1", 0, 0, buffer_steps=4)
    publisher.start()
    context: zmq.asyncio.Context = zmq.asyncio.Context()
    asker = context.socket(zmq.DEALER)
    try:
        asker.connect(publisher.replay_endpoint)
        for _ in range(6):
            publisher.publish([])
        for first, sequences in ((4, [4, 5]), (0, [2, 3, 4, 5]), (6, [])):
            await asker.send_multipart([b"", first.to_bytes(8, "big")])
            for sequence in sequences:
                assert (await asker.recv_multipart())[:3] == [b"", b"kv-events", sequence.to_bytes(8, "big")]
            assert await asker.recv_multipart() == [b"", b"", END, b""]
    finally:
        context.destroy(linger=0)
        await publisher.stop()


async def test_a_replica_that_does_not_publish_says_so() -> None:
    async with Backend(BackendSpec()) as backend, aiohttp.ClientSession(f"http://{backend.address}") as http:
        assert backend.publisher is None
        async with http.get("/kv_event_sources") as response:
            assert json.loads(await response.read()) == {}


async def test_a_port_that_is_taken_is_said_and_nothing_is_left_behind() -> None:
    async with running() as (first, _):
        assert first.publisher is not None
        port = int(first.publisher.endpoint.rpartition(":")[2])
        second = Backend(spec().model_copy(update={"kv_events": port, "kv_replay": 0}))
        with pytest.raises(OSError, match="cannot publish KV events"):
            await second.start()
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientConnectorError):
                await http.get(f"http://{second.address}/health")


@pytest.mark.parametrize("port", [-1, 70_000])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="kv_events"):
        BackendSpec(kv_events=port)
