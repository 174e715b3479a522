"""The parts of `make bench-fleet` that need no other processes."""

from __future__ import annotations

from tests.bench import fleet


def test_beat_is_measured_on_what_it_says() -> None:
    found = fleet.beat()["beat"]
    assert found["cpu_ms"] > 0
    assert found["state_bytes"] < 27 * fleet.REPLICAS + 32
    assert found["batch_bytes"] < 8 * fleet.PLACEMENTS * 40


def test_the_trace_that_fares_worst_counts() -> None:
    def trace(hit: float, ttft: float) -> dict[str, dict[str, float]]:
        return {
            "hit_ratio": {"1": 1.0, "8": hit},
            "hit_ratio_unshared": {"1": 1.0, "8": hit / 2},
            "ttft_ratio": {"8": ttft},
        }

    found = fleet.worst({"traces": {"a": trace(0.98, 1.04), "b": trace(0.99, 1.06)}})
    assert found["hit_ratio"] == {"1": 1.0, "8": 0.98}
    assert found["hit_ratio_unshared"] == {"1": 1.0, "8": 0.49}
    assert found["ttft_ratio_8"] == 1.06
