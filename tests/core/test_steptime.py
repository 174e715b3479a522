from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.steptime import MEASURED, StepTime, prior

SIMPLE = StepTime(c0=1.0, w=10.0, g=1.0, a=0.5, k=0.25, s=2.0)


def test_a_step_adds_its_terms() -> None:
    # 5 new tokens < w: floor of 10; one chunk of 4 on 6; 8 tokens of KV; 3 sequences
    assert SIMPLE.step_s(5, [(4, 6)], 8, 3) == 1 + 10 + 0.5 * 4 * (6 + 2) + 0.25 * 8 + 2 * 3


def test_products_rise_with_tokens_above_the_floor_of_the_weights() -> None:
    assert SIMPLE.step_s(30, [], 0, 0) - SIMPLE.step_s(20, [], 0, 0) == 10


def test_a_decode_step_is_a_step_without_prefill() -> None:
    assert SIMPLE.decode_step_s(12, 100) == SIMPLE.step_s(12, [], 100, 12)


@given(st.integers(0, 200_000), st.integers(0, 200_000), st.integers(1, 9000))
def test_prefill_in_closed_form_is_the_sum_of_its_chunks(uncached: int, cached: int, budget: int) -> None:
    step = MEASURED[8, "h100", 1]
    chunks = [(min(budget, uncached - done), cached + done) for done in range(0, uncached, budget)]
    summed = sum(step.step_s(q, [(q, p)], 0, 1) for q, p in chunks)
    assert step.prefill_s(uncached, cached, budget) == pytest.approx(summed, rel=1e-9)


def test_scaling_takes_prefill_and_decode_apart() -> None:
    scaled = SIMPLE.scaled(prefill=2.0, decode=3.0)
    assert scaled == StepTime(c0=3.0, w=30.0, g=2.0, a=1.0, k=0.75, s=6.0)


# Milliseconds by the same kernel tables the constants were fitted to, evaluated at points and not by the formula:
# prefill of 2,048 and 8,192; 2,048 behind 14,336 cached; decode of 1, 64 and 256 sequences of 2,048, and 64 of 8,192.
SPOTS = {
    (8, "a100", 1): (125, 557, 210, 12.0, 23.1, 63.0, 58.6),
    (8, "h100", 1): (43.5, 200, 65.5, 6.2, 12.6, 30.7, 28.6),
    (8, "h200", 1): (43.4, 199, 65.9, 4.9, 9.5, 23.6, 20.7),
    (70, "h100", 4): (130, 577, 158, 15.0, 20.7, 37.2, 30.8),
    (70, "h100", 8): (85.9, 344, 98.9, 10.2, 13.7, 23.2, 18.9),
    (70, "a100", 4): (337, 1372, 442, 27.3, 40.0, 86.5, 59.1),
}


@pytest.mark.parametrize("row", SPOTS, ids=str)
def test_constants_give_the_published_times_within_ten_percent(row: tuple[int, str, int]) -> None:
    step = MEASURED[row]
    seconds = [
        step.prefill_s(2048),
        step.prefill_s(8192),
        step.prefill_s(2048, 14_336),
        step.decode_step_s(1, 2048),
        step.decode_step_s(64, 64 * 2048),
        step.decode_step_s(256, 256 * 2048),
        step.decode_step_s(64, 64 * 8192),
    ]
    assert [s * 1e3 for s in seconds] == pytest.approx(SPOTS[row], rel=0.10)


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_a_measured_combination_is_its_own_prior(row: tuple[float, str, int]) -> None:
    size, gpu, tp = row
    assert prior({"gpu": gpu, "tp": str(tp), "model_size": f"{size}b"}) == MEASURED[row]


@pytest.mark.parametrize("gpu", ["H100", "h100-sxm", "NVIDIA-H100-80GB-HBM3", "H100-SXM"])
def test_gpu_names_in_the_wild_are_recognised(gpu: str) -> None:
    assert prior({"gpu": gpu}) == MEASURED[8, "h100", 1]


@pytest.mark.parametrize("size", ["8b", "8B", "8 B", "8.0b", "Llama-3.1-8B-Instruct", "8000m"])
def test_model_sizes_in_the_wild_are_recognised(size: str) -> None:
    assert prior({"gpu": "h100", "model_size": size}) == MEASURED[8, "h100", 1]


@pytest.mark.parametrize(
    "labels",
    [{}, {"gpu": "tpu"}, {"tp": "many"}, {"tp": "0"}, {"model_size": "big"}, {"model_size": "0b"}, {"pp": "-1"}],
)
def test_what_is_missing_or_unknown_counts_as_8b_on_one_a100(labels: dict[str, str]) -> None:
    assert prior(labels) == MEASURED[8, "a100", 1]


def seconds(gpu: str, tp: int, size: float) -> tuple[float, float, float]:
    """A prefill, a lone decode, a full batch."""
    step = prior({"gpu": gpu, "tp": str(tp), "model_size": f"{size}b"})
    return step.prefill_s(4096), step.decode_step_s(1, 2048), step.decode_step_s(128, 128 * 4096)


GPUS, TPS, SIZES = ("a100", "h100", "h200"), (1, 2, 3, 4, 6, 8, 16), (0.5, 1.5, 3, 8, 13, 20, 23, 24, 34, 70, 123, 405)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("size", SIZES)
def test_more_gpus_are_never_slower(gpu: str, size: float) -> None:
    by_tp = [seconds(gpu, tp, size) for tp in TPS]
    for fewer, more in itertools.pairwise(by_tp):
        assert all(m <= f for m, f in zip(more, fewer, strict=True))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tp", TPS)
def test_a_larger_model_is_never_faster(gpu: str, tp: int) -> None:
    by_size = [seconds(gpu, tp, size) for size in SIZES]
    for smaller, larger in itertools.pairwise(by_size):
        assert all(b >= s for b, s in zip(larger, smaller, strict=True))


def test_pipeline_stages_share_prefill_and_leave_decode() -> None:
    one, two = prior({"gpu": "h100"}), prior({"gpu": "h100", "pp": "2"})
    assert two.decode_step_s(8, 8000) == one.decode_step_s(8, 8000)
    assert two.g == one.g / 2
    assert two.a == one.a / 2


def test_the_demo_fleet_is_ordered_as_its_hardware() -> None:
    h100x4, h100, a100 = (
        prior({"model_size": "8b", "gpu": g, "tp": t}) for g, t in [("h100", "4"), ("h100", "1"), ("a100", "1")]
    )
    assert h100x4.prefill_s(4000) < h100.prefill_s(4000) / 2 < a100.prefill_s(4000) / 4
    assert math.isclose(h100.prefill_s(2048), 0.0435, rel_tol=0.05)
