from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from extproc.adapters.metrics_queue import QueueCollector, QueueMetrics
from extproc.core.admission.settings import QueueSettings
from extproc.core.router import Router
from extproc.core.types import Route, Wait
from tests.core.support import ok, only, request, router, text


def made(registry: CollectorRegistry, **queue: Any) -> tuple[Router, Route]:
    """One replica with seconds of prefill."""
    made_ = router(1, queue=QueueSettings(**queue), observer=QueueMetrics(registry))
    registry.register(QueueCollector(made_))
    busy = made_.arrive(request(text(200_000, 1), output=10, subset=only(0)), 0.0)
    assert isinstance(busy, Route)
    return made_, busy


def held(made_: Router, seed: int, **fields: Any) -> str:
    verdict = made_.arrive(request(text(2000, seed), output=10, body_bytes=2100, **fields), 0.0)
    assert isinstance(verdict, Wait)
    return verdict.ticket


def waits(registry: CollectorRegistry, outcome: str) -> tuple[float | None, float | None]:
    labels = {"pool": "p", "outcome": outcome}
    return (
        registry.get_sample_value("extproc_queue_wait_seconds_count", labels),
        registry.get_sample_value("extproc_queue_wait_seconds_sum", labels),
    )


def gauge(registry: CollectorRegistry, name: str) -> float | None:
    return registry.get_sample_value(f"extproc_queue_{name}", {"pool": "p"})


def test_what_is_held_is_shown() -> None:
    registry = CollectorRegistry()
    made_, _ = made(registry)
    held(made_, 2)
    held(made_, 3)
    assert (gauge(registry, "requests"), gauge(registry, "bytes")) == (2, 4200)
    tokens = gauge(registry, "tokens")
    assert tokens is not None
    assert tokens > 1000


def test_waits_are_counted_by_how_they_ended() -> None:
    registry = CollectorRegistry()
    made_, busy = made(registry, max_requests=2)
    left = held(made_, 2)
    held(made_, 3)
    made_.leave(left, 0.5)
    held(made_, 4)
    held(made_, 5, priority=1)  # one of the others is given up for it
    made_.turns(0.75)
    made_.finish(busy.flight, ok(), 1.0)
    made_.turns(1.0)
    assert waits(registry, "left") == (1, 0.5)
    assert waits(registry, "refused") == (1, 0.75)
    assert waits(registry, "routed") == (2, 2.0)
    assert (gauge(registry, "requests"), gauge(registry, "bytes")) == (0, 0)


def test_what_was_sent_off_is_counted_apart_where_it_had_starved() -> None:
    registry = CollectorRegistry()
    made_, busy = made(registry)
    held(made_, 2)
    made_.finish(busy.flight, ok(), 1.0)
    made_.turns(1.0)
    sent = [
        registry.get_sample_value("extproc_queue_dispatched_tokens_total", {"pool": "p", "turn": turn})
        for turn in ("regular", "starved")
    ]
    assert sent[0] is not None
    assert sent[0] > 500
    assert sent[1] == 0
