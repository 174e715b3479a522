"""Follows the publishers of all replicas, as these come and go."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final

from extproc.adapters.kv_events import sources
from extproc.adapters.kv_events.follower import Counts, Follower, Incoming, Knowledge, ManyPublishersError, Place
from extproc.adapters.kv_events.inbox import Inbox, Sorter
from extproc.adapters.kv_events.sockets import Sockets, Subscriber
from extproc.adapters.kv_events.sources import Source, SourcesError
from extproc.adapters.pages import Page, Pages
from extproc.adapters.rounds import Rounds, Visited
from extproc.config import KvEvents
from extproc.core.ranks import members_at
from extproc.core.types import Add, CacheChanged, CacheUnknown, Change, Replica, Reset, ScrapeFailure

log = logging.getLogger(__name__)

ASK_TIMEOUT_S: Final = 3.0
RECHECK_S: Final = 30.0
"""Between two questions where a replica publishes: another process may have taken its place."""
RETRY_S: Final = 2.0
"""After a question without an answer, a port that is taken, or a mistake of ours."""
CONFUSED: Final = (
    "KV events of %s, rank %d: %s; do two publish there, or are its replays another's? Tried again in %g s"
)
CONTESTED: Final = (
    "KV events of %s in pool %s: %s is where %s publishes too, so neither is followed; "
    "give each an endpoint of its own, by {host} or by its labels kv_events and kv_replay"
)


@dataclass(slots=True, eq=False)
class _Watched(Visited):
    """One replica and its publishers."""

    replica: Replica
    settings: KvEvents
    lines: dict[tuple[Source, KvEvents], asyncio.Task[None]] = field(default_factory=dict)
    followers: list[Follower] = field(default_factory=list)
    answer: str = ""
    """What was last said of where it publishes, so that it is said once."""
    claims: frozenset[str] = frozenset()
    """Endpoints that are its own, as far as is known."""
    rival: str | None = None
    """Another replica that claims one of them; then what comes from there is followed for neither."""
    pause_s: float = RECHECK_S

    @property
    def state(self) -> str:
        return f"{len(self.followers)} followed"


@dataclass(slots=True, eq=False)
class _Bound:
    """Where the engines of a pool connect to, one socket for each rank."""

    settings: KvEvents
    inboxes: list[dict[str, Inbox]]
    sorters: list[Sorter]
    tasks: list[asyncio.Task[None]]


class Following(Rounds[_Watched]):
    """Learns from every replica of which `follow` told, until `stop`.

    `learn` gets the facts, some hundred blocks at a time, within a task of each publisher. `lag` gets a pool, and the seconds that
    one of its messages took from the engine's step to us.
    """

    verb = "KV events"

    def __init__(
        self,
        settings: dict[str, KvEvents],
        learn: Callable[[CacheChanged | CacheUnknown], None],
        *,
        rng: Random,
        lag: Callable[[str, float], None] = lambda _pool, _seconds: None,
        data_parallel: Mapping[str, int] | None = None,
        pages: Pages | None = None,
    ) -> None:
        """`settings`: by name of the pool; changes of other pools are ignored. `pages` is closed by `stop`.

        `data_parallel`: ranks behind each address of a pool that the core takes for replicas of their own; 1 where it is not named.
        """
        self._settings = dict(settings)
        super().__init__(self._settings, rng, pages)
        self._learn, self._lag = learn, lag
        self._data_parallel = data_parallel or {}
        self._sockets = Sockets()
        self._turns = asyncio.Lock()
        self._replicas: dict[tuple[str, str], Replica] = {}
        self._bound: dict[str, _Bound] = {}
        self.counts: defaultdict[str, Counts] = defaultdict(Counts)
        """By pool."""

    def known(self) -> dict[tuple[str, str], bool]:
        """Pool and replica -> whether all of its cache is known; without those that told nothing yet."""
        states: defaultdict[tuple[str, str], set[Knowledge]] = defaultdict(set)
        for watched, _ in self._tasks.values():
            for follower in watched.followers:
                states[watched.pool, follower.place.address].add(follower.knows)
        return {key: each == {Knowledge.WHOLE} for key, each in states.items() if each != {Knowledge.NOTHING}}

    def strangers(self, pool: str) -> int:
        """Messages to the bound socket that named no replica of the pool."""
        bound = self._bound.get(pool)
        return sum(sorter.strangers for sorter in bound.sorters) if bound else 0

    def follow(self, change: Change) -> None:
        """As `Rounds.follow`; labels may name endpoints."""
        for replica in _named(change):
            self._replicas[change.pool, replica.address] = replica
        super().follow(change)
        self._replicas = {key: self._replicas[key] for key in self._tasks}
        for replica in _named(change):
            found = self._tasks.get((change.pool, replica.address))
            if found is not None and found[0].replica != replica:
                found[0].replica = replica
                found[0].woken.set()

    def retarget(self, pool: str, settings: KvEvents | None, replicas: Collection[Replica]) -> None:
        """Other settings for a pool from now on; None ends it, and its caches are no longer known. `replicas`: its members."""
        before = self._settings.get(pool)
        if settings == before:
            return
        if settings is None:
            del self._settings[pool]
            for address in [address for name, address in self._tasks if name == pool]:
                self._end((pool, address))
                self._forget(pool, address)
        else:
            self._settings[pool] = settings
            for watched in self._of(pool):
                watched.settings = settings
                watched.woken.set()
            self.follow(Reset(pool, tuple(replicas)))
        self._unbind(pool)

    async def stop(self) -> None:
        """As `Rounds.stop`."""
        for pool in list(self._bound):
            self._unbind(pool)
        await super().stop()
        self._sockets.close()

    # --- one replica --------------------------------------------------------------------------------------------------

    def _enter(self, pool: str, address: str) -> _Watched:
        return _Watched(pool, address, self._replicas[pool, address], self._settings[pool])

    def _first_s(self, watched: _Watched) -> float:  # noqa: ARG002 - the same for all
        return 0.1

    async def _visit(self, watched: _Watched) -> None:
        """Find its publishers, and follow those."""
        found = await self._found(watched)
        if found is None:
            return
        watched.claims = frozenset(e for source in found for e in (source.endpoint, source.replay) if e is not None)
        wanted = set() if self._contested(watched) else {(source, watched.settings) for source in found}
        if gone := watched.lines.keys() - wanted:
            self._leave(watched, gone)
        for key in sorted(wanted - watched.lines.keys(), key=lambda key: key[0].rank):
            name = f"{self.verb} of {watched.address}, rank {key[0].rank}"
            watched.lines[key] = asyncio.create_task(self._line(watched, *key), name=name)

    async def _rest(self, watched: _Watched) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(watched.pause_s * self._jitter()):
                await watched.woken.wait()

    def _end(self, key: tuple[str, str]) -> None:
        if found := self._tasks.get(key):
            for line in list(found[0].lines):
                self._close(found[0], line)
        super()._end(key)

    def _contested(self, watched: _Watched) -> bool:
        """Whether another replica is said to publish in the same place: whose cache is told of there, nobody knows."""
        rivals = (
            each for each, _ in self._tasks.values() if each.address != watched.address and each.claims & watched.claims
        )
        rival = next(rivals, None)
        before, watched.rival = watched.rival, None if rival is None else rival.address
        if rival is None:
            return False
        if before is None:
            shared = ", ".join(sorted(rival.claims & watched.claims))
            log.warning(CONTESTED, watched.address, watched.pool, shared, rival.address)
        if rival.lines:
            rival.woken.set()
        return True

    def _leave(self, watched: _Watched, lines: Iterable[tuple[Source, KvEvents]] = ()) -> None:
        """Some publishers are there no more, or are to be followed in another way: what they told is void, and others tell theirs again."""
        for line in lines:
            self._close(watched, line)
        for follower in watched.followers:
            follower.again()
        self._forget(watched.pool, watched.address)

    def _forget(self, pool: str, address: str) -> None:
        """Nothing is known of what is cached there."""
        for member in members_at(address, self._data_parallel.get(pool, 1)):
            self._learn(CacheUnknown(pool, member))

    def _close(self, watched: _Watched, line: tuple[Source, KvEvents]) -> None:
        self._await(watched.lines.pop(line))

    def _await(self, task: asyncio.Task[None]) -> None:
        """End it; `stop` waits for that."""
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        task.cancel()

    async def _found(self, watched: _Watched) -> tuple[Source, ...] | None:
        """Its publishers; None where that is not known now, so that all stays as it is."""
        watched.pause_s = RECHECK_S
        if watched.settings.mode != "auto" or sources.LABEL in watched.replica.labels:
            return self._configured(watched)
        page = await self._pages.ask(watched.address, sources.PATH, ASK_TIMEOUT_S)
        if isinstance(page, ScrapeFailure):
            watched.pause_s = RETRY_S
            return None
        return self._answered(watched, page)

    def _answered(self, watched: _Watched, page: Page) -> tuple[Source, ...] | None:
        if page.status == 404:
            self._say(watched, f"does not know {sources.PATH}; taken for {watched.settings.endpoint}")
            return self._configured(watched)
        if page.status != 200:
            self._say(watched, f"answers {sources.PATH} with {page.status}")
            return None
        try:
            found = sources.told(page.body, watched.address)
        except SourcesError as e:
            self._say(watched, f"its answer to {sources.PATH} {e}")
            return ()
        endpoints = ", ".join(str(source.endpoint) for source in found)
        self._say(watched, f"published at {endpoints}" if found else "off; start it with --kv-events-config")
        return found

    def _ranks(self, pool: str, settings: KvEvents) -> int:
        return settings.ranks or self._data_parallel.get(pool, 1)

    def _configured(self, watched: _Watched) -> tuple[Source, ...]:
        try:
            return sources.configured(watched.settings, watched.replica, self._ranks(watched.pool, watched.settings))
        except SourcesError as e:
            self._say(watched, str(e))
            return ()

    def _say(self, watched: _Watched, what: str, level: int = logging.INFO) -> None:
        if watched.answer != what:
            log.log(level, "KV events of %s in pool %s: %s", watched.address, watched.pool, what)
        watched.answer = what

    # --- one publisher ------------------------------------------------------------------------------------------------

    async def _line(self, watched: _Watched, source: Source, settings: KvEvents) -> None:
        """The life of one publisher's task: whatever fails begins again, with nothing known."""
        while True:
            pause_s = RETRY_S
            try:
                await self._followed(watched, source, settings)
            except OSError as e:
                self._say(watched, f"{e.strerror}; tried again every {RETRY_S:g} s", logging.ERROR)
            except ManyPublishersError as e:
                pause_s = RECHECK_S
                log.error(CONFUSED, watched.address, source.rank, e, pause_s)
            except Exception:
                log.exception("KV events of %s, rank %d, failed", watched.address, source.rank)
            await asyncio.sleep(pause_s)

    async def _followed(self, watched: _Watched, source: Source, settings: KvEvents) -> None:
        place = self._place(watched, source.rank)
        follower = Follower(
            place,
            self._incoming(watched, source, settings),
            partial(self._sockets.replay, source.replay) if source.replay is not None else None,
            self._learn,
            counts=self.counts[watched.pool],
            siblings=watched.followers if place.address == watched.address else (),
            turns=self._turns,
            replay_timeout_s=settings.replay_timeout_s,
            lag=partial(self._lag, watched.pool),
        )
        watched.followers.append(follower)
        try:
            await follower.run()
        except Exception:
            self._leave(watched)
            raise
        finally:
            watched.followers.remove(follower)

    def _place(self, watched: _Watched, rank: int) -> Place:
        """Ranks are replicas of their own where the core says so; else they share what is known of their address."""
        members = members_at(watched.address, self._data_parallel.get(watched.pool, 1))
        return (
            Place(watched.pool, members[rank], 0)
            if 1 < len(members) > rank
            else Place(watched.pool, watched.address, rank)
        )

    def _incoming(self, watched: _Watched, source: Source, settings: KvEvents) -> Incoming:
        """Raises OSError where the port that engines shall connect to is taken."""
        if source.endpoint is not None:
            return self._sockets.subscriber(source.endpoint, settings.topic, settings.max_queued)
        inboxes = self._listening(watched.pool, settings).inboxes[source.rank]
        inboxes[watched.address] = inbox = Inbox(settings.max_queued, partial(inboxes.pop, watched.address, None))
        return inbox

    # --- engines that connect to us -----------------------------------------------------------------------------------

    def _listening(self, pool: str, settings: KvEvents) -> _Bound:
        bound = self._bound.get(pool)
        if bound is not None and bound.settings == settings:
            return bound
        self._unbind(pool)
        assert settings.bind is not None
        bound = self._bound[pool] = _Bound(settings, [], [], [])
        try:
            for rank in range(self._ranks(pool, settings)):
                self._bind(bound, sources.counted_up(settings.bind, rank), pool)
        except OSError:
            self._unbind(pool)
            raise
        return bound

    def _bind(self, bound: _Bound, endpoint: str, pool: str) -> None:
        settings = bound.settings
        subscriber = self._sockets.subscriber(endpoint, settings.topic, settings.max_queued, bind=True)
        inboxes: dict[str, Inbox] = {}
        sorter = Sorter(inboxes)
        bound.inboxes.append(inboxes)
        bound.sorters.append(sorter)
        task = asyncio.create_task(sorter.run(subscriber), name=f"{self.verb} of {pool}")
        task.add_done_callback(partial(_ended, subscriber))
        bound.tasks.append(task)

    def _unbind(self, pool: str) -> None:
        if bound := self._bound.pop(pool, None):
            for task in bound.tasks:
                self._await(task)


def _ended(subscriber: Subscriber, task: asyncio.Task[None]) -> None:
    """Also of a task that was cancelled before it began."""
    subscriber.close()
    if not task.cancelled() and (error := task.exception()):
        log.error("%s ended", task.get_name(), exc_info=error)


def _named(change: Change) -> tuple[Replica, ...]:
    if isinstance(change, Reset):
        return change.replicas
    return (change.replica,) if isinstance(change, Add) else ()
