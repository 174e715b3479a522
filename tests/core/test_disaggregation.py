"""Prefill and decode apart: when a request is split, what is booked where, and what is learned of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.admission.settings import QueueSettings
from extproc.core.deciding import decide
from extproc.core.disaggregation import Transfer, decodes, learn, prefills
from extproc.core.fleet import Member
from extproc.core.health.states import State
from extproc.core.pool import work_of
from extproc.core.prefix.exact import token_chain
from extproc.core.router import PoolSettings, Router
from extproc.core.settings import DisaggregationSettings
from extproc.core.types import (
    Add,
    Api,
    Configured,
    Decision,
    End,
    Outcome,
    PrefixSource,
    Probe,
    Probed,
    Progressed,
    Refusal,
    Reject,
    Remove,
    Replica,
    Request,
    Reset,
    Route,
    Wait,
)

from .support import H100, POOL, Log, address, chosen, member, ok, only, request, route, sample, text
from .test_router_properties import Arrive, Driver, Step, requests, scripts, steps, where

P, D = address(0), address(1)
LONG = 60_000
"""Bytes of a prompt that takes a second to compute."""
FAST = DisaggregationSettings(bandwidth_bytes_per_s=50e9, latency_s=0.001)
FORCED = DisaggregationSettings(local_prefill=False)
PAIRED = DisaggregationSettings(local_prefill=False, bootstrap_port=8_998)


def roles(*names: str) -> tuple[Replica, ...]:
    return tuple(Replica(address(i), {**H100, "role": name}) for i, name in enumerate(names))


def configured(given: DisaggregationSettings | None, queue: bool = False) -> PoolSettings:
    return PoolSettings(POOL, scraped=False, disaggregation=given, queue=QueueSettings(enabled=queue))


def apart(*names: str, given: DisaggregationSettings | None = FAST, log: Log | None = None) -> Router:
    made = Router([configured(given)], Random(1), log)
    made.learn(Reset(POOL, roles(*names)), 0.0)
    return made


def busy(made: Router, i: int, requests: int = 40) -> None:
    """Put so many answers under way on a replica, each with its first token."""
    for n in range(requests):
        sent = route(made, request(text(400, 1000 + n), subset=only(i), output=2000))
        made.learn(Progressed(sent.flight, 0.01, 0.01, 1), 0.02)


def leg(made: Router, i: int = 0) -> int:
    return len(member(made, i).load.legs)


# --- whether to split -------------------------------------------------------------------------------------------------


def test_an_idle_replica_computes_its_prompts_itself() -> None:
    sent = route(apart("prefill", "decode"), request(text(LONG)))
    assert (sent.endpoints, sent.decision.prefiller) == ((D,), None)


def test_a_prompt_that_would_stop_many_answers_is_computed_elsewhere() -> None:
    made = apart("prefill", "decode")
    busy(made, 1)
    sent = route(made, request(text(LONG)), 0.1)
    assert (sent.endpoints, sent.decision.prefiller, sent.decision.reason) == ((D,), P, "split")
    assert leg(made) == 1


def test_a_short_prompt_is_not() -> None:
    made = apart("prefill", "decode")
    busy(made, 1)
    assert route(made, request(text(200)), 0.1).decision.prefiller is None


def test_a_long_queue_for_prefill_makes_it_stay() -> None:
    made = apart("prefill", "decode")
    busy(made, 1)
    split = [route(made, request(text(LONG, n)), 0.1).decision.prefiller for n in range(40)]
    assert split[0] == P
    assert None in split


def test_slow_transfers_make_it_stay() -> None:
    made = apart("prefill", "decode", given=DisaggregationSettings(latency_s=30.0))
    busy(made, 1)
    assert route(made, request(text(LONG)), 0.1).decision.prefiller is None


def test_who_has_the_prompt_cached_computes_it() -> None:
    made = apart("prefill", "prefill", "decode")
    busy(made, 2)
    first = route(made, request(text(LONG)), 0.1)
    made.finish(first.flight, ok(first.endpoints[0], ttft_s=1.0), 5.0)
    made.pools[POOL].index.clear(address(2))
    again = route(made, request(text(LONG) + text(30_000, 7)), 6.0)
    assert again.decision.prefiller == first.decision.prefiller


def test_only_what_is_missing_is_brought() -> None:
    made = apart("prefill", "decode", given=FORCED)
    pool = made.pools[POOL]
    wanted = request(text(LONG))
    without = pool.ask(wanted, pool.candidates(wanted, 0.0), 0.0)
    pool.index.insert(D, wanted.blocks)
    having = pool.ask(wanted, pool.candidates(wanted, 0.0), 0.0)
    assert without.split is not None
    assert having.split is not None
    assert having.split.transfer_s[D] < 0.1 * without.split.transfer_s[D]


def test_who_answers_with_most_of_the_prompt_cached_needs_no_help() -> None:
    made = apart("prefill", "decode")
    busy(made, 1)
    wanted = request(text(LONG) + text(2000, 7))
    assert isinstance(split := made.explain(wanted, 0.1), Decision)
    made.pools[POOL].index.insert(D, request(text(LONG)).blocks)
    assert isinstance(alone := made.explain(wanted, 0.1), Decision)
    assert (split.prefiller, alone.prefiller) == (P, None)


@pytest.mark.parametrize(
    ("name", "answers", "computes"),
    [("prefill-decode", 1, 1), ("encode-prefill-decode", 1, 1), ("encode-prefill", 0, 1), ("encode", 0, 0), ("", 0, 0)],
)
def test_the_roles_of_llm_d(name: str, answers: int, computes: int) -> None:
    made = apart(name)
    one = member(made, 0)
    assert (decodes(one), prefills(one)) == (bool(answers), bool(computes))
    assert isinstance(made.arrive(request(text(100)), 0.0), Route) is bool(answers)


def test_only_completions_are_split_and_nothing_goes_to_who_prefills_alone() -> None:
    made = apart("prefill", "decode")
    busy(made, 1)
    for api in (Api.EMBEDDINGS, Api.RESPONSES, Api.OTHER):
        sent = route(made, request(text(LONG), api=api), 0.1)
        assert (sent.endpoints, sent.decision.prefiller) == ((D,), None)


def test_who_cannot_compute_prompts_is_always_helped() -> None:
    made = apart("prefill", "decode", given=FORCED)
    assert route(made, request(text(100))).decision.prefiller == P


def test_who_cannot_compute_prompts_gets_none_that_nobody_computes() -> None:
    made = apart("decode", "both", given=FORCED)
    made.learn(Remove(POOL, address(1)), 0.0)
    verdict = made.arrive(request(text(100)), 0.0)
    assert isinstance(verdict, Reject)
    assert verdict.refusal is Refusal.NO_REPLICAS
    made.learn(Add(POOL, roles("decode", "both")[1]), 0.0)
    assert chosen(made, request(text(100), api=Api.EMBEDDINGS)) == address(1)


def test_prefill_alone_answers_nothing() -> None:
    verdict = apart("prefill", "prefill").arrive(request(text(100)), 0.0)
    assert isinstance(verdict, Reject)


def test_who_computes_the_prompt_is_no_alternate_of_who_answers() -> None:
    made = apart("both", "both", "decode")
    for i in range(3):
        busy(made, i, 30)
    split = [s for n in range(12) if (s := route(made, request(text(LONG, n)), 0.1)).decision.prefiller]
    assert split
    for sent in split:
        assert sent.decision.prefiller not in sent.endpoints


def test_who_would_compute_it_for_the_best_may_be_the_best() -> None:
    made = apart("both", "decode")
    busy(made, 1)
    made.learn(Configured(POOL, configured(FORCED)), 0.0)
    sent = route(made, request(text(300)), 0.1)
    assert (sent.endpoints[0], sent.decision.prefiller) == (P, None)
    assert leg(made) == 0


def test_who_keeps_a_request_has_no_alternate_that_needs_help() -> None:
    made = apart("both", "decode", "both")
    busy(made, 1)
    busy(made, 2)
    made.learn(Configured(POOL, configured(FORCED)), 0.1)
    assert route(made, request(text(300)), 0.1).endpoints == (P, address(2))


def queued() -> Router:
    """A prompt costs least split, and would come after 1.3 s; computed whole, after 0.3 s."""
    made = apart("prefill", "decode")
    busy(made, 1)
    for n in range(3):
        split_one(made, now=0.1, seed=n)
    made.learn(Configured(POOL, replace(configured(FAST), queue=QueueSettings(enabled=True, hold_above_s=5.0))), 0.1)
    return made


@pytest.mark.parametrize(("slo_ttft_s", "by"), [(None, P), (2.0, P), (1.0, None)])
def test_of_two_ways_the_one_is_taken_that_is_in_time(slo_ttft_s: float | None, by: str | None) -> None:
    sent = route(queued(), request(text(LONG, 9), slo_ttft_s=slo_ttft_s), 0.1)
    assert sent.decision.prefiller == by


def test_who_prefills_helps_where_a_prompt_would_be_late_even_if_that_costs_more() -> None:
    made = apart("prefill", "decode")
    disaggregation = made.pools[POOL].disaggregation
    assert disaggregation is not None
    for n in range(40):  # so many that another second there is dear
        disaggregation.legs.arrived(0.3, 0.05 * n)
    route(made, request(text(LONG, 10), subset=only(1)), 2.0)
    cheap, late = (made.explain(request(text(LONG, 9), slo_ttft_s=slo_s), 2.0) for slo_s in (None, 0.6))
    assert isinstance(cheap, Decision)
    assert isinstance(late, Decision)
    assert (cheap.prefiller, late.prefiller) == (None, P)


def test_where_neither_way_is_in_time_it_is_refused() -> None:
    verdict = queued().arrive(request(text(LONG, 9), slo_ttft_s=0.1), 0.1)
    assert isinstance(verdict, Reject)
    assert verdict.refusal is Refusal.SLO


def test_what_is_left_of_the_time_after_a_wait_decides() -> None:
    pool, wanted = queued().pools[POOL], request(text(LONG, 9), slo_ttft_s=5.0)
    members = pool.candidates(wanted, 0.1)
    assert pool.ask(wanted, members, 0.1).split is not None
    assert pool.ask(wanted, members, 0.1, held_s=4.0).split is None


def test_who_is_not_there_computes_nothing_unless_nobody_could_do_without() -> None:
    made = apart("prefill", "decode")
    busy(made, 1)
    made.learn(Probed(POOL, P, Probe.LIVE, ok=False, refused=True), 0.0)
    assert route(made, request(text(LONG)), 0.1).decision.prefiller is None
    made.learn(Configured(POOL, configured(FORCED)), 0.1)
    assert route(made, request(text(LONG)), 0.1).decision.prefiller == P


def test_without_settings_roles_mean_nothing() -> None:
    plain, labelled = apart("both", "both", "both", given=None), apart("prefill", "decode", "both", given=None)
    for n in range(30):
        wanted = request(text(100 * n * n, n))
        one, other = route(plain, wanted, 0.1 * n), route(labelled, wanted, 0.1 * n)
        assert one == other


# --- what is booked ---------------------------------------------------------------------------------------------------


def split_one(made: Router, size: int = LONG, now: float = 0.0, seed: int = 0, **fields: Any) -> Route:
    sent = route(made, request(text(size, seed), **fields), now)
    assert sent.decision.prefiller == P
    return sent


def test_the_prompt_stands_in_the_queue_of_who_computes_it_and_in_no_other() -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made)
    prefill, decode = member(made, 0), member(made, 1)
    assert prefill.backlog_s(0.0) > 0.2
    assert (len(prefill.load), prefill.load.held_tokens, prefill.prefilling(0.0)) == (0, 0.0, 1)
    assert decode.backlog_s(0.0) == 0.0
    assert (len(decode.load), decode.prefilling(0.0), decode.load.decoding(0.0)) == (1, 1, 0)
    assert sent.decision.prediction.ttft_s > prefill.backlog_s(0.0)
    assert made.in_flight == 1


def test_the_leg_ends_with_the_first_token() -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made)
    made.learn(Progressed(sent.flight, 0.3, 0.3, 10), 0.4)
    made.check()
    assert leg(made) == 0
    assert member(made, 0).backlog_s(0.4) == 0.0
    assert member(made, 1).load.decoding(0.4) == 1
    made.finish(sent.flight, ok(D, ttft_s=0.3), 2.0)
    made.check()


@pytest.mark.parametrize("end", list(End))
def test_the_leg_ends_with_the_flight_however_that_ends(end: End) -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made)
    made.finish(sent.flight, Outcome(end, served=D), 0.1)
    made.check()
    assert (leg(made), member(made, 0).backlog_s(0.1), made.in_flight) == (0, 0.0, 0)


def test_a_flight_that_is_never_heard_of_takes_its_leg_along() -> None:
    made = apart("prefill", "decode", given=FORCED)
    split_one(made)
    made.expire(1000.0)
    made.check()
    assert leg(made) == 0


def test_no_byte_yet_means_that_the_prompt_is_not_done() -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made)
    late = sent.decision.prediction.ttft_s + 2.0
    assert member(made, 0).backlog_s(late) == 0.0
    made.learn(Progressed(sent.flight, None, None, 0), late)
    made.check()
    assert member(made, 0).backlog_s(late) > 0.5
    assert member(made, 1).backlog_s(late) == 0.0


def test_while_the_cache_is_on_its_way_the_prompt_is_done() -> None:
    made = apart("prefill", "decode", given=DisaggregationSettings(latency_s=30.0, local_prefill=False))
    sent = split_one(made)
    made.learn(Progressed(sent.flight, None, None, 0), 10.0)
    assert member(made, 0).backlog_s(10.0) == 0.0


def test_who_waits_for_a_place_where_it_is_answered_is_expected_to() -> None:
    made = apart("prefill", "decode", given=FORCED)
    member(made, 1).latency_s = 10.0
    sample(made, 1, 0.1, running=2, waiting=50)
    assert split_one(made, now=0.1).decision.prediction.ttft_s > 100.0


def test_engines_that_meet_have_one_role_each() -> None:
    made = apart("both", "both", "prefill", "decode", given=PAIRED)
    sent = [route(made, request(text(LONG, n), mirrorable=True)) for n in range(6)]
    assert {(s.endpoints, s.decision.prefiller, s.decision.bootstrap_port) for s in sent} == {
        ((address(3),), address(2), 8_998)
    }


@pytest.mark.parametrize("wrong", [{"mirrorable": False}, {"samples": 2}, {"api": Api.RESPONSES}])
def test_what_cannot_be_sent_to_two_goes_to_one_that_does_both(wrong: dict[str, Any]) -> None:
    asked = replace(request(text(LONG), mirrorable=True), **wrong)
    sent = route(apart("prefill", "both", "decode", given=PAIRED), asked)
    assert (sent.endpoints, sent.decision.prefiller, sent.decision.bootstrap_port) == ((address(1),), None, None)
    assert isinstance(apart("prefill", "decode", given=PAIRED).arrive(asked, 0.0), Reject)


def test_without_one_that_prefills_nothing_is_sent_to_one_that_cannot() -> None:
    assert isinstance(apart("decode", given=PAIRED).arrive(request(text(LONG), mirrorable=True), 0.0), Reject)


@pytest.mark.parametrize(
    ("label", "port"), [("9000", 9_000), ("0", 8_998), ("65536", 8_998), ("x", 8_998), ("\u0663", 8_998), ("", 8_998)]
)
def test_where_engines_meet_may_be_a_label(label: str, port: int) -> None:
    made = Router([configured(PAIRED)], Random(1))
    meeting = Replica(P, {**H100, "role": "prefill", "bootstrap_port": label})
    made.learn(Reset(POOL, (meeting, Replica(D, {**H100, "role": "decode"}))), 0.0)
    assert route(made, request(text(LONG), mirrorable=True)).decision.bootstrap_port == port


def test_where_two_that_answer_refuse_to_be_asked_it_is_not_laid_to_who_prefills() -> None:
    made = apart("prefill", "decode", "decode", given=PAIRED)
    for n in range(10):
        sent = route(made, request(text(100, n), mirrorable=True), 0.1 * n)
        made.finish(sent.flight, Outcome(End.UNREACHABLE, served=sent.endpoints[1], attempts=2), 0.1 * n)
    assert [member(made, i).state(1.0) is State.READY for i in range(3)] == [True, False, False]


def test_requests_that_wait_for_who_prefills_hold_up_no_others() -> None:
    made = Router([configured(PAIRED, queue=True)], Random(1))
    made.learn(Reset(POOL, roles("prefill", "decode", "both")), 0.0)
    assert isinstance([made.arrive(request(text(LONG, n), mirrorable=True), 0.0) for n in range(5)][-1], Wait)
    whole = made.arrive(request(text(3 * LONG), api=Api.RESPONSES), 0.0)
    assert isinstance(whole, Wait)
    (turn,) = made.turns(0.0)
    assert isinstance(turn.verdict, Route)
    assert (turn.ticket, turn.verdict.endpoints) == (whole.ticket, (address(2),))


def test_side_cars_need_no_place_to_meet() -> None:
    assert split_one(apart("prefill", "decode", given=FORCED)).decision.bootstrap_port is None


def test_equal_prefillers_share_prompts_and_each_its_own() -> None:
    made = apart("prefill", "prefill", "decode", given=FORCED)
    used: list[list[str | None]] = [[], []]
    for again in used:
        for n in range(16):
            sent = route(made, request(text(2000, n)), 0.0)
            again.append(sent.decision.prefiller)
            made.finish(sent.flight, Outcome(End.CLIENT_GONE), 0.0)
    assert used[0] == used[1]
    assert set(used[0]) == {P, address(1)}


def test_who_computes_it_may_leave_and_come_back() -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made)
    made.learn(Remove(POOL, P), 0.1)
    made.check()
    made.learn(Add(POOL, roles("prefill")[0]), 0.2)
    made.check()
    made.finish(sent.flight, ok(D, ttft_s=0.5), 1.0)
    made.check()
    assert leg(made) == 0


def test_a_flight_that_the_proxy_sends_elsewhere_keeps_its_leg() -> None:
    made = apart("prefill", "decode", "decode", given=FORCED)
    sent = split_one(made)
    other = next(a for a in (D, address(2)) if a != sent.endpoints[0])
    made.learn(Progressed(sent.flight, None, None, 0, other), 0.1)
    made.check()
    assert leg(made) == 1
    made.learn(Progressed(sent.flight, 0.5, 0.5, 10, other), 0.6)
    made.check()
    assert leg(made) == 0


def test_other_routers_are_told_where_the_prompt_will_be_cached() -> None:
    made = apart("prefill", "decode", given=FORCED)
    made.placements()
    split_one(made, 30_000)
    assert {placed.address for placed in made.placements()} == {P, D}


def test_other_routers_are_told_of_the_load_of_legs() -> None:
    made = apart("prefill", "decode", given=FORCED)
    split_one(made)
    told = {load.address: load for load in made.report(POOL, 0.0)}
    assert told[P].requests == told[D].requests == 1
    assert told[P].backlog_s > 0.2
    assert told[D].backlog_s == 0.0


def test_the_prompt_is_cached_on_both_once_it_was_answered() -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made)
    wanted = request(text(LONG))
    made.finish(sent.flight, ok(D, ttft_s=0.5), 1.0)
    assert made.pools[POOL].index.match(wanted.blocks).keys() == {P, D}


def test_a_prompt_that_was_never_computed_is_not() -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made)
    made.finish(sent.flight, Outcome(End.UPSTREAM_ERROR, status=502, served=D), 1.0)
    assert not made.pools[POOL].index.match(request(text(LONG)).blocks)


def test_it_waits_here_while_those_who_compute_prompts_have_enough() -> None:
    made = Router([configured(FORCED, queue=True)], Random(1))
    made.learn(Reset(POOL, roles("prefill", "decode")), 0.0)
    verdicts = [made.arrive(request(text(LONG, n)), 0.0) for n in range(4)]
    assert isinstance(verdicts[0], Route)
    assert isinstance(verdicts[-1], Wait)
    made.finish(verdicts[0].flight, ok(D, ttft_s=0.4), 1.0)
    turns = made.turns(1.0)
    assert isinstance(turns[0].verdict, Route)
    assert turns[0].verdict.decision.prefiller == P
    made.check()


def test_the_prompt_counts_where_it_is_computed_and_not_as_cached() -> None:
    made = apart("prefill", "decode", given=FORCED)
    pool, wanted = made.pools[POOL], request(text(LONG))
    members = pool.candidates(wanted, 0.0)
    assert work_of(pool.ask(wanted, members, 0.0), members, 0.0).prefill_s > 0.2
    split_one(made)
    (flight,) = member(made, 1).load
    assert flight.uncached_tokens == flight.prompt_tokens
    sent = split_one(made)
    assert sent.decision.prediction.cached_tokens > 0.9 * sent.decision.prompt_tokens


def test_who_told_of_the_cache_is_who_computes_the_prompt() -> None:
    made = apart("prefill", "decode", given=FORCED)
    pool, wanted = made.pools[POOL], request(text(LONG))
    members = pool.candidates(wanted, 0.0)
    ask = pool.ask(wanted, members, 0.0)
    ask.exact = frozenset({P})
    ranking = pool.settled(ask, pool.policy.rank(ask, members, 0.0, Random(1)))
    assert decide("", pool, ask, ranking, 0.0).prefix_source is PrefixSource.EXACT


def test_a_whole_response_that_takes_longer_than_expected_makes_nobody_look_busy() -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made, stream=False, output=100)
    made.learn(Progressed(sent.flight, None, None, 0), 300.0)
    made.check()
    assert member(made, 0).backlog_s(300.0) == 0.0


def test_it_waits_here_while_nobody_listens_who_computes_prompts() -> None:
    made = Router([configured(FORCED, queue=True)], Random(1))
    made.learn(Reset(POOL, roles("prefill", "decode")), 0.0)
    made.learn(Probed(POOL, P, Probe.LIVE, ok=False, refused=True), 0.0)
    waits = [made.arrive(request(text(100, n)), 2.0 * n) for n in range(2)]
    assert all(isinstance(verdict, Wait) for verdict in waits)
    assert made.turns(5.0) == []
    assert [turn.verdict for turn in made.turns(10.5)] == [Reject(Refusal.ABSENT, "m")]
    made.learn(Probed(POOL, P, Probe.LIVE, ok=True), 11.0)
    (turn,) = made.turns(11.0)
    assert isinstance(turn.verdict, Route)
    assert turn.verdict.decision.prefiller == P
    made.check()


def test_those_before_a_leg_whose_token_came_are_done_as_well() -> None:
    made = apart("prefill", "decode", given=FORCED)
    split_one(made)
    second = route(made, request(text(LONG, 9)), 0.0)
    made.learn(Progressed(second.flight, 0.1, 0.1, 10), 0.1)
    made.check()
    assert member(made, 0).backlog_s(0.1) == 0.0
    assert leg(made) == 1


def test_nobody_waits_any_longer_for_room_where_nothing_is_computed() -> None:
    made = apart("prefill", "decode")
    other = route(made, request(text(100), api=Api.EMBEDDINGS))
    made.learn(Configured(POOL, configured(FORCED, queue=True)), 0.0)
    verdicts = [made.arrive(request(text(LONG, n)), 0.0) for n in range(4)]
    assert isinstance(verdicts[-1], Wait)
    made.finish(other.flight, ok(D), 0.01)
    assert made.turns(0.01) == []
    assert made.turns(10.0)


def test_what_is_sent_to_who_computes_prompts_is_not_taken_for_that_of_others() -> None:
    made = apart("prefill", "decode", given=FORCED)
    split_one(made)
    sample(made, 0, 0.1, running=1, waiting=0)
    assert member(made, 0).strangers == 0.0
    sample(made, 0, 5.0, running=2, waiting=0)
    assert member(made, 0).strangers > 0.0


def test_a_prompt_that_was_tokenized_is_pending_on_both_and_on_neither_in_the_end() -> None:
    made = apart("prefill", "decode", given=FORCED)
    tokens = token_chain(range(400))
    sent = route(made, request(text(1600), tokens=tokens, prompt_tokens=400, tokenized=True))
    pending = made.pools[POOL].caches.pending
    assert pending.extend(tokens.hashes, {}).keys() == {P, D}
    made.finish(sent.flight, ok(D), 1.0)
    assert not pending.extend(tokens.hashes, {})


def test_what_a_prompt_costs_others_where_it_is_computed_counts() -> None:
    made = apart("both", "decode")
    busy(made, 1)
    pool, wanted = made.pools[POOL], request(text(LONG))
    made.learn(Configured(POOL, configured(FORCED)), 0.0)

    def besides_waiting() -> float:
        parts = pool.ask(wanted, pool.candidates(wanted, 0.1), 0.1).parts[D]
        return parts[6] - parts[1]

    idle = besides_waiting()
    made.learn(Configured(POOL, configured(None)), 0.0)
    busy(made, 0, 20)
    made.learn(Configured(POOL, configured(FORCED)), 0.0)
    assert besides_waiting() > 1.2 * idle


# --- whose fault ------------------------------------------------------------------------------------------------------


def test_an_error_before_the_first_token_is_laid_to_who_computes_the_prompt() -> None:
    made = apart("prefill", "decode", given=FORCED)
    for n in range(10):
        sent = made.arrive(request(text(100, n)), 0.1 * n)
        assert isinstance(sent, Route)
        made.finish(sent.flight, Outcome(End.UPSTREAM_ERROR, status=502, served=D), 0.1 * n + 0.05)
    assert member(made, 0).state(1.0) != member(made, 1).state(1.0)
    assert member(made, 1).state(1.0).value == "ready"
    made.learn(Probed(POOL, P, Probe.LIVE, ok=True), 60.0)
    made.expire(60.0)
    assert member(made, 0).state(60.0) is State.PROBATION
    split_one(made, 100, 60.0)
    (leg,) = member(made, 0).load.legs
    assert member(made, 0).health.trial == leg.id


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("end", "served", "suspect"),
    [(End.UPSTREAM_ERROR, address(2), 0), (End.UNREACHABLE, None, 0), (End.OK, address(2), 1)],
)
def test_where_the_proxy_asked_another_in_vain_neither_of_them_is_suspected(
    end: End, served: str | None, suspect: int, stream: bool
) -> None:
    made = apart("prefill", "decode", "decode", given=FORCED)
    made.learn(Reset(POOL, roles("prefill", "decode")), 0.0)
    for n in range(10):
        sent = split_one(made, 100, 0.1 * n, n, stream=stream)
        made.finish(sent.flight, Outcome(end, served=served, attempts=2, duration_s=60.0), 0.1 * n + 60.0)
    states = [member(made, i).state(61.0).value for i in range(2)]
    assert states[suspect] != "ready"
    assert states[1 - suspect] == "ready"


@pytest.mark.parametrize(("after_s", "suspect"), [(0.05, 0), (20.0, 1)])
def test_a_whole_response_fails_early_by_its_prompt_and_late_by_its_answer(after_s: float, suspect: int) -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = [split_one(made, 100, 0.0, n, stream=False) for n in range(10)]
    for each in sent:
        outcome = Outcome(End.UPSTREAM_ERROR, status=503, served=D, duration_s=after_s)
        made.finish(each.flight, outcome, after_s + 1.0)
    states = [member(made, i).state(after_s + 1.0).value for i in range(2)]
    assert states[suspect] != "ready"
    assert states[1 - suspect] == "ready"


def test_who_prefills_alone_keeps_nobody_from_a_trial() -> None:
    made = apart("prefill", "decode", "decode")
    for i in range(2):
        for n in range(10):
            member(made, i).failed(0.1 * n)
        made.learn(Probed(POOL, address(i), Probe.LIVE, ok=True), 60.0)
    made.expire(60.0)
    made.expire(65.0)
    assert member(made, 0).state(65.0) is member(made, 1).state(65.0) is State.PROBATION
    assert made.pools[POOL].fleet.trial_due == D


def test_no_connection_is_laid_to_who_answers() -> None:
    made = apart("prefill", "decode", given=FORCED)
    for n in range(10):
        sent = made.arrive(request(text(100, n)), 0.1 * n)
        assert isinstance(sent, Route)
        made.finish(sent.flight, Outcome(End.UNREACHABLE, status=503, served=D), 0.1 * n + 0.05)
    assert member(made, 0).state(1.0).value == "ready"
    assert member(made, 1).state(1.0).value != "ready"


@pytest.mark.parametrize("hangs", [0, 1])
def test_of_a_split_request_that_stands_still_who_computes_its_prompt_is_suspected(hangs: int) -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made, 4000)
    if hangs == 1:
        made.learn(Progressed(sent.flight, 0.1, 0.1, 10), 0.2)
    size, now = (0, 0.0) if hangs == 0 else (10, 0.2)
    while now < 60.0:
        now += 1.0
        first = None if hangs == 0 else 0.1
        made.learn(Progressed(sent.flight, first, first, size), now)
        made.expire(now)
    states = [member(made, i).state(now).value for i in range(2)]
    assert states[hangs] != "ready"
    assert states[1 - hangs] == "ready"


@pytest.mark.parametrize("alive", [0, 1])
def test_of_whole_responses_that_stand_still_who_gives_no_sign_is_suspected(alive: int) -> None:
    made = apart("prefill", "decode", given=FORCED)
    sent = split_one(made, 4000, stream=False, output=10)
    now = 0.0
    while now < 60.0:
        now += 1.0
        made.learn(Progressed(sent.flight, None, None, 0), now)
        member(made, alive).worked(now)
        made.expire(now)
    states = [member(made, i).state(now).value for i in range(2)]
    assert states[alive] == "ready"
    assert states[1 - alive] != "ready"


# --- what is learned --------------------------------------------------------------------------------------------------


def test_transfers_that_take_longer_are_learned() -> None:
    transfer = Transfer(DisaggregationSettings(latency_s=0.1))
    believed = transfer.seconds(10_000)
    for _ in range(60):
        expected = 0.05 + transfer.seconds(10_000)
        transfer.learn(transfer.seconds(10_000), 0.0, expected, 0.05 + 3.0 * believed)
    assert isclose(transfer.factor, 3.0, rel_tol=0.15)


def test_what_is_no_transfer_teaches_nothing_of_it() -> None:
    transfer = Transfer(DisaggregationSettings())
    transfer.learn(0.0, 0.0, 1.0, 9.0)
    assert transfer.factor == 1.0


def test_who_waits_for_a_place_where_it_is_answered_teaches_nothing_of_its_way() -> None:
    made = apart("prefill", "decode", given=FORCED)
    split_one(made)
    (flight,) = member(made, 1).load
    disaggregation, prefill = made.pools[POOL].disaggregation, member(made, 0)
    assert disaggregation is not None
    before = repr(disaggregation), repr(prefill.speed)
    flight.prediction = replace(flight.prediction, queue_s=flight.prediction.queue_s + 3.0)
    learn(disaggregation, flight, prefill, 4.0)
    assert (repr(disaggregation), repr(prefill.speed)) == before
    flight.prediction = replace(flight.prediction, queue_s=flight.prediction.queue_s - 3.0)
    learn(disaggregation, flight, prefill, 4.0)
    assert repr(disaggregation) != before[0]
    assert repr(prefill.speed) != before[1]


def test_no_tokens_take_no_time() -> None:
    assert Transfer(DisaggregationSettings()).seconds(0) == 0.0


def test_what_is_learned_of_who_prefills_comes_from_split_requests() -> None:
    made = apart("prefill", "decode", given=FORCED)
    before = member(made, 0).speed.prefill_factor
    now = 0.0
    for n in range(40):
        sent = route(made, request(text(LONG, n)), now)
        slow = 3.0 * sent.decision.prediction.ttft_s if n < 20 else sent.decision.prediction.ttft_s
        made.finish(sent.flight, ok(D, ttft_s=slow, duration_s=slow + 1), now + slow + 1)
        now += slow + 2
    assert member(made, 0).speed.prefill_factor > 1.3 * before
    disaggregation = made.pools[POOL].disaggregation
    assert disaggregation is not None
    assert disaggregation.transfer.factor > 1.05


def test_first_tokens_tell_what_a_second_of_prefill_for_others_is_worth() -> None:
    made = apart("prefill", "decode", given=FORCED)
    disaggregation = made.pools[POOL].disaggregation
    assert disaggregation is not None
    sent = split_one(made)
    before = disaggregation.legs.prices(1, 0.0, 0.4).decode
    made.learn(Progressed(sent.flight, 3.0, 3.0, 10), 3.0)
    assert disaggregation.legs.prices(1, 0.0, 0.4).decode > before


# --- whatever happens -------------------------------------------------------------------------------------------------

some = st.builds(Replica, where, st.sampled_from([{**H100, "role": r} for r in ("prefill", "decode", "both", "else")]))
with_roles: st.SearchStrategy[Step] = st.one_of(
    steps,
    st.builds(Reset, st.just(POOL), st.lists(some, max_size=5, unique_by=lambda r: r.address).map(tuple)),
    st.builds(Add, st.just(POOL), some),
    st.builds(Configured, st.just(POOL), st.sampled_from([None, FAST, FORCED, PAIRED]).map(configured)),
)
told = st.lists(st.tuples(with_roles, st.floats(0.0, 5.0)), max_size=50)
choices = st.sampled_from([FAST, FORCED, PAIRED])


class Apart(Driver):
    """A driver whose replicas have roles."""

    def __init__(self, given: DisaggregationSettings) -> None:
        super().__init__("predicted")
        self.router = Router([configured(given)], Random(1), self.log, 30.0)
        self.router.learn(Reset(POOL, roles("prefill", "decode", "both")), 0.0)

    def step(self, step: Step) -> None:
        if isinstance(step, Arrive):
            step = Arrive(replace(step.request, mirrorable=True))
        super().step(step)

    def members(self) -> list[Member]:
        return [one for _, one in self.router.members()]


@settings(max_examples=150, deadline=None)
@given(script=told, chosen=choices)
def test_every_leg_ends_once_with_its_flight(script: list[tuple[Any, float]], chosen: DisaggregationSettings) -> None:
    driver = Apart(chosen)
    for step, wait in script:
        driver.now += wait
        driver.step(step)
        driver.router.check()
        for one in driver.members():
            assert one.load.backlog_s(driver.now) >= 0.0
            assert one.load.prefilling(driver.now) >= 0
            assert one.load.decoding(driver.now) >= 0
    driver.router.expire(driver.now + 1000.0)
    driver.router.check()
    assert driver.router.in_flight == 0
    for one in driver.members():
        assert (one.load.requests, one.load.held_tokens, one.load.backlog_s(driver.now)) == (0, 0.0, 0.0)


@settings(max_examples=50, deadline=None)
@given(script=told, wanted=requests, chosen=choices)
def test_explaining_changes_nothing(
    script: list[tuple[Any, float]], wanted: Request, chosen: DisaggregationSettings
) -> None:
    asked, silent = Apart(chosen), Apart(chosen)
    for step, wait in script:
        for driver in (asked, silent):
            driver.now += wait
        asked.router.explain(wanted, asked.now)
        for driver in (asked, silent):
            driver.step(step)
    assert repr(asked.log.decisions) == repr(silent.log.decisions)
    explained, arrived = asked.router.explain(wanted, asked.now), silent.router.arrive(wanted, silent.now)
    if isinstance(explained, Decision) and isinstance(arrived, Route):
        assert (explained.endpoints, explained.prefiller) == (arrived.decision.endpoints, arrived.decision.prefiller)


@settings(max_examples=50, deadline=None)
@given(script=scripts, labels=st.sampled_from([{}, {"role": "both"}]))
def test_a_pool_without_prefillers_apart_keeps_its_books(
    script: list[tuple[Any, float]], labels: Mapping[str, str]
) -> None:
    driver = Apart(FAST)
    driver.router.learn(Reset(POOL, tuple(Replica(address(i), {**H100, **labels}) for i in range(3))), 0.0)
    driver.play(script)
    driver.router.check()
