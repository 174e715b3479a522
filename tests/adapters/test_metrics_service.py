"""What tells of the process itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from extproc.adapters.config_watch import ConfigState
from extproc.adapters.metrics_service import Life, ServiceCollector, imbalance
from extproc.adapters.pulse import Pulse
from extproc.adapters.tasks import Tasks
from extproc.core.types import End, Outcome, Remove, Route
from tests.core.support import POOL, address, member, request, router


class Bench:
    def __init__(self) -> None:
        self.router = router(2)
        self.config, self.tasks = ConfigState(), Tasks()
        self.pulse = Pulse(lambda: 0.0, lambda _: None)
        self.stopping = False
        self.registry = CollectorRegistry()
        self.registry.register(
            ServiceCollector(
                Life(
                    self.router,
                    self.config,
                    self.tasks,
                    self.pulse,
                    endpoints_errors=lambda: 3,
                    log_lines_dropped=lambda: 4,
                    stopping=lambda: self.stopping,
                )
            )
        )

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"extproc_{name}", labels)

    def route(self) -> Route:
        verdict = self.router.arrive(request("Hello"), 1.0)
        assert isinstance(verdict, Route)
        return verdict


def test_a_fresh_process_has_nothing_to_complain_of() -> None:
    bench = Bench()
    assert bench.value("config_valid") == 1
    for name in ("config_errors_total", "config_applied_total", "config_restart_needed", "ledger_imbalance"):
        assert bench.value(name) == 0, name
    assert bench.value("pauses_total") == bench.value("paused_seconds_total") == bench.value("stopping") == 0


def test_each_trouble_has_its_figure() -> None:
    bench = Bench()
    bench.config.valid, bench.config.errors, bench.config.applied = False, 2, 5
    bench.config.restart_needed = ("listen.grpc",)
    bench.tasks.failures["tick"] += 1
    bench.pulse.stalls, bench.pulse.stalled_s = 1, 5.5
    bench.stopping = True
    assert bench.value("config_valid") == 0
    assert bench.value("config_errors_total") == 2
    assert bench.value("config_applied_total") == 5
    assert bench.value("config_restart_needed") == 1
    assert bench.value("task_failures_total", task="tick") == 1
    assert bench.value("pauses_total") == 1
    assert bench.value("paused_seconds_total") == 5.5
    assert bench.value("endpoints_errors_total") == 3
    assert bench.value("log_lines_dropped_total") == 4
    assert bench.value("stopping") == 1


def test_the_books_are_on_the_page_and_agree_while_flights_come_and_go() -> None:
    bench = Bench()
    routes = [bench.route() for _ in range(5)]
    for route in routes[:2]:
        bench.router.finish(route.flight, Outcome(End.OK, status=200), 2.0)
    bench.router.learn(Remove(POOL, address(0)), 3.0)  # whose flights stay open
    assert bench.value("flights_opened_total") == 5
    assert bench.value("flights_closed_total") == 2
    assert bench.value("ledger_imbalance") == 0


def test_a_flight_that_is_lost_shows() -> None:
    bench = Bench()
    bench.route()
    bench.router.ledger.opened += 1
    assert imbalance(bench.router) == 1


def test_a_load_that_outlives_its_flight_shows() -> None:
    bench = Bench()
    route = bench.route()
    bench.router.ledger.close(route.flight)  # behind the router's back: the replica still holds it
    assert sum(len(member(bench.router, i).load) for i in (0, 1)) == 1
    assert imbalance(bench.router) == 1
