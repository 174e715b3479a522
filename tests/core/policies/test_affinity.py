from __future__ import annotations

from collections import Counter

import pytest

from extproc.core.types import Add, Remove

from ..support import (
    POOL,
    address,
    chosen,
    fill,
    first,
    members_of,
    ok,
    only,
    preferred,
    rank,
    replicas,
    request,
    route,
    router,
    text,
)

# --- session_affinity -------------------------------------------------------------------------------------------------


def test_a_session_stays_where_it_is_whatever_it_says() -> None:
    made = router(5, "session_affinity")
    for n in range(10):
        verdict = route(made, request(text(1000, n), session="s"))
        assert verdict.decision.reason == "session"
        made.finish(verdict.flight, ok(verdict.endpoints[0]), 0.0)
    assert len({preferred(made, request(text(1000, n), session="s")) for n in range(20)}) == 1


def test_sessions_spread_over_the_fleet() -> None:
    made = router(5, "session_affinity")
    counts = Counter(preferred(made, request(session=f"s{n}")) for n in range(1000))
    assert len(counts) == 5
    assert all(count == pytest.approx(200, abs=60) for count in counts.values())


def test_a_replica_that_leaves_moves_only_its_own_sessions() -> None:
    made = router(5, "session_affinity")
    before = {f"s{n}": preferred(made, request(session=f"s{n}")) for n in range(1000)}
    made.learn(Remove(POOL, address(2)), 0.0)
    after = {s: preferred(made, request(session=s)) for s in before}
    moved = {s for s in before if before[s] != after[s]}
    assert moved == {s for s, where in before.items() if where == address(2)}
    assert len(moved) / 1000 == pytest.approx(1 / 5, abs=0.05)
    made.learn(Add(POOL, replicas(5)[2]), 0.0)
    assert {s: preferred(made, request(session=s)) for s in before} == before


def test_a_replica_that_joins_takes_only_its_share() -> None:
    made = router(4, "session_affinity")
    before = {f"s{n}": preferred(made, request(session=f"s{n}")) for n in range(1000)}
    made.learn(Add(POOL, replicas(5)[4]), 0.0)
    after = {s: preferred(made, request(session=s)) for s in before}
    moved = {s for s in before if before[s] != after[s]}
    assert {after[s] for s in moved} == {address(4)}
    assert len(moved) / 1000 == pytest.approx(1 / 5, abs=0.05)


def test_a_session_spills_to_its_next_replica_while_its_own_is_above_the_bound() -> None:
    made = router(4, "session_affinity")
    home = preferred(made, request(session="s"))
    i = next(i for i in range(4) if address(i) == home)
    flights = [route(made, request(subset=only(i))).flight for _ in range(8)]
    decision = route(made, request(session="s")).decision
    assert decision.reason == "spill"
    assert decision.endpoints[0] != home
    # The same other one each time: its cache grows there.
    assert preferred(made, request(session="s")) == decision.endpoints[0]
    for flight in flights:
        made.finish(flight, ok(home), 1.0)
    assert preferred(made, request(session="s"), 1.0) == home


def test_a_hot_session_is_bounded() -> None:
    made = router(4, "session_affinity")
    counts = Counter(chosen(made, request(session="s")) for _ in range(100))
    assert len(counts) == 4
    assert max(counts.values()) <= 32  # 1.25 times the mean
    assert sum(counts.values()) == 100


def test_a_nearly_idle_fleet_does_not_scatter_a_session() -> None:
    made = router(8, "session_affinity")
    assert len({chosen(made, request(session="s")) for _ in range(4)}) == 1


def test_without_a_session_the_head_of_the_prompt_stands_in() -> None:
    made = router(5, "session_affinity")
    system = text(2000, 1)
    assert len({preferred(made, request(system + text(500, n))) for n in range(2, 20)}) == 1


def test_with_neither_the_fewest_in_flight_take_it() -> None:
    members = members_of(replicas(3))
    for each, n in zip(members, (2, 0, 1), strict=True):
        fill(each, n)
    ranking = rank("session_affinity", members)
    assert (first(ranking), ranking.reason) == (address(1), "no_session")


# --- prefix_affinity --------------------------------------------------------------------------------------------------


def test_the_longest_cached_prefix_wins() -> None:
    members = members_of(replicas(3))
    ranking = rank("prefix_affinity", members, prompt_tokens=1000, hits={address(1): 900.0, address(2): 300.0})
    assert (first(ranking), ranking.reason) == (address(1), "prefix")


def test_a_short_match_does_not_count() -> None:
    members = members_of(replicas(3))
    fill(members[1], 1)
    ranking = rank("prefix_affinity", members, prompt_tokens=1000, hits={address(1): 299.0})
    assert first(ranking) != address(1)
    assert ranking.reason == "no_prefix"
    assert first(rank("prefix_affinity", members, prompt_tokens=1000, hits={address(1): 300.0})) == address(1)


def test_a_holder_above_the_bound_gives_way_to_the_next_holder_then_to_the_least_loaded() -> None:
    members = members_of(replicas(4))
    for each, n in zip(members, (9, 3, 2, 1), strict=True):
        fill(each, n)
    hits = {address(0): 900.0, address(1): 500.0}
    ranking = rank("prefix_affinity", members, prompt_tokens=1000, hits=hits)
    assert [m.address for _, m in ranking.order] == [address(1), address(3), address(2), address(0)]
    assert ranking.reason == "spill"


def test_of_equal_holders_the_less_loaded_wins() -> None:
    members = members_of(replicas(3))
    fill(members[0], 2)
    fill(members[1], 1)
    ranking = rank("prefix_affinity", members, prompt_tokens=1000, hits={address(0): 500.0, address(1): 500.0})
    assert first(ranking) == address(1)


def test_a_conversation_follows_its_cache() -> None:
    made = router(4, "prefix_affinity")
    said = text(4000, 1)
    home = chosen(made, request(said))
    for n in range(20):
        said += text(1000, n + 10)
        verdict = route(made, request(said), now=10.0 * n)
        assert verdict.endpoints[0] == home
        assert verdict.decision.reason == "prefix"
        made.finish(verdict.flight, ok(home), 10.0 * n + 5.0)
