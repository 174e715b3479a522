"""Parts of the comparison with real runs: a clock misread or a half scored on itself would make the simulation look better."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from extproc.core.steptime import MEASURED
from extproc.sim.engine import EngineConfig
from extproc.sim.replay import Timed, replay
from tests.bench.recorded_runs import MissingRunsError, Run, config, load, requests
from tests.bench.sim_accuracy import Figure, compare, figures, half, misses, table

META: dict[str, Any] = {"engine_kwargs": {"max_num_seqs": 128, "max_num_batched_tokens": 2048, "max_model_len": None}}
ROW = {"input_toks": 5, "output_toks": 3}


def row(arrival: float, queued: float, scheduled: float, first: float, last: float) -> dict[str, Any]:
    times = ("arrival_time", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
    return ROW | dict(zip(times, (arrival, queued, scheduled, first, last), strict=True))


def test_the_two_clocks_are_brought_together_by_the_shortest_way_to_the_queue() -> None:
    # the second waits 0.4 s for a step to end before it is queued, which is no difference of clocks
    rows = [row(1000.0, 50.0, 50.0, 51.0, 52.0), row(1000.1, 50.5, 50.75, 52.0, 54.0)]
    first, second = requests(rows)
    assert first == Timed(5, 3, 0.0, 0.0, 1.0, 2.0)
    assert (second.arrived_s, second.queue_s, second.ttft_s, second.tpot_s) == pytest.approx((0.1, 0.65, 1.9, 1.0))


def test_requests_are_put_in_order_of_arrival() -> None:
    rows = [row(7.0, 7.0, 7, 8, 9), row(5.0, 5.0, 5, 6, 7)]
    assert [r.arrived_s for r in requests(rows)] == [0.0, 2.0]


def test_settings_that_were_not_recorded_stay_at_the_default() -> None:
    default = EngineConfig(MEASURED[8, "a100", 1])
    assert config(META) == replace(default, max_num_seqs=128, max_num_batched_tokens=2048, cpu_overhead_s=0.0)


def test_recorded_settings_are_taken() -> None:
    cache = {"num_gpu_blocks": 2588, "block_size": 32, "enable_prefix_caching": False}
    scheduler = {"scheduler_config": {"async_scheduling": False}}
    found = config(META | {"kv_cache": cache, "resolved_config": scheduler})
    assert (found.num_blocks, found.block_size) == (2587, 32)
    assert not found.prefix_caching
    assert not found.async_scheduling


def test_a_folder_of_runs_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "b_meta.json").write_text(json.dumps(META))
    (tmp_path / "b_requests.jsonl").write_text(json.dumps(row(1, 1, 1, 2, 3)) + "\n")
    assert [(run.name, len(run.requests)) for run in load(tmp_path)] == [("b", 1)]


@pytest.mark.parametrize("folder", [True, False])
def test_missing_runs_are_refused_with_their_source(folder: bool, tmp_path: Path) -> None:
    with pytest.raises(MissingRunsError, match=r"casys-kaist/LLMServingSim \(MIT\)"):
        load(tmp_path if folder else None)


def test_the_halves_share_nothing_and_leave_nothing_out() -> None:
    real = [Timed(1, 1, float(i), 0, 0, 0) for i in range(7)]
    assert (list(half(real, "early")), list(half(real, "late"))) == ([0, 1, 2], [3, 4, 5, 6])


def test_errors_are_shares_of_the_real_figure() -> None:
    real = [Timed(5, 3, 0.0, 1.0, 2.0, 4.0), Timed(5, 1, 1.0, 2.0, 3.0, 3.0)]
    simulated = [replace(t, scheduled_s=t.arrived_s + 2.0, first_token_s=t.arrived_s + 1.0) for t in real]
    found = figures(real, simulated)
    assert found["queue_s"]["mean"] == {"real": 1.0, "sim": 2.0, "error": 1.0}
    assert found["ttft_s"]["p99"] == {"real": 2.0, "sim": 1.0, "error": -0.5}
    assert found["ttft_s"]["each"] == 0.5
    assert found["tpot_s"]["mean"] == {"real": 1.0, "sim": 1.5, "error": 0.5}  # of the one that has more than one token
    assert found["makespan_s"] == {"real": 4.0, "sim": 4.0, "error": 0.0}


def test_an_error_against_nothing_is_none_or_all() -> None:
    assert (Figure(0.0, 0.0).error, Figure(0.0, 0.1).error) == (0.0, 1.0)


def sample() -> dict[str, Any]:
    truth = EngineConfig(MEASURED[8, "h100", 1], cpu_overhead_s=0.0)
    load_ = [Timed(400 + 137 * i % 2500, 20 + i, 0.06 * i, 0, 0, 0) for i in range(40)]
    run = Run("a", replace(truth, step_time=MEASURED[8, "a100", 1]), tuple(replay(load_, truth)))
    return {"a, late half": compare(run, "late")}


def test_a_run_of_the_simulation_itself_is_foretold_from_its_other_half() -> None:
    found = sample()
    entry = found["a, late half"]
    assert entry["half"] == "late"
    assert abs(entry["ttft_s"]["mean"]["error"]) < 0.05
    assert set(entry["constants"]) == {"c0", "w", "g", "a", "k", "s"}
    assert table(found).row_count == 1


def test_what_is_further_off_than_wanted_is_named() -> None:
    found = figures([Timed(5, 3, 0.0, 1.0, 2.0, 4.0)], [Timed(5, 3, 0.0, 1.0, 2.3, 4.0)])
    assert misses({"a": found}) == ["a: ttft_s mean +15.0%"]
    found = figures([Timed(5, 3, 0.0, 1.0, 2.0, 4.0)], [Timed(5, 3, 0.0, 1.0, 2.0, 3.8)])
    assert misses({"a": found}) == ["a: makespan_s -5.0%"]
