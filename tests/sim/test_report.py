from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from extproc.sim.client import Record
from extproc.sim.report import Counters, counters, percentile, predicted_share, summary, table, total

VLLM = Path(__file__).parents[1] / "fixtures" / "vllm-0.32"


def record(ttft_s: float | None = 0.1, e2e_s: float = 1.0, error: str | None = None, started_s: float = 0.0) -> Record:
    return Record("s", 0, started_s, ttft_s, e2e_s, 200, output_tokens=5, error=error)


def summed(*records: Record, predicted: float | None = None, **replicas: Counters) -> dict[str, Any]:
    return summary(records, replicas, {}, predicted)


def test_percentiles_lie_between_the_nearest_ranks() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert [percentile(values, p) for p in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert percentile(values, 95) == pytest.approx(3.85)


def test_percentiles_of_nothing_are_unknown() -> None:
    assert percentile([], 50) is None
    assert summed()["ttft_p99_s"] is None


def test_failures_count_as_errors_and_not_as_fast_answers() -> None:
    found = summed(record(e2e_s=2.0), record(ttft_s=None, e2e_s=0.001, error="status 503"))
    assert (found["requests"], found["errors"]) == (2, 1)
    assert found["e2e_mean_s"] == 2.0


def test_the_run_lasts_until_the_last_answer() -> None:
    assert summed(record(started_s=3.0, e2e_s=2.5), record(started_s=4.0, e2e_s=1.0))["duration_s"] == 5.5


def test_the_actual_hit_is_of_all_prompt_tokens_looked_up() -> None:
    found = summed(a=Counters(prefix_queries=100, prefix_hits=50), b=Counters(prefix_queries=300, prefix_hits=0))
    assert found["prefix_hit_actual"] == 0.125


def test_no_lookup_leaves_the_hit_unknown() -> None:
    assert summed(a=Counters())["prefix_hit_actual"] is None


def test_counters_are_read_from_a_real_page() -> None:
    page = (VLLM / "metrics_loaded_30req.txt").read_text()
    read = counters(page)
    assert read.prefix_queries == total(page, "vllm:prefix_cache_queries_total")
    assert read.prompt_tokens > 0
    assert read.prefix_queries > 0


def test_series_are_summed_over_their_labels_and_not_mixed_up_with_longer_names() -> None:
    page = 'x_total{a="1"} 2.0\nx_total{a="2"} 3e1\nx_total_created{a="1"} 99\n# HELP x_total text\n'
    assert total(page, "x_total") == 32.0
    assert total(page, "y_total") is None


def test_counters_since_an_earlier_page_are_differences() -> None:
    assert Counters(5, 50, 9, 50, 20).since(Counters(1, 10, 2, 10, 5)) == Counters(4, 40, 7, 40, 15)


def test_the_predicted_share_is_unknown_until_usage_came() -> None:
    assert predicted_share("") is None
    page = 'extproc_predicted_cached_tokens_total{pool="d"} 30.0\nextproc_prompt_tokens_total{pool="d",replica="a"} 120.0\n'
    assert predicted_share(page) == 0.25


def shown(runs: dict[str, Any]) -> str:
    page = io.StringIO()
    Console(width=120, file=page).print(table(runs, {"extproc": "extproc", "round_robin": "round robin"}))
    return page.getvalue()


def test_the_table_shows_both_runs_the_change_and_each_replica() -> None:
    labels = {"a:1": {"gpu": "h100", "tp": "4"}}
    counted = {"a:1": Counters(requests=3, prompt_tokens=2000, output_tokens=400)}
    one = summary([record(ttft_s=0.1)], counted, labels, 0.5)
    other = summary([record(ttft_s=0.4)], counted, labels, None)
    text = shown({"extproc": one, "round_robin": other})
    assert "0.100 s" in text
    assert "-75%" in text
    assert "h100 tp4 a:1" in text
    assert "3 req, 2k tok" in text
    assert "50.0%" in text
