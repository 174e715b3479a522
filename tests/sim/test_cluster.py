"""The cluster: clients, proxy, routers and replicas in virtual time."""

from __future__ import annotations

from math import log
from statistics import pstdev

import pytest

from extproc.config import ConfigError
from extproc.core.types import End, Refusal
from extproc.sim.cluster import IDLE_TIMEOUT_S, Cluster, Result, Scenario, Served
from extproc.sim.fleet_spec import Group, nodes
from extproc.sim.incidents import IncidentError, checked, incident
from extproc.sim.node import NodeSpec
from extproc.sim.sidecar import NO_QUEUE, POOL, Wiring
from extproc.sim.simulate_report import digest
from extproc.sim.traces import Generate, Trace, Turn, generate

TRACE = generate(Generate(sessions=60, sessions_per_s=4.0), 1)
ALL_POLICIES = ("predicted", "least_request", "round_robin", "random", "prefix_affinity", "token_aware", "least_queue")


def fleet(count: int = 3, block_size: int = 64, gpu: str = "h100") -> tuple[NodeSpec, ...]:
    return nodes([Group(gpu=gpu, count=count)], "8b", block_size, 0.002)


def run(trace: Trace = TRACE, policy: str = "predicted", incidents: tuple[str, ...] = (), **changes: object) -> Result:
    replicas = fleet()
    befall = checked(map(incident, incidents), len(replicas))
    scenario = Scenario(trace, replicas, incidents=befall, **changes)  # type: ignore[arg-type]
    return Cluster(scenario, policy).run()


def steady(requests: int = 120, every_s: float = 0.5, output: int = 200) -> Trace:
    return Trace("steady", 64, tuple(Turn(2000, output, i * every_s) for i in range(requests)))


def by_turn(result: Result) -> list[Served]:
    return sorted(result.served, key=lambda s: s.turn)


def address(place: int) -> str:
    return f"10.0.0.{place}:8000"


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_every_request_ends_once_and_the_books_balance(policy: str) -> None:
    result = run(policy=policy)  # checks routers and engines at its end
    assert sorted(s.turn for s in result.served) == list(range(len(TRACE.turns)))
    assert {s.end for s in result.served} == {End.OK}
    for served in result.served:
        assert served.output_tokens == TRACE.turns[served.turn].output_tokens
        assert served.queue_s is not None
        assert served.ttft_s is not None
        assert 0 <= served.queue_s < served.ttft_s <= served.e2e_s


@pytest.mark.parametrize("policy", ["predicted", "random"])
def test_the_same_seed_gives_the_same_log(policy: str) -> None:
    one, two = (run(policy=policy, incidents=("5:1:dies", "9:1:joins")) for _ in range(2))
    assert digest(one.served) == digest(two.served)
    assert digest(run(policy="random", seed=2).served) != digest(run(policy="random").served)


def test_replicas_count_what_the_routers_sent() -> None:
    result = run()
    assert sum(n.totals.requests for n in result.nodes) == len(TRACE.turns)
    assert sum(n.totals.generated_tokens for n in result.nodes) == sum(t.output_tokens for t in TRACE.turns)
    for node in result.nodes:
        assert 0 < node.totals.busy_s <= result.lasted_s


def test_a_turn_comes_its_pause_after_the_answer_before() -> None:
    done = by_turn(run())
    for served, turn in zip(done, TRACE.turns, strict=True):
        if turn.after is None:
            assert served.arrived_s == pytest.approx(turn.delay_s)
        else:
            before = done[turn.after]
            assert served.arrived_s == pytest.approx(before.arrived_s + before.e2e_s + turn.delay_s)


def test_prefixes_are_found_again_and_predicted() -> None:
    done = run().served
    cached, predicted = (sum(getattr(s, k) or 0 for s in done) for k in ("cached_tokens", "predicted_cached_tokens"))
    assert cached > 0.3 * sum(s.prompt_tokens for s in done)
    assert 0.5 * cached < predicted <= 1.05 * cached


def test_smaller_engine_blocks_find_at_least_as_much() -> None:
    coarse = Trace("coarse", 512, tuple(Turn(5000, 50, i * 2.0, runs=((0, 9),)) for i in range(10)))
    hits = []
    for block_size in (512, 16):
        result = Cluster(Scenario(coarse, fleet(1, block_size)), "predicted").run()
        hits.append([s.cached_tokens for s in by_turn(result)])
    assert hits[0] == hits[1] == [0] + [4608] * 9


def test_block_sizes_must_divide_those_of_the_trace() -> None:
    with pytest.raises(ValueError, match="divides 64"):
        Cluster(Scenario(TRACE, fleet(1, 48)), "predicted")


def test_true_lengths_are_told_only_when_asked_for() -> None:
    assert digest(run(oracle_lengths=True).served) != digest(run().served)


# --- routers and their wiring -----------------------------------------------------------------------------------------


def test_requests_are_dealt_to_the_routers_in_turn_and_each_learns_of_its_own() -> None:
    result = run(steady(), routers=3)
    assert [s.router for s in by_turn(result)] == [i % 3 for i in range(120)]
    assert [s.router.ledger.opened for s in result.sidecars] == [40, 40, 40]


def test_routers_that_do_not_talk_see_each_others_requests_in_the_samples_alone() -> None:
    cluster = Cluster(Scenario(steady(), fleet(1), routers=2), "predicted")
    while cluster._timeline.now < 20:
        cluster._timeline.step()
    assert all(m.strangers for s in cluster._sidecars for _, m in s.router.members())


def test_ends_reach_the_router_with_the_next_flush_of_the_log() -> None:
    trace = Trace("one", 64, (Turn(2000, 3, 1.02), Turn(2000, 3, 10.0)))
    for wiring, late in ((Wiring(log_flush_interval_s=0.5, completion_delay_s=2.0), 1), (Wiring(), 0)):
        cluster = Cluster(Scenario(trace, fleet(1), wiring=wiring), "predicted")
        router, timeline = cluster._sidecars[0].router, cluster._timeline
        while timeline.now < 3.4:  # the answer came at about 1.1 and is flushed at 1.5
            timeline.step()
        assert router.in_flight == late


@pytest.mark.parametrize(("age", "seen"), [(0.0, True), (3.0, False)])
def test_samples_arrive_late_when_asked_for(age: float, seen: bool) -> None:
    cluster = Cluster(Scenario(steady(), fleet(1), wiring=Wiring(scrape_age_s=age)), "predicted")
    while cluster._timeline.now < 2.5:
        cluster._timeline.step()
    member = cluster._sidecars[0].router.pools[POOL].fleet.get(address(1))
    assert member is not None
    assert (member.sample is not None) is seen


def test_a_wrong_prior_is_learned_away() -> None:
    result = run(steady(300), "round_robin", wiring=Wiring(prior_error=4.0))
    for _, member in result.sidecars[0].router.members():
        assert member.speed.decode_factor == pytest.approx(0.25, rel=0.35)  # the engine's CPU time lies on top
        assert member.speed.prefill_factor < 0.6


def test_misjudged_prompts_seem_longer_or_shorter_by_their_own_factor_and_hits_stay_shares() -> None:
    blocks = tuple(((1, 30), (100 + i, 1)) for i in range(200))
    trace = Trace("shared", 64, tuple(Turn(2000, 20, i * 1.0, runs=runs) for i, runs in enumerate(blocks)))
    exact, wrong, again, other = (
        run(trace, wiring=Wiring(estimate_error=error), seed=seed)
        for error, seed in ((0.0, 1), (0.3, 1), (0.3, 1), (0.3, 2))
    )
    assert digest(wrong.served) == digest(again.served)
    assert digest(other.served) != digest(wrong.served)
    factors = [w.predicted_cached_tokens / 1920 for w in by_turn(wrong)[20:] if w.predicted_cached_tokens]
    assert len(factors) > 150
    assert pstdev(map(log, factors)) == pytest.approx(0.3, abs=0.06)
    assert {s.predicted_cached_tokens for s in by_turn(exact)[20:]} <= {0, 1920}
    assert [s.cached_tokens for s in by_turn(wrong)[20:]] == [1920] * 180


def test_a_prompt_is_misjudged_alike_whatever_the_policy() -> None:
    wiring = Wiring(estimate_error=0.3)
    clusters = [Cluster(Scenario(TRACE, fleet(), wiring=wiring), policy) for policy in ("predicted", "random")]
    turn = TRACE.turns[7]
    one, two = (cluster._request(7, turn, turn.hashes()) for cluster in clusters)
    assert one == two
    assert one.prompt_bytes != 4 * turn.prompt_tokens
    assert one.prompt_bytes is not None
    scale = one.prompt_bytes / (4 * turn.prompt_tokens)
    assert one.blocks.ends == tuple(round(256 * (i + 1) * scale) for i in range(len(one.blocks)))


def test_without_progress_and_with_it_every_flight_still_ends() -> None:
    for interval in (None, 0.2):
        assert len(run(wiring=Wiring(progress_interval_s=interval)).served) == len(TRACE.turns)


# --- incidents --------------------------------------------------------------------------------------------------------


def test_what_ran_on_a_replica_that_died_is_lost_and_new_requests_go_to_the_next_of_the_list() -> None:
    result = run(steady(600, every_s=0.02), policy="round_robin", incidents=("5.01:1:dies",))
    lost = [s for s in result.served if s.end is not End.OK]
    assert lost
    assert {(s.end, s.replica) for s in lost} == {(End.UPSTREAM_ERROR, address(1))}
    assert all(s.arrived_s < 5.02 for s in lost)
    retried = [s for s in result.served if s.attempts > 1]
    assert retried
    assert all(s.end is End.OK and s.replica != address(1) for s in retried)
    assert max(s.arrived_s for s in retried) < 5.2  # the log has told of those that broke off by then


def test_a_replica_that_comes_back_is_used_again() -> None:
    result = run(steady(), policy="round_robin", incidents=("10.1:1:dies", "30:1:joins"))
    there = [s.arrived_s for s in result.served if s.replica == address(1)]
    assert not [at for at in there if 10.1 < at < 30]
    assert [at for at in there if at > 40]


def test_a_newcomer_gets_nothing_before_it_joins() -> None:
    result = run(steady(), policy="round_robin", incidents=("20:2:joins",))
    there = [s.arrived_s for s in result.served if s.replica == address(2)]
    assert min(there) > 20
    assert len(there) > 20


def test_requests_on_a_hung_replica_time_out() -> None:
    result = run(steady(), policy="round_robin", incidents=("10.1:1:hangs",))
    stuck = [s for s in result.served if s.end is not End.OK]
    assert stuck
    assert {(s.end, s.replica) for s in stuck} == {(End.TIMEOUT, address(1))}
    assert all(s.e2e_s >= IDLE_TIMEOUT_S for s in stuck)


def test_predicted_leaves_a_slow_replica_alone() -> None:
    def share(*incidents: str) -> float:
        result = run(steady(240), incidents=incidents)
        return sum(s.replica == address(1) for s in result.served) / 240

    assert share("0:1:slows=8") < 0.5 * share()


ALL_DIE = ("0:1:dies", "0:2:dies", "0:3:dies")


def test_with_nobody_there_and_no_queue_requests_fail_at_once() -> None:
    result = run(steady(10), policy="round_robin", incidents=ALL_DIE, wiring=Wiring(queue=NO_QUEUE))
    later = {(s.end, s.status, s.attempts, s.e2e_s) for s in result.served if s.arrived_s > 0}
    assert later == {(End.UNREACHABLE, 503, 3, 0.0)}


def test_with_nobody_there_requests_wait_for_somebody_and_not_for_ever() -> None:
    wiring = Wiring()
    result = run(steady(10, every_s=5.0), incidents=ALL_DIE, wiring=wiring)
    later = [s for s in by_turn(result) if s.arrived_s > 5]
    assert {(s.refusal, s.status) for s in later} == {(Refusal.ABSENT, 503)}
    assert [s.held_s for s in later] == pytest.approx([wiring.queue.absent_wait_s] * len(later), abs=0.01)
    back = by_turn(run(steady(10, every_s=5.0), incidents=(*ALL_DIE, "33:2:joins"), wiring=wiring))
    assert {s.end for s in back if s.arrived_s > 25} == {End.OK}
    assert all(s.held_s for s in back if 25 < s.arrived_s < 33)


def test_a_prompt_beyond_the_cache_is_refused_by_the_replica() -> None:
    result = run(Trace("long", 64, (Turn(1_000_000, 5, 0.0), Turn(100, 5, 0.0, after=0))))
    assert [(s.end, s.status) for s in by_turn(result)] == [(End.CLIENT_ERROR, 400), (End.OK, 200)]


@pytest.mark.parametrize("text", ["5:1", "x:1:dies", "5:1:explodes", "5:1:slows", "5:1:dies=2", "5:1:slows=0", ""])
def test_what_cannot_be_read_as_an_incident_is_refused(text: str) -> None:
    with pytest.raises(IncidentError):
        incident(text)


def test_incidents_must_befall_someone_and_leave_someone() -> None:
    with pytest.raises(IncidentError, match="replica 4 is not there; the fleet has 1 to 3"):
        checked([incident("5:4:dies")], 3)
    with pytest.raises(IncidentError, match="nobody is there at the start"):
        checked([incident("5:1:joins")], 1)


# --- fleets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "size", "tokens"),
    [
        (Group(gpu="h100"), "8b", 400_000),
        (Group(gpu="a100"), "8b", 400_000),
        (Group(gpu="h100", tp=4), "70b", 410_000),
        (Group(gpu="h100", tp=8), "70b", 1_270_000),
    ],
)
def test_the_cache_is_what_the_memory_leaves(group: Group, size: str, tokens: int) -> None:
    assert group.kv_capacity(size) == pytest.approx(tokens, rel=0.04)


def test_the_cache_can_be_told_in_tokens_or_in_blocks_of_sixteen() -> None:
    assert Group.from_text("kv_tokens=5000").kv_capacity("8b") == 5000
    assert Group.from_text("gpu=a100,blocks=100").kv_capacity("8b") == 1600
    spec = nodes([Group(count=2, kv_tokens=399_360)], "8b", 512, 0.0)
    assert [(s.replica.address, s.engine.num_blocks) for s in spec] == [(address(1), 780), (address(2), 780)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus=3", "gpus: no such key"),
        ("count=0", "count: input should be greater"),
        ("blocks=5,kv_tokens=5", "has both num_blocks and kv_tokens"),
    ],
)
def test_mistakes_in_a_replica_are_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Group.from_text(text)


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise tp"):
        nodes([Group()], "70b", 64, 0.0)
    with pytest.raises(ConfigError, match="is not like 8b"):
        nodes([Group()], "big", 64, 0.0)


# --- what the default policy comes to in a cluster --------------------------------------------------------------------


def test_routers_that_do_not_talk_come_to_prefer_different_replicas() -> None:
    """Each then knows what waits on its own; with one mind for all of them they would share every replica evenly."""
    arrivals = tuple(Turn(8000, 100, i * 0.06) for i in range(1200))
    scenario = Scenario(Trace("alike", 64, arrivals), fleet(4), routers=2)
    apart = {}
    for policy in ("predicted", "round_robin"):
        shares = [[0] * 4 for _ in range(2)]
        for served in Cluster(scenario, policy).run().served:
            assert served.replica is not None
            if served.turn > 600:
                shares[served.router][int(served.replica.split(".")[3].split(":")[0]) - 1] += 1
        apart[policy] = sum(abs(a - b) for a, b in zip(*shares, strict=True)) / sum(map(sum, shares))
    assert apart["round_robin"] < 0.1
    assert apart["predicted"] > 0.4


def test_a_replica_that_slows_down_gets_less() -> None:
    result = run(steady(300, every_s=0.1), incidents=("10:1:slows=4",))
    late = [s.replica for s in by_turn(result)[150:]]
    assert late.count(address(1)) < 0.6 * late.count(address(2))
