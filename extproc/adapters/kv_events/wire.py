"""Payloads of KV events, as vLLM 0.9 to 0.33 and SGLang 0.5 send them, without the names of those that nobody reads.

A payload is MessagePack: `[unix seconds, [event, ...], data-parallel rank]`; the rank is not read. Events are arrays that begin with their
type until vLLM 0.23, maps with the key `type` from 0.24 on and in SGLang. Fields that have their default may be left out; what a later
release adds, at the end of an array or under a new name, is passed over, and so are events of types that are not known here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

SEQUENCE_BYTES: Final = 8
END: Final = b"\xff" * SEQUENCE_BYTES
"""In the place of a sequence number: a replay is over."""
MAX_EVENTS: Final = 65_536
"""Of one message: a million tokens in blocks of 16, each told by itself. To read so many takes some 50 ms, in which nothing else is done."""
STORED, REMOVED, CLEARED = "BlockStored", "BlockRemoved", "AllBlocksCleared"


class UndecodableError(Exception):
    """The message is none that an engine sends; the text says why."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it came."""

    topic: bytes
    sequence: int
    """From 0 since the engine began, one more each time."""
    payload: bytes


def message(frames: list[bytes]) -> Message:
    """Raises UndecodableError unless there are the three frames of a message."""
    if len(frames) != 3 or len(frames[1]) != SEQUENCE_BYTES:
        raise UndecodableError(
            f"{len(frames)} frames of {[len(f) for f in frames[:4]]} bytes instead of topic, 8, payload"
        )
    return Message(frames[0], int.from_bytes(frames[1], "big"), frames[2])


_Id = int | Annotated[bytes, msgspec.Meta(max_length=64)]
"""`BlockId`. Ids are kept as long as the block is there, and the hashes in use have 8 to 32 bytes."""


class Stored(msgspec.Struct, frozen=True, gc=False):
    """Blocks that the engine now holds. The order of the fields is that of the array form."""

    block_hashes: tuple[_Id, ...]
    parent_block_hash: _Id | None
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    """Where: null and GPU say the same; CPU, STORAGE and others are tiers of offloading."""
    lora_name: str | None = None
    extra_keys: tuple[tuple[Any, ...] | None, ...] | None = None
    """For each block, what beside tokens it was computed from: adapter, media, salt, embeddings, in this order."""
    group_idx: int | None = None
    """Of models whose layers keep different caches: which of these."""
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    """REMOTE: not in this replica."""


class Removed(msgspec.Struct, frozen=True, gc=False):
    """Blocks that it gave up."""

    block_hashes: tuple[_Id, ...]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class Cleared(msgspec.Struct, frozen=True, gc=False):
    """It gave all of them up."""


Event = Stored | Removed | Cleared


class _StoredMap(Stored, frozen=True, gc=False, tag=STORED):
    cache_salt: str | None = None
    """SGLang's; vLLM tells it among the extra keys."""


class _RemovedMap(Removed, frozen=True, gc=False, tag=REMOVED):
    pass


class _ClearedMap(Cleared, frozen=True, gc=False, tag=CLEARED):
    pass


class _StoredArray(Stored, frozen=True, gc=False, array_like=True, tag=STORED):
    pass


class _RemovedArray(Removed, frozen=True, gc=False, array_like=True, tag=REMOVED):
    pass


class _ClearedArray(Cleared, frozen=True, gc=False, array_like=True, tag=CLEARED):
    pass


class _Payload(msgspec.Struct, frozen=True, gc=False, array_like=True):
    ts: float
    events: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_EVENTS)]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one message tells."""

    at: float
    """When the engine's step was done, unix seconds by its host's clock."""
    events: list[Event]
    unknown: int = 0
    """Events of types that are not known here."""
    malformed: int = 0
    """Events of stored blocks whose fields are not those of one."""


_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)
"""What decoding raises: not the format, bad UTF-8, nested too deep."""
_payload: Final = msgspec.msgpack.Decoder(_Payload)
_map: Final = msgspec.msgpack.Decoder(_StoredMap | _RemovedMap | _ClearedMap)
_array: Final = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)


def decode(payload: bytes) -> Batch:
    """Raises UndecodableError where it is no payload at all, or has an event that may tell of blocks that are gone, and cannot be read.

    Stored blocks that cannot be read only count: less is known of the cache then, and nothing that is not there.
    """
    try:
        read = _payload.decode(payload)
    except _UNREADABLE as e:
        raise UndecodableError(f"payload of {len(payload)} bytes: {e}") from None
    if not math.isfinite(read.ts):
        raise UndecodableError(f"payload of {len(payload)} bytes: made at {read.ts}")
    events: list[Event] = []
    malformed = 0
    for raw in read.events:
        try:
            events.append((_array if _is_array(raw) else _map).decode(raw))
        except _UNREADABLE as e:
            kind = _kind(raw)
            if kind in (None, REMOVED, CLEARED):
                raise UndecodableError(
                    f"payload of {len(payload)} bytes: {kind or 'an event without type'}: {e}"
                ) from None
            malformed += kind == STORED
    return Batch(read.ts, events, len(read.events) - len(events) - malformed, malformed)


def salt(event: Stored) -> str | None:
    """The salt that SGLang tells beside the tokens."""
    return event.cache_salt if isinstance(event, _StoredMap) else None


def _is_array(raw: msgspec.Raw) -> bool:
    first = memoryview(raw)[0]
    return 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)


def _kind(raw: msgspec.Raw) -> str | None:
    """The type that an event claims to be of; None where it claims none."""
    try:
        event = msgspec.msgpack.decode(raw)
    except _UNREADABLE:
        return None
    named = event.get("type") if isinstance(event, dict) else event[0] if isinstance(event, list) and event else None
    return named if isinstance(named, str) else None
