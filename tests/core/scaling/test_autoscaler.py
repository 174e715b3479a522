"""The autoscaler in its router: what it sees, when it looks, and from zero."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from extproc.core.admission.settings import QueueSettings
from extproc.core.router import Router
from extproc.core.scaling.autoscaler import Autoscaler
from extproc.core.scaling.rules import Seen
from extproc.core.scaling.settings import ScalingSettings
from extproc.core.settings import PoolSettings
from extproc.core.types import (
    Add,
    Api,
    Configured,
    DrainAsked,
    Refusal,
    Reject,
    Remove,
    Reset,
    Route,
    Wait,
)
from tests.core.support import A100, POOL, address, ok, replicas, request, sample, text

SETTINGS = ScalingSettings(min_replicas=1, max_replicas=6, ttft_target_s=1.0)
ZERO = replace(SETTINGS, min_replicas=0)
QUEUE = QueueSettings(absent_wait_s=180.0)
REPLICA_TTFT_S = 0.27
"""About what is predicted for the prompts below, so that nothing is learned of another speed."""


def router(members: int = 2, scaling: ScalingSettings | None = SETTINGS, queue: QueueSettings = QUEUE) -> Router:
    pool = PoolSettings(POOL, scraped=False, queue=queue, scaling=scaling)
    made = Router([pool], Random(1))
    made.learn(Reset(POOL, replicas(members, A100)), 0.0)
    return made


def scaling(made: Router) -> Autoscaler:
    found = made.pools[POOL].scaling
    assert found is not None
    return found


def traffic(
    made: Router, per_s: float, begin_s: float, end_s: float, ttft_s: float = REPLICA_TTFT_S, growth: float = 0.0
) -> None:
    """Prompts of 4,000 tokens that are answered after two seconds, with a sweep four times a second. `growth`: of the rate, per s."""
    open_: list[tuple[float, str]] = []
    at, next_sweep, number = begin_s, begin_s, 0
    while at < end_s:
        while next_sweep <= at:
            made.expire(next_sweep)
            next_sweep += 0.25
        while open_ and open_[0][0] <= at:
            made.finish(open_.pop(0)[1], ok(ttft_s=ttft_s, replica_ttft_s=REPLICA_TTFT_S, duration_s=2.0), at)
        number += 1
        verdict = made.arrive(request(text(16_000, seed=number), output=100), at)
        if isinstance(verdict, Route):
            open_.append((at + 2.0, verdict.flight))
        at += 1.0 / (per_s + growth * (at - begin_s))
    for _, flight in open_:
        made.finish(flight, ok(ttft_s=ttft_s, replica_ttft_s=REPLICA_TTFT_S, duration_s=2.0), end_s)


def test_a_pool_without_scaling_asks_for_nothing() -> None:
    assert router(scaling=None).pools[POOL].scaling is None


def test_at_the_first_look_it_asks_for_what_is_there() -> None:
    made = router(3)
    assert scaling(made).asked is None
    made.expire(0.0)
    assert scaling(made).asked == 3


def test_a_pool_whose_members_were_not_told_of_is_not_taken_for_an_empty_one() -> None:
    made = Router([PoolSettings(POOL, scraped=False, scaling=SETTINGS)], Random(1))
    made.expire(0.0)
    assert scaling(made).asked is None
    made.learn(Reset(POOL, replicas(5)), 30.0)
    made.expire(30.0)
    assert scaling(made).asked == 5


def test_right_after_a_start_nothing_is_taken_away() -> None:
    made = router(5)
    asked = {}
    for at in range(0, 400, 15):
        made.expire(float(at))
        asked[at] = scaling(made).asked
    assert (asked[285], asked[300]) == (5, 1)


def test_a_process_that_stood_still_takes_nothing_away_for_a_cooldown() -> None:
    made = router(6)
    traffic(made, 12.0, 0.0, 400.0)
    before = scaling(made).asked
    assert before is not None
    assert before >= 4
    asked = {}
    for at in range(1000, 1400, 15):  # nothing came for ten minutes, as far as was seen
        made.expire(float(at))
        asked[at] = scaling(made).asked
    assert asked[1285] == before
    assert (asked[1300] or 0) < before


def test_a_pool_that_lost_all_members_asks_for_what_it_had() -> None:
    made = router(3)
    traffic(made, 2.0, 0.0, 60.0)
    made.learn(Reset(POOL, ()), 60.0)
    for at in (75.0, 90.0):
        made.expire(at)
    look = scaling(made).last
    assert look is not None
    assert (look.seen.replicas, look.asked) == (0, 3)


def test_a_pool_of_a_fixed_size_is_asked_for_just_that() -> None:
    made = router(2, replace(SETTINGS, min_replicas=4, max_replicas=4))
    traffic(made, 12.0, 0.0, 100.0)
    for at in range(100, 1500, 15):
        made.expire(float(at))
        assert scaling(made).asked == 4
    assert scaling(made).changes == 0


def test_growth_is_seen_and_taken_along() -> None:
    made = router(6)
    traffic(made, 2.0, 0.0, 360.0, growth=1.0 / 60.0)
    look = scaling(made).last
    assert look is not None
    assert look.seen.growth_per_s2 == pytest.approx(1.0 / 60.0, rel=0.1)
    assert look.seen.later_per_s > look.seen.per_s + 1.0
    assert look.need.at_once > look.need.up_to


def test_what_came_is_what_is_asked_for() -> None:
    made = router(2)
    traffic(made, 2.0, 0.0, 120.0)
    look = scaling(made).last
    assert look is not None
    assert look.seen.per_s == pytest.approx(2.0, rel=0.05)
    # 4,000 tokens at 0.0548 ms on an A100, and attention.
    assert look.fill_s == pytest.approx(2.0 * 0.243, rel=0.1)
    assert 0.02 < look.decode_s < 0.5
    assert look.capacity_s is not None
    assert 0.7 < look.capacity_s <= 0.9
    traffic(made, 12.0, 120.0, 300.0)
    assert (scaling(made).asked or 0) >= 4


def test_held_and_refused_requests_are_work_too() -> None:
    made = router(1, queue=QueueSettings(max_requests=5))
    made.expire(0.0)
    for i in range(60):
        made.arrive(request(text(40_000, seed=i)), 0.01 * i)
    assert scaling(made).arrivals.mix(1.0).requests == 1.0
    made.expire(16.0)
    look = scaling(made).last
    assert look is not None
    assert look.seen.queue >= 5
    assert look.seen.per_s == 4.0
    assert (scaling(made).asked or 0) > 1


def test_late_first_tokens_are_seen() -> None:
    made = router(2)
    traffic(made, 2.0, 0.0, 60.0, ttft_s=1.7)
    look = scaling(made).last
    assert look is not None
    assert look.seen.ttft_p95_s == 1.7
    assert look.asked == 3


def test_draining_replicas_do_not_count() -> None:
    made = router(3)
    made.learn(DrainAsked(POOL, address(0)), 0.0)
    made.expire(0.0)
    look = scaling(made).last
    assert look is not None
    assert (look.seen.replicas, look.asked) == (2, 2)


def test_requests_of_others_are_counted_by_their_share() -> None:
    pool = PoolSettings(POOL, queue=QUEUE, scaling=SETTINGS)
    made = Router([pool], Random(1))
    made.learn(Reset(POOL, replicas(1, A100)), 0.0)
    sample(made, 0, 0.0, running=0, waiting=0, generated_tokens=0.0)
    for i in range(160):
        made.arrive(request(text(4000, seed=i // 10), output=4), 0.1 * i)
        if i % 5 == 0:
            ours = made.in_flight
            sample(made, 0, 0.1 * i, running=2 * ours, waiting=0, generated_tokens=float(i))
    made.expire(16.0)
    look = scaling(made).last
    assert look is not None
    assert 13.0 < look.seen.per_s < 21.0  # 10 of ours each second, and nearly as many of theirs


def test_it_looks_every_so_often() -> None:
    made = router(1)
    seen = []
    for at in (0.0, 1.0, 14.9, 15.0, 20.0, 30.0):
        made.expire(at)
        look = scaling(made).last
        assert look is not None
        seen.append(look.at)
    assert seen == [0.0, 0.0, 0.0, 15.0, 15.0, 30.0]


def test_other_settings_keep_what_was_counted() -> None:
    made = router(2)
    traffic(made, 2.0, 0.0, 60.0)
    before = scaling(made)
    made.learn(Configured(POOL, PoolSettings(POOL, scaling=replace(SETTINGS, max_replicas=1))), 60.0)
    made.expire(75.0)
    assert scaling(made) is before
    assert scaling(made).asked == 1
    made.learn(Configured(POOL, PoolSettings(POOL)), 76.0)
    assert made.pools[POOL].scaling is None
    made.learn(Configured(POOL, PoolSettings(POOL, scaling=SETTINGS)), 77.0)
    made.expire(77.0)
    assert scaling(made) is not before
    assert scaling(made).asked == 2


# --- from zero ----------------------------------------------------------------------------------------------------------


def test_an_empty_pool_that_scales_from_zero_holds_requests_until_its_first_replica() -> None:
    made = router(0, ZERO)
    made.expire(0.0)
    auto, pool = scaling(made), made.pools[POOL]
    assert (auto.asked, auto.active(pool.admission, pool.fleet, 0.0)) == (0, False)
    verdict = made.arrive(request("Hello"), 10.0)
    assert isinstance(verdict, Wait)
    assert verdict.deadline == 190.0
    assert auto.active(pool.admission, pool.fleet, 10.0)
    made.expire(10.25)
    assert auto.asked == 1
    assert made.turns(100.0) == []
    made.learn(Add(POOL, replicas(1)[0]), 130.0)
    assert made.turns(130.4) == []  # the proxy may not know it yet, and has no other
    (turn,) = made.turns(130.5)
    assert isinstance(turn.verdict, Route)
    assert turn.verdict.endpoints == (address(0),)
    made.check()


def test_without_a_replica_in_time_they_are_refused() -> None:
    made = router(0, ZERO)
    made.arrive(request("Hello"), 10.0)
    made.turns(10.0)
    assert made.turns(189.9) == []
    (turn,) = made.turns(190.0)
    assert isinstance(turn.verdict, Reject)
    assert turn.verdict.refusal is Refusal.ABSENT


def test_a_client_that_wants_its_token_sooner_is_refused_sooner() -> None:
    made = router(0, ZERO)
    verdict = made.arrive(request("Hello", slo_ttft_s=5.0), 0.0)
    assert isinstance(verdict, Wait)
    assert verdict.deadline < 5.0


@pytest.mark.parametrize("given", [SETTINGS, None])
def test_any_other_empty_pool_refuses_as_before(given: ScalingSettings | None) -> None:
    verdict = router(0, given).arrive(request("Hello"), 0.0)
    assert isinstance(verdict, Reject)
    assert verdict.refusal is Refusal.NO_REPLICAS


def test_what_cannot_be_held_is_refused_by_an_empty_pool() -> None:
    unread = request(api=Api.OTHER, prompt_bytes=None)
    verdict = router(0, ZERO).arrive(unread, 0.0)
    assert isinstance(verdict, Reject)
    assert verdict.refusal is Refusal.NO_REPLICAS


def test_it_goes_back_to_zero_when_nothing_was_done_for_a_cooldown() -> None:
    made = router(1, ZERO)
    traffic(made, 2.0, 1.0, 60.0)
    pool, auto = made.pools[POOL], scaling(made)
    asked = {}
    for at in range(60, 800, 5):
        made.expire(float(at))
        asked[at] = (auto.asked, auto.active(pool.admission, pool.fleet, float(at)))
    assert asked[300] == (1, True)
    assert asked[355] == (1, True)
    assert asked[795] == (0, False)
    made.learn(Remove(POOL, address(0)), 800.0)
    assert isinstance(made.arrive(request("Hello"), 801.0), Wait)
    made.expire(801.0)
    assert auto.asked == 1
    assert made.release(802.0)[0].verdict == Reject(Refusal.NO_REPLICAS, "m")


def test_a_first_replica_gets_nothing_before_it_was_heard_of() -> None:
    pool = PoolSettings(POOL, queue=QUEUE, scaling=ZERO)
    made = Router([pool], Random(1))
    assert isinstance(made.arrive(request("Hello"), 0.0), Wait)
    made.learn(Add(POOL, replicas(1)[0]), 100.0)
    assert made.turns(101.0) == []
    assert isinstance(made.arrive(request("again"), 101.5), Wait)
    sample(made, 0, 102.0, running=0, waiting=0)
    assert [type(turn.verdict) for turn in made.turns(102.0)] == [Route, Route]
    assert isinstance(made.arrive(request("Hello"), 102.1), Route)


def test_growth_of_others_is_foretold_with_ours() -> None:
    """Half of what runs on the replica is ours."""
    made = Router([PoolSettings(POOL, queue=QUEUE, scaling=SETTINGS)], Random(1))
    made.learn(Reset(POOL, replicas(1, A100)), 0.0)
    sample(made, 0, 0.0, running=0, waiting=0, generated_tokens=0.0)
    at, number = 0.0, 0
    while at < 240.0:
        number += 1
        made.arrive(request(text(400, seed=number), output=4), at)
        if number % 5 == 0:
            sample(made, 0, at, running=2 * made.in_flight, waiting=0, generated_tokens=float(number))
        if number % 20 == 0:
            made.expire(at)
        at += 1.0 / (1.0 + at / 60.0)
    look = scaling(made).last
    assert look is not None
    assert look.seen.growth_per_s2 == pytest.approx(2.0 / 60.0, rel=0.3)
    assert look.seen.later_per_s == pytest.approx(look.seen.per_s + 120.0 * look.seen.growth_per_s2, rel=0.3)


def test_what_we_hold_others_hold_too() -> None:
    def look(strangers: int) -> Seen:
        made = Router([PoolSettings(POOL, queue=QUEUE, scaling=SETTINGS)], Random(1))
        made.learn(Reset(POOL, replicas(1, A100)), 0.0)
        sample(made, 0, 0.0, running=strangers, waiting=0, generated_tokens=0.0)
        for i in range(30):
            made.arrive(request(text(40_000, seed=i)), 0.1)
        for at in range(1, 16):
            sample(made, 0, float(at), running=made.in_flight + strangers, waiting=0, generated_tokens=float(at))
        made.expire(16.0)
        found = scaling(made).last
        assert found is not None
        return found.seen

    alone, shared = look(0), look(20)
    assert alone.in_flight == pytest.approx(shared.in_flight - 20, abs=2)
    assert shared.late_requests > 2 * alone.late_requests > 0
