"""What a source of members is, and what all of them share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

from extproc.config import ReplicaConfig
from extproc.core.types import Add, Change, Remove, Replica, Reset

DRAIN_LABEL: Final = "drain"
"""`drain: "true"` among the labels says the same as `drain: true` of the replica, for sources that have labels only."""

Emit = Callable[[Change], None]
OnError = Callable[[str], None]
"""Gets the text of a mistake: what is wrong, and where."""


class Source(Protocol):
    """The members of one pool. The first change is a Reset; none comes before the members are known."""

    pool: str

    async def run(self, emit: Emit) -> None:
        """Tell of all changes, until cancelled; return early when there will be no more."""


class FakeSource:
    """A source whose changes a test pushes by hand, before or while it runs."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self._changes: asyncio.Queue[Change] = asyncio.Queue(maxsize=1000)

    def push(self, *changes: Change) -> None:
        for change in changes:
            self._changes.put_nowait(change)

    async def run(self, emit: Emit) -> None:
        while True:
            emit(await self._changes.get())


def ignore_errors(_text: str) -> None:
    """The default of `on_error`."""


def replica(config: ReplicaConfig, pool_labels: Mapping[str, str]) -> Replica:
    """The core's view of a configured replica; its own labels win over the pool's.

    The label `drain` is taken out: other labels make a replica another one, whose speed has to be learned anew.
    """
    labels = {**pool_labels, **config.labels}
    label = labels.pop(DRAIN_LABEL, "")
    return Replica(config.address, labels, config.weight, config.drain or label.lower() == "true")


def difference(pool: str, before: Mapping[str, Replica], after: Mapping[str, Replica]) -> Iterator[Change]:
    """The fewest changes from one membership (by address) to the other.

    Joins come first: where all replicas are replaced at once, the pool is never empty in between.
    """
    yield from (Add(pool, new) for address, new in after.items() if before.get(address) != new)
    yield from (Remove(pool, address) for address in before if address not in after)


def reset(pool: str, members: Mapping[str, Replica]) -> Reset:
    """All members at once."""
    return Reset(pool, tuple(members.values()))
