"""Parts of the comparison with Dynamo: step times as its mocker has them, the tape, causes, and what is said without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from extproc.core.policies.base import REGISTRY
from extproc.sim.cluster import Cluster, Scenario, Served
from extproc.sim.node import NodeSpec
from tests.bench.dynamo_child import decide, tokens
from tests.bench.dynamo_choices import TIE, Row, Worker, agreement, ample_blocks, cause, taped
from tests.bench.dynamo_mocker import BLOCK, NUM_BLOCKS, MockerStepTime, fleet, trace
from tests.bench.dynamo_peer import (
    FIGURES,
    WIRING,
    PeerError,
    ask,
    choices_table,
    gain,
    our_replays,
    replays_table,
    theirs,
    window_of,
)


def line(at_ms: int, prompt: int, output: int, *ids: int) -> str:
    return json.dumps({"timestamp": at_ms, "input_length": prompt, "output_length": output, "hash_ids": ids})


def serve(*lines: str, workers: tuple[NodeSpec, ...] | None = None) -> list[Served]:
    """By the order of the lines, with round robin."""
    result = Cluster(Scenario(trace(lines), workers or fleet(1), wiring=WIRING), "round_robin").run()
    return sorted(result.served, key=lambda s: s.turn)


# --- the mocker's steps: what the mocker of 1.6.1 reported for the same requests, milliseconds --------------------------------


@pytest.mark.parametrize(("prompt", "ttft_ms"), [(1024, 32.490712), (7236, 148.412166), (26_888, 561.266671)])
def test_a_prefill_takes_what_the_mocker_says_chunk_by_chunk(prompt: int, ttft_ms: float) -> None:
    (served,) = serve(line(0, prompt, 2))
    assert served.ttft_s == pytest.approx(ttft_ms * 1e-3, abs=1e-8)


def test_decode_takes_longer_as_the_cache_fills() -> None:
    (served,) = serve(line(0, 1024, 2))
    assert served.ttft_s is not None
    assert served.e2e_s - served.ttft_s == pytest.approx(5.792771e-3, abs=1e-8)


def test_a_step_with_both_takes_the_sum_and_begins_when_the_one_before_is_over() -> None:
    first, second = serve(line(0, 1024, 40), line(100, 2048, 5))
    assert first.e2e_s == pytest.approx(0.308231492, abs=1e-7)
    assert second.ttft_s == pytest.approx(0.057163652, abs=1e-7)
    assert second.queue_s == pytest.approx(0.002007361, abs=1e-7)


def test_decode_takes_at_least_a_millisecond() -> None:
    step = MockerStepTime.of(1000)
    assert step.step_s(1, [], 0, 1) == pytest.approx(5.74e-3)
    assert step.step_s(1, [], 2500, 1) == 1e-3


def test_its_workers_do_not_slow_down() -> None:
    step = MockerStepTime.of(1000)
    assert step.scaled(1.0, 1.0) is step
    with pytest.raises(ValueError, match="do not slow down"):
        step.scaled(2.0, 1.0)


def test_full_blocks_of_the_last_partial_id_can_be_shared() -> None:
    assert trace([line(500, 600, 9, 3, 7)]).turns[0].runs == ((24, 8), (56, 1))
    assert trace([line(0, 512, 9, 3)]).turns[0].runs == ((24, 8),)
    _, second = serve(line(0, 600, 1, 3, 7), line(1000, 700, 1, 3, 7))
    assert second.cached_tokens == 576


# --- the tape -----------------------------------------------------------------------------------------------------------------

WINDOW = [line(i * 40, 2000 + 10 * i, 30, 0, 1, 100 + i, 200 + i) for i in range(60)]


def rows_of(lines: list[str]) -> list[Row]:
    window = trace(lines)
    return taped(Scenario(window, fleet(3, ample_blocks(window)), wiring=WIRING))


def test_the_tape_opens_and_closes_each_flight_once_and_in_order() -> None:
    rows = rows_of(WINDOW)
    assert [row.id for row in rows] == [str(i) for i in range(60)]
    for name in ("prefilled", "ended"):
        told = [(int(flight), int(row.id)) for row in rows for flight in getattr(row, name)]
        assert len({flight for flight, _ in told}) == len(told) > 20
        assert all(flight < at for flight, at in told)


def test_the_tape_has_what_the_rule_saw() -> None:
    rows = rows_of(WINDOW)
    assert rows[0].workers == dict.fromkeys(range(3), Worker(0, 0, 2000 / BLOCK))
    assert rows[0].uncached_tokens == 2000
    assert any(w.cached_tokens == 1024 for w in rows[5].workers.values())
    assert rows[5].uncached_tokens == 2050 - rows[5].workers[rows[5].chosen].cached_tokens
    assert any(w.queued_tokens for row in rows for w in row.workers.values())
    assert any(0 < len(row.workers) < 3 for row in rows)
    assert "dynamo_taped" not in REGISTRY


def test_choices_of_the_tape_are_least_by_the_formula() -> None:
    for row in rows_of(WINDOW):
        costs = {i: worker.cost(row.prompt_tokens) for i, worker in row.workers.items()}
        assert costs[row.chosen] == pytest.approx(min(costs.values()))


def test_nothing_is_evicted_where_blocks_are_ample() -> None:
    blocks = ample_blocks(trace(WINDOW))
    assert blocks >= sum(-(-(2000 + 10 * i + 30) // BLOCK) for i in range(60))


# --- the other side -----------------------------------------------------------------------------------------------------------


def test_equal_block_ids_are_equal_tokens() -> None:
    one, other = tokens(200, [(5, 2), (9, 1)], 64), tokens(150, [(5, 2)], 64)
    assert (len(one), len(other)) == (200, 150)
    assert one[:128] == other[:128] == list(range(320, 448))
    assert one[128:192] == list(range(576, 640))
    assert set(one[192:]) == set(other[128:]) == {0}


class Service:
    """A selection service that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    async def prefill_complete(self, flight: str) -> None:
        self.told.append(("prefilled", flight))

    async def free_reservation(self, flight: str) -> None:
        self.told.append(("ended", flight))

    def loads(self, model_name: str) -> list[dict[str, Any]]:
        return [{"loads": [{"worker_id": 1, "potential_prefill_tokens": 30}]}]

    async def potential_loads(self, prompt: dict[str, Any]) -> list[dict[str, Any]]:
        size = len(prompt["token_ids"])
        prefill = {0: size, 1: 30 + size - 64}
        return [
            {"worker_id": w, "potential_prefill_tokens": p, "potential_decode_blocks": 2} for w, p in prefill.items()
        ]

    async def select(self, prompt: dict[str, Any]) -> dict[str, Any]:
        return {"worker_id": prompt["allowed_worker_ids"][0]}

    async def create_reservation(self, booked: dict[str, Any]) -> None:
        self.told.append(
            ("booked", {key: booked[key] for key in ("selection_id", "worker_id", "effective_prefill_tokens")})
        )


async def test_the_selector_is_brought_to_the_state_asked_and_told_what_we_chose() -> None:
    service = Service()
    flights = {"prefilled": ["7"], "ended": ["3", "7"]}
    row = {"id": "9", "prompt_tokens": 100, "runs": [[1, 1]], "workers": {"1": {}}, "chosen": 0, "uncached_tokens": 36}
    answer = await decide(service, row | flights, 64)
    booked = {"selection_id": "9", "worker_id": 0, "effective_prefill_tokens": 36}
    assert service.told == [("prefilled", "7"), ("ended", "3"), ("ended", "7"), ("booked", booked)]
    assert answer["chosen"] == 1
    assert [(w["queued_tokens"], w["cached_tokens"]) for w in answer["workers"]] == [(0, 0), (30, 64)]


@pytest.mark.parametrize("python", [sys.executable, "/nowhere/python"])
def test_without_the_package_the_command_to_install_it_is_named(python: str) -> None:
    with pytest.raises(PeerError, match=r"pip install ai-dynamo-runtime==1\.6\.1"):
        ask(Path(python), "replay", {})


# --- compared -----------------------------------------------------------------------------------------------------------------

LOW, HIGH = Worker(0, 0, 10), Worker(0, 0, 20)


def row(*workers: Worker, chosen: int) -> Row:
    return Row("0", 64, (), [], [], dict(enumerate(workers)), chosen)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ((LOW, LOW), (LOW, LOW), TIE),
        ((LOW, HIGH), (LOW, LOW), TIE),
        ((LOW, Worker(64, 0, 10)), (Worker(128, 0, 10), Worker(64, 0, 10)), "queued tokens"),
        ((LOW, Worker(0, 0, 10.5)), (LOW, Worker(0, 64, 10.5)), "cached tokens"),
        ((LOW, Worker(0, 0, 10.5)), (Worker(0, 0, 11), LOW), "held blocks"),
        ((Worker(0, 64, 10), Worker(64, 0, 11)), (Worker(64, 0, 11), Worker(0, 64, 10)), "several of these"),
        ((LOW, HIGH), (LOW, HIGH), "another formula"),
    ],
)
def test_the_cause_is_what_makes_our_rule_choose_alike_when_seen_alike(
    ours: tuple[Worker, Worker], theirs: tuple[Worker, Worker], said: str
) -> None:
    assert cause(row(*ours, chosen=0), dict(enumerate(theirs)), 1) == said


def answer(chosen: int, *workers: Worker) -> dict[str, Any]:
    seen = [
        {"worker": i, "queued_tokens": w.queued_tokens, "cached_tokens": w.cached_tokens, "held_blocks": w.held_blocks}
        for i, w in enumerate(workers)
    ]
    return {"chosen": chosen, "workers": seen[::-1]}


def test_choices_are_counted() -> None:
    rows = [row(LOW, HIGH, chosen=0)] * 3 + [row(LOW, LOW, chosen=0)]
    answers = [answer(0, LOW, HIGH), answer(1, HIGH, LOW), answer(1, LOW, HIGH), answer(1, LOW, LOW)]
    found = agreement(rows, answers)
    assert (found.decisions, found.equal, found.by_formula) == (4, 1, 3)
    assert found.causes == {"held blocks": 1, "another formula": 1, TIE: 1}
    assert json.dumps(found.causes)


def test_a_tape_and_answers_of_another_length_are_no_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        agreement([row(LOW, chosen=0)], [])


def test_dynamos_figures_are_in_our_units() -> None:
    found = theirs(
        {"mean_ttft_ms": 300.0, "p99_ttft_ms": 2000.0, "mean_e2e_latency_ms": 3000.0, "prefix_cache_reused_ratio": 0.2}
    )
    assert found == pytest.approx({"ttft_mean_s": 0.3, "ttft_p99_s": 2.0, "e2e_mean_s": 3.0, "prefix_hit_actual": 0.2})


def test_both_simulators_stand_side_by_side() -> None:
    ours = our_replays(trace(WINDOW))
    assert set(ours) == {"round_robin", "dynamo", "predicted"}
    assert all(set(run) == set(FIGURES) for run in ours.values())
    assert gain(ours) == ours["dynamo"]["ttft_mean_s"] / ours["round_robin"]["ttft_mean_s"]
    dynamos = {name: {figure: 2 * value for figure, value in ours[name].items()} for name in ("round_robin", "dynamo")}
    console = Console(width=140, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as shown:
        console.print(replays_table(ours, dynamos))
        console.print(choices_table(agreement([row(LOW, chosen=0)], [answer(0, LOW)])))
    text = shown.get()
    assert text.count("-50.0%") == 2 * len(FIGURES)
    assert "predicted, ours" in text
    assert "predicted, Dynamo's" not in text


def test_the_window_is_the_start_of_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f"{each}\n" for each in WINDOW))
    assert window_of(path, 2) == WINDOW[:2]
    with pytest.raises(PeerError, match="kvcache-ai/Mooncake"):
        window_of(tmp_path / "none", 2)
    path.write_text("TIMESTAMP,ContextTokens\n")
    with pytest.raises(PeerError, match="not a trace of"):
        window_of(path, 2)


def test_the_fleet_is_the_mockers() -> None:
    (node,) = fleet(1)
    assert (node.engine.num_blocks, node.engine.block_size) == (NUM_BLOCKS, BLOCK)
    assert (node.engine.cpu_overhead_s, node.engine.async_scheduling) == (0.0, False)
