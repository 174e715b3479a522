"""The overload benchmark in parts: what saturation is, who counts as what, fairness, and the page."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from extproc.core.types import End, Refusal
from extproc.sim.cluster import Served
from extproc.sim.traces import Trace, TraceError, Turn
from extproc.sim.traces.marks import FLOODING, MODEST
from tests.bench import overload, overload_page, overload_runs
from tests.bench.matrix.load import pace
from tests.bench.matrix.windows import RECORDED, Source
from tests.bench.overload_runs import Case, Clients, Job, Place, clients, fairness, jain, kinds, max_min
from tests.bench.routing import in_process

SMALL = Place(Source("documents", 250, 6), 1)


def served(turn: int, arrived_s: float, ttft_s: float | None = 0.5, **changes: Any) -> Served:
    """A request of 1,000 tokens with 101 of output, answered at 10 ms per token unless it has no first token."""
    e2e_s = 0.0 if ttft_s is None else ttft_s + 1.0
    end, status = (None, 429) if ttft_s is None else (End.OK, 200)
    base = Served(turn, arrived_s, 0, "r", 1, end, status, "cost", 0.0, ttft_s, e2e_s, 1000, 101, 0, None, None)
    return replace(base, **changes)


TRACE = Trace("t", 64, tuple(Turn(1000, 101, float(i)) for i in range(20)))


# --- the load ---------------------------------------------------------------------------------------------------------


def test_saturation_is_where_throughput_stops_following() -> None:
    rate = overload_runs.saturation(SMALL)
    trace = overload_runs.window(SMALL)
    paced = pace(trace, overload_runs.nodes(trace))
    assert overload_runs.follows(SMALL, paced, rate)
    assert not overload_runs.follows(SMALL, paced, 1.5 * rate)


def test_loads_are_shares_of_saturation_and_only_the_queue_differs() -> None:
    job = Job(SMALL, Case.PRIORITY, 0.5, False, 8.0)
    without, with_queue, twice = (
        overload_runs.scenario(j) for j in (job, replace(job, queue=True), replace(job, load=1.0))
    )
    assert without.trace == with_queue.trace
    assert (without.wiring.queue.enabled, with_queue.wiring.queue.enabled) == (False, True)
    assert replace(without.wiring, queue=with_queue.wiring.queue) == with_queue.wiring
    assert without.trace.turns[-1].delay_s == pytest.approx(2 * twice.trace.turns[-1].delay_s, rel=0.01)


def test_each_case_has_its_clients() -> None:
    def turns(case: Case) -> tuple[Turn, ...]:
        return overload_runs.scenario(Job(SMALL, case, 1.0, True, 8.0)).trace.turns

    share = sum(t.priority for t in turns(Case.PRIORITY)) / 250
    assert share == pytest.approx(0.2, abs=0.08)
    assert turns(Case.SLO) == turns(Case.PRIORITY)
    tenants = Counter(t.tenant for t in turns(Case.FLOOD))
    assert 3 < tenants[FLOODING] / tenants[MODEST] < 8
    asked = {case: overload_runs.scenario(Job(SMALL, case, 1.0, True, 8.0)).slo_ttft_s for case in Case}
    assert asked == {Case.PRIORITY: None, Case.SLO: 2.0, Case.FLOOD: None}


# --- figures ----------------------------------------------------------------------------------------------------------


def test_what_counts_as_what() -> None:
    part = [
        served(0, 0.0),
        served(1, 1.0, 1.5, held_s=1.0),
        served(2, 2.0, 3.0),  # too late
        served(3, 3.0, 0.5, e2e_s=9.0),  # in time, and then too slow; ends after the last has arrived
        served(4, 4.0, None, refusal=Refusal.DEADLINE, held_s=30.0),
        served(5, 5.0, None, refusal=Refusal.ABSENT, status=503),
        served(6, 8.0, 0.5, end=End.UPSTREAM_ERROR),
        served(7, 10.0),
    ]
    found = clients(part, TRACE)
    assert (found.requests, found.refused, found.failed, found.held) == (8, 1, 2, 2)
    assert found.held_mean_s == 15.5
    assert found.ttft_p50_s == 0.5
    assert found.ttft_mean_s == pytest.approx((0.5 + 1.5 + 3.0 + 0.5 + 0.5) / 5)
    assert found.goodput == 3 / 8
    assert found.ttft_met == 4 / 8
    assert found.served_tokens_per_s == pytest.approx(3 * 1101 / 10)
    assert found.offered_tokens_per_s == pytest.approx(8 * 1101 / 10)


def test_without_any_answer_times_are_infinite_and_shares_zero() -> None:
    found = clients([served(0, 0.0, None), served(1, 1.0, None)], TRACE)
    assert found.ttft_p99_s == found.ttft_mean_s == found.e2e_mean_s == math.inf
    assert found.goodput == found.ttft_met == found.held_mean_s == 0.0


def test_the_first_tenth_to_arrive_is_not_scored_and_kinds_share_the_time() -> None:
    every = [served(i, float(i), tenant=MODEST if i % 4 == 3 else FLOODING, priority=i % 2) for i in range(20)]
    by_tenant = dict(kinds(Case.FLOOD, every[::-1], TRACE))
    assert {name: c.requests for name, c in by_tenant.items()} == {"all": 18, MODEST: 5, FLOODING: 13}
    assert by_tenant[MODEST].offered_tokens_per_s == pytest.approx(5 * 1101 / 17)
    by_priority = dict(kinds(Case.PRIORITY, every, TRACE))
    assert {name: c.requests for name, c in by_priority.items()} == {"all": 18, "urgent": 9, "others": 9}


@pytest.mark.parametrize(
    ("demands", "capacity", "shares"),
    [
        ([0.2, 1.0], 1.0, [0.2, 0.8]),
        ([1.0, 0.2], 1.0, [0.8, 0.2]),
        ([1.0, 1.0], 1.0, [0.5, 0.5]),
        ([0.1, 0.2], 1.0, [0.1, 0.2]),
        ([0.9, 0.1, 0.5], 0.9, [0.4, 0.1, 0.4]),
        ([], 1.0, []),
    ],
)
def test_max_min_fair_shares(demands: list[float], capacity: float, shares: list[float]) -> None:
    assert max_min(demands, capacity) == pytest.approx(shares)


def test_jains_index() -> None:
    assert jain([3.0, 3.0, 3.0]) == 1.0
    assert jain([1.0, 0.0]) == 0.5
    assert jain([0.0, 0.0]) == 1.0


def test_fair_is_who_gets_the_max_min_share_and_not_who_gets_a_part_of_the_demand() -> None:
    def tenant(got: float, asked: float) -> Clients:
        return replace(
            clients([served(0, 0.0), served(1, 1.0)], TRACE), served_tokens_per_s=got, offered_tokens_per_s=asked
        )

    assert fairness([tenant(200, 200), tenant(800, 1000)]) == pytest.approx(1.0)
    assert fairness([tenant(100, 200), tenant(900, 1000)]) < 0.95


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return overload.measure([SMALL, replace(SMALL, seed=2)], in_process)


def test_every_setting_is_run_with_the_queue_and_without(document: dict[str, Any]) -> None:
    cells = Counter((c["case"], c["load"]) for c in document["cells"])
    assert cells == dict.fromkeys(
        [("priority", 0.7), ("priority", 1.0), ("priority", 1.2), ("slo", 1.2), ("flood", 1.2)], 2
    )
    for cell in document["cells"]:
        assert set(cell["seeds"]) == {"1", "2"}
        assert ("jain" in cell) is (cell["case"] == "flood")
        assert cell["queue"] or not cell["kinds"]["all"]["held"]
    assert set(document["saturation_per_s"]) == {"documents"}


def test_means_are_over_the_seeds(document: dict[str, Any]) -> None:
    for cell in document["cells"]:
        for kind, means in cell["kinds"].items():
            both = [one[kind]["goodput"] for one in cell["seeds"].values()]
            assert means["goodput"] == pytest.approx(sum(both) / 2)


def test_the_summary_compares_with_and_without(document: dict[str, Any]) -> None:
    found = document["summary"]
    pairs = [
        [one["urgent"]["ttft_p50_s"] for one in cell["seeds"].values()]
        for cell in document["cells"]
        if (cell["case"], cell["load"]) == ("priority", 1.2)
    ]
    expected = math.prod(b / a for a, b in zip(*pairs, strict=True)) ** 0.5
    assert found["urgent_ttft_p50_ratio_1.2"] == pytest.approx(expected)
    assert 0 <= found["goodput_0.7_with"] <= 1
    assert 0.5 <= found["jain_with"] <= 1


def test_the_page_has_every_cell_in_tables_that_are_whole(document: dict[str, Any]) -> None:
    text = overload_page.markdown(document, "a command")
    assert "Generated by `a command`: 20 runs in virtual time, seeds 1, 2." in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1, table
    for title in (
        "In short",
        "Priorities, load 0.7",
        "A TTFT asked for, load 1.2",
        "A tenant that floods",
        "Saturation",
    ):
        assert f"## {title}" in text
    assert len(re.findall(r"^\| documents \| with(?:out)? \|", text, re.MULTILINE)) == 2 * 6


def test_the_command_writes_figures_and_page(tmp_path: Path) -> None:
    out, page = tmp_path / "build" / "out.json", tmp_path / "page.md"
    small = ("--only", "documents", "--seeds", "1", "--requests", "150", "--jobs", "1")
    overload.main([*small, "--output", str(out), "--docs", str(page)])
    written = json.loads(out.read_text())
    assert written["took_s"] > 0
    assert {c["trace"] for c in written["cells"]} == {"documents"}
    assert "# Late binding, measured" in page.read_text()


def test_recorded_traces_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        overload.sources(tmp_path)
    for file in RECORDED.values():
        (tmp_path / file).touch()
    names = [source.name for source in overload.sources(tmp_path)]
    assert names == [*RECORDED, *overload.GENERATED]
    assert {s.requests for s in overload.sources(tmp_path, 50)} == {50}
    assert [s.name for s in overload.sources(None)] == list(overload.GENERATED)
