"""Scrapes replicas at a pace that follows their work, and hands on what they say as facts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Final

from extproc.adapters.engines import Engine, listed_models
from extproc.adapters.pages import Pages
from extproc.adapters.rounds import Rounds, Visited, now
from extproc.config import Scrape
from extproc.core.types import Fact, NotSampled, Sample, Sampled, ScrapeFailure, Serves

log = logging.getLogger(__name__)

MODELS_PATH: Final = "/v1/models"


@dataclass(frozen=True, slots=True)
class Target:
    """How the replicas of one pool are read."""

    engine: Engine | None
    """None reads no metrics, only the models."""
    scrape: Scrape


@dataclass(slots=True, eq=False)
class _Watched(Visited):
    """One replica and what its scrapes brought."""

    target: Target
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


class Scraper(Rounds[_Watched]):
    """Scrapes every replica of which `follow` told, until `stop`.

    `learn` gets the facts, within the task of the replica. `busy` says whether we have flights on an address, for an engine that
    has just been given work still says that it has none.

    `wake`: the replica was given work, or doubt arose. It is scraped one `interval_s` from then, if that is sooner than planned.
    Not at once: until its next step is done an engine says what it said before, and that would look fresh.
    """

    verb = "scrape"

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
        super().__init__(targets, rng, pages)
        self._targets = dict(targets)
        self._learn = learn
        self._busy = busy

    def retarget(self, pool: str, target: Target) -> None:
        """Read the replicas of a pool in another way from their next scrape on."""
        self._targets[pool] = target
        for watched in self._of(pool):
            watched.target = target

    def _enter(self, pool: str, address: str) -> _Watched:
        return _Watched(pool, address, self._targets[pool])

    def _first_s(self, watched: _Watched) -> float:
        return watched.target.scrape.interval_s

    async def _visit(self, watched: _Watched) -> None:
        """Read the metrics, and the models where they are due and the replica answers at all."""
        if watched.target.engine is not None:
            result = await self._sample(watched, watched.target.engine)
            self._note(watched, result)
            if result in (ScrapeFailure.REFUSED, ScrapeFailure.LATE):
                return
        if now() >= watched.models_due:
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
            watched.models_due = now() + min(scrape.idle_interval_s, scrape.models_interval_s)
            return
        watched.models_due = now() + scrape.models_interval_s
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
