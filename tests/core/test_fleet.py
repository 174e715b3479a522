from __future__ import annotations

import math

import pytest

from extproc.core.fleet import SUSPECT_S, Fleet, Member, Readiness
from extproc.core.types import Add, Remove, Replica, Reset, Sample, ScrapeFailure

from .support import A100, H100, POOL, address, flight, replicas


def fleet(n: int = 3, *, scraped: bool = True) -> Fleet:
    made = Fleet(scraped=scraped, stale_after_s=10.0)
    made.apply(Reset(POOL, replicas(n)), 0.0)
    return made


def at(made: Fleet, i: int) -> Member:
    found = made.get(address(i))
    assert found is not None
    return found


def names(members: list[Member]) -> list[str]:
    return [m.address for m in members]


# --- membership -------------------------------------------------------------------------------------------------------


def test_reset_keeps_who_stays_and_names_who_left() -> None:
    made = fleet(3)
    kept = at(made, 1)
    gone = made.apply(Reset(POOL, replicas(4)[1:]), 1.0)
    assert gone == [address(0)]
    assert made.get(address(1)) is kept
    assert [m.address for m in made.members] == [address(1), address(2), address(3)]


def test_add_and_remove_are_idempotent() -> None:
    made = fleet(1)
    one = at(made, 0)
    assert made.apply(Add(POOL, Replica(address(0), H100)), 1.0) == []
    assert at(made, 0) is one
    assert made.apply(Remove(POOL, address(0)), 2.0) == [address(0)]
    assert made.apply(Remove(POOL, address(0)), 2.0) == []
    assert len(made) == 0


def test_other_labels_forget_the_learned_speed_and_keep_the_load() -> None:
    made = fleet(1)
    one = at(made, 0)
    one.load.open(flight("a"), 0.0)
    learned = one.speed
    made.apply(Add(POOL, Replica(address(0), H100, weight=3.0)), 1.0)
    assert one.speed is learned
    assert one.replica.weight == 3.0
    made.apply(Add(POOL, Replica(address(0), A100)), 1.0)
    assert one.speed is not learned
    assert len(one.load) == 1


def test_a_replica_that_left_and_came_back_starts_anew() -> None:
    made = fleet(1)
    before = at(made, 0)
    made.apply(Remove(POOL, address(0)), 1.0)
    made.apply(Add(POOL, replicas(1)[0]), 2.0)
    assert at(made, 0) is not before
    assert at(made, 0).joined_at == 2.0


# --- readiness --------------------------------------------------------------------------------------------------------


def test_a_replica_never_sampled_is_not_ready_where_samples_are_expected() -> None:
    made = fleet(1)
    assert at(made, 0).readiness(0.0) is Readiness.UNSAMPLED
    at(made, 0).sampled(Sample(), 1.0)
    assert at(made, 0).readiness(1.0) is Readiness.READY
    assert at(fleet(1, scraped=False), 0).readiness(0.0) is Readiness.READY


def test_a_refused_scrape_says_down_and_a_late_one_does_not() -> None:
    one = at(fleet(1), 0)
    one.sampled(Sample(), 1.0)
    one.not_sampled(ScrapeFailure.LATE)
    assert (one.readiness(1.0), one.late_scrapes) == (Readiness.READY, 1)
    one.not_sampled(ScrapeFailure.REFUSED)
    assert one.readiness(1.0) is Readiness.DOWN
    one.sampled(Sample(), 2.0)
    assert (one.readiness(2.0), one.late_scrapes) == (Readiness.READY, 0)


def test_a_failed_request_makes_suspect_until_time_a_scrape_or_an_answer_clears_it() -> None:
    one = at(fleet(1, scraped=False), 0)
    one.failed(10.0)
    assert one.readiness(10.0 + SUSPECT_S - 0.01) is Readiness.SUSPECT
    assert one.readiness(10.0 + SUSPECT_S) is Readiness.READY
    one.failed(20.0)
    one.sampled(Sample(), 20.5)
    assert one.readiness(20.5) is Readiness.READY
    one.failed(30.0)
    one.answered(1.0, 30.5)
    assert one.readiness(30.5) is Readiness.READY


def test_candidates_are_the_ready_ones_then_the_unsampled_then_everyone() -> None:
    made = fleet(3)
    assert names(made.candidates(0.0)) == [address(0), address(1), address(2)]
    at(made, 1).sampled(Sample(), 0.0)
    assert names(made.candidates(0.0)) == [address(1)]
    at(made, 1).failed(0.0)
    assert names(made.candidates(0.0)) == [address(0), address(2)]
    at(made, 0).not_sampled(ScrapeFailure.REFUSED)
    at(made, 2).not_sampled(ScrapeFailure.REFUSED)
    assert sorted(names(made.candidates(0.0))) == [address(0), address(1), address(2)]


def test_a_subset_restricts_by_address_or_by_host() -> None:
    made = fleet(3, scraped=False)
    assert names(made.candidates(0.0, frozenset({address(1)}))) == [address(1)]
    assert names(made.candidates(0.0, frozenset({"10.0.0.3"}))) == [address(2)]
    assert made.candidates(0.0, frozenset()) == []
    assert made.candidates(0.0, frozenset({"10.9.9.9"})) == []


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_fresh_until_it_is_too_old() -> None:
    one = at(fleet(1), 0)
    assert one.fresh(0.0) is None
    one.sampled(Sample(running=1), 5.0)
    assert one.fresh(15.0) == Sample(running=1)
    assert one.fresh(15.1) is None


def test_a_counter_that_went_back_is_a_restart() -> None:
    one = at(fleet(1), 0)
    assert one.sampled(Sample(prompt_tokens=100.0), 0.0) is False
    assert one.sampled(Sample(prompt_tokens=150.0), 1.0) is False
    assert one.sampled(Sample(prompt_tokens=None), 2.0) is False
    assert one.sampled(Sample(prompt_tokens=150.0), 3.0) is False
    assert one.sampled(Sample(prompt_tokens=10.0), 4.0) is True


def test_a_process_that_was_gone_lost_its_cache_however_much_it_has_done_since() -> None:
    one = at(fleet(1), 0)
    one.sampled(Sample(prompt_tokens=100.0), 0.0)
    one.not_sampled(ScrapeFailure.REFUSED)
    assert one.sampled(Sample(prompt_tokens=5000.0), 60.0) is True
    assert one.sampled(Sample(prompt_tokens=5001.0), 61.0) is False


def test_strangers_are_what_the_engine_has_beyond_our_own() -> None:
    one = at(fleet(1), 0)
    one.load.open(flight("a"), 0.0)
    one.sampled(Sample(running=4, waiting=2), 0.0)
    assert one.strangers == 5
    one.sampled(Sample(running=4), 2.0)
    assert one.strangers == 5  # unknown: the last known stays
    one.sampled(Sample(running=0, waiting=0), 7.0)
    # Ours is on its way there, and theirs were there just now.
    assert one.strangers == pytest.approx(5 * math.exp(-0.5))
    one.sampled(Sample(running=0, waiting=0), 107.0)
    assert one.strangers < 0.001


def test_the_queue_is_the_sample_with_what_was_sent_and_ended_since() -> None:
    one = at(fleet(1), 0)
    assert one.queued(0.0) is None
    a, b = flight("a"), flight("b")
    one.load.open(a, 0.0)
    one.sampled(Sample(waiting=3), 0.0)
    one.load.open(b, 0.0)
    assert one.queued(0.0) == 4
    one.load.close(a, 0.0)
    one.load.close(b, 0.0)
    assert one.queued(0.0) == 2
    assert one.queued(10.1) is None


def test_hit_trust_falls_where_predicted_hits_do_not_come_and_recovers() -> None:
    one = at(fleet(1), 0)
    for _ in range(50):
        one.hit(1000, 0)
    assert one.hit_trust < 0.01
    for _ in range(50):
        one.hit(1000, 1000)
    assert one.hit_trust > 0.99
    one.hit(0, 500)  # nothing was predicted: says nothing
    one.hit(100, 5000)
    assert one.hit_trust <= 1.0


def test_latency_is_a_moving_average() -> None:
    one = at(fleet(1), 0)
    assert (one.latency_s, one.answered_at) == (None, 0.0)
    one.answered(10.0, 5.0)
    assert (one.latency_s, one.answered_at) == (10.0, 5.0)
    one.answered(5.0, 6.0)
    assert one.latency_s == 9.0


def test_repr_is_a_status_line() -> None:
    made = fleet(1)
    assert repr(made) == "<fleet [<member 10.0.0.1:8000 0 in flight, never sampled>]>"
    at(made, 0).sampled(Sample(), 1.5)
    at(made, 0).not_sampled(ScrapeFailure.REFUSED)
    assert repr(at(made, 0)) == "<member 10.0.0.1:8000 0 in flight, sampled at 1.500, down>"


def test_the_share_of_the_cache_that_is_ours_settles_where_predictions_come_true() -> None:
    """An engine that holds what was sent within the last 40 % of the capacity, while we believe in all of it."""
    one = at(fleet(1), 0)
    for n in range(3000):
        age = (n * 0.618) % 1.0 * one.cache_share  # of the prefix, in caches' worth of later tokens
        one.hit(1000, 1000 if age <= 0.4 else 0)
    assert one.cache_share == pytest.approx(0.4, abs=0.05)


def test_the_share_of_the_cache_is_bounded_and_comes_back() -> None:
    one = at(fleet(1), 0)
    for _ in range(1000):
        one.hit(1000, 0)
    assert one.cache_share == 0.05
    for _ in range(1000):
        one.hit(1000, 1000)
    assert one.cache_share == 1.0
    one.hit(0, 0)
    one.hit(1000, 970)  # a block at the edge says nothing
    assert one.cache_share == 1.0
