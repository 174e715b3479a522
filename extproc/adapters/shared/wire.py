"""The encoding of what routers tell one another: a byte for the version, then MessagePack.

Structs are arrays, so that fields cost no names; a later release may add fields at the end, which this one passes over. What
cannot be read so gets another version. Sizes, for the bounds in docs/redis.md: a replica with load takes some 25 bytes, a
placement 8 bytes for each block that no other placement of its batch has.

There are three messages: a state, of which each beat leaves one; a batch of placements; and a push, which says at once what
changed. What one router says is numbered, pushes without a gap; a state has the number of the push that says the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from sys import byteorder
from typing import Annotated, Final, TypeVar

import msgspec

from extproc.core.peers import PLACED_BLOCKS
from extproc.core.prefix.blocks import ENDS
from extproc.core.types import Blocks, Judgement, PeerLoad, Placed, TenantServed

VERSION: Final = 1
"""Of all messages, of the hashes of blocks, and of where blocks end."""
MAX_BATCH_BYTES: Final = 32 * 1024
"""Of one router's placements of one beat or push: 4,000 blocks. What does not fit is left out, and counted."""
HASH_BYTES: Final = 8
OUT, DRAINING = 1, 2

M = TypeVar("M")
Text = Annotated[str, msgspec.Meta(max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class UnknownVersionError(Exception):
    """Of another release: nothing is wrong with it."""


class UnreadableError(Exception):
    """What no release writes."""


class _Load(msgspec.Struct, array_like=True, frozen=True, gc=False):
    address: Text
    requests: Count
    backlog_ms: Count
    context_tokens: Count
    prefilling: Count = 0


class _Judgement(msgspec.Struct, array_like=True, frozen=True, gc=False):
    address: Text
    flags: Count
    ends_in_ms: Count | None


class _Served(msgspec.Struct, array_like=True, frozen=True, gc=False):
    tenant: Text | None
    priority: int
    tokens: Count


class _Pool(msgspec.Struct, array_like=True, frozen=True):
    name: Text
    loads: Annotated[list[_Load], msgspec.Meta(max_length=10_000)]
    judgements: Annotated[list[_Judgement], msgspec.Meta(max_length=10_000)]
    served: Annotated[list[_Served], msgspec.Meta(max_length=10_000)]


class _State(msgspec.Struct, array_like=True, frozen=True):
    number: Count
    pools: Annotated[list[_Pool], msgspec.Meta(max_length=1_000)]
    says: bool = False
    hears: bool = False


class _Loads(msgspec.Struct, array_like=True, frozen=True):
    pool: Text
    loads: Annotated[list[_Load], msgspec.Meta(max_length=10_000)]


class _Push(msgspec.Struct, array_like=True, frozen=True):
    router: Text
    number: Count
    whole: bool
    pools: Annotated[list[_Loads], msgspec.Meta(max_length=1_000)]
    batch: Annotated[bytes, msgspec.Meta(max_length=1 << 20)] = b""
    """A message of its own; empty for none."""


class _Placed(msgspec.Struct, array_like=True, frozen=True, gc=False):
    pool: Count
    address: Count
    """Both by their places in the lists of the batch."""
    like: Count
    """One more than the place of an earlier placement of the batch whose chain begins like this one; 0 for none."""
    alike: Count
    """Blocks that they share."""
    rest: bytes
    """The hashes of the further blocks, 8 bytes each, little-endian."""


class _Batch(msgspec.Struct, array_like=True, frozen=True):
    pools: Annotated[list[Text], msgspec.Meta(max_length=1_000)]
    addresses: Annotated[list[Text], msgspec.Meta(max_length=10_000)]
    placed: Annotated[list[_Placed], msgspec.Meta(max_length=10_000)]


_encoder = msgspec.msgpack.Encoder()
_states = msgspec.msgpack.Decoder(_State)
_pushes = msgspec.msgpack.Decoder(_Push)
_batches = msgspec.msgpack.Decoder(_Batch)


class PoolState(msgspec.Struct, frozen=True):
    """What a router tells of one pool."""

    pool: str
    loads: tuple[PeerLoad, ...]
    judgements: tuple[Judgement, ...]
    served: tuple[TenantServed, ...]


class State(msgspec.Struct, frozen=True):
    """What a router tells at a beat."""

    number: int
    """Of the word: counts up, so that a reader knows a new one from one it has read."""
    pools: tuple[PoolState, ...]
    says: bool = False
    """Whether it pushes."""
    hears: bool = False
    """Whether pushes of all others reach it, so that nothing is lost on it between slow beats."""


class Push(msgspec.Struct, frozen=True):
    """What a router tells at once."""

    router: str
    """Its name."""
    number: int
    """One more than that of the push before."""
    whole: bool
    """Whether it names all replicas that have load, and not only those whose load changed."""
    loads: tuple[tuple[str, tuple[PeerLoad, ...]], ...]
    """By name of the pool."""
    batch: bytes = b""
    """Placements, as `batch` encodes them; empty for none."""


def state(said: State) -> bytes:
    """Encode a router's state."""
    return _versioned(_State(said.number, [_pool(pool) for pool in said.pools], said.says, said.hears))


def read_state(data: bytes) -> State:
    """The state. Raises UnknownVersionError or UnreadableError."""
    found = _read(_states, data)
    return State(found.number, tuple(_pool_state(pool) for pool in found.pools), found.says, found.hears)


def push(said: Push) -> bytes:
    """Encode a push."""
    pools = [_Loads(pool, [_load(x) for x in loads]) for pool, loads in said.loads]
    return _versioned(_Push(said.router, said.number, said.whole, pools, said.batch))


def read_push(data: bytes) -> Push:
    """The push, its batch as it is. Raises UnknownVersionError or UnreadableError."""
    found = _read(_pushes, data)
    loads = tuple((pool.pool, tuple(_peer_load(x) for x in pool.loads)) for pool in found.pools)
    return Push(found.router, found.number, found.whole, loads, found.batch)


def batch(placed: Sequence[Placed]) -> tuple[bytes, int]:
    """Encode placements, the last ones first where not all fit. Returns how many were left out, too."""
    pools, addresses = _Places(), _Places()
    heads: dict[int, tuple[int, int]] = {}
    """Hash -> one more than the place of the placement that has it, and how many blocks that is."""
    chosen: list[_Placed] = []
    room = MAX_BATCH_BYTES
    for each in reversed(placed):
        hashes = each.blocks.hashes
        like, alike = next((heads[h] for h in reversed(hashes) if h in heads), (0, 0))  # equal hash, equal prefix
        room -= HASH_BYTES * (len(hashes) - alike) + 2 * HASH_BYTES
        if room < 0:
            break
        item = _Placed(pools.of(each.pool), addresses.of(each.address), like, alike, _packed(hashes[alike:]))
        chosen.append(item)
        for i in range(alike, len(hashes)):
            heads[hashes[i]] = len(chosen), i + 1
    return _versioned(_Batch(list(pools), list(addresses), chosen)), len(placed) - len(chosen)


def batches(placed: Sequence[Placed], most: int) -> tuple[list[bytes], int]:
    """The same in up to `most` batches, the latest placements in the last of them."""
    found: list[bytes] = []
    left = len(placed)
    while left and len(found) < most:
        data, left = batch(placed[:left])
        found.insert(0, data)
    return found, left


def read_batch(data: bytes) -> list[Placed]:
    """Placements, latest first. Raises UnknownVersionError or UnreadableError."""
    found = _read(_batches, data)
    chains: list[tuple[int, ...]] = []
    try:
        for each in found.placed:
            head = chains[each.like - 1][: each.alike] if each.like else ()
            chains.append((head + _unpacked(each.rest))[:PLACED_BLOCKS])
        return [
            Placed(found.pools[each.pool], found.addresses[each.address], Blocks(chain, ENDS[: len(chain)]))
            for each, chain in zip(found.placed, chains, strict=True)
        ]
    except (IndexError, ValueError) as e:
        raise UnreadableError(str(e)) from None


class _Places(dict[str, int]):
    """Names numbered as they come."""

    def of(self, name: str) -> int:
        return self.setdefault(name, len(self))


def _packed(hashes: Sequence[int]) -> bytes:
    numbers = array("Q", hashes)
    if byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _unpacked(data: bytes) -> tuple[int, ...]:
    numbers = array("Q", data)  # ValueError unless its length is a multiple of eight
    if byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)


def _versioned(message: msgspec.Struct) -> bytes:
    return bytes((VERSION,)) + _encoder.encode(message)


def _read(decoder: msgspec.msgpack.Decoder[M], data: bytes) -> M:
    if not data:
        raise UnreadableError("empty")
    if data[0] != VERSION:
        raise UnknownVersionError(str(data[0]))
    try:
        return decoder.decode(memoryview(data)[1:])
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise UnreadableError(str(e)) from None


def _pool(given: PoolState) -> _Pool:
    return _Pool(
        given.pool,
        [_load(x) for x in given.loads],
        [_Judgement(j.address, _flags(j), None if j.ends_in_s is None else _ms(j.ends_in_s)) for j in given.judgements],
        [_Served(s.tenant, s.priority, round(s.tokens)) for s in given.served],
    )


def _pool_state(found: _Pool) -> PoolState:
    return PoolState(
        found.name,
        tuple(_peer_load(x) for x in found.loads),
        tuple(
            Judgement(
                j.address,
                bool(j.flags & OUT),
                bool(j.flags & DRAINING),
                None if j.ends_in_ms is None else j.ends_in_ms / 1e3,
            )
            for j in found.judgements
        ),
        tuple(TenantServed(s.tenant, s.priority, float(s.tokens)) for s in found.served),
    )


def _load(given: PeerLoad) -> _Load:
    return _Load(given.address, given.requests, _ms(given.backlog_s), round(given.context_tokens), given.prefilling)


def _peer_load(found: _Load) -> PeerLoad:
    return PeerLoad(
        found.address, found.requests, found.backlog_ms / 1e3, float(found.context_tokens), found.prefilling
    )


def _flags(judgement: Judgement) -> int:
    return (OUT if judgement.out else 0) | (DRAINING if judgement.draining else 0)


def _ms(seconds: float) -> int:
    return max(round(seconds * 1e3), 0)
