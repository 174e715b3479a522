"""The whole path for the length of a block: a client, the real Envoy with the rendered bootstrap, extproc, replicas.

    async with stack(tmp_path, {"replicas": [a.address, b.address]}) as s:
        async with s.post(prompt="Hello") as response:
            ...

Extproc runs in the test's own process and loop, so that a test can look into it; `process.py` runs it as one of its own.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from extproc.adapters.recorder import Record
from extproc.app import App
from extproc.config import Config, parse
from extproc.core.health.states import State
from extproc.envoy import bootstrap, endpoints, names
from extproc.sim.backend import Backend as Replica
from extproc.sim.backend import BackendSpec
from tests.support.envoy import EnvoyProcess
from tests.support.ports import free_port
from tests.support.waiting import until

CHAT = "/v1/chat/completions"
MODEL = "sim"
GPU = {"gpu": "h200", "model_size": "8b"}
"""The fastest measured: a step takes about 5 ms, a short answer 50 ms."""

Json = dict[str, Any]


def replica(**spec: Any) -> Replica:
    """A simulated vLLM with short answers, on a port that is free again after it stopped."""
    return Replica(BackendSpec(**{"port": free_port(), "labels": GPU, "model": MODEL, "mean_output_tokens": 8, **spec}))


def configured(directory: Path, *pools: Json, **sections: Any) -> Config:
    """A configuration on free ports, with its files in `directory`; `sections` add to those of the file, or are lists."""
    own: Json = {
        "listen": {"grpc": f"127.0.0.1:{free_port()}", "http": f"127.0.0.1:{free_port()}"},
        "envoy": {
            "listen": f"127.0.0.1:{free_port()}",
            "admin": f"127.0.0.1:{free_port()}",
            "endpoints_file": "endpoints.json",
            "bootstrap_file": "envoy.json",
            "response_headers": True,
            # Half a second is for production; here client, replicas and extproc share one thread.
            "message_timeout_s": 10,
            "log_flush_interval_s": 0.02,
            "progress_interval_s": 0.1,
        },
    }
    given = {
        key: {**own.get(key, {}), **value} if isinstance(value, dict) else value for key, value in sections.items()
    }
    merged = {**own, **given}
    scrape = {"interval_s": 0.1, "idle_interval_s": 0.5}
    listed = [{"labels": GPU, "scrape": scrape, **pool} for pool in pools]
    return parse(yaml.safe_dump({"pools": listed, **merged}), base=directory)


def chat(prompt: str = "Hello", *, stream: bool = False, max_tokens: int = 4, **more: Any) -> Json:
    """A chat request; with `max_tokens` alone the simulated replica may stop earlier."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "stream": stream, **more}


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs, and a client for it."""

    config: Config
    app: App
    envoy: EnvoyProcess
    client: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://{self.config.envoy.listen}"

    @property
    def admin(self) -> str:
        """URL of extproc's HTTP port."""
        return f"http://{self.config.listen.http}"

    def post(self, body: Any = None, path: str = CHAT, **options: Any) -> Any:
        """Send a request, by default a short chat; the response is a context manager."""
        data = body if isinstance(body, bytes) else json.dumps(body or chat()).encode()
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return self.client.post(f"{self.url}{path}", data=io.BytesIO(data), headers=headers, **options)

    async def served(self, body: Any = None, path: str = CHAT, **options: Any) -> str:
        """Who answered a request that must succeed."""
        async with self.post(body, path, **options) as response:
            text = await response.read()
            assert response.status == 200, text
            served: str = response.headers[names.REPLICA_HEADER]
            return served

    async def chosen(self, body: Any = None) -> str:
        """The same of one that extproc decided on, one after the other: where extproc gets no time the proxy goes on without it."""
        before = self.app.recorder.last(1)
        while True:
            async with self.post(body) as response:
                text = await response.read()
                if self.app.recorder.last(1) != before:
                    assert response.status == 200, text
                    return str(response.headers[names.REPLICA_HEADER])
            await self.seen()

    def last(self) -> Record:
        """The newest decision."""
        return self.app.recorder.last(1)[0]

    def since(self, record: Record) -> list[Record]:
        """The decisions after that one, in their order."""
        kept = self.app.recorder.last(1_000)
        return kept[: kept.index(record)][::-1]

    async def ended(self) -> Record:
        """The newest decision, once its end is known."""
        record = self.last()
        await until(lambda: record.ended is not None)
        return record

    def metric(self, name: str, **labels: str) -> float:
        """One sample of /metrics; 0 where there is no such line."""
        value = self.app.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value

    async def seen(self) -> None:
        """Envoy takes extproc for healthy. Between two tests of a module nothing answers its checks: our loop stands still."""
        await until(lambda: connected(self.envoy))

    async def settled(self) -> None:
        """All flights end in time, and the books agree."""
        await until(lambda: self.app.router.in_flight == 0)
        self.app.router.check()


def be_patient(rendered: Json) -> None:
    """Wait longer for extproc's word on its health: it shares an event loop with clients and replicas here, and a moment without time
    for it is not what these tests are about. What Envoy does without extproc is tested with processes of their own.
    """
    for cluster in rendered["static_resources"]["clusters"]:
        for check in cluster.get("health_checks", ()):
            check["timeout"] = "10s"


@asynccontextmanager
async def stack(
    directory: Path,
    *pools: Json,
    ready: bool = True,
    change: Callable[[Json], None] = lambda _: None,
    **sections: Any,
) -> AsyncIterator[Stack]:
    """Started, and at the end checked: the ledger is empty. `change` may edit the bootstrap; `ready` waits for all members."""
    config = configured(directory, *pools, **sections)
    app = App(config)
    await app.start()
    try:
        endpoints.create_if_missing(config)
        rendered = bootstrap.render(config)
        be_patient(rendered)
        change(rendered)
        async with EnvoyProcess(rendered) as envoy, client() as session:
            running = Stack(config, app, envoy, session)
            await until(lambda: connected(envoy))
            if ready:
                await until(lambda: all_ready(app))
                await until(lambda: same_members(app, envoy))
            yield running
            await running.settled()
    finally:
        await app.stop(grace_s=1.0)


def client() -> aiohttp.ClientSession:
    """Without a limit on connections, and patient: a slow machine is no failure."""
    timeout = aiohttp.ClientTimeout(total=60)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def connected(envoy: EnvoyProcess) -> bool:
    """Whether Envoy takes extproc for healthy."""
    name = f"cluster.{names.SERVICE_CLUSTER}.membership_healthy"
    return (await envoy.stats(name)).get(name) == 1


def all_ready(app: App) -> bool:
    """Whether every member has been sampled and says what it serves, where it is asked."""
    now = time.monotonic()
    return app.not_ready() is None and all(
        member.state(now) is State.READY and (member.models or not member.scraped) for _, member in app.router.members()
    )


async def same_members(app: App, envoy: EnvoyProcess) -> bool:
    """Whether Envoy has the members that extproc has."""
    clusters = await envoy.clusters()
    pools = app.router.pools.items()
    return all(set(clusters[names.cluster_name(n)]) == {m.address for m in p.fleet.members} for n, p in pools)


async def gathered(count: int, one: Callable[[int], Awaitable[Any]], at_once: int = 16) -> list[Any]:
    """The results of `one(0..count-1)`, in order, so many at a time."""
    gate = asyncio.Semaphore(at_once)

    async def held(i: int) -> Any:
        async with gate:
            return await one(i)

    return list(await asyncio.gather(*map(held, range(count))))
