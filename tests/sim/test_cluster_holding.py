"""Requests that the router holds or refuses, its checks of replicas, and drains, in a simulated cluster."""

from __future__ import annotations

from itertools import pairwise

import pytest

from extproc.core.types import End, Probe, Refusal
from extproc.openai.errors import ANSWERS
from extproc.sim.cluster import Cluster, Result, Scenario, Served
from extproc.sim.fleet_spec import Group, nodes
from extproc.sim.incidents import checked, incident
from extproc.sim.sidecar import NO_QUEUE, TICK_S, Wiring
from extproc.sim.simulate_report import Slo, summary
from extproc.sim.traces import Generate, Trace, Turn, generate
from tests.sim.holding import held_by

PROMPT = Wiring(log_flush_interval_s=0.0, queue=NO_QUEUE)
"""Ends are told at once."""


def cluster(trace: Trace, incidents: tuple[str, ...] = (), count: int = 2, wiring: Wiring = PROMPT) -> Cluster:
    fleet = nodes([Group(gpu="h100", count=count)], "8b", 64, 0.002)
    befall = checked(map(incident, incidents), count)
    return Cluster(Scenario(trace, fleet, incidents=befall, wiring=wiring), "predicted")


def steady(requests: int = 40, every_s: float = 0.5, output: int = 50) -> Trace:
    return Trace("steady", 64, tuple(Turn(2000, output, i * every_s) for i in range(requests)))


def by_turn(result: Result) -> list[Served]:
    return sorted(result.served, key=lambda s: s.turn)


def address(place: int) -> str:
    return f"10.0.0.{place}:8000"


# --- held -------------------------------------------------------------------------------------------------------------


def test_a_held_request_goes_on_at_the_moment_that_the_router_named_and_its_wait_counts() -> None:
    made = cluster(steady())
    holder = held_by(made, 0.375)
    held, placed = by_turn(made.run()), by_turn(cluster(steady()).run())
    assert [s.held_s for s in held] == pytest.approx([0.375] * 40)
    assert {s.held_s for s in placed} == {None}
    for one, other in zip(held, placed, strict=True):
        assert one.end is End.OK
        assert one.arrived_s == other.arrived_s
        assert one.ttft_s is not None
        assert one.queue_s is not None
        assert 0.375 <= one.queue_s < one.ttft_s < one.e2e_s
        assert other.ttft_s is not None
        assert one.ttft_s == pytest.approx(other.ttft_s + 0.375, abs=0.05)
    for outcome in holder.finished:
        assert outcome.ttft_s is not None
        assert outcome.replica_ttft_s == pytest.approx(outcome.ttft_s - 0.375)


def test_a_place_that_an_end_frees_is_given_at_once() -> None:
    made = cluster(steady(20, every_s=0.0), count=1)
    held_by(made, 1e6, ready=lambda router: router.in_flight == 0)
    served = by_turn(made.run())
    sent = sorted(s.arrived_s + (s.held_s or 0.0) for s in served)
    ends = sorted(s.arrived_s + s.e2e_s for s in served)
    assert sent[1:] == pytest.approx(ends[:-1])  # one after the other, and no tick in between


def test_nothing_is_polled() -> None:
    trace = Trace("one", 64, (Turn(2000, 5, 0.0), Turn(2000, 5, 100.0)))
    made = cluster(trace, wiring=Wiring(log_flush_interval_s=0.0, progress_interval_s=None, queue=NO_QUEUE))
    holder = held_by(made, 90.0)
    lasted_s = made.run().lasted_s
    scrapes = checks = 2 * lasted_s / 4.5
    assert holder.asked < lasted_s / TICK_S + scrapes + 2 * checks + 30


def test_a_router_that_names_the_present_again_and_again_does_not_stop_time() -> None:
    made = cluster(steady(3))
    held_by(made, 0.2, wakeup=lambda at: at - 10.0)
    assert [s.held_s for s in by_turn(made.run())] == pytest.approx([0.2] * 3, abs=0.002)


def test_a_session_goes_on_after_the_held_turn_and_after_a_refusal() -> None:
    trace = generate(Generate(sessions=10, turns=3), 1)
    for refusal in (None, Refusal.DEADLINE):
        made = cluster(trace)
        held_by(made, 0.3, refusal=refusal)
        done = by_turn(made.run())
        assert {s.end for s in done} == {None if refusal else End.OK}
        for served, turn in zip(done, trace.turns, strict=True):
            if turn.after is not None:
                before = done[turn.after]
                assert served.arrived_s == pytest.approx(before.arrived_s + before.e2e_s + turn.delay_s)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", Refusal)
def test_a_refusal_has_its_status_and_only_contention_counts_as_refused(refusal: Refusal) -> None:
    made = cluster(steady(4))
    held_by(made, 0.1, refusal=refusal)
    result = made.run()
    status = ANSWERS[refusal].status
    assert {(s.end, s.status, s.refusal, s.replica, s.ttft_s) for s in result.served} == {
        (None, status, refusal, None, None)
    }
    found = summary(result, Slo())
    assert (found["refused"], found["failed"]) == ((4, 0) if status == 429 else (0, 4))
    assert found["refusals"] == {refusal.value: 4}
    assert found["held_mean_s"] == pytest.approx(0.1)
    assert found["goodput_share"] == 0.0


def test_the_error_of_a_prediction_leaves_the_wait_out() -> None:
    made = cluster(steady())
    held_by(made, 20.0)
    assert summary(made.run(), Slo())["ttft_error_mean_s"] < 0.5


def test_priorities_are_told_apart() -> None:
    turns = tuple(Turn(2000, 50, i * 0.5, priority=i % 2) for i in range(20))
    result = cluster(Trace("two", 64, turns)).run()
    assert {(s.turn % 2, s.priority) for s in result.served} == {(0, 0), (1, 1)}
    classes = summary(result, Slo())["priorities"]
    assert list(classes) == ["1", "0"]
    assert {c["requests"] for c in classes.values()} == {10}
    assert all(0 < c["ttft_p50_s"] <= c["ttft_p99_s"] for c in classes.values())


# --- checks, drains, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "well"), [("hangs", True), ("slows=2", True), ("dies", False)])
def test_checks_tell_of_the_process_and_not_of_its_engine(what: str, well: bool) -> None:
    made = cluster(steady(80), (f"5:1:{what}",))
    holder = held_by(made, 0.0)
    made.run()
    here = [(at, fact) for at, fact in holder.checks if fact.address == address(1)]
    assert {fact.probe for _, fact in here} == {Probe.LIVE, Probe.READY}
    assert all(fact.ok for at, fact in here if at < 5)
    later = [(at, fact.ok) for at, fact in here if at > 16]
    assert {ok for _, ok in later} == {well}
    pauses = {round(b - a, 3) for a, b in pairwise(dict(later)) if b > a}
    assert pauses == {Wiring().health_interval_s if well else Wiring().doubt_interval_s}


def test_a_replica_that_drains_finishes_what_it_has_and_gets_nothing_new() -> None:
    made = cluster(steady(80, output=400), ("10.2:1:drains", "30:1:joins"))
    served = by_turn(made.run())
    there = [s for s in served if s.replica == address(1)]
    running = [s for s in there if s.arrived_s < 10.2 < s.arrived_s + s.e2e_s]
    assert running
    assert {s.end for s in running} == {End.OK}
    assert not [s for s in there if 10.2 < s.arrived_s < 30]
    assert [s for s in there if s.arrived_s > 30]


def test_a_failing_replica_answers_500_until_it_starts_anew_and_what_runs_there_goes_on() -> None:
    made = cluster(steady(120, output=200), ("10.2:1:errors", "40.1:1:joins"))
    served = by_turn(made.run())
    failed = [s for s in served if s.end is not End.OK and s.status == 500]
    assert failed
    assert {(s.end, s.replica) for s in failed} == {(End.UPSTREAM_ERROR, address(1))}
    assert all(10.2 < s.arrived_s < 40.1 for s in failed)
    assert {s.end for s in served if s.arrived_s < 8} == {End.OK}
    assert len(failed) < 30  # the router leaves it alone
