"""What the router does shows in the metrics, with labels that have a bound."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from extproc.adapters.metrics import FleetCollector, RouterMetrics
from extproc.core.health.states import State
from extproc.core.prefix.blocks import chain
from extproc.core.prefix.exact import token_chain
from extproc.core.router import PoolSettings, Router
from extproc.core.types import (
    Api,
    BlocksStored,
    CacheChanged,
    DrainAsked,
    End,
    Outcome,
    Remove,
    Replica,
    Request,
    Reset,
    Route,
    Sample,
    Sampled,
    Usage,
)

FIRST, SECOND = "10.0.0.1:8000", "10.0.0.2:8000"
ASK = Request(Api.CHAT, "m", prompt_bytes=4000, max_output_tokens=10, stream=True)


class Bench:
    """A router of two replicas with its metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(self.registry)
        self.router = Router([PoolSettings("p", ("m",), scraped=False)], Random(1), self.metrics)
        self.registry.register(FleetCollector(self.router, lambda: 5.0))
        self.router.learn(Reset("p", (Replica(FIRST), Replica(SECOND))), 0.0)

    def route(self, request: Request = ASK) -> Route:
        verdict = self.router.arrive(request, 1.0)
        assert isinstance(verdict, Route)
        return verdict

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"extproc_{name}", labels)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_flight_is_counted_from_decision_to_end(bench: Bench) -> None:
    route = bench.route()
    chosen = route.endpoints[0]
    assert bench.value("in_flight") == 1
    assert bench.value("replica_in_flight", pool="p", replica=chosen) == 1
    usage = Usage(prompt_tokens=800, completion_tokens=20, cached_tokens=64)
    bench.router.finish(route.flight, Outcome(End.OK, 200, chosen, 1, 0.2, 0.1, 1.5, 4000, usage), 2.0)
    assert bench.value("in_flight") == 0
    assert bench.value("decisions_total", pool="p", policy="predicted", reason="cost", replica=chosen) == 1
    assert bench.value("outcomes_total", pool="p", replica=chosen, outcome="ok") == 1
    assert bench.value("prompt_tokens_total", pool="p", replica=chosen) == 800
    assert bench.value("output_tokens_total", pool="p", replica=chosen) == 20
    assert bench.value("actual_cached_tokens_total", pool="p") == 64
    assert bench.value("predicted_cached_tokens_total", pool="p") == 0
    assert bench.value("ttft_seconds_sum", pool="p") == 0.2
    assert bench.value("prompt_tokens_predicted_ratio_sum", pool="p") == 1000 / 800
    assert bench.value("output_tokens_predicted_ratio_sum", pool="p") == 10 / 20


def test_hits_are_counted_by_what_told_of_them(bench: Bench) -> None:
    ids = tuple(range(1024))
    tokenized = replace(ASK, tokens=token_chain(ids), prompt_tokens=len(ids), subset=frozenset({FIRST}))
    guessed = replace(ASK, blocks=chain(b"", b"x" * 4000))
    bench.router.learn(CacheChanged("p", FIRST, (BlocksStored(tuple(range(64)), None, ids, 16),)), 0.0)
    for request, cached in ((tokenized, 1008), (tokenized, 992), (tokenized, 1024), (guessed, 5)):
        route = bench.route(request)
        usage = Usage(prompt_tokens=1024, completion_tokens=20, cached_tokens=cached)
        bench.router.finish(route.flight, Outcome(End.OK, 200, route.endpoints[0], 1, 0.2, 0.1, 1.5, 4000, usage), 2.0)
    counted = {
        (source, reported): value
        for source, reported in product(("exact", "approximate", "none"), ("right", "fewer", "more"))
        if (value := bench.value("hit_predictions_total", pool="p", source=source, reported=reported))
    }
    assert counted == {("exact", "right"): 1, ("exact", "fewer"): 1, ("exact", "more"): 1, ("approximate", "more"): 1}
    assert bench.value("prefix_sources_total", pool="p", source="exact") == 3
    assert bench.value("prefix_sources_total", pool="p", source="approximate") == 1


def test_what_replicas_tell_of_their_caches_shows(bench: Bench) -> None:
    ids = tuple(range(32))
    bench.router.learn(CacheChanged("p", FIRST, (BlocksStored((1, 2), None, ids, 16),)), 0.0)
    assert bench.value("replica_exact_blocks", pool="p", replica=FIRST) == 2
    assert bench.value("replica_exact_blocks", pool="p", replica=SECOND) is None
    assert bench.value("cache_blocks_ignored_total", pool="p", why="orphan") == 0
    bench.router.learn(CacheChanged("p", SECOND, (BlocksStored((1,), 7, ids[:16], 16),)), 0.0)
    assert bench.value("cache_blocks_ignored_total", pool="p", why="orphan") == 1


def p90_counts(bench: Bench, outcome: Outcome, samples: int = 1) -> tuple[float | None, float | None]:
    """All answers held against the p90, and those within it, after one more; its p90 is its cap of 10."""
    route = bench.route(replace(ASK, samples=samples))
    assert route.decision.output_p90_tokens == 10
    bench.router.finish(route.flight, outcome, 2.0)
    return bench.value("output_p90_total", pool="p"), bench.value("output_within_p90_total", pool="p")


def test_answers_are_counted_against_the_p90_that_was_predicted(bench: Bench) -> None:
    assert p90_counts(bench, Outcome(End.OK, 200, usage=Usage(800, 10))) == (1, 1)
    assert p90_counts(bench, Outcome(End.OK, 200, usage=Usage(800, 11))) == (2, 1)


def test_answers_whose_length_is_not_known_for_sure_say_nothing_of_the_p90(bench: Bench) -> None:
    assert p90_counts(bench, Outcome(End.OK, 200, response_bytes=900)) == (None, None)
    assert p90_counts(bench, Outcome(End.CLIENT_GONE, 200, usage=Usage(800, 2))) == (None, None)
    assert p90_counts(bench, Outcome(End.OK, 200, usage=Usage(800, 12)), samples=2) == (None, None)


def test_a_flight_served_by_an_alternate_counts_for_it(bench: Bench) -> None:
    route = bench.route()
    first, alternate = route.endpoints
    bench.router.finish(route.flight, Outcome(End.OK, 200, alternate, 2, 0.2, 0.1, 1.5), 2.0)
    assert bench.value("moved_total", pool="p") == 1
    assert bench.value("outcomes_total", pool="p", replica=alternate, outcome="ok") == 1
    assert bench.value("outcomes_total", pool="p", replica=first, outcome="ok") is None


def test_refusals_are_counted_by_reason(bench: Bench) -> None:
    bench.router.arrive(Request(Api.CHAT, "other"), 1.0)
    bench.router.arrive(Request(Api.CHAT, "m", subset=frozenset()), 1.0)
    assert bench.value("refusals_total", pool="none", reason="unknown_model") == 1
    assert bench.value("refusals_total", pool="p", reason="subset_empty") == 1


def test_an_end_that_nobody_waits_for_is_counted(bench: Bench) -> None:
    bench.router.finish("nobody", Outcome(End.OK), 1.0)
    assert bench.value("unknown_flights_total", outcome="ok") == 1


def test_series_of_a_replica_that_left_are_dropped_and_stay_dropped(bench: Bench) -> None:
    route = bench.route()
    gone = route.endpoints[0]
    bench.router.learn(Remove("p", gone), 2.0)
    assert bench.value("decisions_total", pool="p", policy="predicted", reason="cost", replica=gone) is None
    bench.router.finish(route.flight, Outcome(End.OK, 200, gone, 1, 0.2, 0.1, 1.5), 3.0)
    assert bench.value("outcomes_total", pool="p", replica=gone, outcome="ok") is None
    assert bench.value("outcomes_total", pool="p", replica="departed", outcome="ok") == 1


def test_unknown_gauges_are_absent_and_not_zero(bench: Bench) -> None:
    assert bench.value("replica_waiting", pool="p", replica=FIRST) is None
    assert bench.value("replica_sample_age_seconds", pool="p", replica=FIRST) is None
    bench.router.learn(Sampled("p", FIRST, Sample(running=3, waiting=2)), 3.0)
    assert bench.value("replica_waiting", pool="p", replica=FIRST) == 2
    assert bench.value("replica_sample_age_seconds", pool="p", replica=FIRST) == 2.0
    assert bench.value("replica_kv_usage_ratio", pool="p", replica=FIRST) is None


def test_no_label_comes_from_a_request(bench: Bench) -> None:
    for i in range(50):
        request = Request(Api.CHAT, "m", prompt_bytes=10, session=f"session-{i}", tenant=f"tenant-{i}")
        route = bench.route(request)
        bench.router.finish(route.flight, Outcome(End.CLIENT_GONE), 2.0)
    text = "".join(str(sample.labels) for metric in bench.registry.collect() for sample in metric.samples)
    assert "session-" not in text
    assert "tenant-" not in text


# --- health -----------------------------------------------------------------------------------------------------------


def test_changes_of_health_are_counted_by_where_they_led_and_why(bench: Bench) -> None:
    at = {"pool": "p", "replica": FIRST}
    assert bench.value("health_changes_total", **at, state="ready", reason="answers") == 1
    bench.router.learn(DrainAsked("p", FIRST, within_s=3.0), 1.0)
    assert bench.value("health_changes_total", **at, state="draining", reason="notice") == 1
    assert bench.value("replica_state", **at, state="gone") == 1, "as of now, though nobody has noticed yet"
    bench.router.expire(5.0)
    assert bench.value("health_changes_total", **at, state="gone", reason="notice") == 1
    bench.router.learn(Remove("p", FIRST), 6.0)
    assert bench.value("health_changes_total", **at, state="gone", reason="notice") is None


def test_each_replica_is_in_one_state(bench: Bench) -> None:
    values = {state: bench.value("replica_state", pool="p", replica=FIRST, state=state) for state in State}
    assert values == {state: float(state is State.READY) for state in State}


def test_requests_sent_though_all_are_out_are_counted(bench: Bench) -> None:
    bench.route()
    assert bench.value("failed_open_total", pool="p") is None
    for replica in (FIRST, SECOND):
        bench.router.learn(DrainAsked("p", replica), 1.0)
    decision = bench.route().decision
    assert decision.reason == "failed_open"
    assert bench.value("failed_open_total", pool="p") == 1
