from __future__ import annotations

import math

import pytest

from extproc.core.fleet import Fleet, Member
from extproc.core.health.settings import HealthSettings
from extproc.core.health.states import Reason, State
from extproc.core.types import Add, Remove, Replica, Reset, Sample, ScrapeFailure

from .support import A100, H100, POOL, address, fill, flight, put, replicas

SETTINGS = HealthSettings()


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


# --- who may be chosen ------------------------------------------------------------------------------------------------


def test_a_replica_never_sampled_is_not_ready_where_samples_are_expected() -> None:
    made = fleet(1)
    assert at(made, 0).state(0.0) is State.STARTING
    at(made, 0).sampled(Sample(), 1.0)
    assert at(made, 0).state(1.0) is State.READY
    assert at(fleet(1, scraped=False), 0).state(0.0) is State.READY


def test_a_refused_scrape_says_open_and_a_late_one_does_not() -> None:
    one = at(fleet(1), 0)
    one.sampled(Sample(), 1.0)
    one.not_sampled(ScrapeFailure.LATE, 1.0)
    assert (one.state(1.0), one.late_scrapes) == (State.READY, 1)
    one.not_sampled(ScrapeFailure.REFUSED, 1.0)
    assert one.health.why(1.0) == (State.OPEN, Reason.REFUSED, 1.0)
    assert one.state(1000.0) is State.OPEN
    one.sampled(Sample(), 1002.0)
    assert one.health.why(1002.0) == (State.SLOW_STARTING, Reason.RESTARTED, 1002.0)
    assert (one.state(1002.0 + SETTINGS.slow_start_s), one.late_scrapes) == (State.READY, 0)


def test_a_failed_request_makes_suspect_until_time_a_scrape_or_an_answer_clears_it() -> None:
    one = at(fleet(1, scraped=False), 0)
    one.failed(10.0)
    assert one.state(10.0 + SETTINGS.suspect_s - 0.01) is State.SUSPECT
    assert one.state(10.0 + SETTINGS.suspect_s) is State.READY
    one.answered(1.0, 15.0)
    one.failed(20.0)
    one.sampled(Sample(), 20.5)
    assert one.state(20.5) is State.READY
    one.answered(1.0, 25.0)
    one.failed(30.0)
    one.answered(1.0, 30.5)
    assert one.state(30.5) is State.READY


def test_candidates_are_the_ready_ones_then_the_starting_then_the_least_bad() -> None:
    made = fleet(3)
    assert names(made.candidates(0.0)) == [address(0), address(1), address(2)]
    at(made, 1).sampled(Sample(), 0.0)
    assert names(made.candidates(0.0)) == [address(1)]
    at(made, 1).failed(0.0)
    assert names(made.candidates(0.0)) == [address(0), address(2)]
    assert not any(m.health.passed_over(0.0) for m in made.candidates(0.0))
    at(made, 0).not_sampled(ScrapeFailure.REFUSED, 0.0)
    at(made, 2).not_sampled(ScrapeFailure.REFUSED, 0.0)
    assert names(made.candidates(0.0)) == [address(1)]
    assert all(m.health.passed_over(0.0) for m in made.candidates(0.0))
    assert not made.absent(0.0)
    at(made, 1).not_sampled(ScrapeFailure.REFUSED, 0.0)
    assert names(made.candidates(0.0)) == [address(0), address(1), address(2)]
    assert made.absent(0.0)


def test_of_those_that_are_out_the_least_bad_goes_first_and_the_gone_never() -> None:
    """Each is worse than the one before; the last is gone, and is never chosen."""
    made = fleet(6, scraped=False)
    suspect, opened, draining, hung, refused, gone = made.members
    suspect.failed(0.0)
    for _ in range(3):
        opened.failed(0.0)
    draining.health.drain(None, 0.0)
    hung.health.silent_for(SETTINGS.hang_s, 0.0)
    refused.not_sampled(ScrapeFailure.REFUSED, 0.0)
    gone.health.drain(0.0, 0.0)
    worse = list(made.members)
    while worse:
        best = worse.pop(0)
        assert made.candidates(0.0) == ([] if best is gone else [best])
        made.apply(Remove(POOL, best.address), 0.0)
        made.candidates(0.0)


@pytest.mark.parametrize("drain", [Replica(address(0), {"drain": "true"}), Replica(address(0), drain=True)])
def test_what_discovery_wants_drained_gets_nothing_while_others_are_there(drain: Replica) -> None:
    made = fleet(2, scraped=False)
    learned = at(made, 0).speed
    made.apply(Add(POOL, Replica(address(0), {**H100, **drain.labels}, drain=drain.drain)), 1.0)
    assert at(made, 0).health.why(1.0) == (State.DRAINING, Reason.ASKED, 1.0)
    assert at(made, 0).speed is learned, "a drain is not other hardware"
    assert names(made.candidates(1.0)) == [address(1)]
    made.apply(Remove(POOL, address(1)), 2.0)
    assert names(made.candidates(2.0)) == [address(0)]
    made.apply(Add(POOL, Replica(address(0), H100)), 3.0)
    assert not made.candidates(3.0)[0].health.passed_over(3.0)


def test_members_that_join_at_once_are_not_new_to_each_other() -> None:
    made = fleet(3)
    at(made, 0).sampled(Sample(), 0.1)
    at(made, 1).sampled(Sample(), SETTINGS.slow_start_s - 0.1)
    assert [at(made, i).state(SETTINGS.slow_start_s) for i in range(3)] == [State.READY, State.READY, State.STARTING]
    at(made, 2).sampled(Sample(), 300.0)
    assert at(made, 2).health.why(300.0) == (State.SLOW_STARTING, Reason.JOINED, 300.0)


def test_the_share_of_a_new_replica_grows() -> None:
    made = fleet(2)
    old = at(made, 0)
    old.sampled(Sample(), 0.0)
    fill(old, 10)
    made.apply(Add(POOL, replicas(3)[2]), 100.0)
    new = at(made, 2)
    new.sampled(Sample(), 100.0)
    counts = []
    for now in (100.0, 102.0, 105.0, 109.0, 110.0):
        while new in made.candidates(now) and len(new.load) < 20:
            put(new, f"new-{len(new.load)}", now)
        counts.append(len(new.load))
    assert counts == [1, 2, 5, 9, 20]  # one at once, then its share of the ten that the other has, then what it likes


def test_where_all_start_slowly_nobody_is_held_back() -> None:
    made = fleet(2, scraped=False)
    made.apply(Reset(POOL, replicas(4)[2:]), 100.0)
    fill(at(made, 2), 50)
    assert [m.state(100.0) for m in made.members] == [State.SLOW_STARTING] * 2
    assert names(made.candidates(100.0)) == [address(2), address(3)]


def test_one_request_at_a_time_is_on_trial() -> None:
    made = fleet(2, scraped=False)
    bad = at(made, 0)
    for _ in range(3):
        bad.failed(0.0)
    assert names(made.candidates(0.5)) == [address(1)]
    now = SETTINGS.open_s
    assert names(made.candidates(now)) == [address(0), address(1)]
    bad.health.tried("a", now)
    assert names(made.candidates(now)) == [address(1)]
    bad.health.released("a")
    assert names(made.candidates(now)) == [address(0), address(1)]


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
    one.not_sampled(ScrapeFailure.REFUSED, 1.0)
    assert one.sampled(Sample(prompt_tokens=5000.0), 60.0) is True
    assert one.sampled(Sample(prompt_tokens=5001.0), 61.0) is False


def test_strangers_end_with_the_process_that_had_them() -> None:
    """An engine that does not tell what runs there would be shunned for ever for what another had."""
    one = at(fleet(1), 0)
    one.identified("vllm", 0.0)
    one.sampled(Sample(running=6, waiting=2), 1.0)
    assert one.strangers == 8
    assert one.identified("triton", 2.0)
    one.sampled(Sample(waiting=0), 2.0)
    assert one.strangers == 0


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
    assert repr(made) == "<fleet [<member 10.0.0.1:8000 starting by joined, 0 in flight, never sampled>]>"
    at(made, 0).sampled(Sample(), 1.5)
    at(made, 0).not_sampled(ScrapeFailure.REFUSED, 2.0)
    assert repr(at(made, 0)) == "<member 10.0.0.1:8000 open by refused, 0 in flight, sampled at 1.500>"


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
