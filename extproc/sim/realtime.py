"""The simulated engine in wall time: one task that sleeps through each step and hands out its tokens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from extproc.core.types import AdaptersSampled
from extproc.sim.engine import Emitted, Engine, EngineRequest, RequestId, Token

_log = logging.getLogger(__name__)

MAX_LORA_SETS: Final = 64
"""vLLM keeps every set of adapters that it ever ran for as long as it lives; here those last used are kept."""
MAX_LAG_S: Final = 1.0
"""Behind schedule by more than this, the engine stops catching up: after a pause of the whole machine a burst would follow."""


class Flow:
    """Tokens on their way from the engine to one HTTP response."""

    __slots__ = ("_pending", "_waiter", "every")

    def __init__(self, every: bool) -> None:
        self.every = every
        """False: only the first and last tokens are wanted."""
        self._pending: list[Token] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, token: Token) -> None:
        self._pending.append(token)
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list[Token]:
        """All tokens since the last call, at least one."""
        if not self._pending:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        tokens, self._pending = self._pending, []
        return tokens


@dataclass(frozen=True, slots=True)
class Gauges:
    """What the engine last said of itself: it speaks only at the end of a step, so requests just added do not show."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0


class RealtimeEngine:
    """Drives an Engine. `time_scale` above 1 makes its GPU slower than real by that factor."""

    def __init__(self, engine: Engine, time_scale: float = 1.0) -> None:
        self.engine = engine
        self.time_scale = time_scale
        self.gauges = Gauges()
        self.adapters_seen: dict[AdaptersSampled, float] = {}
        """What was said of LoRA adapters at the ends of steps, with the Unix time when it was last so, which is their order."""
        self.max_lag_s = 0.0
        """Furthest behind schedule so far: above some milliseconds this machine is too busy for honest timings."""
        self._flows: dict[RequestId, Flow] = {}
        self._wake = asyncio.Event()
        self._hang = False
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<realtime x{self.time_scale:g}, {len(self._flows)} awaited, {self.engine!r}>"

    @property
    def hang(self) -> bool:
        """While true no step runs and nothing comes out; requests are still accepted."""
        return self._hang

    @hang.setter
    def hang(self, value: bool) -> None:
        self._hang = value
        self._wake.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="engine")
        self._task.add_done_callback(_report_crash)

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def submit(self, requests: Iterable[EngineRequest], flow: Flow) -> None:
        """Queue requests that the caller has checked; raises ValueError for one that the engine refuses."""
        for request in requests:
            if refusal := self.engine.add(request):
                raise ValueError(f"engine refuses {request.id}: {refusal}")
            self._flows[request.id] = flow
        self._wake.set()

    def withdraw(self, ids: Iterable[RequestId]) -> None:
        """Nobody waits for these any more; those that have ended are passed over."""
        for i in ids:
            self._flows.pop(i, None)
            if self.engine.abort(i):
                self._look()

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            step = None if self._hang else self.engine.start_step()
            if step is None:
                self._wake.clear()
                await self._wake.wait()
                due = clock()
                continue
            # An absolute schedule: a late wake-up shortens the next sleep, so errors do not add up.
            due = max(due, clock() - MAX_LAG_S) + step.duration_s * self.time_scale
            await asyncio.sleep(max(0.0, due - clock()))
            self.max_lag_s = max(self.max_lag_s, clock() - due)
            emitted = self.engine.finish_step(step)
            self._look()
            self._deliver(emitted)

    def _look(self) -> None:
        self.gauges = Gauges(self.engine.running, self.engine.waiting, self.engine.kv_usage)
        if (told := self.engine.adapters_told) is not None:
            self.adapters_seen.pop(told, None)
            self.adapters_seen[told] = time.time()
            if len(self.adapters_seen) > MAX_LORA_SETS:
                del self.adapters_seen[next(iter(self.adapters_seen))]

    def _deliver(self, emitted: Emitted) -> None:
        flows = self._flows
        for token in emitted.edges:
            flow = flows.pop(token.id) if token.finished else flows[token.id]
            flow.put(token)
        for token in emitted.inner_tokens():
            if (flow := flows[token.id]).every:
                flow.put(token)


def _report_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("the simulated engine stopped", exc_info=error)
