"""Real vLLM replicas: how they are set up, what they answer, and the steps that they log."""

from __future__ import annotations

import asyncio
import json
import math
import re
import tempfile
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from extproc.adapters.engines import ENGINES
from extproc.core.steptime import StepTime
from extproc.sim.engine import EngineConfig
from tests.bench.sim_vllm_plan import Ask, Content, Dispatch, Plan, chained
from tests.e2e.vllm import Vllm

STEP_TIME: Final = StepTime(c0=4e-3, w=5e-4, g=3e-5, a=1e-9, k=1e-7, s=3e-4)
"""Of that model on one core, roughly: where the fit starts."""
REQUEST_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for."""

    seed: int = 1
    at_once: int = 4
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    """vLLM's default on CPU; no page of it tells."""


async def settings(http: aiohttp.ClientSession, url: str, options: Options) -> EngineConfig:
    """The simulated engine, set up like the replica."""
    async with http.get(f"{url}/metrics") as response:
        sample = ENGINES["vllm"].parse(await response.read())
    assert sample is not None
    assert sample.num_blocks
    assert sample.block_size
    return EngineConfig(
        STEP_TIME,
        num_blocks=sample.num_blocks - 1,  # the first one is never used
        block_size=sample.block_size,
        max_model_len=(await first_model(http, url))["max_model_len"],
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        async_scheduling=False,  # as vLLM has it on CPU
        cpu_overhead_s=0.0,
    )


async def first_model(http: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """What a replica says of the model that it serves."""
    async with http.get(f"{url}/v1/models") as response:
        found: dict[str, Any] = (await response.json())["data"][0]
    return found


@dataclass(frozen=True, slots=True)
class Served:
    """Replicas that are there."""

    urls: Sequence[str]
    logs: Sequence[Path] = ()
    """Of each replica, where they log their steps."""


@asynccontextmanager
async def replicas() -> AsyncIterator[Served]:
    """Two of our own, named by VLLM and MODEL as for `make test-vllm`."""
    async with AsyncExitStack() as exits:
        directory = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        both = [
            await exits.enter_async_context(Vllm(directory, "--enable-logging-iteration-details")) for _ in range(2)
        ]
        await asyncio.gather(*(r.ready() for r in both))
        yield Served([r.url for r in both], [r.log for r in both])


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request; seconds of the client's clock."""

    cached_tokens: int
    sent_s: float
    first_s: float
    last_s: float
    hashes: tuple[int, ...] = ()
    """Of the full blocks of prompt and answer."""


@dataclass
class Client:
    """The one client of all replicas."""

    http: aiohttp.ClientSession
    urls: Sequence[str]
    model: str
    block_size: int
    content: Content
    tick: Callable[[], object] = lambda: None
    _turnstile: dict[int, asyncio.Lock] = field(default_factory=dict)

    async def play(self, plan: Plan, at_once: int) -> list[Answer]:
        """Send all; the answers in the order of the plan. Raises aiohttp.ClientError or AssertionError where one fails."""
        dispatch = Dispatch(plan, at_once)
        self._turnstile = {i: asyncio.Lock() for i in range(plan.replicas)}
        answers: dict[int, Answer] = {}
        async with asyncio.TaskGroup() as group:

            async def one(place: int) -> None:
                answers[place] = await self._ask(plan.asks[place], place)
                self.tick()
                dispatch.end(place)
                go()

            def go() -> None:
                for place in dispatch.take():
                    group.create_task(one(place))

            go()
        return [answers[place] for place in range(len(plan.asks))]

    async def _ask(self, ask: Ask, place: int) -> Answer:
        prompt = self.content.prompt(ask, place)
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": ask.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # The next goes out when the headers of this one are back: two connections do not keep an order by themselves.
        async with AsyncExitStack() as exits:
            async with self._turnstile[ask.replica]:
                sent = time.monotonic()
                url = f"{self.urls[ask.replica]}/v1/completions"
                response = await exits.enter_async_context(self.http.post(url, json=body))
            response.raise_for_status()
            stream = await read(response.content)
        tokens = [*prompt, *stream.tokens]
        assert len(stream.tokens) == ask.output_tokens, f"{len(stream.tokens)} tokens of {ask.output_tokens}"
        self.content.answered(ask, tokens)
        hashes = chained(tokens, self.block_size)
        return Answer(stream.cached_tokens, sent, stream.first_s, stream.last_s, hashes)


@dataclass(slots=True)
class Streamed:
    """What a stream told."""

    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    first_s: float = math.nan
    last_s: float = math.nan


async def read(lines: AsyncIterable[bytes]) -> Streamed:
    """A stream of completions, with token ids and usage."""
    found = Streamed()
    async for line in lines:
        if not line.startswith(b"data: {"):
            continue
        data = json.loads(line[len(b"data: ") :])
        for choice in data["choices"]:
            found.last_s = time.monotonic()
            if not found.tokens:
                found.first_s = found.last_s
            found.tokens += choice["token_ids"]
        if usage := data.get("usage"):
            found.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    return found


@dataclass(frozen=True, slots=True)
class Iteration:
    """One step of a real engine, as it logs it."""

    prefills: int
    """Sequences in it that have no token yet."""
    sequences: int
    """All of them."""
    tokens: int
    """That it computes."""


_ITERATION: Final = re.compile(
    r"Iteration\(\d+\): (\d+) context requests, (\d+) context tokens, (\d+) generation requests, (\d+) generation tokens"
)
_NOTHING_LEFT: Final = "KV cache usage: 0.0%"


def iterations(log: str) -> list[Iteration]:
    """All that a log tells of."""
    found = (map(int, numbers) for numbers in _ITERATION.findall(log))
    return [Iteration(prefills, prefills + decodes, new + more) for prefills, new, decodes, more in found]


def idle(log: str) -> bool:
    """Whether the last step that was logged left nothing behind, so that the log is complete."""
    steps = [line for line in log[-10_000:].splitlines() if _ITERATION.search(line)]
    return bool(steps) and steps[-1].endswith(_NOTHING_LEFT)
