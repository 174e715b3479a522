"""`extproc serve` as a process of its own, for tests that kill and restart it.

async with Served(config) as served:
    served.kill()
    await served.start()
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import yaml

from extproc.config import Config
from tests.support.waiting import until

COMMAND = (sys.executable, "-c", "from extproc.cli import main; main()")
"""The `extproc` command of this Python, also where it is not installed as a script."""
READY_WITHIN_S = 20.0


class Served:
    """One process; its configuration and log are in the directory of `envoy.bootstrap_file`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        directory = config.envoy.bootstrap_file.parent
        self._path = directory / "extproc.yaml"
        self._log = directory / "extproc.log"
        self._path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note("extproc's log ends with:\n" + "\n".join(self.log().splitlines()[-30:]))
        await self.end()

    @property
    def url(self) -> str:
        """Of its HTTP port."""
        return f"http://{self.config.listen.http}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def log(self) -> str:
        """What it wrote, over all its lives."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    async def start(self, *, ready: bool = True) -> None:
        """Start; with `ready` wait until it says that it can route."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *COMMAND, "serve", "--config", str(self._path), stdout=log, stderr=log
            )
        if ready:
            await until(self.ready, timeout_s=READY_WITHIN_S)

    async def ready(self) -> bool:
        """Whether /readyz says so. Raises AssertionError with the log when the process has ended."""
        assert self._process is not None
        assert self._process.returncode is None, self.log()
        try:
            async with aiohttp.ClientSession() as http, http.get(f"{self.url}/readyz") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def signal(self, number: signal.Signals) -> int:
        """Send a signal that ends it; returns the exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        """The exit status, once it has one."""
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), READY_WITHIN_S)

    def pause(self) -> None:
        """Stop it where it is: it hangs, with its sockets open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def end(self) -> None:
        """End it in any case; safe to call twice."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def metrics(self, prefix: str) -> dict[str, float]:
        """Samples of /metrics whose line starts so, by name with labels."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x.startswith(prefix))}


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmRSS of {pid}")
