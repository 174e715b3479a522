"""The processes of the demo, started with the commands that a user would type, and made ready one after the other."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml
from rich.console import Console

from extproc.config import Config
from extproc.demo.children import Child, Children, DemoError, answers, beside
from extproc.demo.settings import (
    DEFAULT,
    HOST,
    DemoSettings,
    Ports,
    backends,
    checked,
    extproc_config,
    load_settings,
)

READY_S: Final = 30.0
"""For one process to answer; on an idle machine it takes one second, Envoy a fifth."""
RENDER_S: Final = 60.0
"""For rendering and validating the bootstrap."""
DIRECTORY: Final = Path("build/demo")


class Stack:
    """Files, ports and processes of one demo. `children` end with the block of `running`."""

    def __init__(self, settings: DemoSettings, directory: Path) -> None:
        """Writes extproc.yaml and backends.yaml to `directory`. Raises ConfigError, or DemoError when a port is taken."""
        self.settings, self.directory = settings, directory.absolute()
        self.ports = Ports(settings.ports, settings.replicas)
        raw = extproc_config(settings)
        self.config: Config = checked(raw, self.directory)
        self.specs = backends(settings)
        require_free(self.ports.all())
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write("extproc.yaml", raw)
        self._write("backends.yaml", [spec.model_dump(mode="json", exclude_defaults=True) for spec in self.specs])

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"http://{self.ports.envoy}"

    @property
    def replicas(self) -> dict[str, Mapping[str, str]]:
        """Address -> labels."""
        return {f"{spec.host}:{spec.port}": spec.labels for spec in self.specs}

    @asynccontextmanager
    async def running(self, baseline: str | None = None) -> AsyncIterator[Running]:
        """Fresh replicas with Envoy in front, ready; extproc too, unless `baseline` names one of Envoy's own policies."""
        # Left from another run it may name replicas that are no more; without one, `extproc envoy` writes it anew.
        self.config.envoy.endpoints_file.unlink(missing_ok=True)
        bootstrap = self.directory / (f"envoy-{baseline}.json" if baseline else "envoy.json")
        async with aiohttp.ClientSession() as http, Children(self.directory) as children:
            await self._render(children, bootstrap, baseline)
            running = Running(self, children, http, baseline)
            await running.start("replicas", "backend", "--config", self._path("backends.yaml"))
            for address in self.replicas:
                await running.ready(f"replica {address}", f"http://{address}/health")
            if baseline is None:
                await running.start("extproc", "serve", "--config", self._path("extproc.yaml"))
                await running.ready("extproc", f"http://{self.ports.http}/readyz")
            await running.start_envoy(bootstrap)
            await running.ready("Envoy", f"http://{self.ports.admin}/ready")
            yield running

    async def _render(self, children: Children, bootstrap: Path, baseline: str | None) -> None:
        options = ["--baseline", baseline] if baseline else []
        command = ["envoy", "--config", self._path("extproc.yaml"), "--output", str(bootstrap), *options]
        await children.run("render", beside("extproc"), *command, timeout_s=RENDER_S)

    def _path(self, name: str) -> str:
        return str(self.directory / name)

    def _write(self, name: str, content: Any) -> None:
        (self.directory / name).write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))


class Running:
    """A stack whose processes run."""

    def __init__(
        self, stack: Stack, children: Children, http: aiohttp.ClientSession, baseline: str | None = None
    ) -> None:
        self.stack, self.children, self.http, self.baseline = stack, children, http, baseline
        self.processes: dict[str, Child] = {}

    @property
    def name(self) -> str:
        """Of the run, in figures and file names."""
        return self.baseline or "extproc"

    async def start(self, name: str, *command: str) -> None:
        self.processes[name] = await self.children.start(self._log(name), beside("extproc"), *command)

    async def start_envoy(self, bootstrap: Path) -> None:
        # Hot restart shares memory under a number, and a second Envoy on this machine would meet it there.
        options = ("--disable-hot-restart", "--concurrency", "1", "-l", "warning")
        self.processes["envoy"] = await self.children.start(
            self._log("envoy"), beside("envoy"), "-c", str(bootstrap), *options
        )

    def _log(self, name: str) -> str:
        return f"{name}-{self.baseline}" if self.baseline else name

    async def ready(self, what: str, url: str) -> None:
        await self.children.until(what, partial(answers, self.http, url), READY_S)

    async def page(self, url: str) -> str:
        """A page as text. Raises DemoError when it is not to be had."""
        try:
            async with self.http.get(url, timeout=aiohttp.ClientTimeout(total=10)) as response:
                response.raise_for_status()
                return await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            raise DemoError(f"{url}: {type(e).__name__} {e}") from None


def require_free(ports: list[int]) -> None:
    """Raises DemoError that names the ports on which somebody listens."""
    if taken := [port for port in ports if not _free(port)]:
        listed = ", ".join(map(str, taken))
        raise DemoError(
            f"port {listed} on {HOST} is in use; end what listens there, or choose others with `ports:` in the demo's file"
        )


def _free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: a connection that only lingers from the last run does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def open_stack(path: Path | None, directory: Path = DIRECTORY) -> Stack:
    """From a demo file; deploy/demo.yaml when none is named. Raises ConfigError and DemoError."""
    return Stack(load_settings(path or DEFAULT), directory)


# --- extproc run ----------------------------------------------------------------------------------------------------------


async def run_stack(path: Path | None, directory: Path = DIRECTORY, console: Console | None = None) -> None:
    """The fleet, extproc and Envoy until Ctrl-C or SIGTERM. Raises ConfigError and DemoError."""
    stack, console = open_stack(path, directory), console or Console()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    async with stack.running() as running:
        console.print(usage(stack), highlight=False, soft_wrap=True)
        # A child that dies ends the wait with its log; Ctrl-C ends it well.
        await running.children.during(_wait(ended))
    console.print("stopped")


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def usage(stack: Stack) -> str:
    """What is where, and a request to paste."""
    ports = stack.ports
    body = f'{{"model": "{stack.settings.model}", "stream": true, "max_tokens": 32, "messages": [{{"role": "user", "content": "Hello"}}]}}'
    fleet = "\n".join(f"  {a}  {labels['gpu']} tp{labels['tp']}" for a, labels in stack.replicas.items())
    return f"""[bold]ready[/bold]; Ctrl-C ends it
  Envoy              {stack.url}
  Envoy's admin      http://{ports.admin}
  inspection page    http://{ports.http}/
  metrics            http://{ports.http}/metrics
  replicas as seen   http://{ports.http}/debug/replicas
  last decisions     http://{ports.http}/debug/decisions?n=10
  logs, files        {stack.directory}
simulated replicas
{fleet}
try
  curl -N {stack.url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"""
