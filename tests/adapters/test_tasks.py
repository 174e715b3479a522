"""Recurring work that fails begins again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from extproc.adapters.tasks import Tasks
from tests.support.waiting import until


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    these = Tasks(first_pause_s=0.01)
    yield these
    await these.stop()


class Work:
    """Fails so many times, then goes on for ever."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.begun = 0
        self.ended = 0

    async def __call__(self) -> None:
        self.begun += 1
        if self.begun <= self.failures:
            raise RuntimeError("no luck")
        try:
            await asyncio.Event().wait()
        finally:
            self.ended += 1


async def test_work_that_fails_begins_again_and_is_counted(tasks: Tasks, caplog: pytest.LogCaptureFixture) -> None:
    work = Work(failures=3)
    tasks.start("scrub", work)
    await until(lambda: work.begun == 4)
    assert tasks.failures == {"scrub": 3}
    assert [r.getMessage() for r in caplog.records] == [
        f"scrub ended by RuntimeError('no luck'); again in {pause} s" for pause in ("0.01", "0.02", "0.04")
    ]


async def test_work_that_returns_is_done(tasks: Tasks) -> None:
    done = []

    async def once() -> None:
        done.append(1)

    tasks.start("once", once)
    await until(lambda: done)
    await asyncio.sleep(0.05)
    assert done == [1]
    assert tasks.failures == {"once": 0}


async def test_work_of_the_same_name_takes_the_place_of_what_ran(tasks: Tasks) -> None:
    first, second = Work(0), Work(0)
    tasks.start("one", first)
    await until(lambda: first.begun)
    tasks.start("one", second)
    await until(lambda: second.begun)
    assert first.ended == 1


async def test_stop_ends_all_also_those_that_pause() -> None:
    tasks = Tasks(first_pause_s=60)
    works = Work(0), Work(100)
    for i, work in enumerate(works):
        tasks.start(f"{i}", work)
    await until(lambda: all(work.begun for work in works))
    async with asyncio.timeout(5):
        await tasks.stop()
    assert works[0].ended == 1
