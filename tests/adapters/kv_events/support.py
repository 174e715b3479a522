"""Recorded messages, events as engines write them, and one who learns."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from extproc.core.types import BlocksRemoved, BlocksStored, CacheChanged, CacheCleared, CacheUnknown
from extproc.sim.kv_publisher import KvPublisher
from tests.support.ports import free_port

FIXTURES = Path(__file__).parents[2] / "fixtures"
POOL, ADDRESS = "p", "127.0.0.1:8000"


def recorded() -> Iterator[list[bytes]]:
    """The frames of each message of kv_events.bin: >dI for time and number of frames, then each as >I length and bytes."""
    data = (FIXTURES / "vllm-0.32" / "kv_events.bin").read_bytes()
    at = 0
    while at < len(data):
        _, number = struct.unpack_from(">dI", data, at)
        at += 12
        frames = []
        for _ in range(number):
            (length,) = struct.unpack_from(">I", data, at)
            frames.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        yield frames


def payload(*events: Any, at: float = 1.5, rank: int = 0) -> bytes:
    return msgspec.msgpack.encode([at, events, rank])


def stored(*hashes: int | bytes, parent: int | bytes | None = None, size: int = 2, **more: Any) -> dict[str, Any]:
    """As vLLM 0.32 writes it, with tokens that are told from the hashes."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": [t for h in hashes for t in tokens(h, size)],
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **more,
    }


def tokens(block: int | bytes, size: int = 2) -> tuple[int, ...]:
    number = block if isinstance(block, int) else sum(block)
    return tuple(number * 10 + i for i in range(size))


def removed(*hashes: int | bytes, **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", **more}


CLEARED = {"type": "AllBlocksCleared"}


class Learner:
    """What the core would know: each block as often as it was stored and not removed."""

    def __init__(self) -> None:
        self.facts: list[CacheChanged | CacheUnknown] = []
        self.blocks: Counter[int | bytes] = Counter()
        self.unknowns = 0
        self.trouble: Exception | None = None
        self.seen: Callable[[CacheChanged | CacheUnknown], object] = lambda _fact: None

    def learn(self, fact: CacheChanged | CacheUnknown) -> None:
        if self.trouble is not None:
            trouble, self.trouble = self.trouble, None
            raise trouble
        self.seen(fact)
        self.facts.append(fact)
        if isinstance(fact, CacheUnknown):
            self.unknowns += 1
            self.blocks.clear()
            return
        for change in fact.changes:
            if isinstance(change, CacheCleared):
                self.blocks.clear()
            elif isinstance(change, BlocksStored):
                self.blocks.update(change.ids)
            elif isinstance(change, BlocksRemoved):
                self.blocks.subtract(change.ids)

    @property
    def held(self) -> list[int | bytes]:
        return sorted(+self.blocks, key=lambda block: (isinstance(block, bytes), block))

    @property
    def whole(self) -> bool | None:
        """As the last fact says; None where nothing was learned, or it is void."""
        last = self.facts[-1] if self.facts else None
        return last.whole if isinstance(last, CacheChanged) else None


@asynccontextmanager
async def publishing(
    *, port: int = 0, replay_port: int = 0, buffer_steps: int = 10_000, hwm: int = 100_000
) -> AsyncIterator[KvPublisher]:
    """A publisher as of a replica that begins, on ports that are free again after it."""
    publisher = KvPublisher(
        "127.0.0.1", port or free_port(), replay_port or free_port(), buffer_steps=buffer_steps, hwm=hwm
    )
    publisher.start()
    try:
        yield publisher
    finally:
        await publisher.stop()


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def publish_each(publisher: KvPublisher, hashes: Sequence[int]) -> None:
    for block in hashes:
        publisher.publish([stored(block)])
