"""The simulated engine against real vLLM replicas on this machine, request by request: `python -m tests.bench.sim_vllm`, about five minutes.

The requests come from `extproc simulate`'s own generator: shared system prompts, bursts of siblings, turns on top of the answer
before, and prompts of whole blocks that are asked twice. A simulated cluster with the policy `predicted` routes them, and its
choices are kept: from there on, each request has its replica and its place in one global order. They are sent
 1. one at a time to each replica, so that nothing but the order decides what is in its cache;
 2. a few at a time, in the same order: then it matters which of them end first;
 3. the same once more, to see how far reality agrees with itself.
Then simulated engines are sent the same, by the same rule. vLLM says of each request how much of its prompt was in the cache
(`cached_tokens`), and so does the engine. It knows blocks by hashes over the tokens that vLLM was sent and that it gave back.

Where the replicas log their steps (`--enable-logging-iteration-details`; those that we start do), the engine is also led through
the run step by step: each request joins in the step in which it joined there. Then no clock plays a part, and each step must
hold as many sequences and tokens as vLLM's, and each request must find as much in the cache.

Of the second run the moments are compared too: the constants of the step time, and what HTTP adds to each request, are fitted
to the requests of one half, and the errors are those of the other half. A machine with few cores says little there: replicas,
their servers and the client share them with whatever else runs. The third run says how little.

Before each run every replica gets prompts of nobody else's that fill its cache, so whatever lay there is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from extproc.core.steptime import StepTime
from extproc.core.types import Replica
from extproc.sim.engine import Engine, EngineConfig, EngineRequest, RequestId, Token
from extproc.sim.fit import EVALUATIONS, ROUNDS, mismatch
from extproc.sim.node import Node, NodeSpec
from extproc.sim.replay import Timed
from extproc.sim.report import percentile
from extproc.sim.simplex import Point, minimize
from extproc.sim.timeline import Timeline
from extproc.sim.traces import Generate
from tests.bench import sim_accuracy
from tests.bench.sim_accuracy import HALVES, Figure, half
from tests.bench.sim_vllm_plan import SESSIONS, Ask, Content, Dispatch, Plan, plan
from tests.bench.sim_vllm_real import (
    REQUEST_TIMEOUT_S,
    STEP_TIME,
    Answer,
    Client,
    Iteration,
    Options,
    Served,
    first_model,
    idle,
    iterations,
    replicas,
    settings,
)
from tests.support.waiting import until

OUTPUT: Final = Path("build/bench-sim-vllm.json")
HTTP_S: Final = 5e-3
"""What HTTP adds to a request: where the fit starts."""


# --- in the simulation ------------------------------------------------------------------------------------------------


class Fleet:
    """The simulated replicas, and a client that follows the same rule."""

    def __init__(self, plan: Plan, hashes: Sequence[Sequence[int]], config: EngineConfig, http_s: float) -> None:
        self.timeline = Timeline()
        self._plan, self._hashes, self._http_s = plan, hashes, http_s
        self.nodes = [
            Node(NodeSpec(Replica(f"10.0.0.{i}:8000"), config), self.timeline, self) for i in range(plan.replicas)
        ]
        self._sent: dict[int, float] = {}
        self._firsts: dict[int, tuple[float, int]] = {}
        self._lasts: dict[int, float] = {}

    def play(self, at_once: int) -> list[Answer]:
        """The same requests; the answers in the order of the plan."""
        self._dispatch = Dispatch(self._plan, at_once)
        self._go()
        while len(self.timeline):
            self.timeline.step()
        for node in self.nodes:
            node.check()
        return [self._answer(place) for place in range(len(self._plan.asks))]

    def _answer(self, place: int) -> Answer:
        first_s, cached = self._firsts[place]
        return Answer(cached, self._sent[place], first_s, self._lasts[place])

    def _go(self) -> None:
        for place in self._dispatch.take():
            self._sent[place] = self.timeline.now
            self.timeline.at(self.timeline.now + self._http_s, self._arrive, place)

    def _arrive(self, place: int) -> None:
        ask = self._plan.asks[place]
        refusal = self.nodes[ask.replica].submit(engine_request(ask, place, self._hashes[place]))
        assert refusal is None, f"request {place}: {refusal}"

    def scheduled(self, request: int) -> None:
        """Of no interest."""

    def token(self, token: Token) -> None:
        """The first or the last token of a request."""
        assert isinstance(token.id, int)
        if token.first:
            self._firsts[token.id] = self.timeline.now, token.cached_tokens
        if token.finished:
            self._lasts[token.id] = self.timeline.now
            self._dispatch.end(token.id)
            self._go()


def simulate(
    plan: Plan, real: Sequence[Answer], config: EngineConfig, at_once: int, http_s: float = HTTP_S
) -> list[Answer]:
    """What the simulated replicas make of what was sent to the real ones."""
    return Fleet(plan, [answer.hashes for answer in real], config, http_s).play(at_once)


def engine_request(ask: Ask, place: int, hashes: Sequence[int]) -> EngineRequest:
    """One request as the simulated engine takes it; its id is its place."""
    return EngineRequest(place, ask.prompt_tokens, ask.output_tokens, hashes)


@dataclass(slots=True)
class InStep:
    """What an engine made of requests that joined in given steps."""

    steps: int = 0
    different: int = 0
    """Steps of other sequences or tokens than the real ones."""
    preemptions: int = 0
    cached: dict[RequestId, int] = field(default_factory=dict)
    """Prompt tokens from the cache, by request."""


def in_step(requests: Iterable[EngineRequest], steps: Sequence[Iteration], config: EngineConfig) -> InStep:
    """Lead an engine through the steps of a real one: in each as many requests join, in order, as did there.

    Only where scheduling is synchronous: otherwise a step says nothing of those that were decided beside it.
    """
    engine, waiting, found = Engine(config), deque(requests), InStep(len(steps))
    joined = 0
    for step in steps:
        for _ in range(step.prefills - (joined - len(found.cached))):
            if waiting:
                engine.add(waiting.popleft())
                joined += 1
        mine = engine.start_step()
        if mine is None:
            found.different += 1
            continue
        found.different += (mine.decodes + len(mine.chunks), mine.new_tokens) != (step.sequences, step.tokens)
        found.cached |= {t.id: t.cached_tokens for t in engine.finish_step(mine).edges if t.first}
    engine.check()
    found.preemptions = engine.counters.preemptions
    return found


# --- compare ----------------------------------------------------------------------------------------------------------


def hits(plan: Plan, real: Sequence[Answer], simulated: Sequence[int | None]) -> dict[str, Any]:
    """How far the cached tokens of the scored requests agree; None for one that the simulation never answered."""
    pairs = {place: (real[place].cached_tokens, simulated[place] or 0) for place in plan.scored}
    return {
        "requests": len(pairs),
        "equal": sum(r == s for r, s in pairs.values()),
        "prompt_tokens": sum(plan.asks[place].prompt_tokens for place in pairs),
        "cached_tokens": {"real": sum(r for r, _ in pairs.values()), "sim": sum(s for _, s in pairs.values())},
        "off_by_tokens": sum(abs(r - s) for r, s in pairs.values()),
        "different": [
            {"place": place, "replica": plan.asks[place].replica, "real": r, "sim": s}
            for place, (r, s) in pairs.items()
            if r != s
        ],
    }


def timed(plan: Plan, answers: Sequence[Answer]) -> list[Timed]:
    """The scored requests; seconds since the first. When they were scheduled nobody tells."""
    start = answers[plan.first].sent_s
    return [
        Timed(
            plan.asks[i].prompt_tokens,
            plan.asks[i].output_tokens,
            arrived_s=answers[i].sent_s - start,
            scheduled_s=answers[i].sent_s - start,
            first_token_s=answers[i].first_s - start,
            last_token_s=answers[i].last_s - start,
        )
        for i in plan.scored
    ]


def figures(real: Sequence[Timed], simulated: Sequence[Timed]) -> dict[str, Any]:
    """As in `sim_accuracy`, with the median, which a stall of the machine leaves alone."""
    found = sim_accuracy.figures(real, simulated)
    del found["queue_s"]
    for name in ("ttft_s", "tpot_s"):
        found[name]["p50"] = Figure(_median(name, real), _median(name, simulated)).json()
    return found


def _median(name: str, side: Sequence[Timed]) -> float:
    found = percentile(sorted(value for t in side if (value := getattr(t, name)) is not None), 50)
    assert found is not None
    return found


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Played:
    """One run, as it really went."""

    plan: Plan
    config: EngineConfig
    at_once: int
    answers: Sequence[Answer]
    steps: Sequence[Sequence[Iteration]] = ()
    """Of each replica, where known."""

    def simulated(self, step_time: StepTime = STEP_TIME, http_s: float = HTTP_S) -> list[Answer]:
        """The same requests on simulated replicas."""
        config = replace(self.config, step_time=step_time)
        return simulate(self.plan, self.answers, config, self.at_once, http_s)

    def hits(self) -> dict[str, Any]:
        """Cached tokens against the simulation, which has its own time."""
        return hits(self.plan, self.answers, [a.cached_tokens for a in self.simulated()])

    def hits_in_step(self) -> dict[str, Any] | None:
        """Cached tokens against engines that are led step by step; None where the steps are not known."""
        if not self.steps:
            return None
        led = [in_step(self._requests(r), steps, self.config) for r, steps in enumerate(self.steps)]
        cached = {place: tokens for replica in led for place, tokens in replica.cached.items()}
        found = hits(self.plan, self.answers, [cached.get(place) for place in range(len(self.answers))])
        return {
            "steps": sum(i.steps for i in led),
            "different_steps": sum(i.different for i in led),
            "preemptions": sum(i.preemptions for i in led),
            **found,
        }

    def _requests(self, replica: int) -> Iterable[EngineRequest]:
        for place, ask in enumerate(self.plan.asks):
            if ask.replica == replica:
                yield engine_request(ask, place, self.answers[place].hashes)

    def fitted(self, scored: str, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Fit to one half of the run, score the other."""
        real = timed(self.plan, self.answers)
        step_time, http_s = fit(self, half(real, HALVES[scored]), tick)
        simulated = self.simulated(step_time, http_s)
        sides = (real, timed(self.plan, simulated))
        return {
            "constants": asdict(step_time),
            "http_s": http_s,
            "hits": hits(self.plan, self.answers, [a.cached_tokens for a in simulated]),
            **figures(*([side[i] for i in half(real, scored)] for side in sides)),
        }


def fit(run: Played, places: Iterable[int], tick: Callable[[], object]) -> tuple[StepTime, float]:
    """Step time and seconds of HTTP with which the simulation comes closest to the requests at `places`, among those that count.

    As `extproc.sim.fit`, which knows neither shared prefixes nor clients that wait for an answer.
    """
    real, places = timed(run.plan, run.answers), tuple(places)

    def error(point: Point) -> float:
        tick()
        return mismatch(real, timed(run.plan, run.simulated(*_constants(point))), places)

    best: Point = tuple(map(math.log, (*astuple(STEP_TIME), HTTP_S)))
    for spread in ROUNDS:
        _, best = minimize(error, best, spread, EVALUATIONS)
    return _constants(best)


def _constants(point: Point) -> tuple[StepTime, float]:
    *terms, http_s = map(math.exp, point)
    return StepTime(*terms), http_s


async def play(
    served: Served,
    at_once: int,
    options: Options,
    tick: Callable[[], object] = lambda: None,
    sessions: Generate = SESSIONS,
) -> Played:
    """The workload on real replicas, so many requests at a time on each."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        url = served.urls[0]
        config = await settings(http, url, options)
        planned = plan(config, len(served.urls), options.seed, sessions)
        content = Content(config.block_size, options.seed)
        model = (await first_model(http, url))["id"]
        lengths = [log.stat().st_size for log in served.logs]
        answers = await Client(http, served.urls, model, config.block_size, content, tick).play(planned, at_once)
    texts: list[str] = []

    def logged() -> bool:
        texts[:] = [log.read_text()[length:] for log, length in zip(served.logs, lengths, strict=True)]
        return all(map(idle, texts))

    await until(logged)
    return Played(planned, config, at_once, answers, [iterations(text) for text in texts])


async def measure(served: Served, options: Options, console: Console) -> dict[str, Any]:
    """All runs, then the simulation of them."""
    with Progress(console=console, refresh_per_second=2) as bar:
        runs = []
        for name, at_once in (("one at a time", 1), ("several", options.at_once), ("several, again", options.at_once)):
            task = bar.add_task(f"vLLM, {name}", total=None)
            runs.append(await play(served, at_once, options, partial(bar.advance, task)))
        task = bar.add_task("fitting", total=len(HALVES) * len(ROUNDS) * EVALUATIONS)
        sequential, concurrent, again = runs
        return {
            "engine": {**asdict(sequential.config), "step_time": None},
            "sequential": {"hits": sequential.hits(), "in_step": sequential.hits_in_step()},
            "concurrent": {
                "at_once": options.at_once,
                "hits": concurrent.hits(),
                "in_step": concurrent.hits_in_step(),
                "times": {scored: concurrent.fitted(scored, partial(bar.advance, task)) for scored in HALVES},
            },
            "again": compare_runs(concurrent, again),
            "load_average": os.getloadavg(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }


def compare_runs(one: Played, other: Played) -> dict[str, Any]:
    """Two real runs of the same plan: as `sim` the second."""
    both = (timed(run.plan, run.answers) for run in (one, other))
    return {"hits": hits(one.plan, one.answers, [a.cached_tokens for a in other.answers]), **figures(*both)}


def tables(found: dict[str, Any]) -> Iterable[Table]:
    """For people."""
    runs = {
        "one at a time": found["sequential"]["hits"],
        "one at a time, in step": found["sequential"]["in_step"],
        "several": found["concurrent"]["hits"],
        "several, in step": found["concurrent"]["in_step"],
        **{f"several, {half} half fitted": run["hits"] for half, run in found["concurrent"]["times"].items()},
        "several, vLLM again": found["again"]["hits"],
    }
    yield _hits_table({name: run for name, run in runs.items() if run})
    yield _times_table({**found["concurrent"]["times"], "vLLM again": found["again"]})


def _hits_table(runs: dict[str, Any]) -> Table:
    grid = Table("run", title="prompt tokens from the cache: vLLM, simulated")
    for column in ("requests", "equal", "tokens", "simulated", "off by", "different steps"):
        grid.add_column(column, justify="right")
    for name, run in runs.items():
        cached = run["cached_tokens"]
        steps = f"{run['different_steps']} of {run['steps']}" if "steps" in run else ""
        cells = (run["requests"], run["equal"], cached["real"], cached["sim"], run["off_by_tokens"], steps)
        grid.add_row(name, *map(str, cells))
    return grid


def _times_table(runs: dict[str, Any]) -> Table:
    grid = Table("scored, fitted on the other half", title="several at a time, ms: vLLM, simulated")
    columns = [(name, which) for name in ("ttft_s", "tpot_s") for which in ("p50", "mean", "p99")]
    for name, which in (*columns, ("makespan_s", "")):
        grid.add_column(f"{name.removesuffix('_s')} {which}".strip(), justify="right")
    for name, run in runs.items():
        cells = [*(run[what][which] for what, which in columns), run["makespan_s"]]
        grid.add_row(name, *(f"{c['real'] * 1e3:.1f}\n{c['sim'] * 1e3:.1f}\n{c['error']:+.0%}" for c in cells))
    return grid


async def run(given: Served, options: Options, console: Console) -> dict[str, Any]:
    """Everything, on the replicas given or on our own."""
    if given.urls:
        return await measure(given, options, console)
    async with replicas() as own:
        return await measure(own, options, console)


def main() -> None:
    parser = argparse.ArgumentParser(description="the same requests on real vLLM replicas and on simulated ones")
    parser.add_argument("--replicas", default="", help="URL,URL; without it two are started: VLLM=venv MODEL=folder")
    parser.add_argument("--logs", default="", help="FILE,FILE of these replicas, where they log their steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=4, help="requests under way on a replica")
    parser.add_argument("--max-num-seqs", type=int, default=8, help="as the replicas were started")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="likewise")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    asked = parser.parse_args()
    served = Served([u for u in asked.replicas.split(",") if u], [Path(f) for f in asked.logs.split(",") if f])
    options = Options(asked.seed, asked.at_once, asked.max_num_seqs, asked.max_num_batched_tokens)
    console = Console()
    found = asyncio.run(run(served, options, console))
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(found, indent=2) + "\n")
    console.print(*tables(found))
    console.print(f"figures in {asked.output}")


if __name__ == "__main__":
    main()
