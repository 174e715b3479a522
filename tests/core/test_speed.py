from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.speed import Shared, Speed
from extproc.core.steptime import prior

from .support import A100, H100


def observe(speed: Speed, base: float, factor: float, n: int, noise: float, seed: int = 1) -> None:
    """Work between 10 ms and 1 s, log-uniform, as prompts of 400 to 40,000 tokens on an H100 cause."""
    rng = Random(seed)
    for _ in range(n):
        work = math.exp(rng.uniform(math.log(0.01), 0.0))
        speed.learn_ttft(work, (base + factor * work) * math.exp(rng.gauss(0.0, noise)))


def ttft_s(speed: Speed, work_s: float) -> float:
    return speed.base_s + speed.prefill_s(work_s)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("seed", range(10))
def test_a_prior_wrong_by_two_is_right_within_a_tenth_after_fifty_noisy_observations(factor: float, seed: int) -> None:
    speed = Speed(prior(H100))
    observe(speed, 0.02, factor, 50, noise=0.1, seed=seed)
    for work in (0.05, 0.2, 1.0):
        assert ttft_s(speed, work) == pytest.approx(0.02 + factor * work, rel=0.12)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_prior_wrong_by_ten_is_found_as_well(factor: float) -> None:
    speed = Speed(prior(H100))
    observe(speed, 0.02, factor, 100, noise=0.05)
    assert ttft_s(speed, 0.5) == pytest.approx(0.02 + factor * 0.5, rel=0.15)


def test_base_and_factor_are_told_apart() -> None:
    speed = Speed(prior(H100))
    observe(speed, 0.08, 1.5, 400, noise=0.02)
    assert speed.base_s == pytest.approx(0.08, rel=0.25)
    assert speed.prefill_factor == pytest.approx(1.5, rel=0.1)


def test_what_one_replica_shows_is_believed_of_its_equals_that_were_never_chosen() -> None:
    shared = Shared()
    seen, unseen, other = (Speed(prior(labels), shared) for labels in (H100, H100, A100))
    observe(seen, 0.02, 2.0, 60, noise=0.1)
    assert unseen.prefill_factor == pytest.approx(2.0, rel=0.2)
    assert 1.2 < other.prefill_factor < unseen.prefill_factor  # of another kind: the fault may be in one prior alone


def test_equal_replicas_stay_nearly_equal_under_noise() -> None:
    shared, rng = Shared(), Random(1)
    speeds = [Speed(prior(H100), shared) for _ in range(8)]
    for _ in range(100):
        for speed in speeds:
            speed.learn_ttft(0.3, 0.31 * math.exp(rng.gauss(0.0, 0.3)))
    factors = [speed.prefill_factor for speed in speeds]
    assert max(factors) / min(factors) < 1.25


def test_the_one_that_is_slow_among_equals_is_found_and_forgiven() -> None:
    shared = Shared()
    speeds = [Speed(prior(H100), shared) for _ in range(8)]
    for n in range(60):
        for place, speed in enumerate(speeds):
            observe(speed, 0.01, 3.0 if place == 0 else 1.0, 1, noise=0.1, seed=n)
    assert speeds[0].prefill_factor == pytest.approx(3.0, rel=0.25)
    assert all(speed.prefill_factor == pytest.approx(1.0, rel=0.2) for speed in speeds[1:])
    for _ in range(60):
        speeds[0].fade(10.0)
    assert speeds[0].prefill_factor == pytest.approx(speeds[1].prefill_factor, rel=0.2)


def test_the_same_work_for_ever_stays_right_there_and_other_work_is_learned_again() -> None:
    speed, rng = Speed(prior(H100)), Random(1)
    for _ in range(20_000):
        speed.learn_ttft(0.1, 0.3 * math.exp(rng.gauss(0.0, 0.2)))
    assert ttft_s(speed, 0.1) == pytest.approx(0.3, rel=0.2)
    observe(speed, 0.02, 1.0, 150, noise=0.05)
    assert ttft_s(speed, 0.5) == pytest.approx(0.52, rel=0.15)


@pytest.mark.parametrize("factor", [3.0, 0.4])
def test_a_change_of_speed_is_followed(factor: float) -> None:
    speed = Speed(prior(H100))
    observe(speed, 0.02, 1.0, 300, noise=0.05)
    observe(speed, 0.02, factor, 60, noise=0.05)
    assert ttft_s(speed, 0.5) == pytest.approx(0.02 + factor * 0.5, rel=0.15)


def test_one_stalled_request_does_not_set_the_speed() -> None:
    speed = Speed(prior(H100))
    observe(speed, 0.02, 1.0, 100, noise=0.05)
    before = ttft_s(speed, 0.2)
    speed.learn_ttft(0.2, 60.0)
    assert ttft_s(speed, 0.2) < 1.3 * before


def test_a_long_wait_teaches_less_than_a_short_one() -> None:
    sure, unsure = Speed(prior(H100)), Speed(prior(H100))
    sure.learn_ttft(1.0, 2.0)
    unsure.learn_ttft(1.0, 2.0, waited_s=0.9)
    assert 1.0 < unsure.prefill_factor < sure.prefill_factor


def test_what_was_expected_of_others_is_not_blamed_on_the_replica() -> None:
    speed = Speed(prior(H100))
    speed.learn_ttft(0.5, 0.51 + 0.3, unseen_s=0.3)
    assert speed.prefill_factor == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e4), st.floats(0, 100)), max_size=60))
def test_whatever_is_observed_the_speed_stays_finite_and_positive(seen: list[tuple[float, float, float]]) -> None:
    speed = Speed(prior(H100))
    for work, ttft, waited in seen:
        speed.learn_ttft(work, ttft, waited)
        speed.learn_step(work, waited, ttft)
        assert 0.0 <= speed.base_s <= 1.0
        assert 0.0 < speed.prefill_factor < math.inf
        assert 0.0 < speed.decode_factor < math.inf


def test_times_that_cannot_be_are_not_learned() -> None:
    speed = Speed(prior(H100))
    for work, ttft in ((0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan), (math.nan, 1.0)):
        speed.learn_ttft(work, ttft)
    speed.learn_step(4, 4000, 0.0)
    speed.learn_step(4, 4000, -1.0)
    speed.learn_step(4, 4000, math.nan)
    assert (speed.prefill_factor, speed.decode_factor) == (1.0, 1.0)


@pytest.mark.parametrize("factor", [0.5, 2.0, 5.0])
def test_the_decode_factor_converges_in_fifty_observations(factor: float) -> None:
    speed, rng = Speed(prior(H100)), Random(1)
    for _ in range(50):
        sequences = rng.randint(1, 64)
        truth = factor * speed.prior.decode_step_s(sequences, sequences * 1000)
        speed.learn_step(sequences, sequences * 1000, truth * math.exp(rng.gauss(0.0, 0.1)))
    assert speed.decode_factor == pytest.approx(factor, rel=0.1)


def test_work_grows_with_the_tokens_to_prefill_and_with_company() -> None:
    speed = Speed(prior(H100))
    assert speed.work_s(2000, 0) > speed.work_s(1000, 0)
    assert speed.work_s(1000, 8000) > speed.work_s(1000, 0)
    assert speed.work_s(1000, 0, sequences=64, kv_tokens=64_000) > speed.work_s(1000, 0)


def test_to_fill_up_a_step_costs_the_tokens_alone() -> None:
    speed = Speed(prior(H100))
    assert speed.fill_s(2000, 0) == pytest.approx(speed.work_s(4000, 0) - speed.work_s(2000, 0), rel=0.15)
    assert speed.fill_s(2000, 8000) > speed.fill_s(2000, 0)
    assert speed.fill_s(0, 0) == 0.0


def test_a_faster_gpu_prefills_faster_before_anything_is_learned() -> None:
    assert Speed(prior(H100)).work_s(8000, 0) < Speed(prior(A100)).work_s(8000, 0) / 2


def test_repr_is_a_status_line() -> None:
    assert repr(Speed(prior(H100))) == "<speed prefill x1.00 decode x1.00 base 10 ms>"
