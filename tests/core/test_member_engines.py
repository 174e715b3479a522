"""What a replica's engine being another than vLLM means for what is made of its samples."""

from __future__ import annotations

import pytest

from extproc.core.health.states import Reason, State
from extproc.core.types import GpuSampled, Identified, Progressed, Sample

from .support import POOL, address, member, ok, request, route, router, sample, text

PROMPT = text(4000)


@pytest.mark.parametrize(("at_end", "hangs"), [(False, True), (True, False)])
def test_counters_that_move_at_the_end_show_no_hang_by_standing_still(at_end: bool, hangs: bool) -> None:
    """A long answer that comes as a whole: vLLM would count its tokens meanwhile, SGLang's older counters do not."""
    made = router(1, scraped=True)
    sample(made, 0, generated_tokens=100.0, counted_at_end=at_end)
    sent = route(made, request(PROMPT, output=4000, stream=False), now=1.0)
    for second in range(2, 9):
        sample(made, 0, now=float(second), generated_tokens=100.0, counted_at_end=at_end)
        made.learn(Progressed(sent.flight, None, None, 0, address(0)), float(second))
        made.expire(float(second))
    state, reason, _ = member(made, 0).health.why(9.0)
    assert ((state, reason) == (State.OPEN, Reason.SILENT)) is hangs


def test_other_counters_of_the_same_engine_are_no_restart() -> None:
    one = member(router(1, scraped=True), 0)
    one.sampled(Sample(generated_tokens=500.0, counted_at_end=True), 1.0)
    assert one.sampled(Sample(generated_tokens=40.0), 2.0) is False
    assert one.sampled(Sample(generated_tokens=30.0), 3.0) is True


def test_another_engine_at_the_same_address_has_an_empty_cache() -> None:
    made = router(1, scraped=True)
    made.learn(Identified(POOL, address(0), "vllm"), 0.0)
    sample(made, 0, prompt_tokens=100.0)
    made.finish(route(made, request(PROMPT)).flight, ok(address(0)), 1.0)
    made.learn(Identified(POOL, address(0), "vllm"), 2.0)
    assert made.pools[POOL].index.held_bytes(address(0)) > 0
    made.learn(Identified(POOL, address(0), "sglang"), 3.0)
    assert made.pools[POOL].index.held_bytes(address(0)) == 0
    assert member(made, 0).engine == "sglang"
    sample(made, 0, now=3.1, prompt_tokens=500.0)
    assert member(made, 0).health.restarts == 1


def test_an_engine_that_falls_silent_is_no_restart() -> None:
    made = router(1, scraped=True)
    for engine in ("vllm", None, "vllm"):
        made.learn(Identified(POOL, address(0), engine), 0.0)
    assert member(made, 0).health.restarts == 0


def test_the_size_of_the_cache_is_taken_as_it_is_told() -> None:
    assert Sample(cache_tokens=1000, block_size=16, num_blocks=10).kv_capacity_tokens == 1000
    assert Sample(block_size=16, num_blocks=10).kv_capacity_tokens == 160
    assert Sample(num_blocks=10).kv_capacity_tokens is None


def test_gpu_use_of_a_stranger_changes_nothing() -> None:
    made = router(1)
    made.learn(GpuSampled(POOL, address(7), 0.5), 0.0)
    made.learn(GpuSampled("other", address(0), 0.5), 0.0)
    assert member(made, 0).gpu_use(0.0) is None
