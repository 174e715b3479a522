"""How late the loop is, and whose doing that is."""

from __future__ import annotations

import asyncio
import time

import pytest

from extproc.adapters.looplag import BUCKETS, STALL_S, LoopWatch
from tests.support.waiting import until


def samples(watch: LoopWatch) -> dict[str, float]:
    return {s.name + "".join(f"[{v}]" for v in s.labels.values()): s.value for m in watch.collect() for s in m.samples}


def test_there_is_an_edge_at_the_bound() -> None:
    assert STALL_S in BUCKETS


@pytest.mark.parametrize(
    ("late_s", "cpu_s", "ours", "machine"),
    [(0.02, 0.5, 0, 0), (0.03, 0.025, 1, 0), (0.03, 0.001, 0, 1), (0.001, 0.009, 0, 0)],
    ids=["at the bound", "our doing", "we were not running", "busy, but on time"],
)
def test_whose_doing_a_stall_is(late_s: float, cpu_s: float, ours: int, machine: int) -> None:
    watch = LoopWatch()
    watch.note(late_s, cpu_s)
    shown = samples(watch)
    assert (shown["extproc_loop_stalls_total[ours]"], shown["extproc_loop_stalls_total[machine]"]) == (ours, machine)
    assert shown["extproc_loop_longest_own_lag_seconds"] == min(late_s, cpu_s)


def test_the_histograms() -> None:
    watch = LoopWatch()
    for late_s in (0.0005, 0.02, 0.021, 99.0):
        watch.note(late_s, 0.003)
    shown = samples(watch)
    counts = [shown[f"extproc_loop_lag_seconds_bucket[{edge}]"] for edge in ("0.001", "0.01", "0.02", "0.05", "+Inf")]
    assert counts == [1, 1, 2, 3, 4]
    assert shown["extproc_loop_lag_seconds_sum"] == pytest.approx(99.0415)
    assert shown["extproc_loop_lag_own_seconds_bucket[0.005]"] == 4


async def test_work_that_holds_the_loop_up_is_ours() -> None:
    watch = LoopWatch()
    watch.start()
    until_cpu = time.thread_time() + 0.1
    while time.thread_time() < until_cpu:
        pass
    await until(lambda: watch.own_stalls)
    watch.stop()
    assert watch.own.longest_s > 0.08


async def test_waiting_is_the_machines() -> None:
    watch = LoopWatch(cpu=lambda: 7.0)
    watch.start()
    time.sleep(0.05)  # noqa: ASYNC251 - that is what is watched for
    await until(lambda: watch.stalls)
    watch.stop()
    assert watch.own_stalls == 0
    assert watch.late.longest_s > STALL_S


async def test_after_the_end_nothing_is_watched() -> None:
    watch = LoopWatch()
    watch.stop()
    watch.start()
    await until(lambda: samples(watch)["extproc_loop_lag_seconds_count"])
    watch.stop()
    seen = samples(watch)["extproc_loop_lag_seconds_count"]
    await asyncio.sleep(0.05)
    assert samples(watch)["extproc_loop_lag_seconds_count"] == seen
