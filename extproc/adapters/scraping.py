"""Scrapes replicas at a pace that follows their work, and hands on what they say as facts.

Whose page it is is found out by the page itself (`engines.detect`), for each replica alone, and then taken for granted for as long as
that engine's table finds its figures there. A replica that tells nothing of use is said so, once: then only what we send there is
known of its load.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Final

from extproc.adapters.engines import Engine, detect, listed_models, listed_parents
from extproc.adapters.metrics_places import places
from extproc.adapters.pages import Page, Pages
from extproc.adapters.rounds import Rounds, Visited, now
from extproc.config import Scrape
from extproc.core.ranks import members_at
from extproc.core.types import (
    Add,
    Change,
    Fact,
    Identified,
    NotSampled,
    Remove,
    Replica,
    Reset,
    Sample,
    Sampled,
    ScrapeFailure,
    Serves,
)

log = logging.getLogger(__name__)

MODELS_PATH: Final = "/v1/models"


@dataclass(frozen=True, slots=True)
class Target:
    """How the replicas of one pool are read."""

    engines: tuple[Engine, ...]
    """What they may be; none: no metrics are read, only the models."""
    scrape: Scrape
    ranks: int = 1
    """Data parallel ranks of each, whose samples are told apart where there are several."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the metrics may be, in the order in which to look."""
        if self.scrape.path is not None:
            return (self.scrape.path,)
        return tuple(dict.fromkeys(engine.table.path for engine in self.engines))

    @property
    def remedy(self) -> str:
        """What makes replicas tell of their load, where they do not."""
        needs = [f"{engine.name} needs {engine.table.needs}" for engine in self.engines if engine.table.needs]
        return "; ".join(dict.fromkeys(needs))


@dataclass(slots=True, eq=False)
class _Watched(Visited):
    """One replica and what its scrapes brought."""

    target: Target
    result: Sample | ScrapeFailure | None = None
    """What the last scrape brought; None before the first."""
    engine: Engine | None = None
    """What it is, by its last page that said so."""
    path: str | None = None
    """Where that page was."""
    ranks: Mapping[int, Sample] | None = None
    """What that page said of each data parallel rank, where there are several; None before the first."""
    told: str | None = None
    """The engine that was handed on last."""
    dumb: bool = False
    """It was said that it tells nothing."""
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

    def paths(self) -> tuple[str, ...]:
        """Where to look, first where it was."""
        paths = self.target.paths
        return paths if self.path not in paths else (self.path, *(path for path in paths if path != self.path))

    def read(self, page: bytes) -> tuple[Engine, Sample] | None:
        """Whose page it is, and what it says; None where it says nothing."""
        engines = self.target.engines
        if self.engine is not None and self.engine in engines:
            sample = self.engine.parse(page)
            # A page that leaves out what its engine usually tells may be another's, or become one (Triton's, by its models).
            if sample is not None and sample.running is not None and sample.waiting is not None:
                return self.engine, sample
        return detect(page, engines)


@dataclass(frozen=True, slots=True)
class _Missed:
    """Why a path brought no sample."""

    why: ScrapeFailure
    what: str
    """What was there, in a word or two."""
    passes: bool
    """It is trouble of the moment and says nothing of where the page is."""


def _missed(page: Page | ScrapeFailure) -> _Missed:
    if isinstance(page, ScrapeFailure):
        return _Missed(page, page.value, passes=page in (ScrapeFailure.LATE, ScrapeFailure.REFUSED))
    if page.status == 200:
        return _Missed(ScrapeFailure.UNREADABLE, "no figures that are known", passes=False)
    return _Missed(ScrapeFailure.STATUS, f"status {page.status}", passes=page.status >= 500)


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
        self._listed: dict[tuple[str, str], Replica] = {}
        self._places: dict[tuple[str, str], tuple[str, ...]] = {}
        """By pool and address: the replica, and where its metrics are."""

    def follow(self, change: Change) -> None:
        """As of every round; also where the metrics of each replica are."""
        match change:
            case Reset(pool=pool, replicas=replicas):
                for key in [key for key in self._listed if key[0] == pool]:
                    self._forget(key)
                for replica in replicas:
                    self._place(pool, replica)
            case Add(pool=pool, replica=replica):
                self._place(pool, replica)
            case Remove(pool=pool, address=address):
                self._forget((pool, address))
        super().follow(change)

    def list_soon(self, address: str) -> None:
        """What the replica serves may have changed: its models are read with the next scrape, which comes as after `wake`."""
        for watched in self._at(address):
            watched.models_due = 0.0
        self.wake(address)

    def _place(self, pool: str, replica: Replica) -> None:
        if pool in self._targets:
            self._listed[pool, replica.address] = replica
            self._places[pool, replica.address] = places(replica, self._targets[pool].scrape.port)

    def _places_of(self, watched: _Watched) -> tuple[str, ...]:
        return self._places.get((watched.pool, watched.address)) or (watched.address,)

    def _forget(self, key: tuple[str, str]) -> None:
        self._listed.pop(key, None)
        self._places.pop(key, None)

    def retarget(self, pool: str, target: Target) -> None:
        """Read the replicas of a pool in another way from their next scrape on."""
        self._targets[pool] = target
        for watched in self._of(pool):
            watched.target = target
        for (name, _), replica in list(self._listed.items()):
            if name == pool:
                self._place(pool, replica)

    def _enter(self, pool: str, address: str) -> _Watched:
        return _Watched(pool, address, self._targets[pool])

    def _first_s(self, watched: _Watched) -> float:
        return watched.target.scrape.interval_s

    async def _visit(self, watched: _Watched) -> None:
        """Read the metrics, and the models where they are due and the replica answers at all."""
        if watched.target.engines:
            result = await self._sample(watched)
            self._note(watched, result)
            if result in (ScrapeFailure.REFUSED, ScrapeFailure.LATE):
                return
        if now() >= watched.models_due:
            await self._read_models(watched)

    async def _sample(self, watched: _Watched) -> Sample | ScrapeFailure:
        """Look on each path until one has what an engine tells of its load. What is no such page sends on to the next."""
        missed: dict[str, _Missed] = {}
        paths = watched.paths()
        for path in paths:
            page = await self._page(watched, path)
            if page is ScrapeFailure.LATE and watched.engine is None:
                # Next time another first: this page may be one that never ends, as a busy trtllm-serve goes on listing iterations.
                watched.path = paths[-1]
            if isinstance(page, Page) and page.status == 200 and (read := watched.read(page.body)) is not None:
                watched.path = path
                watched.engine, sample = read
                if watched.target.ranks > 1:
                    self._told_apart(watched, watched.engine.parse_ranks(page.body))
                return sample
            missed[path] = _missed(page)
            if missed[path].passes:
                return missed[path].why
        watched.engine = watched.path = None
        self._tell_engine(watched)
        self._tell_dumb(watched, missed)
        return missed[paths[0]].why

    async def _page(self, watched: _Watched, path: str) -> Page | ScrapeFailure:
        """The page, or all of them as one where several tell of the replica.

        That a port of its own for metrics refuses says nothing of the one that takes requests.
        """
        timeout_s = watched.target.scrape.timeout_s
        found = self._places_of(watched)
        if found == (watched.address,):
            return await self._pages.ask(watched.address, path, timeout_s)
        pages = await asyncio.gather(*(self._pages.ask(place, path, timeout_s) for place in found))
        for place, page in zip(found, pages, strict=True):
            if page is ScrapeFailure.REFUSED and place != watched.address:
                return ScrapeFailure.UNREADABLE
            if isinstance(page, ScrapeFailure) or page.status != 200:
                return page
        return Page(200, b"\n".join(page.body for page in pages if isinstance(page, Page)))

    def _note(self, watched: _Watched, result: Sample | ScrapeFailure) -> None:
        before, watched.result = watched.state, result
        if watched.state != before:
            log.info("replica %s of pool %s: %s, was %s", watched.address, watched.pool, watched.state, before)
        if isinstance(result, Sample):
            watched.refused = 0
            watched.dumb = False
            self._tell_engine(watched)
            for fact in _sampled(watched, result):
                self._learn(fact)
            return
        watched.refused = watched.refused + 1 if result is ScrapeFailure.REFUSED else 0
        if watched.refused:
            watched.models_due = 0.0  # whatever comes back there may serve other models
        self._learn(NotSampled(watched.pool, watched.address, result))

    def _told_apart(self, watched: _Watched, ranks: Mapping[int, Sample]) -> None:
        expected, before = frozenset(range(watched.target.ranks)), watched.ranks
        if ranks.keys() != expected and (before is None or before.keys() != ranks.keys()):
            log.warning(
                "replica %s of pool %s tells of data parallel ranks %s, but data_parallel is %d: %s (docs/engines.md)",
                watched.address,
                watched.pool,
                sorted(ranks) or "not at all",
                len(expected),
                _consequence(ranks.keys(), expected),
            )
        watched.ranks = ranks

    def _tell_engine(self, watched: _Watched) -> None:
        engine = None if watched.engine is None else watched.engine.name
        if engine == watched.told:
            return
        watched.told = engine
        if engine is not None:
            log.info("replica %s of pool %s is %s by its metrics", watched.address, watched.pool, engine)
        self._learn(Identified(watched.pool, watched.address, engine))

    def _tell_dumb(self, watched: _Watched, missed: Mapping[str, _Missed]) -> None:
        """Say where it was looked, and what was there."""
        if watched.dumb:
            return
        watched.dumb = True
        elsewhere = [place for place in self._places_of(watched) if place != watched.address]
        log.warning(
            "replica %s of pool %s tells nothing of its load%s on %s: only requests sent from here count. %s (docs/engines.md)",
            watched.address,
            watched.pool,
            f" at {','.join(elsewhere)}" if elsewhere else "",
            " or ".join(f"{path} ({each.what})" for path, each in missed.items()),
            watched.target.remedy or "Set scrape.path and scrape.port to where its metrics are",
        )

    async def _read_models(self, watched: _Watched) -> None:
        """Quiet where it fails: the router then goes by what it knew, and the metrics tell of the trouble."""
        scrape = watched.target.scrape
        page = await self._pages.get(watched.address, MODELS_PATH, scrape.timeout_s)
        models = None if isinstance(page, ScrapeFailure) else listed_models(page)
        if models is None or isinstance(page, ScrapeFailure):
            watched.models_due = now() + min(scrape.idle_interval_s, scrape.models_interval_s)
            return
        watched.models_due = now() + scrape.models_interval_s
        self._learn(Serves(watched.pool, watched.address, models, listed_parents(page)))

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


def _consequence(told: Set[int], expected: Set[int]) -> str:
    """What comes of it that a replica tells of other ranks than it should have, and the remedy."""
    if expected - told:  # SGLang tells of a rank from its first work on
        return "of the rest only requests from here are known, and if the engine has no such ranks they fail: set data_parallel to what it has"
    return "the rest gets nothing from here: set data_parallel to what it has"


def _sampled(watched: _Watched, whole: Sample) -> list[Sampled | NotSampled]:
    """What a scrape says of the replica, or of each of its ranks."""
    pool, ranks = watched.pool, watched.ranks or {}
    if watched.target.ranks == 1:
        return [Sampled(pool, watched.address, whole)]
    return [
        NotSampled(pool, name, ScrapeFailure.UNREADABLE) if sample is None else Sampled(pool, name, sample)
        for rank, name in enumerate(members_at(watched.address, watched.target.ranks))
        for sample in (ranks.get(rank),)
    ]
