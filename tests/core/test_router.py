from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from extproc.core.admission.settings import QueueSettings
from extproc.core.health.settings import HealthSettings
from extproc.core.health.states import State
from extproc.core.observers import Several
from extproc.core.router import PoolSettings, Router
from extproc.core.running import SILENT_S
from extproc.core.types import (
    Add,
    Api,
    Decision,
    End,
    NotSampled,
    Outcome,
    Progressed,
    Refusal,
    Reject,
    Remove,
    Replica,
    Reset,
    Route,
    Sample,
    Sampled,
    ScrapeFailure,
    Serves,
    Wait,
)

from .support import (
    A100,
    MODEL,
    POOL,
    Log,
    address,
    chosen,
    member,
    ok,
    only,
    preferred,
    replicas,
    request,
    route,
    router,
    sample,
    text,
    usage,
)

PROMPT = text(16_000, 1)


def held(made: Router, i: int) -> int:
    """Bytes of PROMPT that replica i is believed to hold."""
    return made.pools[POOL].index.match(request(PROMPT).blocks).get(address(i), 0)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_the_best_replica_comes_first_and_two_alternates_after_it() -> None:
    made = router(5)
    verdict = route(made, request(PROMPT, output=10))
    assert len(verdict.endpoints) == 3
    assert len(set(verdict.endpoints)) == 3
    assert verdict.decision.endpoints == verdict.endpoints
    assert verdict.decision.flight == verdict.flight
    assert [c.address for c in verdict.decision.candidates] == list(verdict.endpoints)


def test_the_choice_reserves_at_once() -> None:
    made = router(2)
    first = route(made, request(PROMPT, output=10))
    i = 0 if first.endpoints[0] == address(0) else 1
    assert len(member(made, i).load) == 1
    assert member(made, i).load.backlog_s(0.0) == pytest.approx(first.decision.prediction.prefill_s)
    assert made.in_flight == 1


def test_the_record_says_what_was_expected() -> None:
    made = router(1)
    decision = route(made, request(b"x" * 4000, output=30), 7.0).decision
    assert (decision.at, decision.pool, decision.model, decision.api, decision.policy) == (
        7.0,
        POOL,
        MODEL,
        Api.CHAT,
        "predicted",
    )
    assert (decision.prompt_tokens, decision.output_tokens) == (1000, 30.0)
    assert decision.candidates[0].score == pytest.approx(decision.prediction.cost_s)


def test_token_ids_count_exactly() -> None:
    assert route(router(1), request(b"x" * 4000, prompt_tokens=777)).decision.prompt_tokens == 777


def test_a_path_that_is_not_read_is_routed_all_the_same() -> None:
    made = router(2)
    plain = request(api=Api.OTHER, model=None, prompt_bytes=None)
    assert isinstance(made.arrive(plain, 0.0), Route)
    made.check()


def test_no_members_and_no_allowed_members_are_told_apart() -> None:
    log = Log()
    empty, full = router(0, observer=log), router(2, observer=log)
    cases = [
        (empty, request(), Refusal.NO_REPLICAS),
        (empty, request(subset=frozenset({"10.0.0.1"})), Refusal.NO_REPLICAS),
        (full, request(subset=frozenset()), Refusal.SUBSET_EMPTY),
        (full, request(subset=frozenset({"10.9.9.9"})), Refusal.SUBSET_EMPTY),
    ]
    for made, wanted, refusal in cases:
        assert made.arrive(wanted, 0.0) == Reject(refusal, MODEL)
        assert made.explain(wanted, 0.0) == Reject(refusal, MODEL)
    assert [pool for _, pool in log.rejects] == [POOL] * 4


def test_a_subset_is_obeyed_in_the_alternates_too() -> None:
    made = router(5)
    verdict = route(made, request(PROMPT, subset=frozenset({address(1), "10.0.0.4"})))
    assert set(verdict.endpoints) == {address(1), address(3)}


# --- models and pools -------------------------------------------------------------------------------------------------


def pools(*settings: PoolSettings) -> Router:
    made = Router(settings, Random(1))
    for i, each in enumerate(settings):
        made.learn(Reset(each.name, (replicas(9)[i],)), 0.0)
    return made


def test_a_request_goes_to_the_pool_of_its_model() -> None:
    made = pools(PoolSettings("small", ("8b",), scraped=False), PoolSettings("large", ("70b",), scraped=False))
    assert route_to(made, "8b") == address(0)
    assert route_to(made, "70b") == address(1)
    assert route_to(made, None) == address(0)
    reject = made.arrive(request(model="13b"), 0.0)
    assert reject == Reject(Refusal.UNKNOWN_MODEL, "13b", ("8b", "70b"))


def route_to(made: Router, model: str | None) -> str:
    verdict = made.arrive(request(model=model), 0.0)
    assert isinstance(verdict, Route)
    return verdict.endpoints[0]


def test_models_that_replicas_list_are_served_too() -> None:
    made = pools(PoolSettings("small", ("8b",), scraped=False), PoolSettings("large", ("70b",), scraped=False))
    made.learn(Serves("large", address(1), ("70b", "my-lora")), 0.0)
    assert route_to(made, "my-lora") == address(1)
    made.learn(Remove("large", address(1)), 0.0)
    assert isinstance(made.arrive(request(model="my-lora"), 0.0), Reject)


def test_a_pool_that_knows_no_models_yet_takes_any() -> None:
    made = pools(PoolSettings("only", scraped=False))
    assert route_to(made, "whatever") == address(0)
    made.learn(Serves("only", address(0), ("8b",)), 0.0)
    assert isinstance(made.arrive(request(model="whatever"), 0.0), Reject)


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_flight_ends_once_and_a_second_end_is_counted() -> None:
    log = Log()
    made = router(2, observer=log)
    flight = route(made, request(PROMPT)).flight
    for _ in range(3):
        made.finish(flight, ok(address(0)), 1.0)
        made.check()
    assert (len(log.ends), len(log.unknown), made.in_flight) == (1, 2, 0)


def test_unknown_ids_and_facts_change_nothing() -> None:
    log = Log()
    made = router(1, observer=log)
    before = repr(made)
    made.finish("nobody", ok(address(0)), 1.0)
    made.learn(Progressed("nobody", 1.0, 1.0, 10), 1.0)
    made.learn(Sampled("nopool", address(0), Sample()), 1.0)
    made.learn(Sampled(POOL, "10.9.9.9:1", Sample(block_size=16, num_blocks=10)), 1.0)
    made.learn(NotSampled(POOL, "10.9.9.9:1", ScrapeFailure.REFUSED), 1.0)
    made.learn(Serves(POOL, "10.9.9.9:1", ("x",)), 1.0)
    made.learn(Remove(POOL, "10.9.9.9:1"), 1.0)
    made.learn(Add("nopool", Replica(address(5))), 1.0)
    made.check()
    assert repr(made) == before
    assert len(log.unknown) == 1
    assert (log.ends, log.departed) == ([], [])


def test_a_flight_that_is_never_reported_is_closed_by_the_sweep() -> None:
    log = Log()
    made = router(1, observer=log, flight_ttl_s=10.0)
    route(made, request(PROMPT), 0.0)
    route(made, request(PROMPT), 4.0)
    assert made.next_wakeup() == 10.0
    assert made.expire(9.9) == 0
    assert made.expire(10.0) == 1
    assert (made.in_flight, made.next_wakeup()) == (1, 14.0)
    assert log.ends[0].outcome == Outcome(End.LOST)
    assert made.expire(100.0) == 1
    assert (len(member(made, 0).load), made.next_wakeup()) == (0, None)
    made.check()


def test_progress_keeps_a_flight_alive() -> None:
    made = router(1, flight_ttl_s=10.0)
    flight = route(made, request(PROMPT), 0.0).flight
    for second in range(1, 100, 5):
        made.learn(Progressed(flight, 0.5, 0.5, 100), float(second))
        assert made.expire(float(second)) == 0
    assert made.expire(200.0) == 1


def test_the_prompt_stays_indexed_only_where_it_was_computed() -> None:
    failures = {
        "4xx": Outcome(End.CLIENT_ERROR, 400, address(0), replica_ttft_s=0.002, response_bytes=200),
        "5xx": Outcome(End.UPSTREAM_ERROR, 500, address(0), replica_ttft_s=0.002, response_bytes=200),
        "no connection": Outcome(End.UNREACHABLE, 503),
        "gone before the first byte": Outcome(End.CLIENT_GONE, None, address(0)),
        "lost": Outcome(End.LOST),
    }
    for name, outcome in failures.items():
        made = router(1)
        flight = route(made, request(PROMPT)).flight
        assert held(made, 0) > 0
        made.finish(flight, outcome, 1.0)
        assert held(made, 0) == 0, name
    computed = {
        "ok": ok(address(0)),
        "gone in the middle": Outcome(End.CLIENT_GONE, 200, address(0), response_bytes=500),
        "broke off in the middle": Outcome(End.UPSTREAM_ERROR, 200, address(0), response_bytes=500),
    }
    for name, outcome in computed.items():
        made = router(1)
        made.finish(route(made, request(PROMPT)).flight, outcome, 1.0)
        assert held(made, 0) > 0, name


def test_a_failure_does_not_withdraw_what_another_request_computed() -> None:
    made = router(1)
    failing, working = route(made, request(PROMPT)).flight, route(made, request(PROMPT)).flight
    made.finish(working, ok(address(0)), 1.0)
    made.finish(failing, Outcome(End.CLIENT_GONE), 2.0)
    assert held(made, 0) > 0


# --- the retry --------------------------------------------------------------------------------------------------------


def test_served_elsewhere_moves_the_prefix_and_passes_over_the_first_choice_for_a_while() -> None:
    log = Log()
    made = router(2, observer=log)
    verdict = route(made, request(PROMPT, subset=only(0) | only(1)), 10.0)
    first, second = verdict.endpoints
    i, j = (0, 1) if first == address(0) else (1, 0)
    made.finish(verdict.flight, ok(second, attempts=2), 11.0)
    made.check()
    assert log.ends[0].moved
    assert held(made, i) == 0
    assert held(made, j) > 0
    assert member(made, i).state(11.0) is State.SUSPECT
    assert member(made, j).state(11.0) is State.READY
    assert chosen(made, request(), 11.0 + HealthSettings().suspect_s - 0.01) == second
    assert member(made, i).state(11.0 + HealthSettings().suspect_s) is State.READY


def test_a_failed_retry_passes_over_both() -> None:
    made = router(3)
    verdict = route(made, request(PROMPT), 10.0)
    made.finish(verdict.flight, Outcome(End.UPSTREAM_ERROR, 503, verdict.endpoints[1], attempts=2), 11.0)
    assert preferred(made, request(), 11.1) == verdict.endpoints[2]


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(End.CLIENT_ERROR, 400, address(0)),
        Outcome(End.CLIENT_ERROR, 404, address(0)),
        Outcome(End.CLIENT_GONE, None, address(0)),
        Outcome(End.LOST),
    ],
)
def test_what_is_not_the_replicas_fault_does_not_pass_it_over(outcome: Outcome) -> None:
    made = router(1)
    made.finish(route(made, request(PROMPT)).flight, outcome, 1.0)
    assert member(made, 0).state(1.0) is State.READY


@pytest.mark.parametrize("outcome", [Outcome(End.UPSTREAM_ERROR, 500, address(0)), Outcome(End.UNREACHABLE, 503)])
def test_a_failed_request_passes_its_replica_over_until_a_scrape_answers(outcome: Outcome) -> None:
    made = router(1)
    made.finish(route(made, request(PROMPT)).flight, outcome, 1.0)
    assert member(made, 0).state(1.0) is State.SUSPECT
    sample(made, 0, now=1.5, running=0)
    assert member(made, 0).state(1.5) is State.READY


def test_served_by_a_replica_that_left_meanwhile_is_no_member_again() -> None:
    made = router(2)
    verdict = route(made, request(PROMPT), 0.0)
    for each in verdict.endpoints:
        made.learn(Remove(POOL, each), 1.0)
    made.finish(verdict.flight, ok(verdict.endpoints[1]), 2.0)
    made.check()
    assert made.pools[POOL].index.addresses == frozenset()


# --- replicas that come and go ----------------------------------------------------------------------------------------


def test_a_replica_removed_and_added_again_never_had_the_flights_of_before() -> None:
    log = Log()
    made = router(1, observer=log)
    flights = [route(made, request(text(8000, n)), 0.0).flight for n in range(3)]
    made.learn(Remove(POOL, address(0)), 1.0)
    assert log.departed == [(POOL, address(0))]
    made.learn(Add(POOL, replicas(1)[0]), 2.0)
    made.check()
    mine = route(made, request(PROMPT), 3.0).flight
    backlog = member(made, 0).load.backlog_s(3.0)
    made.learn(Progressed(flights[0], None, None, 0), 3.0)
    made.learn(Progressed(flights[1], 3.0, 3.0, 100), 3.0)
    assert member(made, 0).load.backlog_s(3.0) == backlog
    for flight in flights:
        made.finish(flight, ok(address(0), ttft_s=2.5, duration_s=2.9), 3.0)
        made.check()
    assert member(made, 0).load.backlog_s(3.0) == backlog
    assert member(made, 0).speed.prefill_factor == 1.0
    assert len(member(made, 0).load) == 1
    made.finish(mine, ok(address(0)), 4.0)
    assert (made.in_flight, len(member(made, 0).load)) == (0, 0)


def test_flights_of_a_replica_that_left_end_by_themselves() -> None:
    made = router(1)
    flight = route(made, request(PROMPT)).flight
    made.learn(Reset(POOL, ()), 1.0)
    made.learn(Progressed(flight, None, None, 0), 1.0)
    made.finish(flight, ok(address(0)), 2.0)
    made.check()
    assert made.in_flight == 0


def test_a_restarted_engine_has_an_empty_cache() -> None:
    made = router(1)
    sample(made, 0, prompt_tokens=500.0)
    made.finish(route(made, request(PROMPT)).flight, ok(address(0)), 1.0)
    sample(made, 0, now=2.0, prompt_tokens=900.0)
    assert held(made, 0) > 0
    sample(made, 0, now=3.0, prompt_tokens=10.0)
    assert held(made, 0) == 0


def test_the_index_holds_what_the_engines_cache_holds() -> None:
    made = router(1)
    sample(made, 0, block_size=16, num_blocks=100)
    for n in range(5):
        made.finish(route(made, request(text(4000, n))).flight, ok(address(0)), 1.0)
    assert made.pools[POOL].index.held_bytes(address(0)) <= 1600 * 4


def test_the_index_shrinks_where_predicted_hits_do_not_come() -> None:
    made = router(1)
    sample(made, 0, block_size=16, num_blocks=2000)
    index = made.pools[POOL].index
    for n in range(20):
        made.finish(route(made, request(text(4000, n))).flight, ok(address(0)), 1.0)
    before = index.held_bytes(address(0))
    for n in range(40):
        flown = route(made, request(text(4000, n % 20)))
        made.finish(flown.flight, ok(address(0), usage=usage(1000, 10, cached=0)), 2.0)
    assert member(made, 0).cache_share < 0.6
    sample(made, 0, now=3.0, block_size=16, num_blocks=2000)
    assert 0 < index.held_bytes(address(0)) < before


# --- learning ---------------------------------------------------------------------------------------------------------


def test_usage_corrects_the_estimates_of_the_next_request() -> None:
    made = router(1)
    for n in range(30):
        verdict = route(made, request(text(3000, n)), float(n))
        made.finish(verdict.flight, ok(address(0), usage=usage(1000, 20)), n + 0.5)
    decision = route(made, request(text(3000, 99)), 100.0).decision
    assert decision.prompt_tokens == pytest.approx(1000, rel=0.02)
    assert decision.output_tokens < 100


def test_without_usage_the_size_of_the_response_tells_the_output() -> None:
    log = Log()
    made = router(1, observer=log)
    made.finish(route(made, request(PROMPT)).flight, ok(address(0), response_bytes=18_000), 1.0)
    made.finish(route(made, request(PROMPT)).flight, ok(address(0)), 2.0)
    assert [e.output_tokens for e in log.ends] == [100, None]


def test_a_prior_wrong_by_two_is_corrected_by_first_tokens() -> None:
    made, rng = router(1), Random(1)
    now = 0.0
    for n in range(50):
        now += 10.0
        verdict = route(made, request(text(rng.randint(2000, 60_000), n), output=10), now)
        expected = verdict.decision.prediction
        truth = 0.02 + 2.0 * expected.prefill_s / member(made, 0).speed.prefill_factor
        made.finish(verdict.flight, ok(address(0), ttft_s=truth * rng.uniform(0.9, 1.1)), now + 5.0)
    assert member(made, 0).speed.prefill_factor == pytest.approx(2.0, rel=0.15)


def test_a_fast_error_does_not_make_the_replica_look_fast() -> None:
    made = router(1)
    for n in range(30):
        flight = route(made, request(text(30_000, n)), float(n)).flight
        end = End.CLIENT_ERROR if n % 2 else End.UPSTREAM_ERROR
        made.finish(flight, Outcome(end, 400 + n % 2, address(0), replica_ttft_s=0.002, ttft_s=0.002), n + 0.1)
    assert (member(made, 0).speed.prefill_factor, member(made, 0).speed.base_s) == (1.0, 0.01)


def test_queueing_does_not_make_the_replica_look_slow() -> None:
    """Each first token comes as predicted, behind five others: the speed was right."""
    made = router(1)
    for burst in range(20):
        now = 100.0 * burst
        verdicts = [route(made, request(text(16_000, 10 * burst + n), output=5), now) for n in range(5)]
        for verdict in verdicts:
            made.finish(verdict.flight, ok(address(0), ttft_s=verdict.decision.prediction.ttft_s), now + 50.0)
    assert member(made, 0).speed.prefill_factor == pytest.approx(1.0, rel=0.1)


def test_token_ids_do_not_teach_how_text_is_tokenized() -> None:
    made = router(1)
    flown = route(made, request(b"x" * 4000, prompt_tokens=1000))
    made.finish(flown.flight, ok(address(0), usage=usage(prompt=1000)), 1.0)
    before = made.pools[POOL].prompt_tokens.bytes_per_token(MODEL)
    flown = route(made, request(b"x" * 4000, prompt_tokens=4000), 2.0)
    made.finish(flown.flight, ok(address(0), usage=usage(prompt=4000)), 3.0)
    assert made.pools[POOL].prompt_tokens.bytes_per_token(MODEL) == before


@pytest.mark.parametrize("fields", [{"stream": False}, {"api": Api.RESPONSES}])
def test_where_the_first_byte_is_not_the_first_token_its_absence_says_nothing(fields: dict[str, Any]) -> None:
    made = router(1)
    flown = route(made, request(b"x" * 40_000, **fields))
    done = member(made).load.backlog_s(0.0)
    made.learn(Progressed(flown.flight, None, None, 0), done + 1.0)
    assert member(made).load.backlog_s(done + 1.0) == 0.0
    factor = member(made).speed.prefill_factor
    made.finish(flown.flight, ok(address(0), ttft_s=30.0, duration_s=30.0), done + 30.0)
    assert member(made).speed.prefill_factor == factor


def test_a_whole_response_that_is_overdue_where_nothing_moves_does_not_look_free() -> None:
    made = router(1)
    flown = route(made, request(b"x" * 4000, output=50, stream=False))
    due = flown.decision.prediction.ttft_s + flown.decision.prediction.decode_s
    made.learn(Progressed(flown.flight, None, None, 0), due + SILENT_S + 1.0)
    assert member(made).load.backlog_s(due + SILENT_S + 1.0) > 0.0


def test_a_whole_response_that_is_overdue_where_tokens_come_is_only_long() -> None:
    made = router(1)
    flown = route(made, request(b"x" * 4000, output=50, stream=False))
    later = flown.decision.prediction.ttft_s + flown.decision.prediction.decode_s + SILENT_S + 1.0
    sample(made, 0, later - 1.0, generated_tokens=100.0)
    sample(made, 0, later - 0.5, generated_tokens=150.0)
    made.learn(Progressed(flown.flight, None, None, 0), later)
    assert member(made).load.backlog_s(later) == 0.0


def test_progress_moves_the_queue() -> None:
    made = router(1)
    a, b = (route(made, request(text(40_000, n), output=5), 0.0) for n in range(2))
    before = member(made, 0).load.backlog_s(0.05)
    made.learn(Progressed(a.flight, 0.05, 0.05, 100), 0.05)
    assert member(made, 0).load.backlog_s(0.05) == pytest.approx(b.decision.prediction.prefill_s)
    assert member(made, 0).load.backlog_s(0.05) < before
    made.learn(Progressed(b.flight, None, None, 0), 5.0)
    assert member(made, 0).load.backlog_s(5.0) > 1.0
    made.check()


def test_other_hardware_at_the_same_address_starts_from_its_own_prior() -> None:
    made = router(1)
    before = made.explain(request(text(40_000)), 0.0)
    made.learn(Add(POOL, Replica(address(0), A100)), 0.0)
    after = made.explain(request(text(40_000)), 0.0)
    assert isinstance(before, Decision)
    assert isinstance(after, Decision)
    assert after.prediction.prefill_s > 2 * before.prediction.prefill_s


# --- inspection -------------------------------------------------------------------------------------------------------


def test_explain_lists_every_candidate_and_reserves_nothing() -> None:
    made = router(6)
    decision = made.explain(request(PROMPT), 0.0)
    assert isinstance(decision, Decision)
    assert len(decision.candidates) == 6
    assert len(decision.endpoints) == 3
    assert (decision.flight, made.in_flight, held(made, 0)) == ("", 0, 0)


def test_flight_ids_of_two_processes_differ() -> None:
    a, b = route(router(1, seed=1), request()), route(router(1, seed=2), request())
    assert a.flight != b.flight


def test_several_observers_hear_everything() -> None:
    logs = Log(), Log()
    made = router(1, observer=Several(*logs))
    verdict = route(made, request(PROMPT))
    made.finish(verdict.flight, ok(address(0)), 1.0)
    made.finish(verdict.flight, ok(address(0)), 1.0)
    made.arrive(request(subset=frozenset()), 1.0)
    made.learn(Remove(POOL, address(0)), 1.0)
    for log in logs:
        assert [len(x) for x in (log.decisions, log.ends, log.unknown, log.rejects, log.departed)] == [1] * 5


def test_check_finds_a_load_that_the_ledger_does_not_know() -> None:
    made = router(1)
    route(made, request(PROMPT), 1.0)
    load = member(made, 0).load
    stray = replace(next(iter(load)), id="stray")
    load.open(stray, 0.0)
    with pytest.raises(AssertionError):
        made.check()
    load.close(stray, 0.0)
    made.check()
    load.close(next(iter(load)), 0.0)
    with pytest.raises(AssertionError):
        made.check()


def test_repr_is_a_status_line() -> None:
    made = router(2)
    route(made, request(PROMPT))
    assert repr(made) == "<router [<pool p predicted 2 replicas>] <ledger 1 opened - 0 closed = 1 open>>"


def test_who_sleeps_gets_nothing_and_wakes_with_an_empty_cache() -> None:
    made = router(2, scraped=True)
    for i in (0, 1):
        made.learn(Sampled(POOL, address(i), Sample(running=0, waiting=0, awake=True)), 0.0)
    shared = request(text(64_000))
    first = route(made, shared, 0.1).endpoints[0]
    other = next(address(i) for i in (0, 1) if address(i) != first)
    made.learn(Sampled(POOL, first, Sample(running=1, waiting=0, awake=False)), 0.2)
    assert [route(made, shared, 0.3 + i).endpoints[0] for i in range(3)] == [other] * 3
    assert made.pools[POOL].index.match(shared.blocks).get(first)
    made.learn(Sampled(POOL, first, Sample(running=1, waiting=0, awake=True)), 5.0)
    assert member(made, first).state(5.0) is State.SLOW_STARTING
    assert not made.pools[POOL].index.match(shared.blocks).get(first)


def test_while_all_sleep_requests_wait_or_are_refused_as_where_nobody_is() -> None:
    made = router(1, scraped=True, queue=QueueSettings())
    made.learn(Sampled(POOL, address(0), Sample(running=0, waiting=0, awake=False)), 0.0)
    waiting = made.arrive(request(), 0.1)
    assert isinstance(waiting, Wait)
    assert made.turns(1.0) == []
    made.learn(Sampled(POOL, address(0), Sample(running=0, waiting=0, awake=True)), 2.0)
    (turn,) = made.turns(2.0)
    assert isinstance(turn.verdict, Route)
    made.learn(Sampled(POOL, address(0), Sample(running=0, waiting=0, awake=False)), 3.0)
    assert isinstance(made.arrive(request(), 3.0), Wait)
    assert made.turns(3.1) == []
    (turn,) = made.turns(3.1 + QueueSettings().absent_wait_s)
    assert isinstance(turn.verdict, Reject)
    assert turn.verdict.refusal is Refusal.ABSENT
