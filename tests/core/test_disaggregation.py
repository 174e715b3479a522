"""Prefill and decode apart: when a request is split, what is booked where, and what is learned of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.admission.settings import QueueSettings
from extproc.core.disaggregation import Transfer
from extproc.core.fleet import Member
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
from .test_router_properties import Driver, Step, requests, scripts, steps, where

P, D = address(0), address(1)
LONG = 60_000
"""Bytes of a prompt that takes a second to compute."""
FAST = DisaggregationSettings(bandwidth_bytes_per_s=50e9, latency_s=0.001)
FORCED = DisaggregationSettings(local_prefill=False)


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


def split_one(made: Router, size: int = LONG, now: float = 0.0) -> Route:
    sent = route(made, request(text(size)), now)
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


# --- whatever happens -------------------------------------------------------------------------------------------------

some = st.builds(Replica, where, st.sampled_from([{**H100, "role": r} for r in ("prefill", "decode", "both", "else")]))
with_roles: st.SearchStrategy[Step] = st.one_of(
    steps,
    st.builds(Reset, st.just(POOL), st.lists(some, max_size=5, unique_by=lambda r: r.address).map(tuple)),
    st.builds(Add, st.just(POOL), some),
)
told = st.lists(st.tuples(with_roles, st.floats(0.0, 5.0)), max_size=50)
choices = st.sampled_from([FAST, FORCED])


class Apart(Driver):
    """A driver whose replicas have roles."""

    def __init__(self, given: DisaggregationSettings) -> None:
        super().__init__("predicted")
        self.router = Router([configured(given)], Random(1), self.log, 30.0)
        self.router.learn(Reset(POOL, roles("prefill", "decode", "both")), 0.0)

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
