"""What tells of the process itself: its configuration, its tasks, its files, its pauses, and whether its books agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.adapters.config_watch import ConfigState
from extproc.adapters.pulse import Pulse
from extproc.adapters.tasks import Tasks
from extproc.core.router import Router


@dataclass(frozen=True, slots=True)
class Life:
    """Where the figures come from."""

    router: Router
    config: ConfigState
    tasks: Tasks
    pulse: Pulse
    endpoints_errors: Callable[[], int]
    log_lines_dropped: Callable[[], int]
    stopping: Callable[[], bool]


def idle_life(router: Router) -> Life:
    """Of a process in which nothing has happened yet, for the pages of the documentation."""
    pulse = Pulse(lambda: 0.0, lambda _seconds: None)
    return Life(router, ConfigState(), Tasks(), pulse, lambda: 0, lambda: 0, lambda: False)


class ServiceCollector(Collector):
    """Read when a scrape comes."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._configuration()
        yield from self._books()
        yield from self._troubles()
        yield _gauge("stopping", "1 from SIGTERM on, while what is held is finished.", self._life.stopping())

    def _configuration(self) -> Iterator[Metric]:
        state = self._life.config
        yield _gauge("config_valid", "1 if the configuration file, as last read, can be used.", state.valid)
        yield _counter("config_errors", "Versions of the configuration file that could not be used.", state.errors)
        yield _counter("config_applied", "Versions of it of which something was taken over.", state.applied)
        yield _gauge(
            "config_restart_needed", "1 if the file has settings that wait for a restart.", bool(state.restart_needed)
        )

    def _books(self) -> Iterator[Metric]:
        ledger = self._life.router.ledger
        yield _counter("flights_opened", "Requests routed.", ledger.opened)
        yield _counter("flights_closed", "Ends of those, however they ended.", ledger.closed)
        yield _gauge(
            "ledger_imbalance",
            "Flights for which the books do not agree: opened less closed is not what is open, or replicas hold more. Always 0.",
            imbalance(self._life.router),
        )

    def _troubles(self) -> Iterator[Metric]:
        life = self._life
        yield _counter("endpoints_errors", "Writes of the members file that failed.", life.endpoints_errors())
        yield _counter(
            "log_lines_dropped", "Log lines that standard error did not take in time.", life.log_lines_dropped()
        )
        yield _counter(
            "pauses", "Times at which this process stood still for half a second or more.", life.pulse.stalls
        )
        yield _counter("paused_seconds", "Seconds for which it did.", life.pulse.stalled_s)
        failures = CounterMetricFamily(
            "extproc_task_failures", "Recurring tasks that failed and were started again.", labels=("task",)
        )
        for task, count in sorted(life.tasks.failures.items()):
            failures.add_metric((task,), count)
        yield failures


def imbalance(router: Router) -> int:
    """Flights for which the ledger's equation, or the replicas' loads, do not fit what is open. Costs a look at each replica.

    Loads may hold less than the ledger: a replica that left took its load along, and its flights end by themselves.
    """
    ledger = router.ledger
    held = sum(len(member.load) for _, member in router.members())
    return abs(ledger.opened - ledger.closed - len(ledger)) + max(held - len(ledger), 0)


def _counter(name: str, text: str, value: float) -> Metric:
    family = CounterMetricFamily(f"extproc_{name}", text)
    family.add_metric((), value)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(f"extproc_{name}", text)
    family.add_metric((), float(value))
    return family
