"""The composition root: what starts in which order, what may fail, and what is told of it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml

from extproc.adapters.discovery import FakeSource
from extproc.adapters.discovery.base import Emit
from extproc.adapters.waking import Waker
from extproc.app import App, StartError
from extproc.config import Config, load
from extproc.core.health.states import Reason, State
from extproc.core.lora import Wanted
from extproc.core.observers import Ended, HealthChanged
from extproc.core.types import (
    DrainAsked,
    End,
    Fact,
    NotSampled,
    Outcome,
    Probe,
    Probed,
    Replica,
    Reset,
    ScrapeFailure,
    Stalled,
)
from extproc.envoy.endpoints import EndpointsError
from tests.core.support import flight
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


# --- its own life -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def followed(directory: Path, pool: dict[str, Any]) -> AsyncIterator[tuple[App, Path]]:
    """Started with a configuration file that it follows."""
    path = directory / "extproc.yaml"
    config = configured(directory, {"name": "p", "engine": "none", **pool})
    path.write_text(dumped(config))
    app = App(load(path), path=path)
    await app.start()
    try:
        yield app, path
    finally:
        await app.stop(grace_s=0)


def dumped(config: Config, **of_pool: Any) -> str:
    """The file of a configuration, with other settings of its pool."""
    raw = config.model_dump(mode="json", exclude_defaults=True)
    raw["pools"][0].update(of_pool)
    return yaml.safe_dump(raw)


def addresses(app: App) -> list[str]:
    return [m.address for _, m in app.router.members()]


def value(app: App, name: str, **labels: str) -> float | None:
    return app.registry.get_sample_value(f"extproc_{name}", labels)


async def test_replicas_come_and_go_by_the_configuration_file(tmp_path: Path) -> None:
    other = "127.0.0.1:10"
    async with followed(tmp_path, {"replicas": [NOBODY]}) as (app, path):
        before = app.router.pools["p"].fleet.get(NOBODY)
        path.write_text(dumped(app.config, replicas=[NOBODY, {"address": other, "drain": True}]))
        await until(lambda: addresses(app) == [NOBODY, other])
        assert app.router.pools["p"].fleet.get(NOBODY) is before
        assert app.router.pools["p"].fleet.members[1].replica.drain
        await until(lambda: '"port_value": 10' in app.config.envoy.endpoints_file.read_text())
        path.write_text(dumped(app.config, replicas=[other]))
        await until(lambda: addresses(app) == [other])
        assert value(app, "config_applied_total") == 2


async def test_settings_of_a_pool_are_changed_while_it_runs(tmp_path: Path) -> None:
    async with followed(tmp_path, {"replicas": [NOBODY]}) as (app, path):
        pool = app.router.pools["p"]
        path.write_text(dumped(app.config, policy="least_request", health={"failures": 9}, queue={"max_requests": 7}))
        await until(lambda: pool.policy.name == "least_request")
        assert pool.settings.health.failures == 9
        assert pool.settings.queue.max_requests == 7
        assert addresses(app) == [NOBODY]


async def test_members_may_come_from_elsewhere_without_a_restart(tmp_path: Path) -> None:
    (tmp_path / "members.json").write_text(json.dumps(["127.0.0.1:10"]))
    async with followed(tmp_path, {"replicas": [NOBODY]}) as (app, path):
        path.write_text(dumped(app.config, replicas=[], discovery={"file": {"path": "members.json"}}))
        await until(lambda: addresses(app) == ["127.0.0.1:10"])
        path.write_text(dumped(app.config, replicas=[NOBODY], discovery=None))
        await until(lambda: addresses(app) == [NOBODY])
        (tmp_path / "members.json").write_text(json.dumps(["127.0.0.1:11"]))  # whose source has ended
        path.write_text(dumped(app.config, replicas=[NOBODY, "127.0.0.1:12"], discovery=None))
        await until(lambda: addresses(app) == [NOBODY, "127.0.0.1:12"])


async def test_an_invalid_file_shows_in_the_metrics_and_changes_nothing(tmp_path: Path) -> None:
    async with followed(tmp_path, {"replicas": [NOBODY]}) as (app, path):
        good = path.read_text()
        path.write_text("pools: nothing")
        await until(lambda: value(app, "config_valid") == 0)
        assert value(app, "config_errors_total") == 1
        assert addresses(app) == [NOBODY]
        path.write_text(good)
        await until(lambda: value(app, "config_valid") == 1)
        path.write_text(dumped(app.config, engine="vllm"))
        await until(lambda: value(app, "config_restart_needed") == 1)


async def test_a_source_that_raises_is_started_again_and_counted(static: App, caplog: pytest.LogCaptureFixture) -> None:
    class Clumsy(FakeSource):
        """Raises once, then does its work."""

        runs = 0

        async def run(self, emit: Emit) -> None:
            self.runs += 1
            if self.runs == 1:
                raise RuntimeError("clumsy")
            await super().run(emit)

    source = Clumsy("default")
    source.push(Reset("default", (Replica("127.0.0.1:10"),)))
    static._tasks.start("discovery of default", lambda: source.run(static._changed))
    await until(lambda: addresses(static) == ["127.0.0.1:10"])
    assert value(static, "task_failures_total", task="discovery of default") == 1
    assert "clumsy" in caplog.text


async def test_a_stopping_process_is_not_ready_and_says_so(tmp_path: Path) -> None:
    async with replica() as one:
        app = App(configured(tmp_path, {"replicas": [one.address]}))
        await app.start()
        await until(lambda: app.not_ready() is None)
        stopping = asyncio.create_task(app.stop(grace_s=4))
        assert await until(lambda: readiness(app)) == (503, "stopping\n")
        assert value(app, "stopping") == 1
        assert await takes_grpc(app.config.listen.grpc)  # the proxy has not noticed yet
        await stopping
        assert not await listens(app.config.listen.http)


async def test_a_change_of_health_is_written_at_once(static: App) -> None:
    """And not with the next tick, which may be held up here for ever."""
    written: list[object] = []
    await until(lambda: value(static, "replica_state", pool="default", replica=NOBODY, state="open"))
    static._endpoints.want = written.append  # type: ignore[method-assign, assignment]
    static._members_changed.clear()
    static.router._observer.health_changed(HealthChanged("default", NOBODY, State.OPEN, State.READY, Reason.ANSWERS))
    assert static._members_changed.is_set()
    await until(lambda: written)


async def test_silence_while_we_stood_still_is_held_against_nobody(static: App) -> None:
    checked: list[Fact] = []
    learn = static.router.learn
    static.router.learn = lambda fact, now: (checked.append(fact), learn(fact, now))[1]  # type: ignore[method-assign, func-returns-value]
    late = NotSampled("default", NOBODY, ScrapeFailure.LATE)
    refused = NotSampled("default", NOBODY, ScrapeFailure.REFUSED)
    failed = Probed("default", NOBODY, Probe.LIVE, ok=False)
    time.sleep(1.0)  # noqa: ASYNC251  # the loop stands still, as it does when the process is stopped
    for fact in (late, failed, refused):
        static._learn(fact)
    assert checked == [refused]
    await until(lambda: any(isinstance(fact, Stalled) for fact in checked))
    await until(lambda: not static._pulse.settling(time.monotonic()))
    static._learn(late)
    assert late in checked


@pytest.mark.parametrize("key", ["grpc", "http"])
async def test_a_socket_on_which_another_process_answers_is_taken(tmp_path: Path, key: str) -> None:
    """gRPC and asyncio alike would take it away from the other without a word."""
    listen = {"grpc": f"unix:{tmp_path}/grpc.sock", "http": f"unix:{tmp_path}/http.sock"}
    first = App(configured(tmp_path, {"replicas": [NOBODY]}, listen=listen))
    await first.start()
    second = App(configured(tmp_path, {"replicas": [NOBODY]}, listen={key: listen[key]}))
    try:
        with pytest.raises(StartError, match=rf"^listen\.{key}: cannot listen on {listen[key]}: .*"):
            await second.start()
        await second.stop()
        assert (tmp_path / f"{key}.sock").is_socket()
    finally:
        await first.stop(grace_s=0)


async def test_envoy_is_told_who_is_out_and_who_drains(tmp_path: Path) -> None:
    names = [f"127.0.0.{n}:9" for n in (1, 2, 3, 4)]
    unasked = {"interval_s": 10_000, "doubt_interval_s": 10_000}  # nobody is there, as a check would find
    app = App(configured(tmp_path, {"engine": "none", "replicas": names, "health": unasked}))
    await app.start()
    try:
        for fact in (
            NotSampled("default", names[0], ScrapeFailure.REFUSED),
            DrainAsked("default", names[1]),
            DrainAsked("default", names[2], within_s=0.0),
        ):
            app.router.learn(fact, time.monotonic())
        await until(
            lambda: healths(app.config.envoy.endpoints_file) == ["UNHEALTHY", "DRAINING", "UNHEALTHY", "HEALTHY"]
        )
    finally:
        await app.stop(grace_s=0)


def healths(file: Path) -> list[str]:
    """What the members file says of each, in its order."""
    return re.findall(r'"health_status": *"(\w+)"', file.read_text())


def test_models_are_read_again_where_a_request_for_an_adapter_met_404() -> None:
    read: list[str] = []
    waker = Waker(lambda _: None, lambda _: None, read.append, lambda: None)
    for adapter, status in ((Wanted("a", 0.5, None), 404), (Wanted("a", 0.5, None), 400), (None, 404)):
        ended = replace(flight("f", where=NOBODY), adapter=adapter)
        waker.ended(Ended(ended, Outcome(End.CLIENT_ERROR, status=status), False, None))
    assert read == [NOBODY]
