"""Whole processes' worth of extproc that share: what one routes the other counts, through reloads and to the end."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import yaml

from extproc.app import App
from extproc.config import load
from extproc.core.types import End, Outcome, Route
from tests.adapters.shared.support import QUICK
from tests.core.support import request
from tests.support.backend import Backend
from tests.support.ports import free_port
from tests.support.redis import RedisServer
from tests.support.waiting import until


def write(path: Path, url: str | None, replica: str = "") -> None:
    """A configuration on free ports the first time; afterwards the same with another Redis."""
    if path.exists():
        raw = yaml.safe_load(path.read_text())
    else:
        raw = {
            "pools": [{"engine": "none", "replicas": [replica]}],
            "listen": {"grpc": f"127.0.0.1:{free_port()}", "http": f"127.0.0.1:{free_port()}"},
            "envoy": {"endpoints_file": f"{path.stem}.json"},
        }
    raw["shared"] = None if url is None else {"url": url, **QUICK}
    path.write_text(yaml.safe_dump(raw))


@asynccontextmanager
async def serving(path: Path, url: str | None, replica: str) -> AsyncIterator[App]:
    write(path, url, replica)
    app = App(load(path), path=path)
    await app.start()
    try:
        yield app
    finally:
        await app.stop(grace_s=0.1)


def shared(app: App, name: str) -> float | None:
    return app.registry.get_sample_value(f"extproc_shared_{name}")


def now() -> float:
    return time.monotonic()


async def test_load_and_drains_of_one_are_known_to_the_other(tmp_path: Path) -> None:
    async with RedisServer() as redis, Backend() as up, serving(tmp_path / "a.yaml", redis.url, up.address) as a:
        async with serving(tmp_path / "b.yaml", redis.url, up.address) as b:
            await until(lambda: a.not_ready() is None and b.not_ready() is None)
            flights = [a.router.arrive(request("Hello"), now()) for _ in range(3)]
            await until(lambda: shared(b, "peer_requests") == 3)
            for each in flights:
                assert isinstance(each, Route)
                a.router.finish(each.flight, Outcome(End.OK), now())
            await until(lambda: shared(b, "peer_requests") == 0)
        await until(lambda: shared(a, "peers") == 0)
        names = await redis.command("KEYS", "*state*")
        assert len(names) == 1, "who stops takes its keys along"


async def test_another_redis_and_none_by_reload(tmp_path: Path) -> None:
    paths = tmp_path / "a.yaml", tmp_path / "b.yaml"
    async with (
        RedisServer() as first,
        RedisServer() as second,
        Backend() as up,
        serving(paths[0], first.url, up.address) as a,
        serving(paths[1], None, up.address) as b,
    ):
        await until(lambda: shared(a, "up") == 1)
        assert shared(b, "up") is None
        for path in paths:
            write(path, second.url)
        await until(lambda: shared(a, "peers") == shared(b, "peers") == 1)
        assert await first.command("KEYS", "*state*") == []
        write(paths[1], None)
        await until(lambda: shared(a, "peers") == 0 and shared(b, "up") is None)
        assert a.registry.get_sample_value("extproc_task_failures_total", {"task": "sharing"}) == 0
