"""What other routers tell: their loads, what they have against replicas, what tenants got, and where prompts lie."""

from __future__ import annotations

from itertools import permutations

import pytest

from extproc.core import peers as peers_module
from extproc.core.admission.settings import QueueSettings
from extproc.core.health.states import Reason, State
from extproc.core.peers import MAX_PEERS, MAX_PLACEMENTS, PLACED_BLOCKS, SILENT_S, Others, Placements, Told, trusted
from extproc.core.router import Router
from extproc.core.types import (
    Blocks,
    DrainAsked,
    DrainEnded,
    End,
    Judgement,
    Outcome,
    PeerGone,
    PeerJudged,
    PeerLoad,
    PeerReported,
    PeerServed,
    Placed,
    Probe,
    Probed,
    Remove,
    Sample,
    Sampled,
    TenantServed,
)

from .support import POOL, address, member, preferred, request, route, router, text


def tell(made: Router, *loads: PeerLoad, peer: str = "a", now: float = 0.0, age_s: float = 0.0) -> None:
    made.learn(PeerReported(POOL, peer, loads, age_s), now)


def judge(made: Router, *judgements: Judgement, peer: str = "a", now: float = 0.0) -> None:
    made.learn(PeerJudged(POOL, peer, judgements), now)


def out(i: int) -> Judgement:
    return Judgement(address(i), True, False)


# --- loads ------------------------------------------------------------------------------------------------------------


def test_the_loads_of_others_count_in_queue_and_company() -> None:
    made = router(2)
    wanted = request(text(4000))
    first = preferred(made, wanted)
    other = address(1) if first == address(0) else address(0)
    tell(made, PeerLoad(first, 3, 5.0, 9000.0))
    assert preferred(made, wanted) == other
    told = member(made, first)
    assert told.backlog_s(0.0) == 5.0
    assert told.backlog_s(2.0) == pytest.approx(3.0)
    assert told.backlog_s(9.0) == 0.0
    decision = made.explain(wanted, 0.0)
    assert [scored.terms["queue_s"] for scored in decision.candidates][-1] >= 5.0  # type: ignore[union-attr, operator]


def test_a_report_replaces_the_last_and_a_peer_that_left_takes_its_load_along() -> None:
    made = router(2)
    tell(made, PeerLoad(address(0), 3, 5.0, 9000.0))
    tell(made, PeerLoad(address(0), 1, 1.0, 100.0), peer="b")
    assert member(made).others is not None
    assert (member(made).others.requests, member(made).backlog_s(0.0)) == (4, 6.0)  # type: ignore[union-attr]
    tell(made, PeerLoad(address(1), 2, 2.0, 100.0))
    assert (member(made).backlog_s(0.0), member(made, 1).backlog_s(0.0)) == (1.0, 2.0)
    made.learn(PeerGone(POOL, "a"), 0.0)
    made.learn(PeerGone(POOL, "b"), 0.0)
    assert (member(made).others, member(made, 1).others) == (None, None)


def others(made: Router, i: int) -> int:
    told = member(made, i).others
    return told.requests if told is not None else 0


def says(made: Router, number: int, *requests: int, whole: bool = False) -> None:
    """Router `a` has so many requests on the first replicas."""
    loads = tuple(PeerLoad(address(i), count, 0.0, 0.0) for i, count in enumerate(requests) if count >= 0)
    made.learn(PeerReported(POOL, "a", loads, 0.0, number, whole), 0.0)


def seen(made: Router) -> list[int]:
    return [others(made, i) for i in range(3)]


def test_a_word_that_is_not_whole_changes_only_what_it_names() -> None:
    made = router(3)
    says(made, 1, 1, 2, 3, whole=True)
    says(made, 2, -1, 5)
    assert seen(made) == [1, 5, 3]
    says(made, 3, 0)
    assert seen(made) == [0, 5, 3]
    says(made, 4, -1, 4, whole=True)
    assert seen(made) == [0, 4, 0]


def test_an_older_word_never_overrides_a_newer_one() -> None:
    made = router(3)
    says(made, 1, 1, 1, 1, whole=True)
    says(made, 3, 3)
    says(made, 2, 2, 2, whole=True)  # by a beat, which was under way for longer
    assert seen(made) == [3, 2, 0]
    says(made, 1, 9, 9, 9)
    says(made, 2, 9, 9, 9)
    assert seen(made) == [3, 2, 0]
    says(made, 3, 9, whole=True)  # the same word as the push of that number
    assert seen(made) == [3, 0, 0]
    says(made, 5, 0, whole=True)
    says(made, 4, 4, 4)
    assert seen(made) == [0, 0, 0]


def test_words_in_any_order_come_to_the_same() -> None:
    words = {1: ((1, 1, 1), True), 2: ((2,), False), 3: ((-1, 3), False), 4: ((4, 4), True), 5: ((-1, -1, 5), False)}
    for order in permutations(words):
        made = router(3)
        for number in order:
            loads, whole = words[number]
            says(made, number, *loads, whole=whole)
        assert seen(made) == [4, 4, 5], order


def test_of_replicas_that_are_no_members_only_whole_words_are_kept() -> None:
    made = router(1)
    for i in range(5):
        says(made, i + 1, 1, *[1] * 100)
    peer = made.pools[POOL].peers.heard("a", 0.0)
    assert peer is not None
    assert (len(peer.loads), len(peer.numbers)) == (1, 1)


def test_a_report_of_some_names_those_without_load_too() -> None:
    made = router(2)
    route(made, request(text(400), subset=frozenset({address(0)})))
    told = made.report(POOL, 0.0, [address(0), address(1), "10.9.9.9:1"])
    assert [(load.address, load.requests) for load in told] == [(address(0), 1), (address(1), 0)]


def test_an_old_report_has_drained_and_a_silent_peer_no_longer_counts() -> None:
    made = router(1)
    tell(made, PeerLoad(address(0), 1, 5.0, 100.0), age_s=1.5)
    assert member(made).backlog_s(0.0) == 3.5
    made.expire(SILENT_S)
    assert member(made).others is not None
    made.expire(SILENT_S + 0.1)
    assert member(made).others is None


def test_the_work_of_others_stands_between_ours() -> None:
    made = router(1)
    route(made, request(text(40_000, 1)))
    load = member(made).load
    alone_s = load.work_s(0.0)
    tell(made, PeerLoad(address(0), 1, 2.0, 100.0))
    route(made, request(text(40_000, 2)))
    one, two = load
    assert two.others_s == pytest.approx(2.0)
    assert load.work_s(0.0) == pytest.approx(alone_s + two.prediction.prefill_s)  # what is told is ours alone
    assert load.backlog_s(0.0) == pytest.approx(load.work_s(0.0) + 2.0)
    load.first_token(one, alone_s / 2)
    assert two.prefill_done_at == pytest.approx(alone_s / 2 + 2.0 + two.prediction.prefill_s)
    load.check()


def test_a_report_names_only_what_has_something() -> None:
    made = router(3)
    assert made.report(POOL, 0.0) == ()
    where = route(made, request(text(40_000)), 0.0).endpoints[0]
    (told,) = made.report(POOL, 0.0)
    load = member(made, where).load
    assert told == PeerLoad(where, 1, load.work_s(0.0), load.held_tokens, 1)
    tell(made, PeerLoad(where, 5, 9.0, 900.0))
    assert made.report(POOL, 0.0) == (told,)  # never what others told


def test_strangers_are_what_no_peer_tells() -> None:
    made = router(1, scraped=True)
    tell(made, PeerLoad(address(0), 3, 0.0, 300.0))
    made.learn(Sampled(POOL, address(0), Sample(running=5, waiting=0)), 0.0)
    assert member(made).strangers == pytest.approx(2.0)


def test_peers_and_what_is_kept_of_them_are_bounded() -> None:
    made = router(1)
    for i in range(MAX_PEERS + 5):
        tell(made, PeerLoad(address(0), 1, 0.0, 1.0), peer=str(i))
    assert len(made.pools[POOL].peers) == MAX_PEERS
    assert member(made).others.requests == MAX_PEERS  # type: ignore[union-attr]
    told = Told()
    told.since([TenantServed(str(i), 0, 1.0) for i in range(peers_module.MAX_TENANTS + 9)])
    assert len(told) == peers_module.MAX_TENANTS


def test_facts_on_what_is_not_there_change_nothing() -> None:
    made = router(1)
    made.learn(PeerGone(POOL, "nobody"), 0.0)
    made.learn(PeerGone("no pool", "a"), 0.0)
    tell(made, PeerLoad("10.9.9.9:1", 1, 1.0, 1.0))
    judge(made, Judgement("10.9.9.9:1", True, True))
    made.learn(Placed(POOL, "10.9.9.9:1", request(text(4000)).blocks), 0.0)
    made.learn(Remove(POOL, address(0)), 0.0)
    made.check()


def test_the_sum_of_loads() -> None:
    others = Others()
    assert not others
    others.put("a", PeerLoad("x", 2, 1.0, 10.0, 1), 0.0, 0.0)
    others.put("b", PeerLoad("x", 1, 3.0, 5.0, 1), 1.0, 2.0)
    assert (others.requests, others.prefilling, others.context_tokens, others.backlog_s(2.0)) == (3, 2, 15.0, 2.0)
    others.put("b", None, 2.0, 2.0)
    assert (others.requests, others.backlog_s(2.0)) == (2, 0.0)


# --- placements -------------------------------------------------------------------------------------------------------


def test_what_others_placed_is_found_and_forgotten_with_the_replica() -> None:
    made = router(3)
    wanted = request(text(8000))
    for i in range(3):
        made.learn(Placed(POOL, address(i), wanted.blocks), 0.0)
        assert made.pools[POOL].index.match(wanted.blocks)[address(i)] == wanted.blocks.ends[-1]
        made.learn(Remove(POOL, address(i)), 0.0)
        assert not made.pools[POOL].index.match(wanted.blocks)
    made.check()


def test_placements_are_told_once_from_the_first_question_on() -> None:
    made = router(1)
    route(made, request(text(4000, 1)))
    assert made.placements() == []
    wanted = request(text(4000, 2))
    route(made, wanted)
    route(made, wanted)
    assert made.placements() == [Placed(POOL, address(0), wanted.blocks)]
    assert made.placements() == []


def test_placements_are_bounded_in_number_and_length() -> None:
    placements = Placements()
    placements.take()
    for i in range(MAX_PLACEMENTS + 3):
        placements.add(POOL, "x", Blocks((i,), (256,)))
    placements.add(POOL, "x", Blocks(tuple(range(10**6, 10**6 + 500)), tuple(range(1, 501))))
    taken = placements.take()
    assert len(taken) == MAX_PLACEMENTS
    assert len(taken[-1].blocks) == PLACED_BLOCKS
    assert taken[0].blocks.hashes == (4,)


# --- what they have against replicas ----------------------------------------------------------------------------------


def test_one_that_others_took_out_is_passed_over_until_a_check_of_ours() -> None:
    made = router(4)
    judge(made, out(0))
    assert member(made).health.why(0.0)[:2] == (State.SUSPECT, Reason.PEERS)
    judge(made, out(0), now=0.1)
    made.learn(Probed(POOL, address(0), Probe.LIVE, True), 0.2)
    assert member(made).state(0.2) is State.READY
    judge(made, out(0), now=0.3)  # nothing new
    assert member(made).state(0.3) is State.READY
    assert made.verdicts(POOL, 0.3) == ()  # hearsay is not passed on


def test_two_that_took_it_out_are_believed_for_as_long_as_they_say_so() -> None:
    made = router(4)
    for peer in "ab":
        judge(made, out(0), peer=peer)
    made.learn(Probed(POOL, address(0), Probe.LIVE, True), 0.1)
    assert member(made).state(0.1) is State.SUSPECT
    judge(made, out(0), peer="a", now=1.5)
    assert member(made).state(3.0) is State.SUSPECT
    for peer in "ab":
        judge(made, peer=peer, now=3.1)
    made.expire(4.0)
    assert member(made).state(4.0) is State.READY


def test_who_finds_most_of_the_fleet_out_is_not_believed() -> None:
    made = router(4)
    judge(made, *(out(i) for i in range(3)))
    assert [m.state(0.0) for _, m in made.members()] == [State.READY] * 4
    assert trusted([out(0), out(1)], 4)[address(0)].out
    assert not trusted([out(0), out(1)], 3)[address(0)].out


def test_a_drain_is_taken_over_and_ends_with_those_who_ask_for_it() -> None:
    asked, made = router(2), router(2)
    asked.learn(DrainAsked(POOL, address(0)), 0.0)
    asked.learn(DrainAsked(POOL, address(1), within_s=30.0), 0.0)
    judge(made, *asked.verdicts(POOL, 10.0), now=10.0)
    assert [m.state(10.0) for _, m in made.members()] == [State.DRAINING, State.DRAINING]
    assert member(made, 1).health.drain_left_s(10.0) == 20.0
    assert member(made, 1).state(30.0) is State.GONE
    assert made.verdicts(POOL, 10.0) == ()
    asked.learn(DrainEnded(POOL, address(0)), 11.0)
    judge(made, *asked.verdicts(POOL, 11.0), now=11.0)
    assert member(made).state(11.0) is State.SLOW_STARTING
    made.learn(PeerGone(POOL, "a"), 12.0)
    assert member(made, 1).state(12.0) is not State.DRAINING


def test_what_is_against_a_replica_by_our_own_evidence_is_told() -> None:
    made = router(2)
    for i in range(3):
        flight = made.arrive(request(text(300, i), subset=frozenset({address(0)})), 0.0).flight  # type: ignore[union-attr]
        made.finish(flight, Outcome(End.UPSTREAM_ERROR, status=500, served=address(0)), 0.1)
    assert made.verdicts(POOL, 0.2) == (Judgement(address(0), True, False),)


# --- fair shares ------------------------------------------------------------------------------------------------------


def test_what_tenants_got_elsewhere_is_charged_here_while_there_is_a_queue() -> None:
    made = router(1, queue=QueueSettings(hold_above_s=0.0))
    admission = made.pools[POOL].admission

    def told(tokens: float) -> None:
        made.learn(PeerServed(POOL, "a", (TenantServed("t", 0, tokens),)), 0.0)

    told(100.0)
    told(300.0)
    assert not admission.queue._levels  # nothing waits: nothing is shared out
    for i in range(3):
        made.arrive(request(text(40_000, i), tenant="u"), 0.0)
    assert made.holding
    told(700.0)
    assert admission.queue._levels[0].counters.of("t") == 400.0
    told(650.0)
    assert admission.queue._levels[0].counters.of("t") == 350.0
    told(10.0)  # it began anew
    assert admission.queue._levels[0].counters.of("t") == 350.0


def test_what_tenants_were_charged_is_told() -> None:
    made = router(1, queue=QueueSettings(hold_above_s=0.0))
    for i in range(3):
        made.arrive(request(text(40_000, i), tenant="t"), 0.0)
    made.turns(5.0)
    (told,) = made.served(POOL)
    assert (told.tenant, told.priority) == ("t", 0)
    assert told.tokens > 10_000
