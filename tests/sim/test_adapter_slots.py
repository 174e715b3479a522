"""LoRA adapters of a simulated replica: slots, loads, and who waits for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from extproc.core.types import AdaptersSampled
from extproc.sim.adapter_slots import AdapterSlots
from extproc.sim.backend import Backend
from extproc.sim.engine import Engine, EngineConfig, EngineRequest
from extproc.sim.spec import BackendSpec
from tests.adapters.engines.pages import parse_vllm
from tests.sim.test_engine import Run, config, request


def lora(id_: int, adapter: str | None, prompt: int = 8, output: int = 3) -> EngineRequest:
    return replace(request(id_, prompt, output), adapter=adapter)


def started(cfg: EngineConfig, *requests: EngineRequest) -> Run:
    engine = Engine(cfg)
    for each in requests:
        assert engine.add(each) is None
    return Run(engine)


def test_the_least_recently_used_that_nobody_uses_makes_room() -> None:
    slots = AdapterSlots(2)
    assert slots.start("a")
    assert slots.start("b")
    slots.stop("a")
    slots.stop("b")
    assert not slots.start("a")
    assert slots.start("c")  # in place of b
    slots.stop("a")
    assert not slots.start("a")
    assert slots.loads == 3
    slots.stop("a")
    assert slots.start("b")  # in place of a, for c is in use


def test_a_batch_uses_no_more_adapters_than_there_are_slots_and_others_pass() -> None:
    run = started(config(max_loras=1), lora(1, "a"), lora(2, "b"), lora(3, "a"), lora(4, None))
    run.drain()
    assert run.first_seen == [1, 3, 4, 2]
    assert run.engine.adapters is not None
    assert run.engine.adapters.loads == 2


def test_a_load_lengthens_the_step_and_comes_once() -> None:
    cfg = config(max_loras=2, lora_load_s=5.0)
    plain, loading = started(config(), request(1, 8, 1)), started(cfg, lora(1, "a", output=1))
    for run in (plain, loading):
        run.drain()
    assert loading.steps[0].duration_s == pytest.approx(plain.steps[0].duration_s + 5.0)
    loading.engine.add(lora(2, "a", output=1))
    loading.drain()
    assert loading.steps[1].duration_s == pytest.approx(plain.steps[0].duration_s)


def test_what_it_says_of_them() -> None:
    run = started(config(max_loras=1), lora(1, "a"), lora(2, "b"))
    assert run.engine.adapters_told == AdaptersSampled(1)
    run.step()
    assert run.engine.adapters_told == AdaptersSampled(1, ("a",), ("a",))
    run.drain()
    assert run.engine.adapters_told == AdaptersSampled(1)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_whoever_waits_for_a_slot_does_not_keep_the_engine_from_skipping_steps(async_scheduling: bool) -> None:
    cfg = config(max_loras=1, async_scheduling=async_scheduling)
    run = started(cfg, lora(1, "a", output=40), lora(2, "b"))
    run.step()
    run.step()
    step = run.engine.start_step()
    assert step is not None
    assert run.engine.quiet_steps(step) > 5
    run.finish(step)
    run.drain()
    assert run.ended == [1, 2]


def test_one_that_was_aborted_gives_its_slot_back() -> None:
    run = started(config(max_loras=1), lora(1, "a", output=40), lora(2, "b"))
    run.step()
    assert run.engine.abort(1)
    run.drain()
    assert run.ended == [2]


async def test_the_metrics_page_tells_slots_and_who_runs() -> None:
    spec: dict[str, Any] = {"model": "tiny", "adapters": ("adapter-a", "adapter-b"), "max_loras": 1, "time_scale": 0.01}
    async with Backend(BackendSpec(**spec)) as backend, aiohttp.ClientSession() as http:
        url = f"http://{backend.address}"
        for model in ("adapter-a", "adapter-b"):
            body = {"model": model, "prompt": "x" * 400, "max_tokens": 3}
            async with http.post(f"{url}/v1/completions", json=body) as response:
                assert response.status == 200
        async with http.get(f"{url}/metrics") as response:
            page = await response.read()
    sample = parse_vllm(page)
    assert sample is not None
    assert sample.adapters == AdaptersSampled(1)
    assert b'running_lora_adapters="adapter-a"' in page
    assert backend.engine.adapters is not None
    assert backend.engine.adapters.loads == 2


async def test_adapters_without_a_number_of_slots_have_one_each() -> None:
    assert BackendSpec(adapters=("a", "b")).engine_config().max_loras == 2
    assert BackendSpec().engine_config().max_loras is None
