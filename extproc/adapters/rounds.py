"""Visits each replica again and again, in a task of its own, so that two visits of one replica never run at once.

What scrapes and active checks have in common: who is visited follows discovery, and a visit can be brought forward.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar, Generic, TypeVar

from extproc.adapters.pages import HttpPages, Pages
from extproc.core.types import Add, Change, Remove, Reset

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Visited:
    """One replica, and what its visitor remembers of it."""

    pool: str
    address: str
    woken: asyncio.Event = field(default_factory=asyncio.Event, kw_only=True)

    @property
    def state(self) -> str:
        """What the last visit found, in a word or two."""
        return "unseen"


V = TypeVar("V", bound=Visited)


class Rounds(ABC, Generic[V]):
    """Goes on visiting every replica of which `follow` told, until `stop`."""

    verb: ClassVar[str]
    """What a visit is called, in the log and in the names of tasks."""

    def __init__(self, pools: Collection[str], rng: Random, pages: Pages | None) -> None:
        """Changes of pools other than `pools` are ignored. `pages` is closed by `stop`."""
        self._pools = pools
        self._rng = rng
        self._pages = pages or HttpPages()
        self._tasks: dict[tuple[str, str], tuple[V, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._stopped = False

    def __repr__(self) -> str:
        states = [visited.state for visited, _ in self._tasks.values()]
        told = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        return f"<{type(self).__name__} {told or 'no replicas'}>"

    async def stop(self) -> None:
        """Cancel all visits and wait for their end. Changes that come later are ignored."""
        self._stopped = True
        for key in list(self._tasks):
            self._end(key)
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self._pages.close()

    def follow(self, change: Change) -> None:
        """Begin with replicas that joined, end with those that left; one that stays goes on undisturbed. Needs a running loop."""
        if self._stopped or change.pool not in self._pools:
            return
        match change:
            case Reset(pool=pool, replicas=replicas):
                listed = {(pool, r.address): None for r in replicas}
                for key in [k for k in self._tasks if k[0] == pool and k not in listed]:
                    self._end(key)
                for key in listed:
                    self._begin(key)
            case Add(pool=pool, replica=replica):
                self._begin((pool, replica.address))
            case Remove(pool=pool, address=address):
                self._end((pool, address))

    def wake(self, address: str) -> None:
        """Bring the next visit forward, to the soonest that the pace allows."""
        for visited in self._at(address):
            visited.woken.set()

    @abstractmethod
    def _enter(self, pool: str, address: str) -> V:
        """A replica that joined."""

    @abstractmethod
    def _first_s(self, visited: V) -> float:
        """Seconds over which the first visits of replicas that join at once are spread."""

    @abstractmethod
    async def _visit(self, visited: V) -> None:
        """One visit."""

    @abstractmethod
    async def _rest(self, visited: V) -> None:
        """Wait until the next visit; `visited.woken` is set by `wake`, also while the last visit went on."""

    def _at(self, address: str) -> Iterator[V]:
        for pool in self._pools:
            if found := self._tasks.get((pool, address)):
                yield found[0]

    def _of(self, pool: str) -> list[V]:
        """All replicas of a pool."""
        return [visited for (name, _), (visited, _) in self._tasks.items() if name == pool]

    def _begin(self, key: tuple[str, str]) -> None:
        if key in self._tasks:
            return
        visited = self._enter(*key)
        self._tasks[key] = visited, asyncio.create_task(self._go_on(visited), name=f"{self.verb} {visited.address}")

    def _end(self, key: tuple[str, str]) -> None:
        if found := self._tasks.pop(key, None):
            _, task = found
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            task.cancel()

    async def _go_on(self, visited: V) -> None:
        """The life of one replica's task."""
        # Spread out, and kept apart by the jitter of each wait: else the answers of a hundred replicas that joined at once would
        # be parsed in one go for ever, and decisions would wait behind them.
        await asyncio.sleep(self._rng.random() * self._first_s(visited))
        while True:
            visited.woken.clear()
            try:
                await self._visit(visited)
            except Exception:  # a mistake of ours must not leave the replica unvisited for good
                log.exception("%s of %s in pool %s failed", self.verb, visited.address, visited.pool)
            await self._rest(visited)

    def _jitter(self) -> float:
        """0.9 to 1.0: the configured interval is a promise, so only downwards."""
        return 1.0 - 0.1 * self._rng.random()


def now() -> float:
    """The running loop's time, seconds."""
    return asyncio.get_running_loop().time()
