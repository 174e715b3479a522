"""Routers that talk, in the simulated cluster."""

from __future__ import annotations

import pytest

from extproc.core.types import Blocks, End, Fact, PeerGone, PeerLoad, PeerReported, Placed
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.fleet_spec import Group, nodes
from extproc.sim.sharing import Sharing, Store, Word
from extproc.sim.sidecar import POOL, Wiring
from extproc.sim.traces import Generate, Trace, generate

TRACE = generate(Generate(sessions=150, sessions_per_s=6.0, turns=3, think_s=1.0, burst_share=0), 1)
CROWD = generate(Generate(sessions=300, sessions_per_s=100.0, turns=3, think_s=1.0, burst_share=0), 1)
FLEET = nodes([Group(gpu="h100", count=4)], "8b", 64, 0.002)


def run(sharing: Sharing | None, routers: int = 4, trace: Trace = TRACE, **changes: object) -> Result:
    wiring = Wiring(sharing=sharing)
    scenario = Scenario(trace, FLEET, routers=routers, wiring=wiring, **changes)  # type: ignore[arg-type]
    return Cluster(scenario, "predicted").run()


def hit(result: Result) -> float:
    prompts = sum(s.prompt_tokens for s in result.served)
    return sum(s.cached_tokens or 0 for s in result.served) / prompts


@pytest.fixture(scope="module")
def alone() -> Result:
    return run(None, routers=1)


def test_routers_that_talk_find_what_others_placed(alone: Result) -> None:
    assert hit(run(Sharing())) > 0.95 * hit(alone)
    assert hit(run(None)) < 0.85 * hit(alone)


def test_lost_beats_cost_nothing_but_time(alone: Result) -> None:
    result = run(Sharing(loss=0.3))
    assert {s.end for s in result.served} == {End.OK}
    assert hit(result) > 0.9 * hit(alone)


def test_one_router_alone_is_as_without_sharing(alone: Result) -> None:
    assert run(Sharing(), routers=1).served == alone.served


def test_the_same_seed_gives_the_same_run() -> None:
    assert run(Sharing(loss=0.1)).served == run(Sharing(loss=0.1)).served


def test_the_load_of_a_router_that_died_is_forgotten_and_its_clients_go_on() -> None:
    result = run(Sharing(), router_deaths=((5.0, 2),))
    assert {s.end for s in result.served} == {End.OK}
    assert all(s.router != 1 for s in result.served if s.arrived_s > 5.0)
    assert any(s.router == 1 for s in result.served)
    for number, sidecar in enumerate(result.sidecars):
        if number != 1:
            assert not sidecar.router.pools[POOL].peers.knows("1")


def ttft_s(result: Result) -> float:
    return sum(s.ttft_s or 0.0 for s in result.served) / len(result.served)


def test_pushes_make_up_for_slow_beats() -> None:
    alone, pushed, by_beats = (
        ttft_s(run(sharing, routers, CROWD))
        for sharing, routers in ((None, 1), (Sharing(beat_s=0.5), 8), (Sharing(beat_s=0.5, push=False), 8))
    )
    assert pushed < 1.05 * alone
    assert by_beats > 1.1 * alone


def test_a_push_is_heard_by_all_who_listen_but_the_one_who_says_it() -> None:
    store = Store(POOL, 1.0)
    heard: dict[int, list[Fact]] = {i: [] for i in range(3)}
    for i, facts in heard.items():
        store.listen(i, facts.extend)
    one = Placed(POOL, "x", Blocks((1,), (256,)))
    loads = (PeerLoad("x", 1, 0.5, 10.0),)
    store.push(1, Word(7, 2.0, loads, (), (), [one], whole=False), 2.5)
    assert heard[0] == heard[2] == [one, PeerReported(POOL, "1", loads, 0.5, 7, whole=False)]
    assert heard[1] == []


def word(at: float, *placed: Placed) -> Word:
    return Word(int(10 * at) + 1, at, (), (), (), list(placed))


def test_the_store_hands_out_each_placement_once_and_tells_who_expired() -> None:
    store = Store(POOL, 1.0)
    one = Placed(POOL, "x", Blocks((1,), (256,)))
    assert store.exchange(0, word(0.0, one), 0.0) == []
    first = store.exchange(1, word(0.1), 0.1)
    assert first[0] == one
    assert [f.age_s for f in first if isinstance(f, PeerReported)] == [pytest.approx(0.1)]
    assert one not in store.exchange(1, word(0.2), 0.2)
    assert one not in store.exchange(0, word(0.2), 0.2)
    assert store.exchange(1, word(1.3), 1.3) == [PeerGone(POOL, "0")]
