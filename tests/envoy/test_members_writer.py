"""The members file is written beside the loop: one write at a time, and the latest state wins."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from extproc.envoy.endpoints import EndpointsError, Member, Members
from extproc.envoy.members_writer import MembersWriter
from tests.support.waiting import until


class Disk:
    """A file whose writes a test holds up, or lets fail."""

    def __init__(self) -> None:
        self.written: list[Members] = []
        self.begun = 0
        self.at_once = 0
        self.free = threading.Event()
        self.free.set()
        self.error: str | None = None

    def write(self, known: Members) -> bool:
        self.begun += 1
        self.at_once += 1
        assert self.at_once == 1
        self.free.wait(20)
        self.at_once -= 1
        if self.error:
            raise EndpointsError(self.error)
        self.written.append(known)
        return True


def members(*ports: int) -> Members:
    return {"p": [Member(f"10.0.0.1:{port}") for port in ports]}


@asynccontextmanager
async def writing(disk: Disk) -> AsyncIterator[MembersWriter]:
    writer = MembersWriter(disk)
    task = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        disk.free.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_is_wanted_is_written_once() -> None:
    disk = Disk()
    async with writing(disk) as writer:
        for _ in range(3):
            writer.want(members(1))
            await until(lambda: disk.written == [members(1)])
    assert disk.begun == 1


async def test_a_slow_disk_holds_up_nobody_and_the_latest_state_wins() -> None:
    disk = Disk()
    disk.free.clear()
    async with writing(disk) as writer:
        writer.want(members(1))
        await until(lambda: disk.begun == 1)
        for port in range(2, 10):
            writer.want(members(port))
            await asyncio.sleep(0)
        disk.free.set()
        await until(lambda: len(disk.written) == 2)
        assert disk.written == [members(1), members(9)]


async def test_back_to_what_was_written_while_another_write_runs() -> None:
    disk = Disk()
    async with writing(disk) as writer:
        writer.want(members(1))
        await until(lambda: len(disk.written) == 1)
        disk.free.clear()
        writer.want(members(2))
        await until(lambda: disk.begun == 2)
        writer.want(members(1))
        disk.free.set()
        await until(lambda: disk.written[-1] == members(1) and len(disk.written) == 3)


async def test_a_full_disk_is_said_once_counted_each_time_and_heals(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    disk = Disk()
    disk.error = "no space left on device"
    async with writing(disk) as writer:
        for count in (1, 2, 3):
            writer.want(members(1))
            await until(lambda count=count: writer.errors == count)  # type: ignore[misc]
        disk.error = None
        writer.want(members(1))
        await until(lambda: disk.written == [members(1)])
        await until(lambda: "again" in caplog.text)
    assert [r.getMessage() for r in caplog.records] == [
        "no space left on device",
        "the members file can be written again",
    ]
