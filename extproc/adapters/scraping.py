"""Reads the metrics and the model lists of replicas, and hands on what they say as facts.

One task per replica scrapes, waits and scrapes again, so that two scrapes of one replica never run at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final

import aiohttp
from yarl import URL

from extproc.adapters.engines import Engine, listed_models
from extproc.config import Scrape
from extproc.core.types import Add, Change, Fact, NotSampled, Remove, Reset, Sample, Sampled, ScrapeFailure, Serves

log = logging.getLogger(__name__)

MAX_PAGE_BYTES: Final = 4 * 1024 * 1024
"""Largest page that is read; vLLM's has 60 KB, and 64 data parallel ranks would make it 3 MB."""
MAX_AT_ONCE: Final = 256
"""Scrapes in progress over all replicas. Well below the usual limit of 1024 open files, which Envoy's streams need too."""
KEEP_ALIVE_S: Final = 3.0
"""Idle connections are closed before the replica does it (uvicorn: after 5 s), or each scrape of an idle replica would meet a closed one."""
MODELS_PATH: Final = "/v1/models"

_GONE: Final = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ECONNRESET})
"""Why a connection fails when nothing listens. Others (no file descriptor left, say) are our own trouble and must not condemn the replica."""


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
    refused: int = 0
    """Connections refused in a row."""
    sampled: Sample | ScrapeFailure | None = None
    """What the last scrape brought; None before the first."""
    models_due: float = 0.0
    """Loop time of the next read of the models."""

    def url(self, path: str) -> URL:
        return URL(f"http://{self.address}{path}", encoded=True)


class Scraper:
    """Scrapes every replica of which `follow` told, between `start` and `stop`.

    `learn` gets the facts. `busy` says whether we have flights on an address: an engine that has just been given work still says
    that it has none. A page that is late leaves the replica's pace as it is, for a busy engine answers late.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        learn: Callable[[Fact], None],
        *,
        rng: Random,
        busy: Callable[[str], bool] = lambda _address: False,
        max_page_bytes: int = MAX_PAGE_BYTES,
    ) -> None:
        """`targets`: by name of the pool; changes of other pools are ignored."""
        self._targets = targets
        self._learn = learn
        self._busy = busy
        self._rng = rng
        self._max_page_bytes = max_page_bytes
        self._tasks: dict[tuple[str, str], tuple[_Watched, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        results = [w.sampled for w, _ in self._tasks.values()]
        sampled = sum(isinstance(r, Sample) for r in results)
        failing = sum(isinstance(r, ScrapeFailure) for r in results)
        return f"<Scraper {len(results)} replicas, {sampled} sampled, {failing} failing>"

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_AT_ONCE, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # one deadline, ours, around the whole of it
            cookie_jar=aiohttp.DummyCookieJar(),
            # Plain text: a replica should not spend its event loop on compression, nor we ours, nor inflate a small bomb.
            headers={"accept": "text/plain, application/json", "accept-encoding": "identity"},
        )

    async def stop(self) -> None:
        """Cancel all scrapes and wait for their end. Changes that come later are ignored."""
        session, self._session = self._session, None
        for key in list(self._tasks):
            self._end(key)
        await asyncio.gather(*self._ending, return_exceptions=True)
        if session is not None:
            await session.close()

    def follow(self, change: Change) -> None:
        """Begin with replicas that joined, end with those that left; one that stays goes on undisturbed."""
        if self._session is None or change.pool not in self._targets:
            return
        match change:
            case Reset(pool=pool, replicas=replicas):
                listed = {(pool, r.address) for r in replicas}
                for key in [k for k in self._tasks if k[0] == pool and k not in listed]:
                    self._end(key)
                for key in listed:
                    self._begin(key)
            case Add(pool=pool, replica=replica):
                self._begin((pool, replica.address))
            case Remove(pool=pool, address=address):
                self._end((pool, address))

    def wake(self, address: str) -> None:
        """The replica was given work: scrape it `interval_s` from now, if that is sooner than planned.

        Not at once: until its next step is done an engine says what it said before, and then that would be believed.
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
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    # --- one replica --------------------------------------------------------------------------------------------------

    async def _watch(self, watched: _Watched) -> None:
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
        """Read the metrics, and where they are due and the replica answers, the models."""
        if watched.target.engine is not None:
            result = await self._sample(watched, watched.target.engine)
            self._note(watched, result)
            if result in (ScrapeFailure.REFUSED, ScrapeFailure.LATE):
                return
        if _now() >= watched.models_due:
            await self._read_models(watched)

    async def _sample(self, watched: _Watched, engine: Engine) -> Sample | ScrapeFailure:
        page = await self._get(watched, watched.target.scrape.path)
        if isinstance(page, ScrapeFailure):
            return page
        return engine.parse(page) or ScrapeFailure.UNREADABLE

    def _note(self, watched: _Watched, result: Sample | ScrapeFailure) -> None:
        pool, address = watched.pool, watched.address
        if result is ScrapeFailure.REFUSED:
            watched.refused += 1
            watched.models_due = 0.0  # whatever comes back there may serve other models
        else:
            watched.refused = 0
        if type(result) is not type(watched.sampled) or (
            isinstance(result, ScrapeFailure) and result != watched.sampled
        ):
            log.info(
                "replica %s of pool %s: %s", address, pool, result if isinstance(result, ScrapeFailure) else "sampled"
            )
        watched.sampled = result
        self._learn(
            NotSampled(pool, address, result) if isinstance(result, ScrapeFailure) else Sampled(pool, address, result)
        )

    async def _read_models(self, watched: _Watched) -> None:
        """Quiet where it fails: the router then goes by what it knew, and the metrics tell of the trouble."""
        page = await self._get(watched, MODELS_PATH)
        models = None if isinstance(page, ScrapeFailure) else listed_models(page)
        scrape = watched.target.scrape
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
        interval = watched.target.scrape.interval_s
        if (longer := self._pause(watched) - interval) > 0:
            try:
                async with asyncio.timeout(longer * self._jitter()):
                    await watched.woken.wait()
            except TimeoutError:
                pass
        await asyncio.sleep(interval * self._jitter())

    def _pause(self, watched: _Watched) -> float:
        """Seconds from the end of one scrape to the next."""
        scrape = watched.target.scrape
        if watched.refused:
            return min(scrape.interval_s * 2 ** min(watched.refused - 1, 30), scrape.idle_interval_s)
        if self._has_work(watched):
            return scrape.interval_s
        return scrape.idle_interval_s

    def _has_work(self, watched: _Watched) -> bool:
        """By our ledger, or by its own word: others may send to it too."""
        said = watched.sampled
        working = isinstance(said, Sample) and bool((said.running or 0) + (said.waiting or 0))
        return working or said is ScrapeFailure.LATE or self._busy(watched.address)

    def _jitter(self) -> float:
        """0.9 to 1.0: an interval is a promise, so only downwards."""
        return 1.0 - 0.1 * self._rng.random()

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    async def _get(self, watched: _Watched, path: str) -> bytes | ScrapeFailure:
        """The body of a page, or why there is none. The deadline does not run while we wait for our own turn."""
        async with self._slots:
            try:
                async with asyncio.timeout(watched.target.scrape.timeout_s):
                    return await self._fetch(watched.url(path))
            except TimeoutError:
                return ScrapeFailure.LATE
            except aiohttp.ClientConnectorError as e:
                return ScrapeFailure.REFUSED if e.os_error.errno in _GONE else ScrapeFailure.LATE
            except (aiohttp.ClientError, OSError, ValueError):
                return ScrapeFailure.UNREADABLE  # broke off, or speaks no HTTP

    async def _fetch(self, url: URL) -> bytes | ScrapeFailure:
        if self._session is None:  # stopping
            return ScrapeFailure.LATE
        # No redirects: a replica must not send us to hosts that discovery did not name.
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                return ScrapeFailure.STATUS
            page = bytearray()
            async for chunk in response.content.iter_any():
                page += chunk
                if len(page) > self._max_page_bytes:
                    response.close()  # reading the rest, to keep the connection, is what the limit is there to avoid
                    return ScrapeFailure.UNREADABLE
            return bytes(page)


def _now() -> float:
    return asyncio.get_running_loop().time()
