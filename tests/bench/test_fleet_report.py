"""The parts of `make bench-fleet` that need no other processes, and what becomes of those that fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import fleet


def test_beat_is_measured_on_what_it_says() -> None:
    found = fleet.beat()["beat"]
    assert found["cpu_ms"] > 0
    assert found["state_bytes"] < 27 * fleet.REPLICAS + 32
    assert found["batch_bytes"] < 8 * fleet.PLACEMENTS * 40


def test_a_part_that_cannot_be_run_is_null_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(traces: Path | None) -> dict[str, float]:
        raise RuntimeError("no such thing")

    parts = {"limits": lambda _: {"limit_overshoot": 0.01}, "simulator": broken, "scaling": lambda _: {}}
    monkeypatch.setattr(fleet, "OUTPUT", tmp_path / "x.json")
    monkeypatch.setattr(fleet, "PARTS", parts)
    monkeypatch.setattr("sys.argv", ["fleet", "--only", "limits", "simulator"])
    fleet.OUTPUT.write_text(json.dumps({"slo_attainment": 0.5}))
    assert fleet.main() == 1
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["limit_overshoot"] == 0.01
    assert found["slo_attainment"] == 0.5, "of an earlier run"
    assert found["hit_ratio"] is None
    assert found["missing"] == {"simulator": "RuntimeError: no such thing"}
    assert set(fleet.KEYS) <= set(found)


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
