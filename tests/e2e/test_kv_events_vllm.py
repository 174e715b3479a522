"""What real vLLM replicas tell against what they report: cached tokens known beforehand and `usage.prompt_tokens_details`.

Prompts are tokenised by the replicas themselves here, so that nothing but the events can be wrong. Run by `make test-vllm`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from extproc.adapters.kv_events.following import Following
from extproc.config import KvEvents
from extproc.core.prefix.caches import Caches
from extproc.core.prefix.exact import token_chain
from extproc.core.types import Api, CacheChanged, CacheUnknown, Replica, Request, Reset
from tests.e2e.vllm import MODEL, WORDS, Vllm, kv_events
from tests.support.ports import free_port
from tests.support.waiting import until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
POOL = "p"
REQUESTS = 150


class Bench:
    """Replicas, what is known of their caches, and a client."""

    def __init__(self, http: aiohttp.ClientSession, settings: KvEvents) -> None:
        self.http = http
        self.caches = Caches()
        self.rng = Random(5)
        self.following = Following({POOL: settings}, self._learn, rng=self.rng)
        self.counts = self.following.counts[POOL]

    def _learn(self, fact: CacheChanged | CacheUnknown) -> None:
        self.caches.told(fact, asyncio.get_running_loop().time())

    async def asked(self, replica: Vllm, body: dict[str, Any]) -> tuple[int, int]:
        """Cached tokens as known before, and as reported."""
        prompt = {"model": body["model"], "prompt": body["prompt"]}
        async with self.http.post(f"{replica.url}/tokenize", json=prompt) as response:
            ids = (await response.json())["tokens"]
        lora = body["model"] if body["model"] != MODEL else None
        chain = token_chain(ids, lora=lora, salt=body.get("cache_salt"))
        request = Request(Api.COMPLETIONS, body["model"], prompt_tokens=len(ids), tokens=chain)
        expected = self.caches.known(request).get(replica.address, 0)
        async with self.http.post(f"{replica.url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            details = (await response.json())["usage"]["prompt_tokens_details"]
        return expected, (details or {}).get("cached_tokens") or 0

    def prompt(self) -> dict[str, Any]:
        """One of a few long beginnings, and an end of its own: more than fits in the cache."""
        rng = self.rng
        beginning = Random(rng.randrange(8))
        text = [beginning.choice(WORDS) for _ in range(beginning.randrange(200, 1500))][: rng.choice([150, 400, 2000])]
        text += rng.choices(WORDS, k=rng.randrange(200))
        adapters = sorted(path.name for path in Path(os.environ["MODEL"]).parent.glob("lora-*"))
        body = {
            "model": rng.choice([MODEL, MODEL, *adapters]),
            "prompt": " ".join(text),
            "max_tokens": rng.choice([1, 8, 70]),
            "ignore_eos": True,
        }
        return {**body, "cache_salt": rng.choice(["pepper", "salt"])} if rng.random() < 0.3 else body

    async def quiet(self) -> None:
        """No event has come for a while: they follow their step by some milliseconds."""
        seen = -1
        while seen != self.counts.messages:
            seen = self.counts.messages
            await asyncio.sleep(0.03)

    async def exact_share(self, replicas: list[Vllm], number: int) -> float:
        exact = hits = 0
        for _ in range(number):
            expected, reported = await self.asked(self.rng.choice(replicas), self.prompt())
            exact += expected == reported
            hits += reported > 0
            if expected != reported:
                print(f"known {expected}, reported {reported}")
            await self.quiet()
        assert hits > number / 5
        return exact / number


@asynccontextmanager
async def bench(settings: KvEvents) -> AsyncIterator[Bench]:
    async with aiohttp.ClientSession() as http:
        found = Bench(http, settings)
        try:
            yield found
        finally:
            await found.following.stop()


async def test_two_replicas_through_evictions_adapters_salts_and_a_restart(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        ports = [free_port() for _ in range(4)]
        replicas = [Vllm(tmp_path, *kv_events(f"tcp://*:{ports[i]}", f"tcp://*:{ports[i + 1]}")) for i in (0, 2)]
        for replica in replicas:
            await stack.enter_async_context(replica)
        for replica in replicas:
            await replica.ready()
        b = await stack.enter_async_context(bench(KvEvents()))
        b.following.follow(Reset(POOL, tuple(Replica(r.address) for r in replicas)))
        await until(lambda: b.following.known() == {(POOL, r.address): True for r in replicas})

        first = await b.exact_share(replicas, REQUESTS)
        removed = b.counts.events.taken["BlockRemoved"]
        print(f"exact share {first:.3f}, {b.counts}")
        assert first >= 0.99
        assert removed > 100
        assert b.counts.events.passed.total() == 0

        # A router that starts now knows the same.
        later = await stack.enter_async_context(bench(KvEvents()))
        later.following.follow(Reset(POOL, tuple(Replica(r.address) for r in replicas)))
        await until(lambda: all(held(later, r) == held(b, r) > 0 for r in replicas))

        # One restarts in its place.
        port = replicas[0].port
        await replicas[0].__aexit__(None, None, None)
        again = Vllm(tmp_path, *kv_events(f"tcp://*:{ports[0]}", f"tcp://*:{ports[1]}"))
        again.port = port
        await stack.enter_async_context(again)
        await again.ready()
        await until(lambda: (held(b, again), b.counts.restarts) == (0, 1), timeout_s=30.0)
        second = await b.exact_share([again, replicas[1]], REQUESTS // 2)
        print(f"exact share after a restart {second:.3f}, {b.counts}")
        assert second >= 0.99
        assert (b.counts.losses, b.counts.undecodable) == (0, 0)


def held(b: Bench, replica: Vllm) -> int:
    return b.caches.exact.held(replica.address)


async def test_a_replica_that_connects_to_us(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        here, replay = free_port(), free_port()
        settings = KvEvents(mode="bind", bind=f"tcp://127.0.0.1:{here}", replay_endpoint=f"tcp://{{host}}:{replay}")
        replica = Vllm(tmp_path)
        topic = f"kv@{replica.address}@{MODEL}"
        replica._options = kv_events(f"tcp://127.0.0.1:{here}", f"tcp://*:{replay}", topic)
        b = await stack.enter_async_context(bench(settings))
        b.following.follow(Reset(POOL, (Replica(replica.address),)))
        await stack.enter_async_context(replica)
        await replica.ready()
        share = await b.exact_share([replica], REQUESTS // 3)
        print(f"exact share {share:.3f}, {b.counts}")
        assert share >= 0.99
        assert b.following.strangers(POOL) == 0
