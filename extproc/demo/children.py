"""Child processes for the length of a block: started as a user would, logged to a file each, ended by their pid on every path."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp

T = TypeVar("T")

STOP_TIMEOUT_S: Final = 8.0
"""extproc gives open streams 5 s; whoever takes longer than this is killed."""
TAIL_LINES: Final = 15
PROBE_S: Final = 2.0
"""Longest wait for one answer of a readiness probe."""


class DemoError(Exception):
    """The demo cannot go on; the text says why, and what to do where something can be done."""


def beside(name: str) -> str:
    """A program of this virtual environment, or whatever PATH has under that name."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else name


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, all of its threads, those that ended too: clock_getcpuclockid(3), Linux."""
    return time.clock_gettime((~pid << 3) | 2)


class Child:
    """One process that runs."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    def __repr__(self) -> str:
        state = "running" if self.process.returncode is None else f"ended with {self.process.returncode}"
        return f"<{self.name}: pid {self.process.pid}, {state}>"

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self) -> str:
        """The end of what it wrote."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-TAIL_LINES:]) or "(nothing)"

    async def died(self) -> DemoError:
        """Wait until it ends by itself; the error to raise then."""
        code = await self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return DemoError(f"{self.name} ended with {how}; {self.log} ends with:\n{self.tail()}")

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL; safe to call when it has ended."""
        if self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class Children:
    """The processes of one block, ended in the reverse of their order when it is left."""

    def __init__(self, directory: Path) -> None:
        """`directory` takes the logs, `<name>.log`; it must exist."""
        self._directory = directory
        self._children: list[Child] = []

    def __repr__(self) -> str:
        return f"<children: {', '.join(map(repr, self._children)) or 'none'}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, name: str, *command: str) -> Child:
        """Start one. Raises DemoError when there is no such program."""
        path = self._directory / f"{name}.log"
        with path.open("wb") as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Its own process group: Ctrl-C in a terminal reaches us alone, and we end the children in order.
                    start_new_session=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
            except FileNotFoundError:
                raise DemoError(f"{command[0]}: no such program; run `make setup`") from None
        child = Child(name, process, path)
        self._children.append(child)
        return child

    async def run(self, name: str, *command: str, timeout_s: float) -> None:
        """One that ends by itself. Raises DemoError with the end of its log when it fails, or takes longer than `timeout_s`."""
        child = await self.start(name, *command)
        try:
            code = await asyncio.wait_for(child.process.wait(), timeout_s)
        except TimeoutError:
            raise DemoError(f"{name}: no end within {timeout_s:g} s; see {child.log}") from None
        self._children.remove(child)
        if code:
            raise DemoError(f"{name}: {child.tail()}")

    async def stop(self) -> None:
        """End all, last first. Goes through all of them even when cancelled on the way."""
        cancelled: asyncio.CancelledError | None = None
        while self._children:
            try:
                await self._children[-1].stop()
            except asyncio.CancelledError as e:
                cancelled = e
                self._children[-1].process.kill()
                await self._children[-1].process.wait()
            self._children.pop()
        if cancelled:
            raise cancelled

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, unless a child ends before: then `work` is cancelled and DemoError shows that child's log."""
        task = asyncio.create_task(work)
        deaths = [asyncio.create_task(child.died()) for child in self._children]
        try:
            await asyncio.wait([task, *deaths], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise next(death.result() for death in deaths if death.done())
            return task.result()
        finally:
            for one in (task, *deaths):
                one.cancel()
            await asyncio.gather(task, *deaths, return_exceptions=True)

    async def until(self, what: str, check: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Wait until `check` says yes. Raises DemoError after `timeout_s`, or at once when a child ends."""

        async def wait() -> None:
            while not await check():  # noqa: ASYNC110  (another process has no Event to wait for)
                await asyncio.sleep(0.05)

        try:
            await asyncio.wait_for(self.during(wait()), timeout_s)
        except TimeoutError:
            logs = ", ".join(str(child.log) for child in self._children)
            raise DemoError(f"{what}: not ready after {timeout_s:g} s; see {logs}") from None


async def answers(http: aiohttp.ClientSession, url: str) -> bool:
    """Whether a GET gives 200 now."""
    try:
        async with http.get(url, timeout=aiohttp.ClientTimeout(total=PROBE_S)) as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False
