"""Follows one publisher: every message once and in order, and where that cannot be, the core hears that it knows less.

1. A publisher has no history, so whoever joins asks for a replay from the beginning, and after a gap from the last message known. That
   one comes again on purpose: if it is another than it was, another process counts there, and the cache that was known is gone.
2. What no replay brings is lost: no endpoint, an engine that has published more than it keeps, no answer in time. Then the core is told
   that the cache is not known, which clears what it had, and from there on learns what is stored and removed, marked as not whole. What
   it claims is then there for certain, and is the least of what is there. To go on with the old knowledge instead would keep blocks whose
   removal was missed, for ever, for they are removed once only; and to learn nothing until the engine begins anew could last for weeks.
3. A cache that is cleared, or whose engine begins anew, is known as a whole again.
4. Nothing says that an engine stopped. After each new connection the last message is asked for, so that one that began anew is known
   before its first event, which comes with the first request that was sent there for blocks it no longer has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final, Protocol

from extproc.adapters.kv_events import wire
from extproc.adapters.kv_events.position import Heard, Position
from extproc.adapters.kv_events.selection import Selection, Tally, blocks, sliced
from extproc.adapters.kv_events.sockets import Connected, Replay
from extproc.adapters.kv_events.wire import Batch, Message, UndecodableError
from extproc.core.types import CacheChange, CacheChanged, CacheCleared, CacheUnknown

log = logging.getLogger(__name__)

SLICE_BLOCKS: Final = 256
"""Blocks learned at one time, some hundred microseconds; then the event loop has its turn."""
ROUNDS: Final = 20
"""Replays asked for in a row, as long as each brings something: vLLM's socket holds 1,000 messages and drops what is not taken fast
enough. On a machine with every core busy twice over, a replay of 10,000 messages took 8."""
LONGEST_REPLAY_S: Final = 60.0
"""Then others have their turn. 10,000 messages take a second."""
RESTARTS, RESTARTS_WITHIN_S = 5, 60.0
"""No engine starts so often. Two that publish in one place seem to, with every message, and each time all is asked for again."""


class ManyPublishersError(Exception):
    """What comes cannot be of one engine."""


class Replayed(StrEnum):
    """What became of a replay; also the metric label."""

    FILLED = "filled"  # nothing is missing
    SHORT = "short"  # the publisher no longer has all of it
    LATE = "late"  # no answer in time
    NOWHERE = "nowhere"  # there is no endpoint to ask


@dataclass(slots=True)
class Counts:
    """What the streams of a pool's publishers came to."""

    messages: int = 0
    undecodable: int = 0
    gaps: int = 0
    restarts: int = 0
    losses: int = 0
    replays: Counter[Replayed] = field(default_factory=lambda: Counter(dict.fromkeys(Replayed, 0)))
    events: Tally = field(default_factory=Tally)


class Incoming(Protocol):
    """Where messages come from."""

    async def next(self) -> list[bytes] | Connected:
        """The next message's frames, or the news of a connection. May return without yielding."""

    def close(self) -> None:
        """Nothing may follow."""


class Knowledge(Enum):
    """What is known of the cache by this publisher's events."""

    NOTHING = 0
    PART = 1
    WHOLE = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Whose cache it is."""

    pool: str
    address: str
    rank: int = 0


class Follower:
    """One publisher's stream, from `run` until that is cancelled."""

    def __init__(
        self,
        place: Place,
        incoming: Incoming,
        replay: Callable[[], Replay] | None,
        learn: Callable[[CacheChanged | CacheUnknown], None],
        *,
        counts: Counts | None = None,
        replay_timeout_s: float,
        siblings: Collection[Follower] = (),
        turns: asyncio.Lock | None = None,
        lag: Callable[[float], None] = lambda _seconds: None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`replay` opens a socket for one replay; None where there is nobody to ask. `counts` may be shared.

        `siblings` are the ranks of this replica, perhaps with itself. Of all that have the same `turns` one learns in a turn of the
        event loop. `lag` gets the seconds from the engine's step to us, by two clocks.
        """
        self.place = place
        self.counts = counts or Counts()
        self.knows = Knowledge.NOTHING
        self.messages_at: float | None = None
        """When the engine made the last message that was due, unix seconds; None before, and where that could not be read."""
        self._incoming, self._replay, self._learn = incoming, replay, learn
        self._replay_timeout_s, self._siblings, self._lag, self._wall = replay_timeout_s, siblings, lag, wall
        self._selection = Selection(place.rank, self.counts.events)
        self._position = Position()
        self._processes = 1
        """Publishers met so far, one after the other."""
        self._restarts: deque[float] = deque(maxlen=RESTARTS)
        """The last ones, unix seconds."""
        self._again = self._confused = False
        self._turns = turns or asyncio.Lock()
        self._budget = SLICE_BLOCKS

    def __repr__(self) -> str:
        return f"<Follower {self.place.address}/{self.place.rank} knows {self.knows.name.lower()}, {self._position!r}>"

    def again(self) -> None:
        """What was learned here was cleared along with another rank's: ask for it again, before the next message."""
        self._again = True

    async def run(self) -> None:
        """Follow until cancelled. Raises ManyPublishersError; what was told is void then."""
        try:
            while True:
                got = await self._incoming.next()
                if self._again:
                    await self._begin_again()
                if isinstance(got, Connected):
                    await self._fill()
                else:
                    await self._heard(got)
                await self._spend(1)
        finally:
            self._incoming.close()

    async def _begin_again(self) -> None:
        self._again = False
        self._position.anew()
        self.knows = Knowledge.PART if self._replay is None else Knowledge.WHOLE
        await self._fill()

    # --- one message --------------------------------------------------------------------------------------------------

    async def _heard(self, frames: list[bytes]) -> None:
        self.counts.messages += 1
        try:
            message = wire.message(frames)
        except UndecodableError as e:
            self._undecodable(e)
            return
        heard = self._position.heard(message.sequence)
        if heard is Heard.AGAIN and self._is_new(message):
            heard = Heard.ANEW
        if heard is Heard.ANEW:
            self._restarted()
            heard = self._position.heard(message.sequence)
        if heard is Heard.GAP:
            self.counts.gaps += self.knows is not Knowledge.NOTHING
            await self._fill()
            if self._position.due < message.sequence:
                self._lose("some messages are missing")
                self._position.skip_to(message.sequence)
            heard = self._position.replayed(message.sequence)
        if heard is Heard.NEXT and (batch := self._decoded(message)) is not None:
            self._lag(self._wall() - batch.at)
            await self._take(batch)

    def _is_new(self, message: Message) -> bool:
        """Whether a message that a replay seems to have brought is younger than all that came, and so another's."""
        try:
            return self.messages_at is not None and wire.decode(message.payload).at > self.messages_at
        except UndecodableError:
            return False

    def _decoded(self, message: Message) -> Batch | None:
        """None for what cannot be read: it is as lost as if it had not come."""
        try:
            return wire.decode(message.payload)
        except UndecodableError as e:
            self._undecodable(e)
            self._lose("a message cannot be read")
            self.messages_at = None
            return None

    async def _take(self, batch: Batch) -> None:
        """Learn what the batch tells, a slice at a time."""
        self.messages_at = batch.at
        self._begin()
        for part in sliced(self._selection.take(batch), SLICE_BLOCKS):
            if any(isinstance(change, CacheCleared) for change in part):
                self._emptied()
            self._tell(part)
            await self._spend(sum(map(blocks, part)))

    async def _spend(self, worth: int) -> None:
        """Let the event loop have its turn after each SLICE_BLOCKS, or as many messages."""
        self._budget -= worth
        if self._budget <= 0:
            self._budget = SLICE_BLOCKS
            async with self._turns:
                await asyncio.sleep(0)

    # --- replays ------------------------------------------------------------------------------------------------------

    async def _fill(self) -> None:
        """Ask for all from the last message known on, as often as that brings something."""
        if self._replay is None:
            self.counts.replays[Replayed.NOWHERE] += 1
            return
        for _ in range(ROUNDS):
            before = self._position.due, self._processes
            became = await self._round(self._replay)
            if became is Replayed.FILLED or (self._position.due, self._processes) == before:
                break
        self.counts.replays[became] += 1

    async def _round(self, open_replay: Callable[[], Replay]) -> Replayed:
        """One replay, learned from as it comes."""
        now = asyncio.get_running_loop().time
        async with open_replay() as replay:
            replay.ask(max(self._position.due - 1, 0))
            beginning, ends_at = True, now() + LONGEST_REPLAY_S
            while now() < ends_at and (frames := await replay.next(self._replay_timeout_s)) is not None:
                if len(frames) > 1 and frames[1] == wire.END:
                    return self._ended(beginning)
                became = await self._replayed(frames, beginning)
                if became is not None:
                    return became
                beginning = False
                await self._spend(1)
        return Replayed.LATE

    def _ended(self, empty: bool) -> Replayed:
        """The end of a replay. A publisher keeps its last message, so where that does not come, another process is asked."""
        self._begin()
        if empty and self._position.due:
            self._restarted()
            return Replayed.SHORT  # to be asked again, from its beginning
        return Replayed.FILLED

    async def _replayed(self, frames: list[bytes], beginning: bool) -> Replayed | None:
        """Learn from one message of a replay; what became of it where it ends with this one."""
        try:
            message = wire.message(frames)
            batch = wire.decode(message.payload)
        except UndecodableError as e:
            self._undecodable(e)
            return Replayed.SHORT
        self._begin()
        heard = self._position.replayed(message.sequence)
        if beginning and heard is Heard.AGAIN and self.messages_at not in (None, batch.at):
            self._restarted()
            heard = self._position.replayed(message.sequence)
            if heard is Heard.GAP:
                return Replayed.SHORT
        if heard is Heard.GAP:
            if not beginning:
                return Replayed.SHORT  # some were dropped on the way
            self._lose("the engine no longer has all of what it told")
            self._position.skip_to(message.sequence)
            heard = self._position.replayed(message.sequence)
        if heard is Heard.NEXT:
            await self._take(batch)
        return None

    # --- what the core hears ------------------------------------------------------------------------------------------

    def _tell(self, changes: tuple[CacheChange, ...]) -> None:
        whole = self.knows is Knowledge.WHOLE and all(each.knows is Knowledge.WHOLE for each in self._siblings)
        self._learn(CacheChanged(self.place.pool, self.place.address, changes, whole))

    def _begin(self) -> None:
        """Events come, and none was missed yet. What the replica was thought to hold is void, unless another rank said that before."""
        if self.knows is not Knowledge.NOTHING:
            return
        if any(each.knows is not Knowledge.NOTHING for each in self._siblings):
            self.knows = Knowledge.WHOLE
        else:
            self._clear()

    def _clear(self) -> None:
        """The cache is empty, and known from here on."""
        self._emptied()
        self._tell((CacheCleared(),))

    def _emptied(self) -> None:
        """The core clears all that it knows of the replica, so other ranks have to tell again what they hold."""
        self.knows = Knowledge.WHOLE
        for each in self._siblings:
            if each is not self and each.knows is not Knowledge.NOTHING:
                each.again()

    def _restarted(self) -> None:
        """Another process publishes there, with an empty cache."""
        self.counts.restarts += 1
        self._processes += 1
        self._restarts.append(self._wall())
        if len(self._restarts) == RESTARTS and self._restarts[-1] - self._restarts[0] < RESTARTS_WITHIN_S:
            raise ManyPublishersError(f"began anew {RESTARTS} times within {RESTARTS_WITHIN_S:g} s")
        log.info("KV events of %s, rank %d: the engine began anew", self.place.address, self.place.rank)
        self._position.anew()
        self._selection.anew()
        self._clear()

    def _lose(self, why: str) -> None:
        """Some of what the engine told is missing for good."""
        self.counts.losses += 1
        self._say(f"{why}; its cache is known in part", again=self.knows is Knowledge.PART)
        self.knows = Knowledge.PART
        self._learn(CacheUnknown(self.place.pool, self.place.address))

    def _undecodable(self, error: UndecodableError) -> None:
        self.counts.undecodable += 1
        self._say(str(error), again=self._confused)
        self._confused = True

    def _say(self, what: str, again: bool) -> None:
        """A trouble that goes on is a warning once: there may be one with each message."""
        level = logging.DEBUG if again else logging.WARNING
        log.log(level, "KV events of %s, rank %d: %s", self.place.address, self.place.rank, what)
