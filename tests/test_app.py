"""The composition root: what starts in which order, what may fail, and what is told of it."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc
import pytest

from extproc.app import App, StartError
from extproc.config import Config
from extproc.envoy.endpoints import EndpointsError
from tests.e2e.stack import configured, replica
from tests.support.ports import free_port
from tests.support.process import Served
from tests.support.waiting import until

NOBODY = "127.0.0.1:9"
"""The discard port: nothing listens there."""


@pytest.fixture
async def static(tmp_path: Path) -> AsyncIterator[App]:
    """One replica that is not there; started and stopped."""
    app = App(configured(tmp_path, {"replicas": [NOBODY]}))
    await app.start()
    yield app
    await app.stop(grace_s=0)


def discovered(directory: Path, *names: str, **sections: dict[str, str]) -> Config:
    """A pool for each name, its members in the file `<name>.json`."""
    return configured(
        directory,
        *({"name": n, "models": [n], "engine": "none", "discovery": {"file": {"path": f"{n}.json"}}} for n in names),
        **sections,
    )


async def readiness(app: App) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(f"http://{app.config.listen.http}/readyz") as response:
        return response.status, await response.text()


async def takes_grpc(address: str) -> bool:
    """Whether a gRPC server answers there."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            async with asyncio.timeout(1):
                await channel.channel_ready()
        except TimeoutError:
            return False
    return True


async def listens(address: str) -> bool:
    """Whether anything accepts connections there."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_members_are_known_and_written_before_the_first_request_can_come(static: App) -> None:
    assert [m.address for _, m in static.router.members()] == [NOBODY]
    assert "pool_default" in static.config.envoy.endpoints_file.read_text()
    assert await listens(static.config.listen.http)
    assert await takes_grpc(static.config.listen.grpc)


async def test_after_a_stop_nothing_listens_and_no_task_is_left(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    app = App(configured(tmp_path, {"replicas": [NOBODY]}))
    await app.start()
    await app.stop(grace_s=0)
    assert not await listens(app.config.listen.http)
    assert not await listens(app.config.listen.grpc)
    assert {t.get_name() for t in asyncio.all_tasks() - before if "grpc" not in repr(t)} == set()


async def test_the_members_file_outlives_the_process(tmp_path: Path) -> None:
    app = App(configured(tmp_path, {"replicas": [NOBODY]}))
    await app.start()
    written = app.config.envoy.endpoints_file.read_bytes()
    await app.stop(grace_s=0)
    assert app.config.envoy.endpoints_file.read_bytes() == written


async def test_readiness_says_what_is_missing(static: App) -> None:
    assert await readiness(static) == (503, "pool default: no member has answered a scrape\n")


async def test_a_replica_that_answers_makes_it_ready(tmp_path: Path) -> None:
    async with replica() as one:
        app = App(configured(tmp_path, {"replicas": [one.address, NOBODY]}))
        await app.start()
        try:
            await until(lambda: app.not_ready() is None)
            assert await readiness(app) == (200, "ok\n")
        finally:
            await app.stop(grace_s=0)


async def test_a_pool_without_members_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    app = App(discovered(tmp_path, "a"))
    await app.start()
    try:
        assert await readiness(app) == (503, "pool a has no members\n")
    finally:
        await app.stop(grace_s=0)


async def test_a_source_that_cannot_be_read_is_counted_and_heals(tmp_path: Path) -> None:
    app = App(discovered(tmp_path, "a"))
    await app.start()
    try:
        await until(lambda: app.registry.get_sample_value("extproc_discovery_errors_total", {"pool": "a"}) == 1)
        assert await listens(app.config.listen.grpc)
        (tmp_path / "a.json").write_text(json.dumps([NOBODY]))
        await until(lambda: app.not_ready() is None)
    finally:
        await app.stop(grace_s=0)


def written(directory: Path) -> list[str]:
    """The files of members that are there."""
    return sorted(path.name for path in directory.glob("endpoints*"))


async def test_members_of_a_pool_are_written_once_they_are_known_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([NOBODY]))
    app = App(discovered(tmp_path, "a", "b"))
    await app.start()
    try:
        await until(lambda: app.registry.get_sample_value("extproc_discovery_errors_total", {"pool": "b"}) == 1)
        await until(lambda: written(tmp_path) == ["endpoints.a.json"])
        (tmp_path / "b.json").write_text(json.dumps(["127.0.0.1:10"]))
        await until(lambda: written(tmp_path) == ["endpoints.a.json", "endpoints.b.json"])
    finally:
        await app.stop(grace_s=0)


@pytest.mark.parametrize("key", ["grpc", "http"])
async def test_a_port_that_is_taken_is_named(tmp_path: Path, key: str) -> None:
    taken = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", free_port())
    address = f"127.0.0.1:{taken.sockets[0].getsockname()[1]}"
    listen = {"grpc": f"127.0.0.1:{free_port()}", "http": f"127.0.0.1:{free_port()}", key: address}
    app = App(configured(tmp_path, {"replicas": [NOBODY]}, listen=listen))
    try:
        with pytest.raises(StartError, match=rf"^listen\.{key}: cannot listen on {address}: .*taken|in use"):
            await app.start()
    finally:
        async with asyncio.timeout(5):
            await app.stop()
        taken.close()


async def test_a_members_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    envoy = {"endpoints_file": "nowhere/endpoints.json"}
    app = App(configured(tmp_path, {"replicas": [NOBODY]}, envoy=envoy))
    with pytest.raises(EndpointsError, match="does not exist"):
        await app.start()
    async with asyncio.timeout(5):
        await app.stop()


async def test_a_members_file_that_can_no_longer_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([NOBODY]))
    (tmp_path / "out").mkdir()
    app = App(discovered(tmp_path, "a", envoy={"endpoints_file": "out/endpoints.json"}))
    await app.start()
    try:
        file = app.config.envoy.endpoints_file
        await until(file.exists)
        file.unlink()
        file.parent.rmdir()
        (tmp_path / "a.json").write_text(json.dumps(["127.0.0.1:10"]))
        await until(lambda: errors(caplog))
        file.parent.mkdir()
        await until(file.exists)
        assert len(errors(caplog)) == 1
    finally:
        await app.stop(grace_s=0)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_well(tmp_path: Path, number: signal.Signals) -> None:
    served = Served(configured(tmp_path, {"engine": "none", "replicas": [NOBODY]}))
    async with served:
        assert await served.signal(number) == 0
    assert "serving: <router" in served.log()
    assert "stopped: <router" in served.log()
    assert "Traceback" not in served.log()
