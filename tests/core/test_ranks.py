"""Data parallel ranks: engines behind one address, each a member of its own."""

from __future__ import annotations

from collections import Counter
from random import Random

from extproc.core.ranks import endpoint_of, expanded, members_at, on_rank_of, rank_of
from extproc.core.router import PoolSettings, Router
from extproc.core.types import End, Outcome, Progressed, Replica, Reset, Sample, Sampled

from .support import POOL, address, chosen, ok, preferred, replicas, request, route, text

A, B = address(0), address(1)


def ranked(hosts: int = 2, ranks: int = 2, policy: str = "predicted") -> Router:
    made = Router([PoolSettings(POOL, policy=policy, scraped=False, ranks=ranks)], Random(1))
    made.learn(Reset(POOL, expanded(replicas(hosts), ranks)), 0.0)
    return made


class TestNames:
    def test_a_rank_is_part_of_the_name_of_a_member_and_of_no_address(self) -> None:
        assert members_at(A, 1) == (A,)
        assert members_at(A, 2) == (f"{A}/0", f"{A}/1")
        assert [(endpoint_of(name), rank_of(name)) for name in (A, f"{A}/0", f"{A}/11")] == [(A, None), (A, 0), (A, 11)]
        assert (on_rank_of(B, f"{A}/1"), on_rank_of(B, A)) == (f"{B}/1", B)

    def test_ranks_keep_what_is_said_of_their_replica(self) -> None:
        both = expanded([Replica(A, {"gpu": "h100"}, weight=2.0, drain=True)], 2)
        assert both == tuple(Replica(f"{A}/{r}", {"gpu": "h100"}, weight=2.0, drain=True) for r in (0, 1))


def test_load_is_spread_over_ranks_as_over_replicas() -> None:
    made = ranked(policy="least_request")
    counts = Counter(chosen(made, request(text(4000, n))) for n in range(40))
    assert counts == {f"{host}/{rank}": 10 for host in (A, B) for rank in (0, 1)}


def test_each_rank_has_a_queue_of_its_own() -> None:
    made = ranked(hosts=1, policy="least_queue")
    for rank, waiting in ((0, 5), (1, 0)):
        made.learn(Sampled(POOL, f"{A}/{rank}", Sample(running=1, waiting=waiting)), 0.0)
    assert preferred(made, request(text(1000))) == f"{A}/1"


def test_each_rank_has_a_prefix_cache_of_its_own() -> None:
    made = ranked(hosts=1)
    prompt = request(text(8000))
    first = route(made, prompt)
    made.finish(first.flight, ok(A), 1.0)
    assert chosen(made, prompt, now=2.0) == first.endpoints[0]


def test_the_alternates_are_other_addresses_with_the_same_rank() -> None:
    made = ranked(hosts=4)
    for n in range(8):
        endpoints = route(made, request(text(4000, n))).endpoints
        assert len({endpoint_of(e) for e in endpoints}) == len(endpoints) == 3
        assert len({rank_of(e) for e in endpoints}) == 1
    alone = ranked(hosts=1, ranks=4)
    assert len(route(alone, request(text(4000))).endpoints) == 1


class TestWhoAnswered:
    """The proxy knows addresses alone."""

    def test_the_address_that_was_chosen_is_the_rank_that_was_chosen(self) -> None:
        made = ranked()
        sent = route(made, request(text(4000)))
        made.learn(Progressed(sent.flight, 0.1, 0.1, 10, endpoint_of(sent.endpoints[0])), 1.0)
        made.check()
        made.finish(sent.flight, Outcome(End.OK, 200, endpoint_of(sent.endpoints[0]), duration_s=1.0), 2.0)
        made.check()
        served = made.pools[POOL].fleet.get(sent.endpoints[0])
        assert served is not None
        assert served.latency_s == 1.0

    def test_after_a_retry_it_is_the_same_rank_elsewhere(self) -> None:
        made = ranked()
        sent = route(made, request(text(4000)))
        other = sent.endpoints[1]
        made.learn(Progressed(sent.flight, None, None, 0, endpoint_of(other)), 1.0)
        made.check()
        at = made.pools[POOL].fleet.get(other)
        assert at is not None
        assert len(at.load) == 1
        made.finish(sent.flight, Outcome(End.OK, 200, endpoint_of(other), attempts=2, duration_s=1.0), 2.0)
        made.check()
        assert (len(at.load), at.latency_s) == (0, 1.0)


def test_a_subset_names_addresses() -> None:
    made = ranked()
    assert endpoint_of(chosen(made, request(text(1000), subset=frozenset({B})))) == B
    assert endpoint_of(chosen(made, request(text(1000), subset=frozenset({B.rpartition(":")[0]})))) == B
