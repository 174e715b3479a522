"""Scrapes replicas at a pace that follows their work, and hands on what they say as facts.

One task per replica scrapes, waits and scrapes again, so that two scrapes of one replica never run at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Final

from extproc.adapters.engines import Engine, listed_models
from extproc.adapters.pages import HttpPages, Pages
from extproc.config import Scrape
from extproc.core.types import Add, Change, Fact, NotSampled, Remove, Reset, Sample, Sampled, ScrapeFailure, Serves

log = logging.getLogger(__name__)

MODELS_PATH: Final = "/v1/models"


@dataclass(frozen=True, slots=True)
class Target:
    """How the replicas of one pool are read."""

    engine: Engine | None
    """None reads no metrics, only the models."""
    scrape: Scrape


@dataclass(slots=True, eq=False)
class _Watched:
    """One replica and the state of its task."""

    pool: str
    address: str
    target: Target
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    result: Sample | ScrapeFailure | None = None
    """What the last scrape brought; None before the first."""
    refused: int = 0
    """Connections refused in a row."""
    models_due: float = 0.0
    """Loop time of the next read of the models."""

    @property
    def state(self) -> str:
        if self.result is None:
            return "unseen"
        return self.result if isinstance(self.result, ScrapeFailure) else "sampled"

    def has_work(self) -> bool:
        """By its own word, for others may send to it too. A late page counts as work: a busy engine answers late."""
        if isinstance(self.result, Sample):
            return bool((self.result.running or 0) + (self.result.waiting or 0))
        return self.result is ScrapeFailure.LATE

    def pause(self, busy: bool) -> float:
        """Seconds from the end of one scrape to the next."""
        scrape = self.target.scrape
        if self.refused:
            return min(scrape.interval_s * 2.0 ** min(self.refused - 1, 30), scrape.idle_interval_s)
        return scrape.interval_s if busy or self.has_work() else scrape.idle_interval_s


class Scraper:
    """Scrapes every replica of which `follow` told, until `stop`.

    `learn` gets the facts, within the task of the replica. `busy` says whether we have flights on an address, for an engine that
    has just been given work still says that it has none.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        learn: Callable[[Fact], None],
        *,
        rng: Random,
        busy: Callable[[str], bool] = lambda _address: False,
        pages: Pages | None = None,
    ) -> None:
        """`targets`: by name of the pool; changes of other pools are ignored. `pages` is closed by `stop`."""
        self._targets = targets
        self._learn = learn
        self._busy = busy
        self._rng = rng
        self._pages = pages or HttpPages()
        self._tasks: dict[tuple[str, str], tuple[_Watched, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._stopped = False

    def __repr__(self) -> str:
        states = [watched.state for watched, _ in self._tasks.values()]
        told = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        return f"<Scraper {told or 'no replicas'}>"

    async def stop(self) -> None:
        """Cancel all scrapes and wait for their end. Changes that come later are ignored."""
        self._stopped = True
        for key in list(self._tasks):
            self._end(key)
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self._pages.close()

    def follow(self, change: Change) -> None:
        """Begin with replicas that joined, end with those that left; one that stays goes on undisturbed. Needs a running loop."""
        if self._stopped or change.pool not in self._targets:
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
        """The replica was given work, or doubt arose: scrape it one `interval_s` from now, if that is sooner than planned.

        Not at once: until its next step is done an engine says what it said before, and that would look fresh.
        """
        for watched in self._at(address):
            watched.woken.set()

    def _at(self, address: str) -> Iterator[_Watched]:
        for pool in self._targets:
            if found := self._tasks.get((pool, address)):
                yield found[0]

    def _begin(self, key: tuple[str, str]) -> None:
        if key in self._tasks:
            return
        pool, address = key
        watched = _Watched(pool, address, self._targets[pool])
        self._tasks[key] = watched, asyncio.create_task(self._watch(watched), name=f"scrape {address}")

    def _end(self, key: tuple[str, str]) -> None:
        if found := self._tasks.pop(key, None):
            _, task = found
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            task.cancel()

    async def _watch(self, watched: _Watched) -> None:
        """The life of one replica's task."""
        # Spread over one interval, and kept apart by the jitter of each wait: else a hundred replicas that joined at once would
        # be parsed in one go for ever, and decisions would wait behind them.
        await asyncio.sleep(self._rng.random() * watched.target.scrape.interval_s)
        while True:
            watched.woken.clear()
            try:
                await self._visit(watched)
            except Exception:  # a mistake of ours must not leave the replica unread for good
                log.exception("scrape of %s in pool %s failed", watched.address, watched.pool)
            await self._rest(watched)

    async def _visit(self, watched: _Watched) -> None:
        """Read the metrics, and the models where they are due and the replica answers at all."""
        if watched.target.engine is not None:
            result = await self._sample(watched, watched.target.engine)
            self._note(watched, result)
            if result in (ScrapeFailure.REFUSED, ScrapeFailure.LATE):
                return
        if _now() >= watched.models_due:
            await self._read_models(watched)

    async def _sample(self, watched: _Watched, engine: Engine) -> Sample | ScrapeFailure:
        scrape = watched.target.scrape
        page = await self._pages.get(watched.address, scrape.path, scrape.timeout_s)
        return page if isinstance(page, ScrapeFailure) else engine.parse(page) or ScrapeFailure.UNREADABLE

    def _note(self, watched: _Watched, result: Sample | ScrapeFailure) -> None:
        before, watched.result = watched.state, result
        if watched.state != before:
            log.info("replica %s of pool %s: %s, was %s", watched.address, watched.pool, watched.state, before)
        if isinstance(result, Sample):
            watched.refused = 0
            self._learn(Sampled(watched.pool, watched.address, result))
            return
        watched.refused = watched.refused + 1 if result is ScrapeFailure.REFUSED else 0
        if watched.refused:
            watched.models_due = 0.0  # whatever comes back there may serve other models
        self._learn(NotSampled(watched.pool, watched.address, result))

    async def _read_models(self, watched: _Watched) -> None:
        """Quiet where it fails: the router then goes by what it knew, and the metrics tell of the trouble."""
        scrape = watched.target.scrape
        page = await self._pages.get(watched.address, MODELS_PATH, scrape.timeout_s)
        models = None if isinstance(page, ScrapeFailure) else listed_models(page)
        if models is None:
            watched.models_due = _now() + min(scrape.idle_interval_s, scrape.models_interval_s)
            return
        watched.models_due = _now() + scrape.models_interval_s
        self._learn(Serves(watched.pool, watched.address, models))

    async def _rest(self, watched: _Watched) -> None:
        """Wait until the next scrape; `wake` cuts the wait short to one interval.

        Counted from the end of the last scrape: a page takes an engine up to 0.9 s under load, on the event loop that serves its
        requests, and counting from the start would ask for the next at once.
        """
        pause = watched.pause(self._busy(watched.address)) * self._jitter()
        last = min(pause, watched.target.scrape.interval_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause - last):
                await watched.woken.wait()
        await asyncio.sleep(last)

    def _jitter(self) -> float:
        """0.9 to 1.0: the configured interval is a promise, so only downwards."""
        return 1.0 - 0.1 * self._rng.random()


def _now() -> float:
    return asyncio.get_running_loop().time()
