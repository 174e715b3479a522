"""Changes and facts on servers, as the core is told of them."""

from __future__ import annotations

from extproc.adapters.ranks import Ranks
from extproc.core.types import (
    Add,
    NotSampled,
    Probe,
    Probed,
    Remove,
    Replica,
    Reset,
    Sample,
    Sampled,
    ScrapeFailure,
    Stalled,
)

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
RANKS = Ranks({"p": 2, "q": 1})


def test_each_rank_joins_and_leaves() -> None:
    assert RANKS.change(Reset("p", (Replica(A),))) == (Reset("p", (Replica(f"{A}/0"), Replica(f"{A}/1"))),)
    assert RANKS.change(Add("p", Replica(B, weight=2.0))) == tuple(
        Add("p", Replica(f"{B}/{r}", weight=2.0)) for r in (0, 1)
    )
    assert RANKS.change(Remove("p", A)) == (Remove("p", f"{A}/0"), Remove("p", f"{A}/1"))


def test_what_holds_for_the_server_holds_for_each_rank() -> None:
    assert RANKS.fact(NotSampled("p", A, ScrapeFailure.REFUSED)) == tuple(
        NotSampled("p", f"{A}/{r}", ScrapeFailure.REFUSED) for r in (0, 1)
    )
    probed = Probed("p", A, Probe.LIVE, ok=False, refused=True)
    assert [fact.refused for fact in RANKS.fact(probed) if isinstance(fact, Probed)] == [True, True]


def test_what_is_told_of_one_rank_is_of_that_one() -> None:
    for fact in (Sampled("p", f"{A}/1", Sample(running=1)), NotSampled("p", f"{A}/1", ScrapeFailure.UNREADABLE)):
        assert RANKS.fact(fact) == (fact,)


def test_pools_with_one_rank_and_other_facts_are_left_as_they_are() -> None:
    for change in (Reset("q", (Replica(A),)), Add("q", Replica(A)), Remove("q", A)):
        assert RANKS.change(change) == (change,)
    for fact in (Stalled(1.0), NotSampled("q", A, ScrapeFailure.LATE)):
        assert RANKS.fact(fact) == (fact,)
        assert Ranks({}).fact(fact) == (fact,)
    assert (RANKS.members("p", A), RANKS.members("q", A)) == ((f"{A}/0", f"{A}/1"), (A,))
