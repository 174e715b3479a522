"""The series of KV events."""

from __future__ import annotations

from random import Random

from prometheus_client import CollectorRegistry

from extproc.adapters.kv_events import sources
from extproc.adapters.kv_events.following import Following
from extproc.adapters.metrics_events import EventCollector, EventMetrics
from extproc.adapters.pages import FakePages
from extproc.config import KvEvents
from extproc.core.types import Remove, Replica, Reset
from tests.adapters.kv_events.support import CLEARED, publishing, removed, stored
from tests.support.waiting import until

A = "127.0.0.1:8000"


def test_no_samples_where_nobody_listens() -> None:
    families = list(EventCollector(lambda: None).collect())
    assert len(families) == 10
    assert [sample for family in families for sample in family.samples] == []


async def test_what_comes_is_counted() -> None:
    registry = CollectorRegistry()
    metrics = EventMetrics(registry)
    pages = FakePages()
    following = Following({"p": KvEvents()}, lambda _fact: None, rng=Random(1), lag=metrics.lag, pages=pages)
    registry.register(EventCollector(lambda: following))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"extproc_kv_{name}", {"pool": "p", **labels})

    async with publishing() as publisher:
        answer = f'{{"0": {{"endpoint": "{publisher.endpoint}", "replay_endpoint": "{publisher.replay_endpoint}"}}}}'
        pages.answers[A, sources.PATH] = answer.encode()
        following.follow(Reset("p", (Replica(A),)))
        assert value("known", replica=A) is None
        await until(lambda: publisher.subscribers() and value("known", replica=A) == 1.0)
        publisher.publish([stored(1), removed(1), CLEARED, stored(2, medium="CPU")])
        await until(lambda: value("messages_total") == 1.0)
        types = [value("events_total", type=kind) for kind in ("BlockStored", "BlockRemoved", "AllBlocksCleared")]
        assert types == [1.0, 1.0, 1.0]
        assert value("events_passed_total", why="tier") == 1.0
        assert value("replays_total", result="filled") == 1.0
        assert value("lag_seconds_count") == 1.0
        publisher.send(9, b"garbage")
        await until(lambda: value("known", replica=A) == 0.0)
        assert [value(f"{name}_total") for name in ("gaps", "losses", "undecodable", "restarts", "strangers")] == [
            1,
            2,
            1,
            0,
            0,
        ]
        following.follow(Remove("p", A))
        assert value("known", replica=A) is None
        assert value("messages_total") == 2.0  # of the pool, and so it stays
    await following.stop()


def test_two_clocks_may_disagree() -> None:
    registry = CollectorRegistry()
    EventMetrics(registry).lag("p", -3.0)
    assert registry.get_sample_value("extproc_kv_lag_seconds_sum", {"pool": "p"}) == 0.0
