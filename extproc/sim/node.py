"""One replica of a simulated cluster: the engine in virtual time, and what can befall its process.

Steps in which nothing starts or ends are not taken one by one: the engine sleeps until the next that matters, and is brought
up to date when someone looks at it or sends to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from extproc.core.types import Replica, Sample
from extproc.sim.blocks import Note
from extproc.sim.engine import Engine, EngineConfig, EngineRequest, Refusal, RequestId, Step, Token
from extproc.sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a replica is."""

    replica: Replica
    """As discovery names it."""
    engine: EngineConfig
    adapters: tuple[str, ...] = ()
    """LoRA adapters that it serves as models of their own."""


class Listener(Protocol):
    """Who sent the requests. Ids are those of the engine's requests."""

    def scheduled(self, request: int) -> None:
        """Its prefill begins now."""

    def token(self, token: Token) -> None:
        """Its first or last token came."""


@dataclass(slots=True)
class Totals:
    """What a replica did since the start, restarts included."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    busy_s: float = 0.0


class Node:
    """One replica."""

    def __init__(
        self,
        spec: NodeSpec,
        timeline: Timeline,
        listener: Listener,
        told: Callable[[str, list[Note]], None] | None = None,
    ) -> None:
        """`told` gets its address and what happened in its prefix cache, when a step that matters ends; None where nobody asks."""
        self.spec = spec
        self._told = told
        self.up = True
        """Something listens there."""
        self.hung = False
        """Its process lives, and computes nothing."""
        self.failing = False
        """It answers new requests with an error; those that it has go on."""
        self.loads: list[tuple[float, int, int]] = []
        """(time, running, waiting), as `note_load` found them."""
        self._timeline = timeline
        self._generation = 0
        """Wake-ups of an older one no longer apply."""
        self._listener = listener
        self._past = Totals()
        self._slowness = 1.0
        self._here: set[int] = set()
        self._begin()

    def __repr__(self) -> str:
        state = "down" if not self.up else "hung" if self.hung else repr(self._engine)
        return f"<node {self.address} {state}>"

    @property
    def address(self) -> str:
        return self.spec.replica.address

    @property
    def totals(self) -> Totals:
        """Since the start."""
        past, counters = self._past, self._engine.counters
        return Totals(
            past.requests + counters.finished,
            past.prompt_tokens + counters.prompt_tokens,
            past.generated_tokens + counters.generated_tokens,
            past.preemptions + counters.preemptions,
            past.busy_s,
        )

    @property
    def busy_s(self) -> float:
        """Seconds with a step under way, since the start, that step included so far."""
        under_way = self._step is not None and not self.hung
        return self._past.busy_s + (self._timeline.now - self._awake_since if under_way else 0.0)

    @property
    def adapter_loads(self) -> int:
        """LoRA adapters loaded by the process that is there, or was last."""
        return 0 if self._engine.adapters is None else self._engine.adapters.loads

    @property
    def requests(self) -> int:
        """Requests there, running or waiting."""
        return len(self._here)

    @property
    def waiting(self) -> int:
        """Of these, those that wait."""
        return self._engine.waiting

    def _begin(self) -> None:
        """A fresh process."""
        self._engine = Engine(self._config(), journal=self._told is not None)
        self._step: Step | None = None
        self._started = 0.0
        """When the step under way began."""
        self._awake_since = 0.0
        """When the stretch of steps began that the next wake-up ends; the rest of it is not yet in `busy_s`."""
        self._quiet = 0
        """Steps from the one under way on that may be skipped."""
        self._generation += 1
        self._gauges = (0, 0, 0.0)
        self._adapters = self._engine.adapters_told

    def _config(self) -> EngineConfig:
        config = self.spec.engine
        return replace(config, step_time=config.step_time.scaled(self._slowness, self._slowness))

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> Refusal | None:
        """Queue a request; None when accepted. Only while it is up."""
        self._cut()
        if refusal := self._engine.add(request):
            return refusal
        self._here.add(_number(request.id))
        if self._step is None and not self.hung:
            self._next()
        return None

    def cached_tokens(self, hashes: Sequence[int], prompt_tokens: int) -> int:
        """Of a prompt with these blocks, what is cached there now."""
        self._sync()
        return self._engine.cached_tokens(hashes, prompt_tokens)

    def emitted(self, request: int) -> int:
        """Output tokens of a request so far."""
        self._sync()
        return self._engine.emitted(request)

    def abort(self, request: int) -> None:
        """Its client is gone."""
        self._cut()
        self._engine.abort(request)
        self._here.discard(request)

    # --- what can befall it -------------------------------------------------------------------------------------------

    def die(self) -> list[tuple[int, int]]:
        """The process ends. Returns the requests that it had, in the order of their ids, with the tokens that they had got."""
        self._sync()
        lost = [(request, self._engine.emitted(request)) for request in sorted(self._here)]
        self._past, was_hung = self.totals, self.hung
        if self._step is not None and not was_hung:
            self._past.busy_s += self._timeline.now - self._awake_since
        self._here.clear()
        self.up = self.hung = self.failing = False
        self._begin()
        return lost

    def start(self) -> None:
        """A fresh process listens."""
        self.up = True

    def hang(self) -> list[int]:
        """The engine stands still for good, and its gauges with it. Returns the requests that it has."""
        self._cut()
        if self._step is not None and not self.hung:
            self._past.busy_s += self._timeline.now - self._awake_since
        self.hung = True
        self._generation += 1
        return sorted(self._here)

    def slow(self, factor: float) -> None:
        """Steps take so many times what they did at first, from the next one on."""
        self._cut()
        self._slowness = factor
        self._engine.config = self._config()

    # --- what is seen of it -------------------------------------------------------------------------------------------

    def sample(self) -> Sample:
        """Its metrics page: gauges as of the last step that ended, so one that hangs goes on saying what it said."""
        self._sync()
        running, waiting, kv_usage = self._gauges
        config, counters = self._engine.config, self._engine.counters
        return Sample(
            running=running,
            waiting=waiting,
            kv_usage=kv_usage,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            prompt_tokens=float(counters.prompt_tokens),
            generated_tokens=float(counters.generated_tokens),
            prefix_queries=float(counters.prefix_queries),
            prefix_hits=float(counters.prefix_hits),
            preemptions=float(counters.preemptions),
            adapters=self._adapters,
        )

    def note_load(self) -> None:
        """Remember how much is there now."""
        self.loads.append((self._timeline.now, self._engine.running, self._engine.waiting))

    def check(self) -> None:
        """Raise AssertionError where the engine's books do not balance, or do not fit the requests sent there."""
        self._engine.check()
        assert len(self._here) == self._engine.running + self._engine.waiting, self

    # --- steps --------------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        """Start a step, and sleep until it ends or, where nothing happens in it, until one ends that matters."""
        step = self._step = self._engine.start_step()
        if step is None:
            return
        now = self._timeline.now
        for seq in step.prefills:
            self._listener.scheduled(_number(seq.request.id))
        self._quiet = self._engine.quiet_steps(step)
        self._started = self._awake_since = now
        self._generation += 1
        self._timeline.at(now + step.lasting_s(self._quiet + 1), self._wake, self._generation)

    def _wake(self, generation: int) -> None:
        step = self._step
        if generation != self._generation or step is None:
            return
        self._past.busy_s += self._timeline.now - self._awake_since
        if self._quiet:
            self._engine.skip(step, self._quiet)
            self._quiet = 0
        edges = self._engine.finish_step(step).edges
        self._look()
        if self._told is not None and (notes := self._engine.notes()):
            self._told(self.address, notes)
        self._next()
        for token in edges:
            if token.finished:
                self._here.discard(_number(token.id))
            self._listener.token(token)

    def _sync(self) -> None:
        """Skip the quiet steps that are over by now."""
        if self._quiet and self._step is not None and not self.hung:
            over = min(self._step.whole_steps(self._timeline.now - self._started), self._quiet)
            if over:
                self._started += self._step.lasting_s(over)
                self._engine.skip(self._step, over)
                self._quiet -= over
                self._look()

    def _cut(self) -> None:
        """The step under way becomes the last of its stretch: something changes after it."""
        self._sync()
        if self._quiet and self._step is not None and not self.hung:
            self._quiet = 0
            self._generation += 1
            self._timeline.at(self._started + self._step.duration_s, self._wake, self._generation)

    def _look(self) -> None:
        engine = self._engine
        self._gauges = (engine.running, engine.waiting, engine.kv_usage)
        self._adapters = engine.adapters_told


def _number(request: RequestId) -> int:
    """The engine takes any id; ours are places in the trace."""
    assert isinstance(request, int)
    return request
