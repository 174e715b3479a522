"""The whole way of an event, against an engine that remembers everything: bytes, follower, selection, index.

Messages get lost, replays answer nothing, a part, or with a hole, engines restart and clear their caches. Whenever a message has come by
itself, what the index claims is there; and where it says that it knows all, it does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Self

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.adapters.kv_events.follower import Follower, Place
from extproc.adapters.kv_events.sockets import CONNECTED, Connected, Replay
from extproc.adapters.kv_events.wire import END
from extproc.core.prefix.exact import UNIT, ExactIndex, token_chain
from extproc.core.types import CacheChanged, CacheUnknown
from tests.adapters.kv_events.support import ADDRESS, CLEARED, POOL, payload, removed, stored

Prompt = tuple[int, ...]
LONGEST = 4
PROMPTS = [prompt for length in range(1, LONGEST + 1) for prompt in product((0, 1), repeat=length)]


def chain(prompt: Prompt) -> tuple[int, ...]:
    return token_chain(tokens(prompt)).hashes


def tokens(prompt: Prompt) -> list[int]:
    return [token for block in prompt for token in (block, *range(UNIT - 1))]


@dataclass
class Engine:
    """One process after another: chains of blocks, tail first out, and a message for each step that changed something."""

    keeps: int
    """Messages, for replays."""
    clock: float = 0.0
    told: list[list[bytes]] = field(default_factory=list)
    """Of this process."""
    held: dict[Prompt, int] = field(default_factory=dict)
    """Blocks by what is in them and before them -> the id under which they were told."""

    def run(self, prompt: Prompt) -> None:
        have = self.holds(prompt)
        new = [prompt[: n + 1] for n in range(have, len(prompt))]
        if new:
            parent = self.held[prompt[:have]] if have else None
            self.held |= {block: hash(block) & (1 << 64) - 1 for block in new}
            event = stored(*(self.held[b] for b in new), parent=parent, size=UNIT)
            self._tell({**event, "token_ids": tokens(prompt[have:])})

    def evict(self, place: int) -> None:
        loose = [b for b in self.held if not any(o[: len(b)] == b and o != b for o in self.held)]
        if loose:
            self._tell(removed(self.held.pop(loose[place % len(loose)])))

    def clear(self) -> None:
        self.held.clear()
        self._tell(CLEARED)

    def restart(self) -> None:
        self.told.clear()
        self.held.clear()

    def holds(self, prompt: Prompt) -> int:
        return next((n for n in range(len(prompt), 0, -1) if prompt[:n] in self.held), 0)

    def replay(self, first: int) -> list[list[bytes]]:
        return self.told[max(first, len(self.told) - self.keeps) :]

    def _tell(self, event: dict[str, Any]) -> None:
        self.clock += 1.0
        self.told.append([b"t", len(self.told).to_bytes(8, "big"), payload(event, at=self.clock)])


class World:
    """Engine, network, follower and index. Also the follower's incoming messages and its replays."""

    def __init__(
        self, keeps: int, replays: bool, index: ExactIndex | None = None, siblings: Collection[Follower] = ()
    ) -> None:
        """`siblings`: the ranks before this one, which tell of the same replica."""
        self.engine = Engine(keeps)
        self.index = ExactIndex() if index is None else index
        self.strange = False
        """The process there has not been heard of."""
        self.behind = False
        """What was told last did not arrive."""
        self.answers: deque[str] = deque()
        """How the next replays are answered; the others as they should be."""
        self._coming: deque[list[bytes] | Connected] = deque([CONNECTED])
        self._answer: list[list[bytes]] = []
        self._there, self._idle = asyncio.Event(), asyncio.Event()
        self.follower = Follower(
            Place(POOL, ADDRESS, len(siblings)),
            self,
            self._opened if replays else None,
            self.learn,
            siblings=siblings,
            replay_timeout_s=1.0,
            wall=self._wall,
        )

    def learn(self, fact: CacheChanged | CacheUnknown) -> None:
        if isinstance(fact, CacheUnknown):
            self.index.forget(fact.address)
        else:
            self.index.apply(fact.address, fact.changes, 0.0, fact.whole)
        self.index.check()

    def act(self, act: str, what: Any, arrives: bool) -> bool:
        """Whether a message came by itself of it, so that the index must be right."""
        told = len(self.engine.told)
        if act == "answer":
            self.answers.append(what)
        elif act == "connect":
            self._coming.append(CONNECTED)
        elif act == "restart":
            self.engine.restart()
            self.strange = self.behind = True
            if arrives:
                self._coming.append(CONNECTED)
        else:
            getattr(self.engine, act)(*(() if what is None else (what,)))
            if len(self.engine.told) > told:
                self.behind = not arrives
                if arrives:
                    self._coming.append(self.engine.told[-1])
                return arrives
        return False

    @property
    def by_chance(self) -> bool:
        """Whether the message that comes from a strange process has the number that was due of the one before, so that nobody could tell."""
        return self.strange and 0 < self.follower._position.due == len(self.engine.told) - 1

    async def settle(self) -> None:
        self._idle.clear()
        self._there.set()
        await self._idle.wait()

    # --- for the follower ---------------------------------------------------------------------------------------------

    async def next(self, within_s: float | None = None) -> Any:
        if within_s is not None:
            return self._answer.pop(0) if self._answer else None
        while not self._coming:
            self._there.clear()
            self._idle.set()
            await self._there.wait()
        return self._coming.popleft()

    def ask(self, first: int) -> None:
        how = self.answers.popleft() if self.answers else "all"
        told = self.engine.replay(first)
        half = len(told) // 2
        ended = [b"", END, b""]
        self._answer = {
            "all": [*told, ended],
            "late": [],
            "half": told[:half],
            "half, and says that it is all": [*told[:half], ended],
            "hole": [*told[:half], *told[half + 1 :], ended],
        }[how]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def _opened(self) -> Replay:
        return self  # type: ignore[return-value]

    def _wall(self) -> float:
        return 1000.0 * self.engine.clock


Act = tuple[str, Any, bool]
"""What happens, with what, and whether the news of it arrive."""


def acts(*answers: str) -> st.SearchStrategy[Act]:
    """What happens to an engine and the way to it; `answers`: how replays may fail."""
    arrives = st.sampled_from([True, True, False])
    return st.one_of(
        st.tuples(st.just("run"), st.sampled_from(PROMPTS), arrives),
        st.tuples(st.just("evict"), st.integers(0, 9), arrives),
        st.tuples(st.sampled_from(["clear", "restart", "connect"]), st.none(), arrives),
        st.tuples(st.just("answer"), st.sampled_from(answers), arrives),
    )


KEEPS = st.sampled_from([1, 3, 1000])


async def play(happens: Sequence[tuple[int, Act]], ranks: int, keeps: int, replays: bool) -> None:
    index, followers, worlds = ExactIndex(), list[Follower](), list[World]()
    for _ in range(ranks):
        worlds.append(World(keeps, replays, index, followers))
        followers.append(worlds[-1].follower)
    tasks = [asyncio.create_task(world.follower.run()) for world in worlds]
    for world in worlds:
        await world.settle()
    for rank, act in happens:
        world = worlds[rank]
        came = world.act(*act)
        if came and world.by_chance:
            break
        world.strange &= not came
        await world.settle()
        assert not any(task.done() for task in tasks), tasks
        if came and not any(each.behind for each in worlds):
            claimed = {p: index.match(chain(p)).get(ADDRESS, 0) for p in PROMPTS}
            there = {p: max(each.engine.holds(p) for each in worlds) for p in PROMPTS}
            assert all(claimed[p] <= there[p] for p in PROMPTS), (followers, claimed, there)
            assert claimed == there or ranks > 1 or not index.knows(ADDRESS), (followers, claimed, there)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(acts("late", "half", "half, and says that it is all", "hole"), min_size=5, max_size=30),
    KEEPS,
    st.booleans(),
)
def test_what_is_claimed_is_there(happens: list[Act], keeps: int, replays: bool) -> None:
    asyncio.run(play([(0, each) for each in happens], 1, keeps, replays))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), acts("late", "half")), min_size=5, max_size=30), KEEPS, st.booleans())
def test_of_two_ranks_what_is_claimed_is_there(happens: list[tuple[int, Act]], keeps: int, replays: bool) -> None:
    """One of them holds it. A replay that leaves something out and says that it is all is not among these: the other rank's messages do not show it."""
    asyncio.run(play(happens, 2, keeps, replays))
