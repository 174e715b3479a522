from __future__ import annotations

from math import ceil
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.tokens import (
    BYTES_PER_TOKEN,
    OUTPUT_P90_TOKENS,
    OUTPUT_TOKENS,
    Bounded,
    Lengths,
    OutputTokens,
    PromptTokens,
    Ratio,
    ResponseBytes,
)
from extproc.core.types import Api


def test_bounded_forgets_what_was_learned_longest_ago() -> None:
    bounded: Bounded[str, Ratio] = Bounded(2)
    for key in ("a", "b", "a", "c"):
        bounded.learned(key, lambda: Ratio(1.0, 1.0))
    assert (bounded.get("a") is not None, bounded.get("b"), bounded.get("c") is not None) == (True, None, True)
    assert len(bounded) == 2


def test_reading_does_not_save_a_key_from_being_forgotten() -> None:
    bounded: Bounded[str, Ratio] = Bounded(2)
    bounded.learned("a", lambda: Ratio(1.0, 1.0))
    bounded.learned("b", lambda: Ratio(1.0, 1.0))
    bounded.get("a")
    bounded.learned("c", lambda: Ratio(1.0, 1.0))
    assert bounded.get("a") is None


def test_a_prompt_without_observations_has_four_bytes_per_token() -> None:
    assert PromptTokens().estimate("m", 4000) == 4000 / BYTES_PER_TOKEN


def test_an_empty_prompt_has_one_token() -> None:
    assert PromptTokens().estimate(None, 0) == 1


@pytest.mark.parametrize("truth", [2.0, 3.3, 8.0])
def test_bytes_per_token_converge_per_model(truth: float) -> None:
    tokens, rng = PromptTokens(), Random(1)
    for _ in range(50):
        size = rng.randint(200, 20_000)
        tokens.learn("m", size, max(round(size / truth * rng.uniform(0.9, 1.1)), 1))
    assert tokens.bytes_per_token("m") == pytest.approx(truth, rel=0.03)
    assert tokens.bytes_per_token("other") == BYTES_PER_TOKEN


@pytest.mark.parametrize(("size", "count"), [(100, 0), (100, 1), (10, 100), (0, 5)])
def test_ratios_that_no_tokenizer_has_are_not_learned(size: int, count: int) -> None:
    tokens = PromptTokens()
    tokens.learn("m", size, count)
    assert tokens.bytes_per_token("m") == BYTES_PER_TOKEN


def test_models_are_bounded() -> None:
    tokens = PromptTokens(models=3)
    for i in range(100):
        tokens.learn(f"m{i}", 300, 100)
    assert tokens.bytes_per_token("m99") < BYTES_PER_TOKEN
    assert tokens.bytes_per_token("m0") == BYTES_PER_TOKEN


def test_mean_length_is_the_mean_of_what_was_seen() -> None:
    lengths = Lengths(forget=1.0)
    for n in (10, 20, 30, 400):
        lengths.learn(n)
    assert lengths.mean(cap=float("inf")) == pytest.approx(115)


def test_mean_length_under_a_cap_counts_longer_ones_as_the_cap() -> None:
    lengths = Lengths(forget=1.0)
    for n in (10, 1000):
        lengths.learn(n)
    assert lengths.mean(cap=100) == pytest.approx(55)


def test_mean_length_beyond_what_is_out_leaves_shorter_ones_aside() -> None:
    lengths = Lengths(forget=1.0)
    for n in (10, 10, 10, 1000):
        lengths.learn(n)
    assert lengths.mean(cap=float("inf"), beyond=100) == pytest.approx(1000)
    assert lengths.mean(cap=float("inf"), beyond=5000) is None


def test_no_observation_is_no_mean() -> None:
    assert Lengths().mean(cap=100.0) is None


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=30), st.integers(1, 100_000), st.integers(0, 400_000))
def test_mean_length_lies_within_what_was_seen(seen: list[int], cap: int, beyond: int) -> None:
    lengths = Lengths()
    for n in seen:
        lengths.learn(n)
    mean = lengths.mean(float(cap), 0.0)
    assert mean is not None
    assert min(seen) * 0.99 - 1 <= max(mean, min(seen)) <= max(seen) * 1.01 + 1
    assert mean <= cap + 1e-9
    assert (late := lengths.mean(float("inf"), beyond)) is None or late >= beyond


def seen(lengths: list[int], forget: float = 1.0) -> Lengths:
    made = Lengths(forget)
    for n in lengths:
        made.learn(n)
    return made


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_quantile_is_found_within_its_length_class(share: float) -> None:
    assert seen(list(range(1, 1001))).quantile(share) == pytest.approx(1000 * share, rel=0.02, abs=2)


@pytest.mark.parametrize("length", [0, 1, 2, 33, 44, 45, 1024, 300_000])
def test_every_quantile_of_one_length_that_always_comes_covers_it(length: int) -> None:
    made = seen([length] * 50)
    assert length <= ceil(made.quantile(0.9)) <= 1.42 * length + 1


def test_a_quantile_follows_what_came_last() -> None:
    made = seen([1000] * 500 + [10] * 500, forget=0.98)
    assert made.quantile(0.9) < 20
    assert made.p90 == made.quantile(0.9)


@pytest.mark.parametrize("n", [3, 9, 20])
def test_the_p90_of_few_lengths_covers_as_much_as_so_few_can(n: int) -> None:
    """The longest of n covers n / (n + 1) of what follows; from nine on that is 90 %."""
    rng, kept = Random(1), 0
    for _ in range(6000):
        kept += (
            rng.lognormvariate(5.0, 1.0) <= seen([max(round(rng.lognormvariate(5.0, 1.0)), 1) for _ in range(n)]).p90
        )
    assert 0.0 <= kept / 6000 - min(n / (n + 1), 0.9) <= 0.02


def test_no_observation_is_no_quantile() -> None:
    assert Lengths().quantile(0.9) == 0


@given(st.lists(st.integers(1, 150_000), min_size=1, max_size=30), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_quantiles_lie_within_the_classes_seen_and_in_order(lengths: list[int], one: float, other: float) -> None:
    made = seen(lengths, forget=0.995)
    low, high = made.quantile(min(one, other)), made.quantile(max(one, other))
    assert min(lengths) / 1.51 - 1 <= low <= high + 1e-6
    assert high <= max(lengths) * 2 + 1


def test_a_p90_starts_at_the_prior_and_respects_the_cap() -> None:
    outputs = OutputTokens()
    assert outputs.p90("m", Api.CHAT, "t", None) == OUTPUT_P90_TOKENS
    assert outputs.p90("m", Api.CHAT, "t", 16) == 16
    assert outputs.p90("m", Api.EMBEDDINGS, "t", None) == 0


def test_a_p90_of_a_new_tenant_leans_on_its_model_and_of_an_old_one_on_itself() -> None:
    outputs = OutputTokens()
    for _ in range(100):
        outputs.learn("m", Api.CHAT, "long", 1000)
        outputs.learn("m", Api.CHAT, "short", 10)
    assert outputs.p90("m", Api.CHAT, "new", None) == pytest.approx(1000, rel=0.1)
    assert outputs.p90("m", Api.CHAT, "short", None) < 40
    assert outputs.p90("n", Api.CHAT, "short", None) == OUTPUT_P90_TOKENS


def test_a_cap_moves_no_p90_that_is_shorter() -> None:
    outputs = OutputTokens()
    for n in range(100):
        outputs.learn("m", Api.CHAT, "t", 10 + n)
    assert outputs.p90("m", Api.CHAT, "t", 50) == 50
    assert outputs.p90("m", Api.CHAT, "t", 150) == outputs.p90("m", Api.CHAT, "t", None) < 150


def test_outputs_start_at_the_prior_and_respect_the_cap() -> None:
    outputs = OutputTokens()
    assert outputs.estimate("m", Api.CHAT, None, None) == OUTPUT_TOKENS
    assert outputs.estimate("m", Api.CHAT, None, 16) == 16
    assert outputs.estimate("m", Api.CHAT, None, None, so_far=1000) == 1500


@pytest.mark.parametrize("api", [Api.EMBEDDINGS, Api.OTHER])
def test_apis_that_generate_nothing_expect_nothing(api: Api) -> None:
    assert OutputTokens().estimate("m", api, None, None) == 0


def test_outputs_of_a_model_converge_and_do_not_leak_to_another() -> None:
    outputs = OutputTokens()
    for _ in range(100):
        outputs.learn("m", Api.CHAT, None, 40)
    assert outputs.estimate("m", Api.CHAT, None, None) == pytest.approx(40, rel=0.5)
    assert outputs.estimate("n", Api.CHAT, None, None) == OUTPUT_TOKENS
    assert outputs.estimate("m", Api.COMPLETIONS, None, None) == OUTPUT_TOKENS


def test_a_new_tenant_leans_on_its_model_and_an_old_one_on_itself() -> None:
    outputs = OutputTokens()
    for _ in range(200):
        outputs.learn("m", Api.CHAT, "long", 1000)
        outputs.learn("m", Api.CHAT, "short", 10)
    both = outputs.estimate("m", Api.CHAT, "new", None)
    assert both == pytest.approx(505, rel=0.1)
    assert outputs.estimate("m", Api.CHAT, "long", None) == pytest.approx(1000, rel=0.1)
    assert outputs.estimate("m", Api.CHAT, "short", None) < 60


def test_an_estimate_never_exceeds_the_cap() -> None:
    outputs = OutputTokens()
    for _ in range(100):
        outputs.learn("m", Api.CHAT, "t", 2000)
    assert outputs.estimate("m", Api.CHAT, "t", 50) <= 50


def test_tenants_are_bounded() -> None:
    outputs = OutputTokens(keys=10)
    for i in range(1000):
        outputs.learn("m", Api.CHAT, f"t{i}", 10)
    assert len(outputs._lengths) == 10
    # The model's own key is learned with each of them, so it stays.
    assert outputs.estimate("m", Api.CHAT, None, None) < 30


def test_output_tokens_by_response_size_have_a_prior_for_streams_and_whole_bodies() -> None:
    sizes = ResponseBytes()
    assert sizes.tokens("m", Api.CHAT, True, 18_000) == 100
    assert sizes.tokens("m", Api.CHAT, False, 500) == 100


def test_output_tokens_by_response_size_converge() -> None:
    sizes = ResponseBytes()
    for _ in range(50):
        sizes.learn("m", Api.CHAT, True, 25_000, 100)
    assert sizes.tokens("m", Api.CHAT, True, 250_000) == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize(("size", "count"), [(100, 0), (5, 10)])
def test_sizes_that_no_response_has_are_not_learned(size: int, count: int) -> None:
    sizes = ResponseBytes()
    sizes.learn("m", Api.CHAT, True, size, count)
    assert sizes.tokens("m", Api.CHAT, True, 1800) == 10
