"""Parts of the routing benchmark: a wrong ratio, a floor too low or a window seen twice would flatter somebody."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from extproc.core.types import End
from extproc.sim.cluster import Cluster, Scenario, Served
from extproc.sim.fleet_spec import Group
from extproc.sim.incidents import Incident, Kind
from extproc.sim.sidecar import Wiring
from extproc.sim.simulate_report import Slo
from extproc.sim.traces import Trace, TraceError, Turn
from tests.bench import routing
from tests.bench.matrix import ignorance, page
from tests.bench.matrix.cells import LOADS, SLOS, STATES, Cell, CellError, fleet, full, incidents, only, quick, sample
from tests.bench.matrix.load import LoadError, Pace, pace, saturation_per_s
from tests.bench.matrix.nominal import IdealCache, nominal
from tests.bench.matrix.runs import CLAIRVOYANT, OURS, Figures, Job, Replay, bounded, figures, floor_s, replay, run
from tests.bench.matrix.summary import GOODPUT_FLOOR, Row, groups, row, summary
from tests.bench.matrix.windows import MAX_PAUSE_S, MAX_TOKENS, Source, window

H100 = fleet([Group(gpu="h100", count=2)], "8b", "hbm", 64)


# --- windows ----------------------------------------------------------------------------------------------------------


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def mooncake(folder: Path, requests: int = 100) -> Path:
    rows = [
        {"timestamp": 1000 * i, "input_length": 1024 + i, "output_length": 5, "hash_ids": [0, i, i + 1000]}
        for i in range(requests)
    ]
    return jsonl(folder / "mooncake_conversation.jsonl", rows)


def agentic(folder: Path, sessions: int = 30, turns: int = 5) -> Path:
    """Prompts of 40 blocks and more; in each session the last turn is too long."""
    sizes = [[2560 + 512 * i for i in range(turns - 1)] + [MAX_TOKENS] for _ in range(sessions)]
    rows = [
        {
            "session": f"s{s}",
            "depth": 0,
            "t": 60.0 * i,
            "in": n,
            "out": 9,
            "think": 50.0,
            "api": 2.0,
            "h": [[1, n // 64]],
        }
        for s in range(sessions)
        for i, n in enumerate(sizes[s])
    ]
    return jsonl(folder / "agentic_sessions.jsonl", rows)


def test_a_seed_selects_other_requests_of_a_file(tmp_path: Path) -> None:
    source = Source("conversation", 20, 9, mooncake(tmp_path))
    windows = [window(source, seed) for seed in (1, 2, 3)]
    firsts = [w.turns[0].prompt_tokens - 1024 for w in windows]
    assert len(set(firsts)) == 3
    for first, found in zip(firsts, windows, strict=True):
        assert [t.prompt_tokens - 1024 for t in found.turns] == list(range(first, first + 20))
        assert [t.delay_s for t in found.turns] == list(range(20))
    assert window(source, 1) == windows[0]


def test_requests_beyond_the_models_context_are_left_out(tmp_path: Path) -> None:
    rows = [{"timestamp": i, "input_length": n, "output_length": 5} for i, n in enumerate((10, MAX_TOKENS, 20))]
    path = jsonl(tmp_path / "t.jsonl", [each | {"hash_ids": []} for each in rows])
    assert [t.prompt_tokens for t in window(Source("t", 2, 9, path), 1).turns] == [10, 20]


def test_a_seed_selects_other_sessions_each_cut_to_its_first_turns(tmp_path: Path) -> None:
    path = agentic(tmp_path)
    windows = [window(Source("agentic", 12, 3, path), seed) for seed in (1, 2)]
    sessions = [list(dict.fromkeys(t.session for t in w.turns)) for w in windows]
    assert [len(each) for each in sessions] == [4, 4]
    assert not set(sessions[0]) & set(sessions[1])
    for found in windows:
        assert [t.after for t in found.turns[:6]] == [None, 0, 1, None, 3, 4]
        assert [t.prompt_tokens for t in found.turns[:3]] == [2560, 3072, 3584]
        assert found.turns[0].delay_s == 0.0
        assert found.turns[3].delay_s > 0.0
        assert found.turns[1].delay_s == MAX_PAUSE_S


def test_a_session_ends_before_a_turn_that_is_too_long(tmp_path: Path) -> None:
    found = window(Source("agentic", 30, 9, agentic(tmp_path)), 1)
    assert max(t.prompt_tokens for t in found.turns) < MAX_TOKENS
    assert sum(t.after is None for t in found.turns) == math.ceil(30 / 4)


def test_blocks_of_sessions_are_merged_and_still_shared(tmp_path: Path) -> None:
    found = window(Source("agentic", 12, 3, agentic(tmp_path)), 1)
    assert found.block_size == 512
    chains = [t.hashes() for t in found.turns[:3]]
    assert [len(chain) for chain in chains] == [5, 6, 7]
    assert chains[2][:5] == chains[0]
    assert not set(chains[0]) & set(found.turns[3].hashes())


@pytest.mark.parametrize("name", ["chat", "siblings", "hot", "unshared"])
def test_generated_windows_have_their_size_and_their_seed(name: str) -> None:
    source = Source(name, 80, 4)
    one, two = (window(source, seed) for seed in (1, 2))
    assert (len(one.turns), one.name) == (80, name)
    assert [t.prompt_tokens for t in one.turns] != [t.prompt_tokens for t in two.turns]
    depths: list[int] = []
    for turn in one.turns:
        depths.append(0 if turn.after is None else depths[turn.after] + 1)
    assert max(depths) < 4
    first = [t.hashes()[:1] for t in one.turns if t.hashes() and t.after is None]
    shared = len(first) - len(set(first))
    assert (shared == 0) if name == "unshared" else (shared > len(first) / 3)


# --- cells ------------------------------------------------------------------------------------------------------------


def test_the_quick_matrix_varies_one_thing_at_a_time() -> None:
    cells = quick(["chat"])
    assert [c.load for c in cells[: len(LOADS)]] == list(LOADS)
    settings = [c.setting for c in cells[len(LOADS) :]]
    alone = ["large", "stale", "2 routers", "4 routers", "mixed", "70b", "dies", "slows"]
    assert settings == [f"0.8, {what}" for what in [*alone, "stale, 4 routers, mixed"]]
    assert not [c for c in quick(["azure"]) if c.cache == "large" or c.fleet == "70b"]
    assert {c.trace for c in quick(["hot", "siblings", "chat", "conversation"]) if c.fleet == "70b"} == {
        "chat",
        "conversation",
    }


def test_the_whole_matrix_is_the_product_and_has_the_quick_one() -> None:
    cells = full(["chat"])
    assert len(cells) == len(set(cells))
    assert set(quick(["chat"])) <= set(cells)
    assert Cell("chat", 1.3, "large", "stale", 4, "mixed", "dies") in cells


def test_cells_are_picked_by_what_they_have() -> None:
    cells = quick(["chat", "hot"])
    assert only(cells, []) == cells
    assert only(cells, ["trace=chat,load=0.9"]) == [Cell("chat", 0.9)]
    assert only(cells, ["routers=2", "fault=dies,trace=hot"]) == [
        Cell("chat", routers=2),
        Cell("hot", routers=2),
        Cell("hot", fault="dies"),
    ]
    with pytest.raises(CellError, match="cells have no speed; they have trace, load"):
        only(cells, ["speed=1"])


def test_what_befalls_a_replica() -> None:
    assert incidents("none", 3, 1.0, 2.0) == ()
    assert incidents("dies", 3, 1.0, 2.0) == (Incident(1.0, 3, Kind.DIES), Incident(2.0, 3, Kind.JOINS))
    assert incidents("slows", 3, 1.0, 2.0) == (Incident(1.0, 3, Kind.SLOWS, 3.0),)


def test_a_large_cache_has_five_times_the_tokens() -> None:
    small, large = (fleet([Group(gpu="h100")], "8b", cache, 64)[0].engine.num_blocks for cache in ("hbm", "large"))
    assert large == pytest.approx(5 * small, abs=5)
    assert small * 64 == pytest.approx(397_000, rel=0.01)


# --- load -------------------------------------------------------------------------------------------------------------


def test_the_rate_of_requests_by_the_clock_is_that_of_the_speed_up() -> None:
    paced = Pace(tuple(float(i) for i in range(101)), (0.0,) * 101)
    assert paced.rate_per_s(1.0) == pytest.approx(0.8 * 101 / 80)
    assert paced.speed_up(2 * paced.rate_per_s(1.0)) == pytest.approx(2.0, rel=1e-3)
    assert paced.moment(0.3, 2.0) == 15.0


def test_pauses_are_made_up_for_and_set_a_limit() -> None:
    starts = tuple(float(i // 2) for i in range(100))
    paced = Pace(starts, tuple(10.0 * (i % 2) for i in range(100)))
    wanted = 2 * paced.rate_per_s(1.0)
    assert paced.speed_up(wanted) > 2.0
    assert paced.rate_per_s(paced.speed_up(wanted)) == pytest.approx(wanted, rel=0.1)
    with pytest.raises(LoadError, match=r"never come at 1000\.0 a second"):
        paced.speed_up(1000.0)


def test_offsets_are_answers_and_pauses() -> None:
    trace = Trace("t", 64, (Turn(1000, 50, 3.0), Turn(1000, 50, 2.0, after=0)))
    times, paced = nominal(trace, H100), pace(trace, H100)
    assert paced.starts == (3.0, 3.0)
    assert paced.offsets[0] == 0.0
    assert 2.0 < paced.offsets[1] < 3.0
    assert paced.arrivals(1.0) == [n.at_s for n in times]


def test_saturation_is_the_throughput_of_a_backlogged_fleet_until_the_last_tenth() -> None:
    sizes = [4096] * 50 + [16384] * 50
    trace = Trace("t", 64, tuple(Turn(n, 1, i * 5.0) for i, n in enumerate(sizes)))
    work_s = sum(n.floor_s for n in nominal(trace, H100)[:90])
    assert saturation_per_s(trace, H100, 1) == pytest.approx(90 * len(H100) / work_s, rel=0.03)


# --- the floor --------------------------------------------------------------------------------------------------------


def test_the_floor_is_what_an_idle_replica_needs() -> None:
    turns = tuple(Turn(n, 20, i * 60.0) for i, n in enumerate((64, 700, 8192, 8193, 50_000)))
    trace = Trace("t", 64, turns)
    served = Cluster(Scenario(trace, H100, wiring=STATES["exact"]), "round_robin").run().served
    for each, alone in zip(served, nominal(trace, H100), strict=True):
        assert each.ttft_s == pytest.approx(alone.floor_s, rel=0.01)


def test_the_floor_counts_what_the_ideal_cache_holds() -> None:
    chain = ((0, 100),)
    trace = Trace("t", 64, (Turn(6500, 9, 0.0, runs=chain), Turn(6500, 9, 0.1, runs=chain), Turn(6500, 9, 0.2)))
    cold, warm, other = (n.floor_s for n in nominal(trace, H100))
    engine = H100[0].engine
    assert cold == other == pytest.approx(engine.step_time.prefill_s(6500) + engine.cpu_overhead_s)
    assert warm == pytest.approx(engine.step_time.prefill_s(100, 6400) + engine.cpu_overhead_s)


def test_the_ideal_cache_is_bounded_and_keeps_heads() -> None:
    cache = IdealCache(4)
    one, two = Turn(300, 1, 0.0, runs=((0, 3),)), Turn(300, 1, 0.0, runs=((10, 3),))
    assert [cache.serve(turn, 100) for turn in (one, one, two, one)] == [0, 200, 0, 100]


def test_the_floor_of_a_mixed_fleet_lies_between_its_replicas() -> None:
    trace = Trace("t", 64, (Turn(4000, 9, 0.0),))
    fleets = [[Group(gpu="h100")], [Group(gpu="a100")], [Group(gpu="h100"), Group(gpu="a100")]]
    fast, slow, both = (nominal(trace, fleet(groups, "8b", "hbm", 64))[0].floor_s for groups in fleets)
    assert both == pytest.approx(2 / (1 / fast + 1 / slow))


# --- figures ----------------------------------------------------------------------------------------------------------


def served(turn: int, ttft_s: float = 1.0, **changes: Any) -> Served:
    base = Served(turn, 0.0, 0, "r", 1, End.OK, 200, "cost", 0.0, ttft_s, ttft_s + 1.0, 1000, 101, 250, None, None)
    return replace(base, **changes)


def test_what_failed_is_in_no_latency_and_in_no_goodput() -> None:
    every = [served(0, 9.0), served(1), served(2, 3.0), served(3, 0.1, end=End.TIMEOUT)]
    found = figures(every, {1, 2, 3}, Slo(2.0, 0.025))
    assert (found.ttft_mean_s, found.e2e_mean_s) == (2.0, 3.0)
    assert found.goodput == pytest.approx(1 / 3)
    assert (found.errors, found.requests, found.hit) == (1, 3, 0.25)


def test_without_any_answer_latencies_are_infinite() -> None:
    found = figures([served(0, end=End.UNREACHABLE)], {0}, Slo())
    assert found.ttft_mean_s == found.ttft_p99_s == found.e2e_mean_s == math.inf
    assert (found.goodput, found.errors) == (0.0, 1)


def job(cell: Cell, requests: int = 60) -> Job:
    return Job(cell, Source(cell.trace, requests, 4), 1, None, 20.0)


def test_the_first_tenth_is_not_scored_and_the_load_is_as_asked_for() -> None:
    shared = replay(job(Cell("unshared", 0.5)))
    turns = shared.scenario.trace.turns
    order = sorted(range(60), key=lambda n: turns[n].delay_s)
    assert shared.scored == frozenset(order[6:])
    assert 48 / (turns[order[53]].delay_s - turns[order[6]].delay_s) == pytest.approx(10.0, rel=1e-3)
    assert floor_s(shared) == pytest.approx(
        sum(nominal(shared.scenario.trace, shared.scenario.fleet)[n].floor_s for n in order[6:]) / 54
    )


def test_a_failure_comes_at_30_percent_of_the_requests() -> None:
    shared = replay(job(Cell("unshared", fault="dies")))
    dies, joins = shared.scenario.incidents
    before = [sum(t.delay_s <= each.at_s for t in shared.scenario.trace.turns) for each in (dies, joins)]
    assert before == pytest.approx([18, 36], abs=1)
    assert dies.replica == joins.replica


def test_the_bound_is_for_what_one_router_knows_exactly() -> None:
    assert bounded(Cell("chat", 0.9))
    for other in ({"load": 1.1}, {"state": "stale"}, {"routers": 2}, {"fault": "dies"}, {"fleet": "mixed"}):
        assert not bounded(replace(Cell("chat", 0.9), **other))


# --- rows and what sums them up -----------------------------------------------------------------------------------------


def made(cell: Cell, policy: str, ttft: float, e2e: float, goodput: float, errors: int = 0) -> Row:
    seeds = {seed: Figures(ttft * f, 9.0, e2e * f, goodput, 0.5, errors, 50) for seed, f in ((1, 0.5), (2, 1.5))}
    return row(cell, policy, seeds, {1: 0.1, 2: 0.3})


EASY, HARD = Cell("chat", 0.4), Cell("hot", 1.1)
ROWS = [
    made(EASY, OURS, 1.0, 4.0, 0.8),
    made(EASY, "lean", 2.0, 4.0, 0.9),
    made(EASY, "keen", 1.6, 5.0, 0.4, errors=2),
    made(EASY, CLAIRVOYANT, 0.8, 4.0, 0.9),
    made(HARD, OURS, 6.0, 9.0, 0.2),
    made(HARD, "lean", 3.0, 16.0, 0.1),
    made(HARD, "keen", 20.0, 10.0, 0.0, errors=1),
]


def test_a_row_has_means_spread_and_seeds() -> None:
    ours = ROWS[0]
    assert (ours["trace"], ours["load"], ours["policy"]) == ("chat", 0.4, OURS)
    assert (ours["ttft_mean_s"], ours["e2e_mean_s"]) == (1.0, 4.0)
    assert ours["spread"]["ttft_mean_s"] == [0.5, 1.5]
    assert (ours["floor_s"], ours["avoidable_s"]) == pytest.approx((0.2, 0.8))
    assert ours["requests"] == 100
    assert ours["seeds"]["2"]["e2e_mean_s"] == 6.0


def test_ratios_are_against_the_best_single_baseline_and_the_best_of_each_cell() -> None:
    found = summary(ROWS)
    assert found["best_baseline"] == "lean"  # sqrt(2 * 3) < sqrt(1.6 * 20)
    assert found["best_baseline_e2e"] == "keen"  # sqrt(5 * 10) < sqrt(4 * 16)
    assert found["best_baseline_goodput"] == "lean"
    assert found["ttft_geomean_ratio"] == pytest.approx(math.sqrt(0.5 * 2.0))
    assert found["e2e_geomean_ratio"] == pytest.approx(math.sqrt(0.8 * 0.9))
    assert found["goodput_ratio"] == pytest.approx(math.sqrt(0.8 / 0.9 * 2.0))
    assert found["worst_cell_ttft_ratio"] == 2.0
    assert found["worst_cell_e2e_ratio"] == 1.0
    assert found["worst_cell_goodput_ratio"] == pytest.approx(0.8 / 0.9)
    assert found["worst_cells"] == {"ttft_mean_s": str(HARD), "e2e_mean_s": str(EASY), "goodput": str(EASY)}
    assert found["clairvoyant_ttft_gap"] == pytest.approx(0.25)
    assert found["clairvoyant_gaps"] == [{"cell": "chat, 0.4", "gap": pytest.approx(0.25)}]
    assert found["traces"]["hot"]["e2e_mean_s"] == pytest.approx(0.9)


def test_the_gain_is_parted_by_what_cells_have_in_common() -> None:
    mixed, more = replace(EASY, fleet="mixed"), ((OURS, 1.0), ("lean", 4.0), ("keen", 40.0))
    parts = summary([*ROWS, *(made(mixed, policy, ttft, 4.0, 0.8) for policy, ttft in more)])["parts"]
    assert list(parts) == ["fleet", "routers", "state", "fault"]
    assert {value: (each["cells"], each["ttft_mean_s"]) for value, each in parts["fleet"].items()} == {
        "equal": (2, pytest.approx(1.0)),
        "mixed": (1, pytest.approx(0.25)),
    }
    assert parts["routers"]["1"]["cells"] == 3


def test_a_cell_without_goodput_does_not_decide_over_all_others() -> None:
    keen = summary(ROWS)["policies"]["keen"]
    assert keen["goodput"] == pytest.approx(math.sqrt(0.4 / 0.8 * GOODPUT_FLOOR / 0.2))
    assert keen["errors"] == 6


def test_the_page_has_each_cell_and_policy_in_whole_tables() -> None:
    ignorant = [entry("chat", ignorance.STALE, 1.25), entry("hot", ignorance.LENGTHS, 0.5)]
    summed = summary(ROWS) | ignorance.summary(ignorant)
    document = {"cells": ROWS, "summary": summed, "ignorance": ignorant}
    text = page.markdown(document, "python -m tests.bench.routing")
    cells = (
        str(EASY),
        str(HARD),
        "1.00 ±0.50",
        "2.000 (2.00 to 2.00)",
        "| hot | 1 | 2.000 |",
        "| fault none | 2 | 1.000 |",
    )
    costs = ("| chat | equal | stale | 1.250 (1.00 to 1.50) |", "| known lengths | 0.500 | 0.500 |")
    for name in (OURS, "lean", "keen", *cells, *costs):
        assert name in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5 + 2 + 2 * 3
    for block in tables:
        assert len({line.count("|") for line in block.strip().splitlines()}) == 1, block


# --- ignorance --------------------------------------------------------------------------------------------------------


def entry(trace: str, what: str, ttft: float) -> ignorance.Entry:
    spread = {measure: [ttft - 0.25, ttft + 0.25] for measure in ignorance.RATIOS}
    ratios = {"ttft_ratio": ttft, "e2e_ratio": 1.0, "goodput_ratio": 1.0}
    return {"trace": trace, "fleet": "equal", "what": what, **ratios, "spread": spread}


def test_every_second_replica_has_a_wrong_prior() -> None:
    specs = fleet([Group(gpu="h100", count=5)], "8b", "hbm", 64)
    trace = Trace("t", 64, (Turn(100, 1, 0.0),))
    priors = {}
    for every in (1, 2):
        wiring = Wiring(prior_error=2.0, prior_error_every=every)
        router = Cluster(Scenario(trace, specs, wiring=wiring), "random").run().sidecars[0].router
        speeds = {member.replica.address: member.speed.prior.g for _, member in router.members()}
        priors[every] = [speeds[spec.replica.address] / spec.engine.step_time.g for spec in specs]
    assert priors == {1: [2.0] * 5, 2: [1.0, 2.0, 1.0, 2.0, 1.0]}


def test_what_is_tried_in_which_fleet() -> None:
    one, two = (Job(cell, Source("unshared", 40, 4), 1, OURS, 20.0) for cell in ignorance.bases(["unshared"]))
    assert (one.cell, two.cell) == (Cell("unshared"), Cell("unshared", fleet="mixed"))
    assert set(ignorance.compare(one)) == set(ignorance.VARIANTS)
    assert set(ignorance.compare(two)) == {*ignorance.WRONG, ignorance.HALF_WRONG}


@pytest.mark.parametrize(("requests", "learned"), [(750, 300), (60, 30)])
def test_wrong_priors_are_scored_when_there_was_time_to_learn(requests: int, learned: int) -> None:
    trace = Trace("t", 64, (Turn(100, 1, 0.0),) * requests)
    shared = Replay(Scenario(trace, H100), tuple(reversed(range(requests))))
    wrong, stale = (ignorance.scored(shared, ignorance.VARIANTS[w]) for w in (ignorance.HALF_WRONG, ignorance.STALE))
    assert wrong == set(range(requests - learned))
    assert stale == shared.scored == set(range(requests - requests // 10))


def test_each_variant_changes_one_thing_and_is_compared_with_the_cell_as_it_is() -> None:
    job = Job(Cell("unshared"), Source("unshared", 120, 4), 1, OURS, 60.0)
    found = ignorance.compare(job)
    shared = replay(replace(job, policy=None))
    assert found[ignorance.STALE].exact == run(job)
    assert found[ignorance.LENGTHS].exact == run(job)
    assert found[ignorance.STALE].changed == run(replace(job, cell=Cell("unshared", state="stale")))
    told = Cluster(replace(shared.scenario, oracle_lengths=True), OURS).run().served
    assert found[ignorance.LENGTHS].changed == figures(told, shared.scored, SLOS["8b"])
    seen = [pair.changed for pair in found.values()]
    assert all(one != two for place, one in enumerate(seen) for two in seen[:place])


def test_the_ratios_of_an_entry_are_the_changed_over_the_exact() -> None:
    def pair(changed: float, exact: float) -> ignorance.Pair:
        one, two = (Figures(ttft, 9.0, 2 * ttft, ttft / 10, 0.5, 0, 50) for ttft in (changed, exact))
        return ignorance.Pair(one, two)

    found = ignorance.entries(EASY, [{"stale": pair(3.0, 1.0)}, {"stale": pair(3.0, 2.0)}])
    assert found == [
        {
            "trace": "chat",
            "fleet": "equal",
            "what": "stale",
            "ttft_ratio": 2.0,
            "e2e_ratio": 2.0,
            "goodput_ratio": pytest.approx(2.0),
            "spread": {m: pytest.approx([1.5, 3.0]) for m in ("ttft_mean_s", "e2e_mean_s", "goodput")},
        }
    ]


def test_ignorance_is_summed_up_by_its_worst_and_its_mean() -> None:
    whats = ((ignorance.STALE, 1.0), (ignorance.STALE, 4.0), (ignorance.WRONG[0], 1.1), (ignorance.WRONG[1], 1.2))
    found = ignorance.summary([entry("chat", what, ttft) for what, ttft in whats])
    assert (found["stale_ttft_ratio"], found["wrong_prior_ttft_ratio"]) == (4.0, 1.2)
    assert found["stale_ttft_geomean_ratio"] == pytest.approx(2.0)
    assert "half_wrong_prior_ttft_ratio" not in found
    assert ignorance.summary([]) == {}


def test_cells_picked_pick_their_ignorance() -> None:
    def cells(*words: str) -> list[Cell]:
        return list(routing._plan(routing._parser().parse_args([*words])).ignorance)

    assert len(cells()) == 2 * 4
    assert cells("--only", "trace=chat,load=0.8") == ignorance.bases(["chat"])
    assert cells("--only", "trace=chat,load=0.9") == []


# --- the whole, small -------------------------------------------------------------------------------------------------

CELL_KEYS = "trace load cache state routers fleet fault policy ttft_mean_s ttft_p99_s e2e_mean_s goodput hit"
SUMMARY_KEYS = (
    "best_baseline ttft_geomean_ratio e2e_geomean_ratio goodput_ratio worst_cell_ttft_ratio worst_cell_e2e_ratio "
    "clairvoyant_ttft_gap"
)
PLAN = routing.Plan(
    {"unshared": Source("unshared", 60, 4)}, [Cell("unshared", 0.9)], (OURS, "round_robin"), range(1, 3)
)


def backwards(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    done = [function(job) for job in reversed(jobs)]
    yield from reversed(done)


def test_the_document_has_what_is_asked_for_whatever_the_order_of_the_runs() -> None:
    document = routing.measure(PLAN, routing.in_process)
    assert [cell["policy"] for cell in document["cells"]] == [OURS, "round_robin"]
    for cell in document["cells"]:
        assert set(CELL_KEYS.split()) | {"errors", "floor_s", "avoidable_s", "seeds"} <= set(cell)
        assert set(cell["seeds"]) == {"1", "2"}
        assert 0 < cell["floor_s"] < cell["ttft_mean_s"] < cell["e2e_mean_s"]
    assert set(SUMMARY_KEYS.split()) <= set(document["summary"])
    assert document["summary"]["best_baseline"] == "round_robin"
    assert routing.measure(PLAN, backwards) == document


def test_the_document_has_what_ignorance_costs() -> None:
    plan = replace(PLAN, ignorance=ignorance.bases(["unshared"]))
    document = routing.measure(plan, routing.in_process)
    whats = [(each["trace"], each["fleet"], each["what"]) for each in document["ignorance"]]
    mixed = (*ignorance.WRONG, ignorance.HALF_WRONG)
    assert whats == [("unshared", f, w) for f, ws in (("equal", ignorance.VARIANTS), ("mixed", mixed)) for w in ws]
    assert all(0.5 < each[key] < 2 for each in document["ignorance"] for key in ignorance.RATIOS.values())
    assert {"stale_ttft_ratio", "wrong_prior_ttft_ratio"} <= set(document["summary"])
    assert routing.measure(plan, backwards) == document
    assert list(page.console_ignorance(document["ignorance"]).columns[2].cells) == [what for _, _, what in whats]


def test_the_bound_is_below_the_policies_and_above_the_floor() -> None:
    document = routing.measure(replace(PLAN, seeds=(1,), evaluations=200), routing.in_process)
    ours, other, bound = document["cells"]
    assert bound["policy"] == CLAIRVOYANT
    assert 0.99 * bound["floor_s"] < bound["ttft_mean_s"] <= min(ours["ttft_mean_s"], other["ttft_mean_s"])
    assert document["summary"]["clairvoyant_ttft_gap"] == pytest.approx(ours["ttft_mean_s"] / bound["ttft_mean_s"] - 1)


def test_sessions_have_no_bound() -> None:
    plan = routing.Plan({"hot": Source("hot", 40, 4)}, [Cell("hot", 0.4)], (OURS, "random"), (1,), evaluations=10)
    assert [cell["policy"] for cell in routing.measure(plan, routing.in_process)["cells"]] == [OURS, "random"]


def test_rows_come_in_the_order_of_cells_and_policies() -> None:
    plan = replace(PLAN, cells=[EASY, HARD], policies=(OURS, "keen", "lean"))
    rows = routing._in_order(reversed(ROWS), plan)
    assert {cell: list(group) for cell, group in groups(rows).items()} == {
        EASY: [OURS, "keen", "lean", CLAIRVOYANT],
        HARD: [OURS, "keen", "lean"],
    }


def test_a_file_that_is_not_there_names_public_sources(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="kvcache-ai/Mooncake"):
        routing.sources(routing.QUICK, tmp_path, [])
    assert next(iter(routing.sources(routing.QUICK, None, [mooncake(tmp_path)]))) == "mooncake_conversation"


def test_the_command_of_the_page_names_no_folder_of_the_machine() -> None:
    words = ["--traces", "/data/t", "--full", "--docs=docs/x.md", "--jobs", "9", "--only", "load=0.9"]
    assert routing.command(words) == "python -m tests.bench.routing --traces DIR --full --only load=0.9"


def test_what_is_infinite_becomes_null() -> None:
    assert routing.finite({"a": [math.inf, 1 / 3], "b": 2}) == {"a": [None, 0.333333], "b": 2}


def test_a_sample_of_the_product_is_the_same_each_time_and_fair_to_traces() -> None:
    chosen = sample(["chat", "hot", "unshared"], 20)
    assert chosen == sample(["chat", "hot", "unshared"], 20)
    assert [sum(c.trace == t for c in chosen) for t in ("chat", "hot", "unshared")] == [7, 7, 6]
    assert len(set(chosen)) == 20
    assert set(chosen) <= set(full(["chat", "hot", "unshared"]))
    assert len({c.fleet for c in chosen}) == 2
    assert len({c.routers for c in chosen}) == 3
