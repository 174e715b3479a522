"""Bodies read by a process of their own: the same result as in place, and what becomes of it when that process fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.adapters.reading import MAX_WAITING, ReadingCollector, ReadingCounts, ReadingPool
from extproc.openai.reading import TOO_COMPLEX, NotRead, Reading, Task, perform
from extproc.openai.requests import Limits
from tests.openai.samples import FOLDER, sample
from tests.support.waiting import until

CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hello"}]}'
TASK = Task("POST", CHAT, Limits(), wants_usage=True)
SAMPLES = sorted(path.stem.removeprefix("err_") for path in FOLDER.glob("err_*.txt") if b"curl" in path.read_bytes())

READY = "import sys, time; w = sys.stdout.buffer; w.write(b'ready'); w.flush(); r = sys.stdin.buffer; "
DIES = READY + "r.read(1)"
HANGS = READY + "r.read(1); time.sleep(3600)"
NEVER_READS = READY + "time.sleep(3600)"
NO_PICKLE = READY + "r.read(1); w.write(bytes([0, 0, 0, 3, 0, 0, 0, 0]) + b'???'); w.flush(); time.sleep(3600)"
WRONG_THING = READY + "r.read(1); w.write(bytes([0, 0, 0, 2, 0, 0, 0, 0]) + b'N.'); w.flush(); time.sleep(3600)"
ENDLESS = READY + "r.read(1); w.write(b'\\xff' * 8); w.flush(); time.sleep(3600)"
SILENT = "import time; time.sleep(3600)"
SAYS_OTHERWISE = "import time; print('hello', flush=True); time.sleep(3600)"


@asynccontextmanager
async def pool(script: str | None = None, **options: float) -> AsyncIterator[ReadingPool]:
    """A pool of real processes, or of those that run `script`; at the end none is left."""
    command = {} if script is None else {"command": (sys.executable, "-c", script)}
    made = ReadingPool(1 << 20, **{"limit_s": 30.0, "read_s": 20.0, "start_s": 20.0, **command, **options})  # type: ignore[arg-type]
    try:
        yield made
    finally:
        pids = [worker.pid for worker in (*made._idle, *made._busy)]
        await made.stop()
        assert repr(made) == "<reading pool: 0 idle, 0 busy, 0 bodies wait>"
        assert not any(runs(pid) for pid in pids)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- the same as in place ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> Iterator[tuple[asyncio.Runner, ReadingPool]]:
    with asyncio.Runner() as runner:

        async def made() -> ReadingPool:
            return ReadingPool(1 << 20, 60.0, read_s=60.0, start_s=60.0)

        shared = runner.run(made())
        yield runner, shared
        assert shared.counts.started == 1  # no body ended it
        runner.run(shared.stop())


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("wants_usage", [False, True])
def test_recorded_requests(reader: tuple[asyncio.Runner, ReadingPool], name: str, wants_usage: bool) -> None:
    runner, shared = reader
    sent = sample(name)
    task = Task("POST", sent.path, Limits(), wants_usage)
    assert runner.run(shared.read(task, sent.sent)) == perform(task, sent.sent)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
asked = st.fixed_dictionaries(
    {},
    optional={
        "model": json_values | st.just("m"),
        "messages": json_values | st.just([{"role": "user", "content": "x" * 600}]),
        "prompt": json_values,
        "input": json_values,
        "stream": st.booleans(),
        "stream_options": json_values,
        "max_tokens": json_values,
        "session_id": st.text(max_size=4),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    body=asked.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
    path=st.sampled_from([CHAT, "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models"]),
    limits=st.sampled_from([Limits(), Limits(max_depth=8, max_blocks=16)]),
    wants_usage=st.booleans(),
)
def test_any_request(
    reader: tuple[asyncio.Runner, ReadingPool], body: bytes, path: str, limits: Limits, wants_usage: bool
) -> None:
    runner, shared = reader
    task = Task("POST", path, limits, wants_usage)
    assert runner.run(shared.read(task, memoryview(body))) == perform(task, body)


async def test_a_body_larger_than_any_buffer_arrives_whole() -> None:
    body = BODY.replace(b"hello", b"x" * 5_000_000)
    async with pool() as made:
        assert await made.read(TASK, memoryview(body)) == perform(TASK, body)
        assert made.counts == ReadingCounts(read=1, started=1)


async def test_the_process_is_kept() -> None:
    async with pool() as made:
        for _ in range(3):
            assert await made.read(TASK, BODY) == perform(TASK, BODY)
        assert repr(made) == "<reading pool: 1 idle, 0 busy, 0 bodies wait>"
        assert made.counts.started == 1


async def test_the_process_ends_with_its_input() -> None:
    """However its parent ended: nothing is left behind."""
    async with pool() as made:
        await made.read(TASK, BODY)
        (worker,) = made._idle
        worker._writer.close()
        async with asyncio.timeout(10):
            await worker.ended()
        assert worker._process.returncode == 0


async def test_signals_to_the_whole_group_are_left_to_the_parent() -> None:
    async with pool() as made:
        await made.read(TASK, BODY)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(made._idle[0].pid, number)
        assert await made.read(TASK, BODY) == perform(TASK, BODY)
        assert made.counts == ReadingCounts(read=2, started=1)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [DIES, NO_PICKLE, WRONG_THING, ENDLESS])
async def test_of_a_body_that_two_die_of_no_third_gets_it(script: str) -> None:
    async with pool(script) as made:
        assert await made.read(TASK, BODY) == Reading(TOO_COMPLEX)
        assert made.counts == ReadingCounts(too_complex=1, started=2, died=2)


async def test_one_that_died_while_idle_is_replaced() -> None:
    async with pool() as made:
        await made.read(TASK, BODY)
        os.kill(made._idle[0].pid, signal.SIGKILL)
        assert await made.read(TASK, BODY) == perform(TASK, BODY)
        assert made.counts == ReadingCounts(read=2, started=2, died=1)


@pytest.mark.parametrize(("script", "body"), [(HANGS, BODY), (NEVER_READS, b"x" * 5_000_000)])
async def test_what_takes_too_long_is_refused_and_its_process_killed(script: str, body: bytes) -> None:
    async with pool(script, read_s=0.05) as made:
        assert await made.read(TASK, body) == Reading(TOO_COMPLEX)
        assert made.counts == ReadingCounts(too_complex=1, started=1, killed=1)


async def test_a_body_that_takes_too_much_memory_is_refused() -> None:
    """By a parser that says so, or that crashes: what comes next is read by another process."""
    body = b'{"model":"m","messages":[],"x":[' + b"[]," * 4_000_000 + b"[]]}"
    async with pool() as made:  # made for bodies of one MiB
        assert await made.read(TASK, body) == Reading(TOO_COMPLEX)
        assert await made.read(TASK, BODY) == perform(TASK, BODY)


@pytest.mark.parametrize("script", [SILENT, SAYS_OTHERWISE])
async def test_one_that_does_not_start_is_no_fault_of_the_body(script: str) -> None:
    async with pool(script, start_s=0.3) as made:
        assert await made.read(TASK, BODY) is NotRead.FAILED
        assert made.counts == ReadingCounts(failed=1, started=1)


async def test_a_command_that_is_not_there() -> None:
    made = ReadingPool(1024, 10.0, command=("/nothing/here",))
    assert await made.read(TASK, BODY) is NotRead.FAILED
    assert made.counts == ReadingCounts(failed=1)


async def test_a_client_that_leaves_ends_the_reading() -> None:
    async with pool(HANGS) as made:
        reading = asyncio.ensure_future(made.read(TASK, BODY))
        await until(lambda: made._busy and made.counts.started == 1)
        (worker,) = made._busy
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        async with asyncio.timeout(10):
            await worker.ended()
        assert repr(made) == "<reading pool: 0 idle, 0 busy, 0 bodies wait>"
        assert not made._free.locked()


async def test_one_that_hangs_leaves_the_other_free() -> None:
    async with pool() as made:
        await made.read(TASK, BODY)
        os.kill(made._idle[0].pid, signal.SIGSTOP)
        stuck = asyncio.ensure_future(made.read(TASK, BODY))
        await until(lambda: made._busy)
        assert await made.read(TASK, BODY) == perform(TASK, BODY)
        stuck.cancel()
        await asyncio.gather(stuck, return_exceptions=True)
        assert made.counts == ReadingCounts(read=2, started=2, killed=1)


async def test_who_waits_too_long_is_told_that_all_are_busy() -> None:
    async with pool(HANGS, workers=1, limit_s=0.3) as made:
        assert list(await asyncio.gather(made.read(TASK, BODY), made.read(TASK, BODY))) == [NotRead.BUSY] * 2
        assert (made.counts.busy, made.counts.started) == (2, 1)


async def test_those_who_wait_are_bounded() -> None:
    async with pool(HANGS, workers=1) as made:
        first = asyncio.ensure_future(made.read(TASK, BODY))
        await until(lambda: made._free.locked())
        waiting = [asyncio.ensure_future(made.read(TASK, BODY)) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        assert await made.read(TASK, BODY) is NotRead.BUSY
        for each in (first, *waiting):
            each.cancel()
        await asyncio.gather(first, *waiting, return_exceptions=True)
        assert repr(made) == "<reading pool: 0 idle, 0 busy, 0 bodies wait>"


def test_metrics() -> None:
    large, held = ReadingCollector(ReadingCounts(read=3, died=1), lambda: 7).collect()
    assert {s.labels["kind"]: s.value for s in large.samples if s.value} == {"read": 3, "died": 1}
    assert [s.value for s in held.samples] == [7]
