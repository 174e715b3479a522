"""LoRA adapters in the metrics and on the HTTP port."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from extproc.adapters.admin import member_view
from extproc.adapters.metrics import FleetCollector, RouterMetrics
from extproc.core.types import AdaptersSampled, Sample, Sampled, Serves
from tests.core.support import MODEL, POOL, address, member, ok, request, route, router


def test_requests_count_by_whether_they_wait_for_a_load_and_replicas_show_what_they_hold() -> None:
    registry = CollectorRegistry()
    made = router(1, observer=RouterMetrics(registry))
    registry.register(FleetCollector(made, lambda: 5.0))
    assert member_view(POOL, member(made), made, 0.0)["adapters"] is None
    assert registry.get_sample_value("extproc_lora_load_seconds", {"pool": POOL}) is None

    made.learn(Serves(POOL, address(0), (MODEL, "a", "b"), {"a": MODEL, "b": MODEL}), 0.0)
    made.learn(Sampled(POOL, address(0), Sample(adapters=AdaptersSampled(4))), 0.0)
    first = route(made, request(model="a"), 1.0)
    for _ in range(2):
        route(made, request(model="a"), 2.0)
    route(made, request(), 2.0)
    made.finish(first.flight, ok(), 3.0)

    def counted(adapter: str) -> float | None:
        return registry.get_sample_value("extproc_lora_requests_total", {"pool": POOL, "adapter": adapter})

    assert (counted("loaded"), counted("held")) == (1, 2)
    assert registry.get_sample_value("extproc_lora_load_seconds", {"pool": POOL}) == 0.5
    shown = member_view(POOL, member(made), made, 3.0)["adapters"]
    assert shown == {"slots": 4, "held": ["a"], "in_flight": {"a": 2}}
