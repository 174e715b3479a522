from __future__ import annotations

import pytest

from extproc.core.fleet import Member
from extproc.core.types import Replica

from ..support import address, first, members_of, put, rank, request


def gpu(i: int, *, queued: int, decoding: float, tokens_per_s: str = "100") -> Member:
    """A replica with that many prompt tokens in the queue and output tokens being generated, put there by flights."""
    (made,) = members_of([Replica(address(i), {"max_tokens_per_s": tokens_per_s})])
    if decoding:
        generating = put(made, f"{i}-decoding", prompt_tokens=50, output_tokens=decoding, prefill_s=0.5)
        made.load.first_token(generating, 0.0)
    if queued:
        put(made, f"{i}-queued", prompt_tokens=queued, output_tokens=300.0, prefill_s=1.0)
    assert (made.load.queued_tokens(0.0), made.load.decoding_tokens(0.0)) == (queued, decoding)
    return made


@pytest.mark.parametrize(("prompt", "output"), [(100, 50), (2000, 100), (100, 500)])
def test_two_replicas_at_70_percent_are_equal_and_the_first_takes_each_request(prompt: int, output: int) -> None:
    gpus = [gpu(0, queued=500, decoding=20), gpu(1, queued=100, decoding=60)]
    ranking = rank("token_aware", gpus, prompt_tokens=prompt, output_tokens=output)
    added = (0.1 * prompt + output) / 100
    assert first(ranking) == address(0)
    assert [score for score, _ in ranking.order] == pytest.approx([0.7 + added, 0.7 + added])


def test_the_load_is_a_tenth_of_the_queue_and_all_of_the_decode_over_the_capacity() -> None:
    from extproc.core.policies.token_aware import TokenAware
    from extproc.core.prediction import Ask

    terms = TokenAware().terms(Ask(request(), 1, 1.0, {}), gpu(0, queued=500, decoding=20), 0.0)
    assert terms == {
        "prompt_tokens_queued": 500.0,
        "decode_tokens": 20.0,
        "tokens_per_s": 100.0,
        "load": pytest.approx(0.7),
    }


def test_a_replica_at_95_percent_is_passed_over_though_it_would_be_less_loaded_after() -> None:
    # 95 % of a large replica: one more request hardly shows there.
    large, small = gpu(0, queued=0, decoding=950, tokens_per_s="1000"), gpu(1, queued=0, decoding=90)
    ranking = rank("token_aware", [large, small], prompt_tokens=100, output_tokens=50.0)
    assert first(ranking) == address(1)
    just_below = gpu(0, queued=0, decoding=949, tokens_per_s="1000")
    assert first(rank("token_aware", [just_below, small], prompt_tokens=100, output_tokens=50.0)) == address(0)


def test_when_all_are_at_the_limit_the_least_loaded_still_takes_it() -> None:
    gpus = [gpu(0, queued=0, decoding=200), gpu(1, queued=0, decoding=120)]
    ranking = rank("token_aware", gpus)
    assert (first(ranking), ranking.reason) == (address(1), "saturated")


def test_a_long_prompt_in_the_queue_weighs_a_tenth_of_the_same_output() -> None:
    gpus = [gpu(0, queued=0, decoding=60), gpu(1, queued=500, decoding=0)]
    assert first(rank("token_aware", gpus)) == address(1)
    assert first(rank("token_aware", gpus, options={"prompt_weight": 1.0, "limit": 9.0})) == address(0)


@pytest.mark.parametrize("label", ["fast", "", "0", "-5", "nan"])
def test_a_capacity_that_is_no_positive_number_counts_as_the_default(label: str) -> None:
    from extproc.core.policies.token_aware import TokenAware
    from extproc.core.prediction import Ask

    made = gpu(0, queued=0, decoding=0, tokens_per_s=label)
    assert TokenAware().terms(Ask(request(), 1, 1.0, {}), made, 0.0)["tokens_per_s"] == 1000.0


def test_each_sample_of_a_request_counts() -> None:
    gpus = [gpu(0, queued=0, decoding=0)]
    one = rank("token_aware", gpus, wanted=request(), prompt_tokens=0, output_tokens=50)
    three = rank("token_aware", gpus, wanted=request(samples=3), prompt_tokens=0, output_tokens=50)
    assert (one.order[0][0], three.order[0][0]) == (0.5, 1.5)
