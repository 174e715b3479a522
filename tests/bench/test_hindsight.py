"""The search for the best assignment in hindsight: its simulation must be the cluster's, and its gains real."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from extproc.core.fleet import Member
from extproc.core.policies.base import REGISTRY, Ranking, Stateless, Terms
from extproc.core.prediction import Ask
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.engine import EngineRequest, _Sequence
from extproc.sim.fleet_spec import Group, nodes
from extproc.sim.incidents import checked, incident
from extproc.sim.sidecar import NO_QUEUE, Wiring
from extproc.sim.traces import Generate, Trace, Turn, generate
from tests.bench.hindsight import Bound, hindsight, unloaded_ttft_s
from tests.bench.hindsight_fleet import Placement, Problem
from tests.bench.hindsight_greedy import exact_greedy
from tests.bench.hindsight_moves import Kinship, Proposer
from tests.bench.hindsight_replica import Arrival, Replica

UNSEEN = Wiring(scrape_interval_s=1e9, scrape_idle_interval_s=1e9, progress_interval_s=None, queue=NO_QUEUE)
"""Nobody looks at a replica while it runs: looking splits sums, which changes their last bits."""


def open_loop(trace: Trace) -> Trace:
    """The same turns by the clock: each as if the answers before had taken 2 s."""
    at: list[float] = []
    for turn in trace.turns:
        at.append(turn.delay_s + (0.0 if turn.after is None else at[turn.after] + 2.0))
    turns = zip(trace.turns, at, strict=True)
    return replace(trace, turns=tuple(replace(turn, delay_s=at_s, after=None) for turn, at_s in turns))


TRACE = open_loop(generate(Generate(sessions=50, sessions_per_s=8.0), 1))


def scenario(trace: Trace = TRACE, replicas: int = 3, kv_tokens: int = 60_000, wiring: Wiring = UNSEEN) -> Scenario:
    group = Group(gpu="a100", count=replicas, kv_tokens=kv_tokens)
    return Scenario(trace, nodes([group], "8b", trace.block_size, 0.002), wiring=wiring)


def address(place: int) -> str:
    return f"10.0.0.{place}:8000"


def assigned(result: Result) -> list[str]:
    return [served.replica or "" for served in sorted(result.served, key=lambda s: s.turn)]


def times(result: Result) -> list[tuple[float | None, float, int | None]]:
    return [(s.ttft_s, s.e2e_s, s.cached_tokens) for s in sorted(result.served, key=lambda s: s.turn)]


def found(bound: Bound) -> list[tuple[float, float, int]]:
    return list(zip(bound.ttft_s, bound.e2e_s, bound.cached_tokens, strict=True))


def judged(setting: Scenario, assignment: Sequence[str]) -> Bound:
    """What comes of an assignment as it is."""
    return hindsight(setting, [assignment], max_evaluations=0)


@dataclass(slots=True)
class _Replayed(Stateless):
    """Routes as recorded: addresses in the order of arrival, joined by commas."""

    name = "replayed"
    addresses: str = ""
    _left: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self._left = iter(self.addresses.split(","))

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        chosen = next(self._left)
        return Ranking(
            [(float(m.replica.address != chosen), m) for m in members if m.replica.address == chosen], "told"
        )

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {}


@pytest.fixture
def replayed() -> Iterator[str]:
    REGISTRY["replayed"] = _Replayed
    yield "replayed"
    del REGISTRY["replayed"]


def replay(setting: Scenario, assignment: Sequence[str], policy: str) -> Result:
    turns = sorted(range(len(assignment)), key=lambda n: (setting.trace.turns[n].delay_s, n))
    return Cluster(setting, policy, {"addresses": ",".join(assignment[n] for n in turns)}).run()


# --- the simulation of one replica ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["random", "predicted", "round_robin"])
@pytest.mark.parametrize("kv_tokens", [60_000, 20_000, 400_000])
def test_an_assignment_gives_the_times_that_it_gave_in_the_cluster_to_the_last_bit(policy: str, kv_tokens: int) -> None:
    setting = scenario(kv_tokens=kv_tokens)
    result = Cluster(setting, policy).run()
    assert found(judged(setting, assigned(result))) == times(result)


def test_with_20_000_tokens_of_cache_sequences_are_preempted_so_that_path_is_compared_too() -> None:
    assert sum(node.totals.preemptions for node in Cluster(scenario(kv_tokens=20_000), "random").run().nodes) > 0


def test_a_cluster_that_looks_at_its_replicas_differs_by_rounding_alone() -> None:
    result = Cluster(scenario(wiring=Wiring(queue=NO_QUEUE)), "predicted").run()
    bound = judged(scenario(), assigned(result))
    assert bound.ttft_s == pytest.approx([s.ttft_s for s in sorted(result.served, key=lambda s: s.turn)], abs=1e-9)


def test_arrivals_of_one_moment_are_served_in_the_order_of_the_trace() -> None:
    bursts = Trace("bursts", 64, tuple(Turn(3000 - 7 * i, 5 + i % 3, float(i // 12)) for i in reversed(range(60))))
    setting = scenario(bursts)
    result = Cluster(setting, "random").run()
    assert found(judged(setting, assigned(result))) == times(result)


def test_a_copy_goes_on_as_the_original_does_and_neither_disturbs_the_other() -> None:
    arrivals = Problem.of(scenario(kv_tokens=20_000)).arrivals[:70]
    config = scenario(kv_tokens=20_000).fleet[0].engine
    alone = Replica(config)
    feed(alone, arrivals)
    for cut in range(0, len(arrivals), 7):
        original = Replica(config)
        feed(original, arrivals[:cut], until_s=arrivals[cut].at_s)
        copies = [original.copy(), original.copy()]
        feed(copies[0], arrivals[cut:])
        feed(original, arrivals[cut:])
        feed(copies[1], arrivals[cut:])
        for each in (original, *copies):
            assert each.last_s.items() <= alone.last_s.items()
            assert each.last_s[len(arrivals) - 1] == alone.last_s[len(arrivals) - 1]


def feed(replica: Replica, arrivals: Sequence[Arrival], until_s: float = math.inf) -> None:
    for arrival in arrivals:
        replica.advance(arrival.at_s)
        replica.arrive(arrival)
    replica.advance(until_s)


def test_a_copy_shares_nothing_that_changes() -> None:
    # The copy is made by hand: what the engine learns to remember must be copied there too.
    setting = scenario(kv_tokens=20_000)
    original = Replica(setting.fleet[0].engine)
    feed(original, Problem.of(setting).arrivals[:40], until_s=Problem.of(setting).arrivals[40].at_s)
    mine, theirs = changing(original), changing(original.copy())
    assert len(mine) > 20
    assert [mine[i] for i in mine.keys() & theirs.keys()] == []


def changing(root: object) -> dict[int, object]:
    """Every object below `root` that can change, by its identity."""
    reached: dict[int, object] = {}
    left: list[object] = [root]
    while left:
        each = left.pop()
        if id(each) in reached or isinstance(each, int | float | str | tuple | EngineRequest | type(None)):
            left += each if isinstance(each, tuple) else []
            continue
        reached[id(each)] = each
        if isinstance(each, dict):
            left += [*each, *each.values()]
        elif isinstance(each, list):
            left += each
        else:
            left += [getattr(each, name) for name in attributes(each)]
    unchanging = ("EngineConfig", "StepTime", "_State", "Copy")
    return {i: each for i, each in reached.items() if type(each).__name__ not in unchanging}


def attributes(each: object) -> list[str]:
    if type(each).__name__ in ("EngineConfig", "StepTime", "_State", "Copy"):
        return []
    return [*getattr(type(each), "__slots__", ()), *getattr(each, "__dict__", {})]


def test_the_walk_over_a_replica_finds_its_sequences() -> None:
    replica = Replica(scenario().fleet[0].engine)
    replica.arrive(Arrival(0.0, EngineRequest(0, 100, 10, (1,))))
    assert [type(each) for each in changing(replica).values()].count(_Sequence) == 1


# --- changes of an assignment -----------------------------------------------------------------------------------------


def test_each_change_that_was_made_is_the_difference_of_two_whole_simulations() -> None:
    problem = Problem.of(scenario())
    rng = Random(1)
    placement = Placement(problem, [rng.randrange(3) for _ in problem.arrivals])
    for _ in range(40):
        before_s = placement.objective_s
        moves = [(rank, rng.randrange(3)) for rank in rng.sample(range(len(problem.arrivals)), 3)]
        change_s = placement.attempt(moves, math.inf)
        assert change_s is not None
        anew = Placement(problem, placement.places)
        assert (placement.first_s, placement.last_s, placement.cached) == (anew.first_s, anew.last_s, anew.cached)
        assert anew.objective_s - before_s == pytest.approx(change_s, abs=1e-7)
        assert placement.queues == anew.queues


def test_a_change_that_does_not_pay_leaves_no_trace() -> None:
    problem = Problem.of(scenario())
    placement = Placement(problem, [rank % 3 for rank in range(len(problem.arrivals))])
    was = placement.places.copy(), placement.first_s.copy(), [queue.copy() for queue in placement.queues]
    assert placement.attempt([(5, 0), (6, 0), (7, 0)], -math.inf) is None
    assert placement.attempt([(5, 0), (6, 0), (7, 0)], -1e9, (1.0, 2.0)) is None
    assert (placement.places, placement.first_s, placement.queues) == was


def test_the_change_up_to_a_horizon_is_the_waiting_that_was_added_until_then() -> None:
    # Six equal requests of one step each come together to one replica; the last of them moves to the idle one.
    turns = tuple(Turn(8192, 1, 0.0) for _ in range(6))
    problem = Problem.of(scenario(Trace("six", 64, turns), replicas=2))
    placement = Placement(problem, [0] * 6)
    alone_s, last_s = placement.first_s[0], placement.first_s[5]
    trial, other = placement._trials([(5, 1)])
    assert trial.change_s(alone_s / 2) == pytest.approx(-alone_s / 2)
    assert other.change_s(alone_s / 2) == pytest.approx(alone_s / 2)
    assert trial.change_s(2.5 * alone_s) + other.change_s(2.5 * alone_s) == pytest.approx(-1.5 * alone_s)
    assert trial.change_s(math.inf) + other.change_s(math.inf) == pytest.approx(alone_s - last_s)


def test_relatives_are_found_by_their_longest_prefix() -> None:
    runs = ([(0, 20)], [(0, 20), (100, 5)], [(0, 20), (100, 5), (200, 5)], [(0, 2), (300, 9)], [(400, 20)])
    turns = tuple(Turn(64 * sum(n for _, n in run) + 9, 4, float(i), runs=tuple(run)) for i, run in enumerate(runs))
    kin = Kinship.of(Problem.of(scenario(Trace("kin", 64, turns))))
    assert kin.parents == (None, 0, 1, 2, None)
    assert kin.shared == (0, 20 * 64, 25 * 64, 2 * 64, 0)
    assert kin.line(0) == [0, 1, 2]  # two blocks in common make no relative


def test_every_kind_of_proposal_is_drawn_and_moves_somebody() -> None:
    problem = Problem.of(scenario())
    placement = Placement(problem, [rank % 3 for rank in range(len(problem.arrivals))])
    proposer = Proposer(placement, Random(1))
    drawn = [proposer.draw() for _ in range(400)]
    assert {proposal.kind for proposal in drawn} == {"move", "swap", "join", "family"}
    for proposal in drawn:
        assert all(placement.places[rank] != to for rank, to in proposal.moves)
        assert len({rank for rank, _ in proposal.moves}) == len(proposal.moves)


# --- the search -------------------------------------------------------------------------------------------------------


def test_what_was_found_is_what_a_cluster_makes_of_it_and_better_than_the_start(replayed: str) -> None:
    setting = scenario()
    start = assigned(Cluster(setting, "predicted").run())
    bound = hindsight(setting, [start], max_evaluations=1500)
    assert found(bound) == times(replay(setting, bound.assignment, replayed))
    assert sum(bound.ttft_s) < 0.97 * sum(judged(setting, start).ttft_s)
    assert sum(bound.improved_by.values()) > 0
    assert bound.evaluations >= 1500


def test_it_finds_the_best_of_all_assignments_of_a_small_trace() -> None:
    turns = tuple(Turn(tokens, 3, 0.1 * i) for i, tokens in enumerate((9000, 9000, 500, 500, 7000, 300, 12_000, 400)))
    problem = Problem.of(scenario(Trace("small", 64, turns), replicas=2))
    least_s = min(
        Placement(problem, [choice >> rank & 1 for rank in range(8)]).objective_s for choice in range(2 ** len(turns))
    )
    bound = hindsight(scenario(Trace("small", 64, turns), replicas=2), [[address(1)] * 8], max_evaluations=1200)
    assert sum(bound.ttft_s) == pytest.approx(least_s, abs=1e-9)


def test_it_moves_a_family_that_pays_only_as_a_whole() -> None:
    # Two chats share one replica whose cache holds only one of them; the other replica serves nobody.
    turns = tuple(
        Turn(14_000 + 64 * i, 4, 4.0 * i + 2.0 * chat, runs=((1000 * (chat + 1), 218 + i),))
        for i in range(12)
        for chat in (0, 1)
    )
    setting = scenario(Trace("chats", 64, turns), replicas=2, kv_tokens=20_000)
    bound = hindsight(setting, [[address(1)] * len(turns)], max_evaluations=300)
    assert bound.cached_tokens.count(0) == 2
    assert {len(set(bound.assignment[chat::2])) for chat in (0, 1)} == {1}


def test_equal_arguments_give_equal_results_and_another_seed_another_way() -> None:
    start = [address(1 + n % 3) for n in range(len(TRACE.turns))]
    one, two, other = (hindsight(scenario(), [start], 400, seed) for seed in (1, 1, 2))
    assert one == two
    assert one.assignment != other.assignment


def test_the_best_start_is_taken_and_never_lost() -> None:
    setting = scenario()
    bad, good = [address(1)] * len(TRACE.turns), assigned(Cluster(setting, "predicted").run())
    assert sum(judged(setting, bad).ttft_s) > 2 * sum(judged(setting, good).ttft_s)
    bound = hindsight(setting, [bad, good], max_evaluations=40)
    assert sum(bound.ttft_s) <= sum(judged(setting, good).ttft_s)


def test_only_scored_turns_count() -> None:
    setting = scenario()
    start = [address(1 + n % 3) for n in range(len(TRACE.turns))]
    scored = range(60, 90)
    bound, other = (hindsight(setting, [start], 600, scored=s) for s in (scored, range(30)))
    assert sum(bound.ttft_s[n] for n in scored) < 0.85 * sum(other.ttft_s[n] for n in scored)
    assert bound.curve[-1][1] == pytest.approx(sum(bound.ttft_s[n] for n in scored) / len(scored))


def test_end_to_end_time_can_count_too() -> None:
    setting = scenario()
    start = [address(1 + n % 3) for n in range(len(TRACE.turns))]
    bound = hindsight(setting, [start], 600, e2e_weight=1.0)
    assert bound.curve[0][1] > bound.curve[-1][1]
    assert bound.curve[-1][1] * len(TRACE.turns) == pytest.approx(sum(bound.ttft_s) + sum(bound.e2e_s))


def test_the_curve_falls_and_progress_hears_of_it() -> None:
    told: list[tuple[int, float]] = []
    bound = hindsight(scenario(), (), 500, progress=lambda *point: told.append(point))
    assert told == bound.curve
    assert [mean_s for _, mean_s in told] == sorted((mean_s for _, mean_s in told), reverse=True)
    assert 15 <= len(told) <= 22


@pytest.mark.parametrize(
    ("setting", "starts"),
    [
        (scenario(generate(Generate(sessions=5), 1)), []),
        (replace(scenario(), incidents=checked([incident("5:1:dies")], 3)), []),
        (scenario(), [["10.9.9.9:1"] * len(TRACE.turns)]),
        (scenario(), [[address(1)]]),
        (scenario(Trace("long", 64, (Turn(70_000, 5, 0.0),))), []),
    ],
    ids=["turns that wait", "incidents", "unknown address", "too few addresses", "a request that fits nowhere"],
)
def test_what_it_cannot_do_it_says(setting: Scenario, starts: list[list[str]]) -> None:
    with pytest.raises(ValueError):
        hindsight(setting, starts, 10)


def test_nobody_is_below_the_unloaded_times_and_who_is_alone_reaches_them() -> None:
    setting = scenario(kv_tokens=400_000)
    floor_s = unloaded_ttft_s(setting)
    bound = hindsight(setting, (), 300)
    assert all(ttft_s >= least_s - 1e-9 for ttft_s, least_s in zip(bound.ttft_s, floor_s, strict=True))
    again = Turn(20_000, 3, 50.0, runs=((0, 200),))
    alone = scenario(Trace("alone", 64, (Turn(20_000, 3, 0.0, runs=((0, 300),)), again, Turn(100, 1, 99.0))))
    times_s = judged(alone, [address(1)] * 3).ttft_s
    assert times_s == pytest.approx(unloaded_ttft_s(alone))
    assert times_s[1] < times_s[0]


def test_one_replica_or_no_request_leaves_nothing_to_search() -> None:
    assert hindsight(scenario(replicas=1), (), 100).evaluations == 0
    assert hindsight(scenario(Trace("none", 64, ())), (), 100).ttft_s == []


# --- the exact greedy choice ------------------------------------------------------------------------------------------


def test_the_exact_greedy_choice_is_far_better_than_dealing_in_turn() -> None:
    setting = scenario()
    dealt = assigned(Cluster(setting, "round_robin").run())
    assert sum(judged(setting, exact_greedy(setting)).ttft_s) < 0.8 * sum(judged(setting, dealt).ttft_s)


def test_the_exact_greedy_choice_weighs_what_it_adds_to_others() -> None:
    # Twenty short prompts wait for the end of a step. The last request would be sooner among them, and would hold up all
    # of them; where the long prompt is, it holds up nobody.
    short = tuple(Turn(100, 2, 0.1 + 0.001 * i) for i in range(20))
    turns = (Turn(8192, 2, 0.0), Turn(24_000, 2, 0.0), *short, Turn(6000, 2, 0.2))
    setting = scenario(Trace("t", 64, turns), replicas=2)
    chosen = exact_greedy(setting)
    assert chosen[:-1] == [address(1), address(2), *[address(1)] * 20]
    assert chosen[-1] == address(2)
    assert judged(setting, chosen).ttft_s[-1] > judged(setting, [*chosen[:-1], address(1)]).ttft_s[-1]


def test_the_exact_greedy_choice_takes_the_replica_that_did_least_where_several_are_idle() -> None:
    turns = tuple(Turn(300, 2, 10.0 * i) for i in range(6))
    assert exact_greedy(scenario(Trace("t", 64, turns))) == [address(1), address(2), address(3)] * 2


def test_the_exact_greedy_choice_goes_to_the_prefix_where_that_is_sooner() -> None:
    again = Turn(8000, 2, 5.0, runs=((0, 125),))
    turns = (Turn(300, 2, 0.0), Turn(8000, 2, 0.1, runs=((0, 125),)), again, replace(again, delay_s=9.0))
    chosen = exact_greedy(scenario(Trace("t", 64, turns)))
    assert chosen[1] == chosen[2] == chosen[3] != chosen[0]
