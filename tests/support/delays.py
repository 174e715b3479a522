"""Extproc's server with a router that holds every request for a while, then sends it to the replicas given.

In the test's own process, or as one of its own to be killed and stopped:  python -m tests.support.delays GRPC HOLD_S REPLICA...
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque

from extproc.config import Config, parse
from extproc.core.types import Api, Decision, Prediction, Request, Route, Turn, Wait
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.server import Server


class Delays(FakeRouter):
    """First come, first served, each `hold_s` after it came. `left` has those that went before."""

    def __init__(self, hold_s: float, endpoints: tuple[str, ...]) -> None:
        super().__init__()
        self._hold_s = hold_s
        self._endpoints = endpoints
        self._queue: deque[tuple[float, str]] = deque()
        self.waited = 0
        """Requests that came."""

    def arrive(self, request: Request, now: float) -> Wait:
        self.waited += 1
        self.held += 1
        ticket = f"t{self.waited}"
        self._queue.append((now + self._hold_s, ticket))
        return Wait(ticket, now + self._hold_s)

    def turns(self, now: float) -> list[Turn]:
        due = []
        while self._queue and self._queue[0][0] <= now:
            _, ticket = self._queue.popleft()
            due.append(Turn(ticket, self._route(ticket)))
        self.held -= len(due)
        return due

    def next_wakeup(self) -> float | None:
        return self._queue[0][0] if self._queue else None

    def _route(self, ticket: str) -> Route:
        nothing = Prediction(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        decision = Decision(0.0, ticket, "default", None, Api.CHAT, "f", "f", self._endpoints, 0, 0.0, nothing, ())
        return Route(ticket, self._endpoints, decision)


def server(config: Config, router: Delays) -> Server:
    """Not started."""
    return Server(config, Intake(router, config), router, time.monotonic)


async def serve(grpc: str, hold_s: float, replicas: tuple[str, ...]) -> None:
    """For ever."""
    config = parse(f"{{listen: {{grpc: '{grpc}'}}, pools: [{{replicas: {list(replicas)}}}]}}")
    await server(config, Delays(hold_s, replicas)).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], float(sys.argv[2]), tuple(sys.argv[3:])))
