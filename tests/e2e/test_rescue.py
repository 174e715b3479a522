"""Replicas as processes of their own, killed or stopped with requests in flight: what has not begun is answered by another."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import pytest

from extproc.core.types import End
from extproc.envoy import names
from tests.e2e.stack import GPU, MODEL, Stack, chat, gathered, stack
from tests.support.ports import free_port
from tests.support.process import COMMAND
from tests.support.waiting import until

pytestmark = pytest.mark.envoy

LONG = 250
"""Tokens of an answer that takes two or three seconds at this time scale."""
HANG_S = 1.5


class Apart:
    """A simulated replica as a process of its own, on the port that it keeps over its lives."""

    def __init__(self, time_scale: float = 2.0) -> None:
        self.port = free_port()
        self._scale = time_scale
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        options = {"port": self.port, "model": MODEL, "gpu": GPU["gpu"], "time-scale": self._scale}
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._process = await asyncio.create_subprocess_exec(*COMMAND, "backend", *flags)
        await until(self._answers, timeout_s=20)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.kill()

    async def kill(self) -> None:
        """At once; safe to call twice."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def pause(self) -> None:
        """It hangs: its kernel goes on accepting connections."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    async def running(self) -> int:
        """Requests that it has."""
        async with aiohttp.ClientSession() as http, http.get(f"http://{self.address}/load") as response:
            return int((await response.json())["server_load"])

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@dataclass
class Answer:
    """What a client saw."""

    status: int
    served: str | None
    whole: bool
    """The body came to its end."""
    took_s: float


@dataclass
class Scene:
    stack: Stack
    replicas: list[Apart]

    async def ask(self, i: int, stream: bool) -> Answer:
        began = time.monotonic()
        body = chat(f"{i} " * 30, stream=stream, max_tokens=LONG, ignore_eos=True)
        async with self.stack.post(body) as response:
            try:
                text, whole = await response.read(), True
            except aiohttp.ClientPayloadError:
                text, whole = b"", False
            done = text.endswith(b"data: [DONE]\n\n") if stream else response.status == 200
            served = response.headers.get(names.REPLICA_HEADER)
            return Answer(response.status, served, whole and done, time.monotonic() - began)


@asynccontextmanager
async def scene(directory: Path, count: int = 3) -> AsyncIterator[Scene]:
    replicas = [Apart() for _ in range(count)]
    await asyncio.gather(*(r.__aenter__() for r in replicas))
    try:
        pool = {
            "policy": "round_robin",
            "replicas": [r.address for r in replicas],
            "queue": {"enabled": False},
            "health": {"hang_s": HANG_S},
        }
        async with stack(directory, pool) as running:
            yield Scene(running, replicas)
    finally:
        await asyncio.gather(*(r.kill() for r in replicas))


async def all_have_work(replicas: list[Apart]) -> bool:
    return all(await asyncio.gather(*(r.running() for r in replicas)))


async def test_whole_responses_of_a_killed_replica_come_from_another(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        asked = [asyncio.create_task(at.ask(i, stream=False)) for i in range(9)]
        await until(lambda: all_have_work(at.replicas))
        dead = at.replicas[0]
        await dead.kill()
        answers = await asyncio.gather(*asked)
        assert [a.status for a in answers] == [200] * 9
        assert all(a.whole for a in answers)
        assert dead.address not in {a.served for a in answers}
        await at.stack.settled()
        assert at.stack.metric("extproc_moved_total", pool="default") >= 1


async def test_only_streams_that_had_begun_there_end_with_a_killed_replica(tmp_path: Path) -> None:
    async with scene(tmp_path) as at:
        asked = [asyncio.create_task(at.ask(i, stream=True)) for i in range(9)]
        await until(lambda: all_have_work(at.replicas))
        dead = at.replicas[0]
        await dead.kill()
        answers = await asyncio.gather(*asked)
        assert {a.status for a in answers} == {200}
        assert {a.served for a in answers if not a.whole} == {dead.address}
        later = await gathered(6, lambda i: at.ask(100 + i, stream=True))
        assert all(a.whole and a.served != dead.address for a in later)


async def test_requests_on_a_replica_that_is_stopped_are_answered_by_another(tmp_path: Path) -> None:
    """Though its kernel accepts them. What comes too early to know of it waits for `hang_s`, the least patience."""
    async with scene(tmp_path, count=2) as at:
        await gathered(6, lambda i: at.ask(i, stream=True))  # what a token takes is known now
        stopped, well = at.replicas
        stopped.pause()
        answers = await gathered(4, lambda i: at.ask(100 + i, stream=True))
        assert all(a.whole for a in answers)
        assert {a.served for a in answers} == {well.address}
        await at.stack.settled()
        record = next(r for r in at.stack.app.recorder.last(10) if r.decision.endpoints[0] == stopped.address)
        assert record.ended is not None
        assert (record.ended.moved, record.ended.outcome.end) == (True, End.OK)
