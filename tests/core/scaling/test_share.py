"""How much more comes to a pool than to one of its routers."""

from __future__ import annotations

from random import Random

import pytest

from extproc.core.scaling.share import Share


def test_alone_all_is_ours() -> None:
    share = Share()
    assert [share.take(ours, 0.0, 15.0 * i) for i, ours in enumerate((0.0, 5.0, 40.0))] == [1.0, 1.0, 1.0]


def test_the_first_look_counts_in_full() -> None:
    assert Share().take(10.0, 30.0, 7.0) == 4.0


def test_one_of_four_routers_finds_its_share_among_few_requests() -> None:
    rng, share, found = Random(1), Share(), []
    for i in range(400):
        flights = [rng.randrange(4) for _ in range(rng.randrange(4, 13))]
        ours = float(flights.count(0))
        found.append(share.take(ours, len(flights) - ours, 15.0 * i))
    late = found[50:]
    assert sum(late) / len(late) == pytest.approx(4.0, rel=0.1)
    assert max(late) < 8.0  # at a single moment it may be 13


def test_a_change_of_shares_is_learned_within_minutes() -> None:
    share = Share()
    for at in range(0, 600, 15):
        share.take(10.0, 10.0, float(at))
    found = [share.take(10.0, 30.0, float(at)) for at in range(600, 1200, 15)]
    assert found[0] < 2.4
    assert found[-1] == pytest.approx(4.0, rel=0.02)


def test_a_router_without_requests_does_not_see_infinitely_many() -> None:
    assert Share().take(0.0, 40.0, 0.0) == 81.0


def test_what_it_says_of_itself() -> None:
    share = Share()
    share.take(2.0, 6.0, 0.0)
    assert repr(share) == "<share: 2.0 in flight, 6.0 of others>"
