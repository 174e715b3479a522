"""What a replica does within its SLO."""

from __future__ import annotations

import pytest

from extproc.core.scaling.arrivals import Mix
from extproc.core.scaling.capacity import ReplicaModel, batch, decode_s, needed, per_s
from extproc.core.scaling.settings import ScalingSettings

MODEL = ReplicaModel(lambda n, _: 0.010 + 1e-4 * n, 0.0, 400_000.0, 0.01)
MIX = Mix(1.0, 2000.0, 0.1, 0.12, 0.02, 200.0, 200.0 * 2000)
EASY = ScalingSettings(ttft_target_s=10.0)


def test_the_batch_is_bounded_by_the_cache_the_slots_and_the_time_per_token() -> None:
    assert batch(MODEL, MIX, 1.0) == 180  # 0.9 x 400,000 / 2,000
    assert batch(ReplicaModel(MODEL.step_s, 0.0, None, 0.0), MIX, 1.0) == 256
    assert batch(MODEL, MIX, 0.0151) == 51
    assert batch(MODEL, MIX, 0.001) == 1


def test_an_output_token_costs_a_step_over_those_who_share_it() -> None:
    assert decode_s(MODEL, MIX, 1.0) == pytest.approx(200 * (0.010 + 0.018) / 180)
    assert decode_s(MODEL, Mix(1.0, 2000.0, 0.1), 1.0) == 0.0


def test_what_prefill_took_of_the_observed_steps_is_not_paid_for_twice() -> None:
    half = ReplicaModel(lambda n, kv: 2.0 * MODEL.step_s(n, kv), 0.5, 400_000.0, 0.01)
    assert decode_s(half, MIX, 1.0) == pytest.approx(decode_s(MODEL, MIX, 1.0))


def test_time_bounds_a_replica_where_the_target_is_easy() -> None:
    assert per_s(MODEL, MIX, 4, EASY) == pytest.approx(0.9 / (0.1 + decode_s(MODEL, MIX, 0.05)), rel=1e-6)


def test_a_tight_target_leaves_less_and_a_large_pool_more() -> None:
    tight = ScalingSettings(ttft_target_s=0.4)
    alone, among_ten = per_s(MODEL, MIX, 1, tight), per_s(MODEL, MIX, 10, tight)
    assert alone < 0.8 * among_ten <= per_s(MODEL, MIX, 10, EASY)


def test_a_target_that_cannot_be_met_does_not_ask_for_the_world() -> None:
    hopeless = ScalingSettings(ttft_target_s=0.01)
    assert per_s(MODEL, MIX, 10, hopeless) >= 0.2 * 0.9 / 0.14


def test_needed_is_the_least_that_suffices() -> None:
    for rate in (0.1, 3.0, 7.0, 20.0, 33.0):
        n = needed(MODEL, MIX, rate, EASY)
        assert n * per_s(MODEL, MIX, n, EASY) >= rate
        assert n == 1 or (n - 1) * per_s(MODEL, MIX, n - 1, EASY) < rate
    assert needed(MODEL, MIX, 1e6, EASY) == EASY.max_replicas
    assert needed(MODEL, Mix(1.0), 5.0, EASY) == 1
