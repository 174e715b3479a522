"""Versions and providers in the metrics, under names of the configuration alone."""

from __future__ import annotations

from random import Random

import pytest
from prometheus_client import CollectorRegistry

from extproc.adapters.metrics import RouterMetrics
from extproc.adapters.metrics_models import ModelCollector, ModelMetrics
from extproc.adapters.recorder import Recorder
from extproc.core.catalog.settings import ProviderSettings
from extproc.core.observers import Several
from extproc.core.router import PoolSettings, Router
from extproc.core.types import End, Outcome, Remove, Replica, Reset
from tests.core.catalog.support import at, catalog, chat, model, placed, target
from tests.core.support import ok, text, usage


class Bench:
    """A pool, and a provider behind it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recorder = Recorder(10)
        observers = Several(RouterMetrics(self.registry), ModelMetrics(self.registry), self.recorder)
        self.router = Router([PoolSettings("a", scraped=False)], Random(1), observers)
        self.registry.register(ModelCollector(self.router, lambda: 5.0))
        self.router.learn(Reset("a", (Replica(at("a")),)), 0.0)
        cloud = ProviderSettings("cloud", prompt_dollars=2.0, output_dollars=10.0)
        of = model(target("a"), fallback=(target("cloud"),), aliases=("gpt",))
        self.router.learn(catalog(of, providers=[cloud]), 0.0)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"extproc_{name}", labels)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_alias_counts_as_its_model_by_target_version_and_end(bench: Bench) -> None:
    for name, outcome in (("chat", ok(at("a"), ttft_s=0.2)), ("gpt", Outcome(End.TIMEOUT))):
        bench.router.finish(placed(bench.router, chat(text(400), model=name), 1.0).flight, outcome, 2.0)
    labels = {"model": "chat", "target": "a", "version": "a"}
    assert bench.value("model_requests_total", **labels, end="ok") == 1
    assert bench.value("model_requests_total", **labels, end="timeout") == 1
    assert bench.value("model_ttft_seconds_sum", **labels) == pytest.approx(0.2)


def test_only_streams_tell_when_their_first_token_came(bench: Bench) -> None:
    flight = placed(bench.router, chat(text(400), stream=False), 1.0).flight
    bench.router.finish(flight, ok(at("a"), ttft_s=0.2), 2.0)
    assert bench.value("model_ttft_seconds_count", model="chat", target="a", version="a") in (None, 0)


def test_what_is_not_in_the_catalog_is_not_counted_here(bench: Bench) -> None:
    bench.router.learn(catalog(), 1.0)
    bench.router.finish(placed(bench.router, chat(text(400)), 1.0).flight, ok(at("a"), ttft_s=0.2), 2.0)
    assert bench.value("model_requests_total", model="chat", target="a", version="a", end="ok") is None


def test_a_provider_shows_what_it_costs_and_why_it_was_asked(bench: Bench) -> None:
    bench.router.learn(Remove("a", at("a")), 0.5)
    route = placed(bench.router, chat(text(4000)), 1.0)
    assert bench.value("provider_in_flight", provider="cloud") == 1
    assert bench.value("provider_cost_dollars_total", provider="cloud") == 0
    assert (bench.value("provider_spent_dollars", provider="cloud") or 0) > 0
    bench.router.finish(route.flight, ok("1.2.3.4:443", ttft_s=0.3, usage=usage(1000, 100)), 2.0)
    assert bench.value("provider_in_flight", provider="cloud") == 0
    assert bench.value("provider_cost_dollars_total", provider="cloud") == pytest.approx(0.003)
    assert bench.value("provider_tokens_total", provider="cloud", kind="prompt") == 1000
    assert bench.value("provider_spent_tokens", provider="cloud") == 1100
    assert bench.value("model_spilled_total", model="chat", target="cloud", reason="no_replicas") == 1
    of = {"pool": "cloud", "replica": "outside"}
    assert bench.value("decisions_total", **of, policy="provider", reason="provider") == 1
    assert bench.value("outcomes_total", **of, outcome="ok") == 1
    assert bench.value("provider_out", provider="cloud") == 0
    (record,) = bench.recorder.last(1)
    view = record.view()
    assert view["target"] == {"model": "chat", "to": "cloud", "version": "cloud"}
    assert (view["pool"], view["model"], view["endpoints"]) == ("cloud", "engine-cloud", [])
    assert view["outcome"]["served"] == "1.2.3.4:443"


def test_a_provider_that_is_passed_over_shows_it(bench: Bench) -> None:
    bench.router.learn(Remove("a", at("a")), 0.5)
    for _ in range(3):
        route = placed(bench.router, chat(text(400)), 4.0)
        bench.router.finish(route.flight, Outcome(End.UNREACHABLE), 4.0)
    assert bench.value("provider_out", provider="cloud") == 1
