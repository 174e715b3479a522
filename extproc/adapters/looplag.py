"""How late the event loop is, and how much of that is our own doing.

A timer every 10 ms measures its own lateness, so a stall of L seconds shows as one between L - 0.01 and L. On a machine that others
use too, a late timer may only mean that this process was not running. Beside wall time stands therefore the CPU time that the loop's
thread used since the last tick: what we held it up with is no more than that, and no more than the lateness.

Not seen: a thread of ours that holds the interpreter's lock makes the loop wait without using CPU in it, and counts as the machine's doing.
It costs 6 us a tick, 0.06 % of a core.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

INTERVAL_S = 0.01
STALL_S = 0.02
"""Longest time for which the loop shall stand still."""
BUCKETS = (0.001, 0.005, 0.01, STALL_S, 0.05, 0.1, 0.25, 1.0, 5.0)

Clock = Callable[[], float]


class Delays:
    """A histogram in plain numbers, for a recorder that runs a hundred times a second."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self.total_s = 0.0
        self.longest_s = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self.total_s += seconds
        self.longest_s = max(self.longest_s, seconds)

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """Upper edge and how many are no longer, as Prometheus wants them."""
        count = 0
        for edge, more in zip((*map(str, BUCKETS), "+Inf"), self._counts, strict=True):
            count += more
            yield edge, count


class LoopWatch(Collector):
    """Watches the loop that it is started in; a source of metrics."""

    def __init__(self, clock: Clock = time.monotonic, cpu: Clock = time.thread_time) -> None:
        """`cpu` is the CPU time of the thread that calls it."""
        self._clock = clock
        self._cpu = cpu
        self._due = 0.0
        self._cpu_before = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.late = Delays()
        self.own = Delays()
        self.stalls = 0
        """Above `STALL_S`, for whatever reason."""
        self.own_stalls = 0
        """Those that were our doing."""

    def __repr__(self) -> str:
        return f"<loop watch: longest {self.late.longest_s * 1e3:.1f} ms, our own {self.own.longest_s * 1e3:.1f} ms>"

    def start(self) -> None:
        """Watch from now on."""
        self._cpu_before = self._cpu()
        self._again()

    def stop(self) -> None:
        """The end; safe to call without a start."""
        if self._timer is not None:
            self._timer.cancel()

    def note(self, late_s: float, cpu_s: float) -> None:
        """A tick that came so late, and the CPU time since the one before."""
        own_s = min(late_s, cpu_s)
        self.late.add(late_s)
        self.own.add(own_s)
        self.stalls += late_s > STALL_S
        self.own_stalls += own_s > STALL_S

    def _again(self) -> None:
        self._due = self._clock() + INTERVAL_S
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._tick)

    def _tick(self) -> None:
        cpu = self._cpu()
        self.note(max(self._clock() - self._due, 0.0), cpu - self._cpu_before)
        self._cpu_before = cpu
        self._again()

    def collect(self) -> Iterator[Metric]:
        late = "How late a timer of the event loop was, every 10 ms, for whatever reason."
        own = "The part of that for which the loop's own thread used the CPU: what we ourselves held it up with."
        yield _histogram("extproc_loop_lag_seconds", late, self.late)
        yield _histogram("extproc_loop_lag_own_seconds", own, self.own)
        text = "Timers more than 20 ms late; ours are those for which the loop's own thread used the CPU so long."
        stalls = CounterMetricFamily("extproc_loop_stalls", text, labels=("cause",))
        stalls.add_metric(("ours",), self.own_stalls)
        stalls.add_metric(("machine",), self.stalls - self.own_stalls)
        yield stalls
        longest = GaugeMetricFamily(
            "extproc_loop_longest_own_lag_seconds", "The largest of the latter since the start."
        )
        longest.add_metric((), self.own.longest_s)
        yield longest


def _histogram(name: str, text: str, delays: Delays) -> Metric:
    return HistogramMetricFamily(name, text, buckets=list(delays.cumulative()), sum_value=delays.total_s)
