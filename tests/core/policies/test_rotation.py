from __future__ import annotations

from collections import Counter

import pytest

from extproc.core.types import Add, NotSampled, Remove, Replica, ScrapeFailure

from ..support import POOL, address, chosen, replicas, request, router, sample, text


def test_round_robin_takes_each_in_turn() -> None:
    made = router(3, "round_robin")
    assert [chosen(made, request(text(100, n))) for n in range(7)] == [address(i % 3) for i in range(7)]


def test_round_robin_goes_on_where_it_was_when_a_replica_joins() -> None:
    made = router(2, "round_robin")
    chosen(made, request())
    made.learn(Add(POOL, replicas(3)[2]), 0.0)
    assert [chosen(made, request()) for _ in range(3)] == [address(1), address(2), address(0)]


def test_round_robin_survives_that_the_last_one_leaves() -> None:
    made = router(3, "round_robin")
    chosen(made, request())
    made.learn(Remove(POOL, address(0)), 0.0)
    assert {chosen(made, request()) for _ in range(2)} == {address(1), address(2)}


def test_round_robin_lists_the_next_ones_as_alternates() -> None:
    made = router(4, "round_robin")
    verdict = made.arrive(request(), 0.0)
    assert verdict.endpoints == (address(0), address(1), address(2))  # type: ignore[union-attr]


def test_random_gives_each_an_equal_chance() -> None:
    made = router(4, "random")
    counts = Counter(chosen(made, request()) for _ in range(1000))
    assert all(count == pytest.approx(250, abs=50) for count in counts.values())
    assert len(counts) == 4


def test_weights_three_to_one_give_three_quarters_and_one() -> None:
    """A100 weight 3, RTX 3090 weight 1."""
    made = router((Replica(address(0), weight=3.0), Replica(address(1), weight=1.0)), "weighted")
    turns = [chosen(made, request(text(100, n))) for n in range(1000)]
    assert Counter(turns) == {address(0): 750, address(1): 250}
    # Spread out: never more than three in a row.
    assert turns[:8] == [address(0), address(0), address(1), address(0)] * 2


def test_free_capacity_70_30_100_gives_35_15_and_50_percent_of_a_thousand() -> None:
    made = router(3, "weighted", options={"by": "free_capacity"})
    for i, free in enumerate((0.7, 0.3, 1.0)):
        sample(made, i, kv_usage=1.0 - free)
    counts = Counter(chosen(made, request(text(100, n))) for n in range(1000))
    assert [counts[address(i)] for i in range(3)] == [
        pytest.approx(350, abs=1),
        pytest.approx(150, abs=1),
        pytest.approx(500, abs=1),
    ]


def test_capacity_that_is_not_known_counts_as_half_free() -> None:
    made = router(2, "weighted", options={"by": "free_capacity"})
    sample(made, 0, kv_usage=0.0)
    counts = Counter(chosen(made, request(text(100, n)), now=1.0) for n in range(300))
    assert counts == {address(0): 200, address(1): 100}


def test_a_full_replica_keeps_a_small_share() -> None:
    made = router(2, "weighted", options={"by": "free_capacity"})
    sample(made, 0, kv_usage=1.0)
    sample(made, 1, kv_usage=0.0)
    counts = Counter(chosen(made, request(text(100, n))) for n in range(1010))
    assert counts[address(0)] == 10


def test_weights_change_without_a_restart() -> None:
    made = router((Replica(address(0)), Replica(address(1))), "weighted")
    made.learn(Add(POOL, Replica(address(0), weight=9.0)), 0.0)
    counts = Counter(chosen(made, request(text(100, n))) for n in range(100))
    assert counts == {address(0): 90, address(1): 10}


def test_a_replica_that_was_away_does_not_save_up_turns() -> None:
    made = router(2, "weighted")
    made.learn(NotSampled(POOL, address(0), ScrapeFailure.REFUSED), 0.0)
    for n in range(100):
        assert chosen(made, request(text(100, n))) == address(1)
    sample(made, 0, now=1.0, running=0)
    counts = Counter(chosen(made, request(text(100, n)), now=20.0) for n in range(20))  # its slow start is over
    assert counts == {address(0): 10, address(1): 10}
