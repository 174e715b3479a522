"""KV events of a simulated replica, told as vLLM 0.32 does: PUB for what happens, ROUTER for those who missed it.

The events are those of the simulated block pool, so what they tell is what the usage of the responses will report. Token ids are the
4 bytes that make a token in the simulation, little endian (openai/simulated_prompt.py).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import zmq
import zmq.asyncio

from extproc.openai.simulated_prompt import TOKEN_BYTES, token_ids
from extproc.sim.blocks import Note, Stored
from extproc.sim.engine import Emitted, Engine, EngineConfig, Step

BUFFER_STEPS: Final = 10_000
"""Messages kept for replays, as in vLLM."""
HWM: Final = 100_000
TURN: Final = 64
"""Messages of a replay after which the event loop has its turn."""
END: Final = b"\xff" * 8
TOPIC: Final = "kv-events"

Event = dict[str, Any]


class KvPublisher:
    """One engine's events: `publish` numbers, sends and keeps them."""

    def __init__(
        self,
        host: str,
        port: int,
        replay_port: int,
        *,
        topic: str = TOPIC,
        buffer_steps: int = BUFFER_STEPS,
        hwm: int = HWM,
    ) -> None:
        """Ports of 0 take free ones. Beyond `hwm` messages that a subscriber has not taken, further ones are dropped."""
        self._hwm = hwm
        self.endpoint, self.replay_endpoint = f"tcp://{host}:{port}", f"tcp://{host}:{replay_port}"
        self.topic = topic
        self.sequence = 0
        """Of the next message."""
        self.replays = 0
        """Answered so far."""
        self._subscribers = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self._context: zmq.asyncio.Context | None = None
        self._pub: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<KvPublisher {self.endpoint} {self.sequence} messages, {self.replays} replays>"

    def start(self) -> None:
        """Listen. Raises OSError where a port is taken. Needs a running loop."""
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.XPUB)  # a PUB, on the wire, that knows who listens
        self._pub.setsockopt(zmq.XPUB_VERBOSER, 1)
        router = self._context.socket(zmq.ROUTER)
        for socket in (self._pub, router):
            socket.setsockopt(zmq.LINGER, 0)
        self._pub.setsockopt(zmq.SNDHWM, self._hwm)
        router.setsockopt(zmq.SNDHWM, HWM)  # vLLM has the default, 1,000, and drops what a slow peer leaves
        try:
            self.endpoint = _bound(self._pub, self.endpoint)
            self.replay_endpoint = _bound(router, self.replay_endpoint)
        except zmq.ZMQError as e:
            self._context.destroy(linger=0)
            self._context = self._pub = None
            raise OSError(
                e.errno, f"cannot publish KV events at {self.endpoint}, {self.replay_endpoint}: {e}"
            ) from None
        self._task = asyncio.create_task(self._answer(router), name=f"replays of {self.endpoint}")

    async def stop(self) -> None:
        """Close, without a word to anyone, as an engine does that ends."""
        if self._task is None or self._context is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=0)
        self._task = self._context = self._pub = None

    def publish(self, events: Sequence[Event]) -> int:
        """Send one message; its sequence number."""
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        sequence, self.sequence = self.sequence, self.sequence + 1
        self._buffer.append((sequence, payload))
        self.send(sequence, payload)
        return sequence

    def send(self, sequence: int, payload: bytes) -> None:
        """Put a message on the wire, and do no more."""
        assert self._pub is not None
        self.subscribers()
        zmq.Socket.send_multipart(self._pub, [self.topic.encode(), sequence.to_bytes(8, "big"), payload], zmq.NOBLOCK)

    def subscribers(self) -> int:
        """Subscriptions that have arrived: what is sent from now on reaches these."""
        with suppress(zmq.Again):
            while self._pub is not None:
                asked = zmq.Socket.recv(self._pub, zmq.NOBLOCK)
                self._subscribers += 1 if asked[:1] == b"\1" else -1
        return self._subscribers

    async def _answer(self, router: zmq.asyncio.Socket) -> None:
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3:
                continue
            client, _, first = frames
            for sent, (sequence, payload) in enumerate(list(self._buffer)):
                if sent % TURN == 0:
                    await asyncio.sleep(0)
                if sequence >= int.from_bytes(first, "big"):
                    await router.send_multipart(
                        [client, b"", self.topic.encode(), sequence.to_bytes(8, "big"), payload]
                    )
            await router.send_multipart([client, b"", b"", END, b""])
            self.replays += 1


def _bound(socket: zmq.asyncio.Socket, endpoint: str) -> str:
    """Where it listens in the end."""
    socket.bind(endpoint)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


@dataclass(slots=True)
class _Meaning:
    """What a block holds, as long as a request that may store it is under way."""

    tokens: bytes
    lora: str | None
    extra: list[str] | None
    users: int = 0


class Chains:
    """The content of the blocks of all requests under way, by hash."""

    def __init__(self, block_size: int, adapters: Sequence[str]) -> None:
        self.block_size = block_size
        self._adapters = adapters
        self._blocks: dict[int, _Meaning] = {}
        self._left: list[Sequence[int]] = []
        """Chains of requests that are gone, but what they stored may not be told yet."""

    def __len__(self) -> int:
        return len(self._blocks)

    def enter(self, hashes: Sequence[int], tokens: bytes, model: str, salt: str) -> Callable[[], None]:
        """A request comes; to be called when it is gone."""
        width = self.block_size * TOKEN_BYTES
        adapter = model if model in self._adapters else None
        for i, block in enumerate(hashes):
            if block not in self._blocks:
                extra = [*([adapter] if adapter else []), *([salt] if salt and not i else [])] or None
                self._blocks[block] = _Meaning(tokens[i * width : (i + 1) * width], adapter, extra)
            self._blocks[block].users += 1
        return lambda: self._left.append(hashes)

    def sweep(self) -> None:
        """All that was stored is told: forget what requests held that are gone."""
        for hashes in self._left:
            for block in hashes:
                meaning = self._blocks[block]
                meaning.users -= 1
                if not meaning.users:
                    del self._blocks[block]
        self._left.clear()

    def told(self, note: Note) -> Event:
        """The event of what happened in the pool."""
        return self._stored(note) if isinstance(note, Stored) else _removed(note)

    def _stored(self, note: Stored) -> Event:
        meanings = [self._blocks[block] for block in note.hashes]
        return {
            "type": "BlockStored",
            "block_hashes": list(note.hashes),
            "parent_block_hash": note.parent,
            "token_ids": [i for meaning in meanings for i in token_ids(meaning.tokens)],
            "block_size": self.block_size,
            "lora_id": None if meanings[0].lora is None else 1 + self._adapters.index(meanings[0].lora),
            "medium": "GPU",
            "lora_name": meanings[0].lora,
            "extra_keys": [meaning.extra for meaning in meanings],
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }


def _removed(block: int) -> Event:
    return {"type": "BlockRemoved", "block_hashes": [block], "medium": "GPU", "group_idx": 0}


class ToldEngine(Engine):
    """An engine that publishes, after each step with events, what became of its blocks."""

    def __init__(self, config: EngineConfig, chains: Chains, publisher: KvPublisher) -> None:
        super().__init__(config, journal=True)
        self._chains, self._publisher = chains, publisher

    def finish_step(self, step: Step) -> Emitted:
        """As the engine does."""
        emitted = super().finish_step(step)
        if notes := self.notes():
            self._publisher.publish([self._chains.told(note) for note in notes])
        self._chains.sweep()
        return emitted
