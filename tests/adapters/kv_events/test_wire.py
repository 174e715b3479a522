from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.adapters.kv_events.selection import Selection, sliced
from extproc.adapters.kv_events.wire import (
    MAX_EVENTS,
    Batch,
    Cleared,
    Removed,
    Stored,
    UndecodableError,
    decode,
    message,
)
from extproc.core.prefix.exact import ExactIndex
from extproc.core.types import BlocksRemoved, BlocksStored, CacheCleared
from tests.adapters.kv_events.support import CLEARED, FIXTURES, payload, recorded, removed, stored, tokens

VERSIONS = re.findall(
    r"^(\S+) fields.*\n  hex (\S+)$", (FIXTURES / "vllm-older" / "kv_events_by_version.txt").read_text(), re.MULTILINE
)


IDS: st.SearchStrategy[Any] = st.integers(0, 3) | st.sampled_from(
    [2**64 - 1, -(2**63), b"", b"i", bytes(64), bytes(65)]
)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | IDS, inner, max_size=3),
    max_leaves=5,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "type": st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"]),
    "block_hashes": st.lists(IDS, max_size=3),
    "parent_block_hash": st.none() | IDS,
    "token_ids": st.sampled_from([[7] * 16, [8] * 32, [2**32] * 16, [-1] * 16, []]),
    "block_size": st.sampled_from([16, 32, 0, -1, 2**64 - 1]),
    "lora_name": st.sampled_from([None, "a"]),
    "medium": st.sampled_from([None, "GPU", "CPU"]),
    "extra_keys": st.sampled_from([None, [None], [["a"]], [["a", "salt"]], [None, [["image", 3]]]]),
    "group_idx": st.sampled_from([None, 0, 1]),
}
"""What an engine might say, and in each place anything else."""
EVENTS: st.SearchStrategy[Any] = (
    ANYTHING
    | st.fixed_dictionaries({}, optional={name: usual | ANYTHING for name, usual in FIELDS.items()})
    | st.fixed_dictionaries(FIELDS)
)


class TestRecorded:
    def test_every_message_is_read_whole(self) -> None:
        batches = [decode(message(frames).payload) for frames in recorded()]
        kinds = [type(event).__mro__[1] for batch in batches for event in batch.events]
        assert [kinds.count(kind) for kind in (Stored, Removed, Cleared)] == [178, 109, 1]
        assert sum(batch.unknown + batch.malformed for batch in batches) == 0

    def test_sequence_numbers_count_from_zero(self) -> None:
        assert [message(frames).sequence for frames in recorded()] == list(range(81))

    def test_adapter_and_salt(self) -> None:
        """The second message is an adapter's, the third a salted one; all three have the same tokens."""
        changes = [Selection().take(decode(frames[2]))[0] for frames, _ in zip(recorded(), range(3), strict=False)]
        plain, adapter, salted = (change for change in changes if isinstance(change, BlocksStored))
        assert [(c.lora, c.salt) for c in (plain, adapter, salted)] == [
            (None, None),
            ("adapter-a", None),
            (None, "pepper"),
        ]
        assert plain.token_ids == adapter.token_ids == salted.token_ids
        assert (plain.size, len(plain.ids), len(plain.token_ids), plain.parent) == (32, 3, 96, None)

    def test_nothing_is_passed_over(self) -> None:
        selection = Selection()
        for frames in recorded():
            selection.take(decode(frames[2]))
        assert dict(selection.tally.taken) == {"BlockStored": 178, "BlockRemoved": 109, "AllBlocksCleared": 1}
        assert selection.tally.passed.total() == 0


class TestVersions:
    def test_there_are_eight(self) -> None:
        assert [version for version, _ in VERSIONS] == [
            "0.9.2", "0.16.0", "0.20.0", "0.23.0", "0.24.0", "0.28.0", "0.32.0", "0.33.0",
        ]  # fmt: skip

    @pytest.mark.parametrize(("version", "encoded"), VERSIONS, ids=[version for version, _ in VERSIONS])
    def test_each_says_the_same(self, version: str, encoded: str) -> None:
        """From 0.20 on the second block has a key that is neither adapter nor salt: it is not told by tokens alone."""
        batch = decode(bytes.fromhex(encoded))
        told = 2 if version in ("0.9.2", "0.16.0") else 1
        assert (batch.at, batch.unknown, batch.malformed) == (1.5, 0, 0)
        assert Selection().take(batch) == [
            BlocksStored((11, 12)[:told], None, (1, 2, 3, 4)[: 2 * told], 2),
            BlocksRemoved((11,)),
            CacheCleared(),
        ]

    def test_hashes_may_be_bytes(self) -> None:
        one, other = bytes(range(32)), bytes(32)
        batch = decode(payload(stored(one, parent=other), removed(other)))
        assert Selection().take(batch) == [BlocksStored((one,), other, tokens(one), 2), BlocksRemoved((other,))]

    def test_hashes_have_64_bits_with_and_without_a_sign(self) -> None:
        batch = decode(payload(removed(2**64 - 1, -(2**63))))
        assert batch.events[0].block_hashes == (2**64 - 1, -(2**63))  # type: ignore[union-attr]

    def test_the_rank_may_be_left_out(self) -> None:
        assert decode(msgspec.msgpack.encode([2.0, []])) == Batch(2.0, [])
        assert decode(msgspec.msgpack.encode([2.0, [], None])) == Batch(2.0, [])

    def test_later_fields_are_passed_over(self) -> None:
        event = stored(1, lookahead_token_ids=[3], something={"new": 1})
        array = ["BlockStored", [1], None, [10, 11], 2, None, "GPU", None, None, 0, "full_attention", None, "new", 7]
        batch = decode(msgspec.msgpack.encode([2.0, [event, array], 0, "new"]))
        assert (len(batch.events), batch.unknown, batch.malformed) == (2, 0, 0)


class TestBadInput:
    def test_an_unknown_type_only_counts(self) -> None:
        batch = decode(payload({"type": "BlockPinned", "block_hashes": [1]}, ["BlockPinned", [1]], CLEARED))
        assert (len(batch.events), batch.unknown, batch.malformed) == (1, 2, 0)

    @pytest.mark.parametrize(
        "event",
        [
            {"type": "BlockStored"},
            ["BlockStored", [1]],
            {**stored(1), "token_ids": ["a", "b"]},
            {**stored(1), "block_hashes": [1.5]},
            {**stored(1), "block_hashes": [bytes(65)]},
            {**stored(1), "extra_keys": 7},
        ],
    )
    def test_stored_blocks_that_cannot_be_read_spoil_nothing_else(self, event: object) -> None:
        batch = decode(payload(event, CLEARED))
        assert (len(batch.events), batch.unknown, batch.malformed) == (1, 0, 1)

    @pytest.mark.parametrize(
        "event",
        [
            7,
            [],
            {},
            {"type": 3},
            {**removed(1), "block_hashes": None},
            {**removed(1), "medium": 3},
            {**removed(1), "block_hashes": [bytes(65)]},
            ["BlockRemoved"],
            {**CLEARED, "type": None},
            msgspec.msgpack.Ext(5, b"x"),
            msgspec.Raw(b"\x91" * 900 + b"\x01"),
            msgspec.Raw(b"\x81\xa4type" + b"\x91" * 900 + b"\x01"),
        ],
    )
    def test_what_may_be_a_removal_and_cannot_be_read_spoils_the_message(self, event: object) -> None:
        """Its blocks would count as cached for ever: they are removed but once."""
        with pytest.raises(UndecodableError, match="payload of"):
            decode(payload(stored(1), event))

    def test_more_events_than_an_engine_tells_at_once_are_not_read(self) -> None:
        few, many = [["BlockPinned"]] * MAX_EVENTS, [["BlockPinned"]] * (MAX_EVENTS + 1)
        assert decode(payload(*few)).unknown == MAX_EVENTS
        with pytest.raises(UndecodableError, match="of length <= 65536"):
            decode(payload(*many))

    @pytest.mark.parametrize(
        "raw", [b"", b"\x00", b"\xc1", b"\x93", b"not msgpack", payload(CLEARED)[:-3], payload() + b"\x00"]
    )
    def test_what_is_no_payload_is_said(self, raw: bytes) -> None:
        with pytest.raises(UndecodableError, match=rf"payload of {len(raw)} bytes"):
            decode(raw)

    @pytest.mark.parametrize(
        "raw", [b"\x92\xcb" + bytes(8) + b"\x91" * 100_000, payload(at=float("nan")), payload(at=float("inf"))]
    )
    def test_nor_is_what_is_nested_too_deep_or_made_at_no_time(self, raw: bytes) -> None:
        with pytest.raises(UndecodableError, match=rf"payload of {len(raw)} bytes"):
            decode(raw)

    @pytest.mark.parametrize(
        "frames", [[], [b"t"], [b"t", b"12345678"], [b"t", b"1", b""], [b"t", b"12345678", b"", b""]]
    )
    def test_what_is_no_message_is_said(self, frames: list[bytes]) -> None:
        with pytest.raises(UndecodableError, match="frames of"):
            message(frames)

    @settings(deadline=None)
    @given(st.binary(max_size=200))
    def test_bytes_by_chance_raise_nothing_else(self, raw: bytes) -> None:
        with suppress(UndecodableError):
            decode(raw)

    @settings(deadline=None)
    @given(st.lists(st.lists(EVENTS, max_size=4), max_size=4))
    def test_whatever_is_told_is_taken_in_or_passed_over(self, batches: list[list[Any]]) -> None:
        selection, index = Selection(rank=1), ExactIndex(max_entries=20, max_held=10)
        for events in batches:
            with suppress(UndecodableError):
                for part in sliced(selection.take(decode(payload(*events))), 2):
                    index.apply("a", part, 0.0)
                    index.check()

    @settings(deadline=None)
    @given(st.data())
    def test_a_damaged_payload_raises_nothing_else(self, data: st.DataObject) -> None:
        frames = data.draw(st.sampled_from(list(recorded())[:20]))
        damaged = bytearray(frames[2])
        for _ in range(data.draw(st.integers(1, 5))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        with suppress(UndecodableError):
            Selection().take(decode(bytes(damaged)))
