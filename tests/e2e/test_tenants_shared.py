"""Two whole routers, each behind the real Envoy, that share the limits of tenants through a real Redis."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.e2e.stack import Json, Stack, stack
from tests.support.backend import Backend
from tests.support.redis import RedisServer
from tests.support.waiting import until

pytestmark = pytest.mark.envoy

LIMIT = 10
"""Of tier free, a minute."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Json

    def left(self) -> int:
        """Requests that are left, by the headers, which must all be there."""
        assert self.headers["x-ratelimit-limit-requests"] == str(LIMIT)
        assert self.headers["x-ratelimit-reset-requests"].endswith("s")
        return int(self.headers["x-ratelimit-remaining-requests"])

    def limited(self, within_s: float = 60 / LIMIT) -> bool:
        """Whether it is the refusal of a request above the limit, whole, and for so long at most."""
        if self.status != 429:
            return False
        assert self.body["error"]["code"] == "rate_limit_exceeded"
        assert self.body["error"]["type"] == "requests"
        assert 1 <= int(self.headers["retry-after"]) <= within_s
        assert self.left() >= 0
        return True


@dataclass
class Pair:
    redis: RedisServer
    routers: tuple[Stack, Stack]
    gate: asyncio.Event
    """The replica answers while it is set."""

    async def ask(self, router: int, tenant: str) -> Answer:
        async with self.routers[router].post(headers={"x-tenant": tenant}) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            text = await response.read()
            return Answer(response.status, headers, {} if response.status == 200 else json.loads(text))

    async def shared(self, yes: bool) -> None:
        """Both routers know that Redis answers, or does not, and of each other."""
        for each in self.routers:
            await until(lambda each=each: each.metric("extproc_limits_shared") == yes, timeout_s=20)  # type: ignore[misc]
            if yes:
                await until(lambda each=each: each.app.router.limits.routers() == 2, timeout_s=20)  # type: ignore[misc]


@asynccontextmanager
async def pair(at: Path, **sharing: Any) -> AsyncIterator[Pair]:
    """Both before the same replica."""
    (at / "secret").write_text("0123456789abcdef")
    tenants: Json = {"secret_file": str(at / "secret"), "sharing": {"strict_wait_s": 5.0, **sharing}}
    tenants |= {"tier_header": "x-tier", "tiers": {"two": {"in_flight": 2}}}
    async with AsyncExitStack() as exits:
        redis = await exits.enter_async_context(RedisServer())
        gate = asyncio.Event()
        gate.set()

        async def answer(_: web.Request) -> web.StreamResponse:
            await gate.wait()
            return web.Response(text="ok")

        member = await exits.enter_async_context(Backend(answer))
        pool = {"engine": "none", "models": ["sim"], "replicas": [member.address]}
        routers = []
        for name in ("a", "b"):
            (at / name).mkdir()
            sections: dict[str, Any] = {
                "tenants": tenants,
                "shared": {"url": redis.url, "max_pause_s": 0.5, "timeout_s": 4.0, "expiry_s": 5.0},
                "requests": {"tenant_header": "x-tenant"},
            }
            routers.append(await exits.enter_async_context(stack(at / name, pool, **sections)))
        made = Pair(redis, (routers[0], routers[1]), gate)
        await made.shared(True)
        yield made


async def test_the_eleventh_request_is_refused_wherever_it_lands(tmp_path: Path) -> None:
    async with pair(tmp_path, strict=True) as both:
        began = time.monotonic()
        answers = [await both.ask(i % 2, "acme") for i in range(LIMIT)]
        refused = [await both.ask(i % 2, "acme") for i in range(4)]
        came_back = int((time.monotonic() - began) * LIMIT / 60)
        assert [a.status for a in answers] == [200] * LIMIT
        assert sum(not a.limited() for a in refused) <= came_back
        left = [a.left() for a in answers]
        assert left[-1] <= 1 + came_back
        assert max(left) < LIMIT
        assert (await both.ask(0, "another")).status == 200


async def test_without_waiting_for_redis_one_more_for_each_router_may_pass(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        began = time.monotonic()
        passed = sum([(await both.ask(i % 2, "acme")).status == 200 for i in range(5 * LIMIT)])
        assert LIMIT <= passed <= LIMIT + 2 + (time.monotonic() - began) * LIMIT / 60
        assert (await both.ask(0, "acme")).limited()
        assert (await both.ask(1, "acme")).limited()


async def test_what_runs_behind_one_router_counts_at_the_other_until_it_ends(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        client = {"x-tenant": "acme", "x-tier": "two"}
        limits = both.routers[1].app.router.limits

        async def status(router: int) -> int:
            async with both.routers[router].post(headers=client) as response:
                await response.read()
                return int(response.status)

        both.gate.clear()
        running = [asyncio.create_task(status(0)) for _ in range(2)]
        name = await until(lambda: both.redis.command("KEYS", "*:limit:in_flight:*"))
        await until(lambda: told(both.redis, name[0], 2))
        running.append(asyncio.create_task(status(1)))  # that one has not heard of them
        await until(lambda: told(both.redis, name[0], 3))
        [key] = limits.in_flight.here
        await until(lambda: limits.in_flight.of(key, time.monotonic()) == 3)
        assert [await status(1), await status(0)] == [429, 429]
        assert both.routers[1].metric("extproc_tenant_requests_total", tier="two", tenant="", result="concurrency") == 1
        both.gate.set()
        assert await asyncio.gather(*running) == [200] * 3
        await until(lambda: told(both.redis, name[0], 0))
        await until(lambda: passes(status(1)))


async def told(redis: RedisServer, name: bytes, count: int) -> bool:
    """Whether so many are in flight, by what the routers have told."""
    words = json.loads(await redis.command("GET", name) or "{}")
    return bool(sum(n for n, _ in words.values()) == count)


async def passes(status: Awaitable[int]) -> bool:
    return await status == 200


async def test_without_redis_each_router_has_the_limit_alone_and_the_debt_is_paid_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path, strict=True, on_loss="open") as both:
        await both.redis.kill()
        await both.shared(False)
        began = time.monotonic()
        answers = [await both.ask(0, "acme") for _ in range(LIMIT)]
        assert [a.status for a in answers] == [200] * LIMIT
        assert answers[0].left() == LIMIT - 1
        if time.monotonic() - began < 60 / LIMIT:
            assert (await both.ask(0, "acme")).limited()
        assert (await both.ask(1, "acme")).status == 200, "that one knows nothing of it"
        await both.redis.start()
        await both.shared(True)
        key = await until(lambda: both.redis.command("KEYS", "*:limit:requests:*"))
        assert len(key) == 1, "what passed meanwhile is charged"
        await until(lambda: limited_on(both, 1, "acme"))
        assert (await both.ask(0, "new")).status == 200


async def limited_on(both: Pair, router: int, tenant: str) -> bool:
    return (await both.ask(router, tenant)).limited(within_s=60)  # for the debts of both


async def test_where_it_is_configured_so_nobody_passes_without_redis(tmp_path: Path) -> None:
    async with pair(tmp_path, on_loss="closed") as both:
        assert (await both.ask(0, "acme")).status == 200
        await both.redis.kill()
        await both.shared(False)
        for router in (0, 1):
            answer = await both.ask(router, "acme")
            assert (answer.status, answer.body["error"]["type"]) == (503, "Service Unavailable")
            assert "cannot be checked" in answer.body["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
        await both.redis.start()
        await both.shared(True)
        for router in (0, 1):
            assert (await both.ask(router, "acme")).status == 200
