"""The processes of one run, started as a user would, each of them to be killed, paused and started again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml

from extproc.demo.children import Child, Children, answers, beside
from extproc.envoy.names import LOG_CLUSTER
from tests.chaos.load import Load, Requests
from tests.chaos.settings import MODEL, TENANT_HEADER, Settings
from tests.support.ports import free_port
from tests.support.relay import Relay
from tests.support.waiting import until

READY_S: Final = 20.0
END_S: Final = 45.0
"""For an end by SIGTERM: `shutdown_grace_s`, and some."""
WELL: Final = {"hang": False, "fail_with": None, "draining": False, "metrics_delay_s": 0.0, "metrics_garbage": False}
NORMAL: Final = ("ready", "slow_starting")


class Service:
    """One program through all its lives; each life has a log of its own."""

    def __init__(self, children: Children, name: str, ready_url: str, *command: str) -> None:
        self.name = name
        self._children, self._ready_url, self._command = children, ready_url, command
        self._lives = 0
        self._child: Child | None = None

    def __repr__(self) -> str:
        return f"<{self.name}: life {self._lives}, {self._child}>"

    @property
    def child(self) -> Child:
        assert self._child is not None, f"{self.name} was not started"
        return self._child

    async def start(self, http: aiohttp.ClientSession) -> None:
        """Start it, and wait until it says that it is ready. Raises AssertionError after READY_S."""
        self._lives += 1
        self._child = await self._children.start(f"{self.name}-{self._lives}", *self._command)
        await until(partial(self._ready, http), timeout_s=READY_S)

    async def _ready(self, http: aiohttp.ClientSession) -> bool:
        assert self.child.process.returncode is None, f"{self.child}:\n{self.child.tail()}"
        return await answers(http, self._ready_url)

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.process.returncode is None

    async def heal(self, http: aiohttp.ClientSession) -> None:
        """Running, whatever it was before."""
        if self.running:
            self.resume()
        else:
            await self.start(http)

    async def kill(self) -> None:
        """kill -9."""
        self._signal(signal.SIGKILL)
        await self.child.process.wait()

    async def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self._signal(signal.SIGTERM)
        return await asyncio.wait_for(self.child.process.wait(), END_S)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.child.process.returncode is None, f"{self.child}:\n{self.child.tail()}"
        os.kill(self.child.pid, number)


class Replica(Service):
    """A simulated replica and its door."""

    def __init__(self, children: Children, name: str, settings: Settings) -> None:
        self.address, self.door = f"127.0.0.1:{free_port()}", free_port()
        spec = {"model": MODEL, "labels": dict(settings.labels)}
        port = self.address.rpartition(":")[2]
        command = (sys.executable, "-m", "tests.chaos.replica", "--port", port, "--door", str(self.door))
        super().__init__(children, name, f"http://{self.address}/health", *command, "--spec", json.dumps(spec))

    async def heal(self, http: aiohttp.ClientSession) -> None:
        await super().heal(http)
        await self.set(http, **WELL)

    async def set(self, http: aiohttp.ClientSession, **state: Any) -> None:
        """Change how it behaves; see replica.py."""
        async with http.post(f"http://127.0.0.1:{self.door}/set", json=state) as response:
            assert response.status == 200, await response.text()

    async def accepted(self, http: aiohttp.ClientSession) -> list[float]:
        """When completions arrived, since its present life began; nothing from one that is down or paused."""
        try:
            timeout = aiohttp.ClientTimeout(total=1)
            async with http.get(f"http://127.0.0.1:{self.door}/accepted", timeout=timeout) as response:
                times: list[float] = await response.json()
                return times
        except (aiohttp.ClientError, TimeoutError):
            return []


@dataclass(frozen=True, slots=True)
class Files:
    """Where everything is."""

    directory: Path
    listen: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    admin: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    grpc: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    http: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")

    @property
    def config(self) -> Path:
        return self.directory / "extproc.yaml"

    @property
    def members(self) -> Path:
        return self.directory / "replicas.yaml"

    @property
    def bootstrap(self) -> Path:
        return self.directory / "envoy.json"

    @property
    def access_log(self) -> Path:
        return self.directory / "access.log"

    def write_config(self, settings: Settings) -> None:
        """As in the README, and what the run needs to see who did what; all else is the default."""
        pool = {
            "models": [MODEL],
            "labels": dict(settings.labels),
            "discovery": {"file": {"path": self.members.name}},
        }
        envoy = {
            "listen": self.listen,
            "admin": self.admin,
            "endpoints_file": "endpoints.json",
            "bootstrap_file": self.bootstrap.name,
            "response_headers": True,
            "access_log": self.access_log.name,
        }
        raw = {
            "listen": {"grpc": self.grpc, "http": self.http},
            "pools": [pool],
            "requests": {"tenant_header": TENANT_HEADER},
            "envoy": envoy,
            "inspect": {"decisions": 5000},
        }
        self.config.write_text(yaml.safe_dump(raw, sort_keys=False))

    def write_members(self, addresses: Iterable[str]) -> None:
        """Replaced by rename, as an operator should."""
        new = self.members.with_suffix(".new")
        new.write_text(yaml.safe_dump(list(addresses)))
        new.rename(self.members)


def with_log_through(bootstrap: dict[str, Any], port: int) -> dict[str, Any]:
    """The bootstrap with the gRPC access log sent to another port of loopback. Changes and returns it. Raises ValueError without such a log."""
    clusters = bootstrap["static_resources"]["clusters"]
    logs = [c for c in clusters if c["name"] == LOG_CLUSTER]
    if not logs:
        raise ValueError("the bootstrap has no gRPC access log; has the rendering changed?")
    [endpoint] = logs[0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    endpoint["endpoint"]["address"]["socket_address"]["port_value"] = port
    return bootstrap


@dataclass(slots=True)
class Scene:
    """All that runs."""

    settings: Settings
    files: Files
    replicas: list[Replica]
    extproc: Service
    envoy: Service
    wire: Relay
    load: Load
    requests: Requests
    http: aiohttp.ClientSession

    async def page(self, path: str) -> str:
        """Of extproc's HTTP port. Raises aiohttp.ClientError or TimeoutError."""
        async with self.http.get(f"http://{self.files.http}{path}") as response:
            response.raise_for_status()
            return await response.text()

    async def not_normal(self, limit_s: float = 15.0) -> str | None:
        """Wait until all replicas are members in good standing; what is amiss when that does not come."""
        deadline = time.monotonic() + limit_s
        while amiss := self._amiss(await self.states()):
            if time.monotonic() >= deadline:
                return f"not in good standing before it: {amiss}"
            await asyncio.sleep(0.1)
        return None

    def _amiss(self, states: dict[str, str]) -> str:
        now = {r.name: states.get(r.address, "no member") for r in self.replicas}
        return ", ".join(f"{name} {state}" for name, state in now.items() if state not in NORMAL)

    async def states(self) -> dict[str, str]:
        """Of each replica, as extproc has it; empty when it does not answer."""
        try:
            return {view["replica"]: view["state"] for view in await self.views()}
        except (aiohttp.ClientError, TimeoutError):
            return {}

    async def views(self) -> list[dict[str, Any]]:
        """What extproc knows of each member. Raises aiohttp.ClientError or TimeoutError."""
        views: list[dict[str, Any]] = json.loads(await self.page("/debug/replicas"))
        return views

    async def unfinished(self) -> int:
        """In flight and queued, as extproc has them. Raises aiohttp.ClientError or TimeoutError."""
        lines = (await self.page("/metrics")).splitlines()
        ours = [line for line in lines if line.startswith(("extproc_in_flight ", "extproc_queue_requests"))]
        assert ours, "no extproc_in_flight among the metrics"
        return round(sum(float(line.rpartition(" ")[2]) for line in ours))

    @property
    def services(self) -> list[Service]:
        return [*self.replicas, self.extproc, self.envoy]

    async def dead(self) -> str | None:
        """Which processes ended by themselves; they are started again."""
        if not (ended := [repr(service) for service in self.services if not service.running]):
            return None
        await self.heal()
        return f"ended by itself: {', '.join(ended)}"

    async def heal(self) -> None:
        """Undo what a fault left behind that did not come to its end."""
        self.load.paused = False
        await self.wire.cut()
        await self.wire.mend()
        for service in self.services:
            await service.heal(self.http)
        self.files.write_members(r.address for r in self.replicas)

    async def restart_envoy(self) -> None:
        """With the load away, as a balancer in front would do: nothing runs in it when it ends."""
        self.load.paused = True
        await until(lambda: self.load.open == 0, timeout_s=self.settings.request_timeout_s + 1)
        await self.envoy.terminate()
        await self.envoy.start(self.http)
        self.load.paused = False


def emptied(directory: Path) -> Path:
    """Its absolute path; there, and without files of an earlier run."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*"):
        old.unlink()
    return directory.absolute()


@asynccontextmanager
async def scene(settings: Settings, directory: Path) -> AsyncIterator[Scene]:
    """Everything ready; files and logs in `directory`. All processes end with the block."""
    files = Files(emptied(directory))
    async with AsyncExitStack() as exits:
        http = await exits.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)))
        children = await exits.enter_async_context(Children(directory))
        replicas = [Replica(children, f"replica-{i}", settings) for i in range(settings.replicas)]
        files.write_config(settings)
        files.write_members(r.address for r in replicas)
        wire = await exits.enter_async_context(Relay(files.grpc))
        extproc = Service(
            children,
            "extproc",
            f"http://{files.http}/readyz",
            beside("extproc"),
            "serve",
            "--config",
            str(files.config),
        )
        await asyncio.gather(*(r.start(http) for r in replicas))
        await extproc.start(http)
        command = (beside("extproc"), "envoy", "--config", str(files.config))
        await children.run("render", *command, timeout_s=60)
        files.bootstrap.write_text(json.dumps(with_log_through(json.loads(files.bootstrap.read_text()), wire.port)))
        envoy = Service(children, "envoy", f"http://{files.admin}/ready", beside("envoy"), *_envoy_options(files))
        await envoy.start(http)
        load = Load(f"http://{files.listen}", settings)
        exits.push_async_callback(load.close)
        yield Scene(settings, files, replicas, extproc, envoy, wire, load, Requests(settings), http)


def _envoy_options(files: Files) -> tuple[str, ...]:
    # Hot restart shares memory under a number, and a second Envoy on this machine would meet it there.
    quiet = ("--disable-hot-restart", "--concurrency", "2", "-l", "warning", "--component-log-level", "ext_proc:error")
    return ("-c", str(files.bootstrap), *quiet, "--file-flush-interval-msec", "50")
