from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.speed import Line, Speed
from extproc.core.steptime import prior

from .support import A100, H100


def observe(line: Line, base: float, factor: float, n: int, noise: float, seed: int = 1) -> None:
    """Work between 10 ms and 1 s, log-uniform, as prompts of 400 to 40,000 tokens on an H100 cause."""
    rng = Random(seed)
    for _ in range(n):
        work = math.exp(rng.uniform(math.log(0.01), 0.0))
        line.learn(work, (base + factor * work) * math.exp(rng.gauss(0.0, noise)))


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("seed", range(10))
def test_a_prior_wrong_by_two_is_right_within_a_tenth_after_fifty_noisy_observations(factor: float, seed: int) -> None:
    line = Line(base=0.01, factor=1.0)
    observe(line, 0.02, factor, 50, noise=0.1, seed=seed)
    for work in (0.05, 0.2, 1.0):
        assert line.at(work) == pytest.approx(0.02 + factor * work, rel=0.1)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_prior_wrong_by_ten_is_found_as_well(factor: float) -> None:
    line = Line(base=0.01, factor=1.0)
    observe(line, 0.02, factor, 100, noise=0.05)
    assert line.at(0.5) == pytest.approx(0.02 + factor * 0.5, rel=0.15)


def test_base_and_factor_are_told_apart() -> None:
    line = Line(base=0.01, factor=1.0)
    observe(line, 0.08, 1.5, 200, noise=0.02)
    assert line.base == pytest.approx(0.08, rel=0.2)
    assert line.factor == pytest.approx(1.5, rel=0.1)


def test_the_same_work_for_ever_keeps_the_line_bounded_and_right_there() -> None:
    line, rng = Line(base=0.01, factor=1.0), Random(1)
    for _ in range(20_000):
        line.learn(0.1, 0.3 * math.exp(rng.gauss(0.0, 0.2)))
    assert line.at(0.1) == pytest.approx(0.3, rel=0.2)
    # And other work is learned again at once.
    observe(line, 0.02, 1.0, 60, noise=0.05)
    assert line.at(0.5) == pytest.approx(0.52, rel=0.15)


def test_a_change_of_speed_is_followed() -> None:
    """Slower takes longer to believe than faster: errors are relative, so the old, shorter times weigh more."""
    line = Line(base=0.01, factor=1.0)
    observe(line, 0.02, 1.0, 300, noise=0.05)
    observe(line, 0.02, 3.0, 150, noise=0.05)
    assert line.at(0.5) == pytest.approx(1.52, rel=0.1)
    observe(line, 0.02, 1.0, 50, noise=0.05)
    assert line.at(0.5) == pytest.approx(0.52, rel=0.2)


def test_one_stalled_request_does_not_set_the_speed() -> None:
    line = Line(base=0.01, factor=1.0)
    observe(line, 0.02, 1.0, 100, noise=0.05)
    before = line.at(0.2)
    line.learn(0.2, 60.0)
    assert line.at(0.2) < 2.0 * before


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e4)), max_size=60))
def test_whatever_is_observed_the_line_stays_finite_and_positive(seen: list[tuple[float, float]]) -> None:
    line = Line(base=0.01, factor=1.0)
    for work, ttft in seen:
        line.learn(work, ttft)
        assert 0.0 <= line.base <= 1.0
        assert 0.02 <= line.factor <= 50.0
        assert line.at(work) > 0.0


@given(st.lists(st.tuples(st.floats(1e-4, 10.0), st.floats(1e-3, 1e2)), min_size=1, max_size=40))
def test_the_covariance_stays_positive(seen: list[tuple[float, float]]) -> None:
    line = Line(base=0.01, factor=1.0)
    for work, ttft in seen:
        line.learn(work, ttft)
        assert line._p00 > 0
        assert line._p11 > 0
        assert line._p00 * line._p11 > line._p01**2


@pytest.mark.parametrize("work", [0.001, 0.1, 1.0, 10.0])
def test_the_covariance_stays_positive_when_the_same_work_comes_for_ever(work: float) -> None:
    line = Line(base=0.01, factor=1.0)
    for _ in range(3000):
        line.learn(work, 0.02 + work)
        assert line._p00 * line._p11 > line._p01**2


def test_times_that_cannot_be_are_not_learned() -> None:
    speed = Speed(prior(H100))
    for work, ttft in ((0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan), (math.nan, 1.0)):
        speed.learn_ttft(work, ttft)
    speed.learn_step(4, 4000, 0.0)
    speed.learn_step(4, 4000, -1.0)
    assert (speed.prefill_factor, speed.decode_factor) == (1.0, 1.0)


@pytest.mark.parametrize("factor", [0.5, 2.0, 5.0])
def test_the_decode_factor_converges_in_fifty_observations(factor: float) -> None:
    speed, rng = Speed(prior(H100)), Random(1)
    for _ in range(50):
        sequences = rng.randint(1, 64)
        truth = factor * speed.prior.decode_step_s(sequences, sequences * 1000)
        speed.learn_step(sequences, sequences * 1000, truth * math.exp(rng.gauss(0.0, 0.1)))
    assert speed.decode_factor == pytest.approx(factor, rel=0.1)


def test_the_decode_factor_is_bounded() -> None:
    speed = Speed(prior(H100))
    for _ in range(1000):
        speed.learn_step(1, 100, 1e6)
    assert speed.decode_factor == pytest.approx(50.0)


def test_work_grows_with_the_tokens_to_prefill_and_with_company() -> None:
    speed = Speed(prior(H100))
    assert speed.work_s(2000, 0) > speed.work_s(1000, 0)
    assert speed.work_s(1000, 8000) > speed.work_s(1000, 0)
    assert speed.work_s(1000, 0, sequences=64, kv_tokens=64_000) > speed.work_s(1000, 0)


def test_a_faster_gpu_prefills_faster_before_anything_is_learned() -> None:
    assert Speed(prior(H100)).work_s(8000, 0) < Speed(prior(A100)).work_s(8000, 0) / 2


def test_repr_is_a_status_line() -> None:
    assert repr(Speed(prior(H100))) == "<speed prefill x1.00 decode x1.00 base 10 ms>"
