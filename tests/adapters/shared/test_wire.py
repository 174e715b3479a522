"""The encoding: what goes in comes out, nothing else is believed, and it is as small as the documentation says."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.adapters.shared import wire
from extproc.core.prefix.blocks import chain
from extproc.core.types import Judgement, PeerLoad, TenantServed
from tests.adapters.shared.support import POOL, placed

FULL = wire.PoolState(
    POOL,
    (PeerLoad("10.0.0.1:8000", 12, 3.25, 40_000.0), PeerLoad("[::1]:80", 0, 0.0, 0.0)),
    (Judgement("10.0.0.2:8000", True, False, None), Judgement("10.0.0.3:8000", False, True, 12.5)),
    (TenantServed("gold", 10, 99.0), TenantServed(None, -5, 1.0)),
)


def test_state_comes_back() -> None:
    told = wire.State(7, (FULL, wire.PoolState("other", (), (), ())), says=True, hears=False)
    assert wire.read_state(wire.state(told)) == told


def test_push_comes_back() -> None:
    batch, _ = wire.batch([placed(1, 2)])
    told = wire.Push("5f", 8, False, ((POOL, FULL.loads), ("other", ())), batch)
    assert wire.read_push(wire.push(told)) == told
    assert wire.read_push(wire.push(wire.Push("5f", 9, True, ()))).batch == b""


def test_a_replica_with_load_takes_some_25_bytes() -> None:
    loads = tuple(PeerLoad(f"10.0.0.{i}:8000", 40, 3.217, 123_456.0) for i in range(64))
    size = len(wire.state(wire.State(1_000, (wire.PoolState(POOL, loads, (), ()),))))
    assert size < 64 * 26 + 32
    assert len(wire.push(wire.Push("0123456789abcdef", 1_000, False, ((POOL, loads[:1]),)))) < 64


def test_releases_before_and_after_are_understood() -> None:
    """One without the fields that came later, one with fields that are still to come."""
    before, after = ["10.0.0.1:8000", 1, 2, 3], ["10.0.0.1:8000", 1, 2, 3, 1, "new"]
    pools = [["default", [before, after], [], [["gold", 0, 5, "new"]], "new"]]
    old = wire.read_state(b"\x01" + wire._encoder.encode([7, pools]))
    assert (old.says, old.hears) == (False, False)
    new = wire.read_state(b"\x01" + wire._encoder.encode([7, pools, True, True, "new"]))
    assert (new.number, new.says, new.hears, new.pools) == (7, True, True, old.pools)
    [pool] = new.pools
    assert [(load.address, load.requests, load.backlog_s, load.context_tokens) for load in pool.loads] == [
        ("10.0.0.1:8000", 1, 0.002, 3.0)
    ] * 2
    assert pool.served == (TenantServed("gold", 0, 5.0),)


@pytest.mark.parametrize("read", [wire.read_state, wire.read_batch, wire.read_push])
def test_other_versions_are_told_from_garbage(read: object) -> None:
    assert callable(read)
    with pytest.raises(wire.UnknownVersionError):
        read(b"\x02" + wire.state(wire.State(1, (FULL,)))[1:])
    with pytest.raises(wire.UnreadableError):
        read(b"")
    with pytest.raises(wire.UnreadableError):
        read(b"\x01\x93")


@given(st.binary(max_size=200))
@example(b"\x92\x01\x91\x94\xa1\xff\x90\x90\x90")  # a name that is not UTF-8
@example(b"\x95\xa1\xff\x01\xc2\x90\xc4\x00")
def test_any_bytes_raise_nothing_else(data: bytes) -> None:
    for read in (wire.read_state, wire.read_batch, wire.read_push):
        for message in (data, b"\x01" + data):
            with suppress(wire.UnknownVersionError, wire.UnreadableError):
                read(message)


@given(st.lists(st.binary(min_size=256, max_size=8 * 256), max_size=12))
def test_placements_come_back_latest_first(prompts: list[bytes]) -> None:
    chains = [chain(b"model", prompt).hashes for prompt in prompts]
    given_ = [placed(*hashes, address=f"10.0.0.{i % 3}:80") for i, hashes in enumerate(chains)]
    data, left_out = wire.batch(given_)
    assert left_out == 0
    assert wire.read_batch(data) == given_[::-1]


def test_a_head_that_is_shared_is_told_once() -> None:
    head = range(1 << 60, (1 << 60) + 100)
    turns = [placed(*head, *range(i * 1_000, i * 1_000 + 5)) for i in range(1, 21)]
    data, left_out = wire.batch(turns)
    assert left_out == 0
    assert len(data) < 8 * (100 + 20 * 5) + 20 * 16
    assert wire.read_batch(data) == turns[::-1]


def test_what_does_not_fit_is_left_out_the_oldest_first() -> None:
    many = [placed(*range(i * 1_000, i * 1_000 + 120)) for i in range(100)]
    data, left_out = wire.batch(many)
    assert len(data) <= wire.MAX_BATCH_BYTES
    assert 0 < left_out < 100
    assert wire.read_batch(data) == many[left_out:][::-1]


def test_several_batches_take_what_one_cannot_and_come_in_order() -> None:
    many = [placed(*range(i * 1_000, i * 1_000 + 120)) for i in range(100)]
    found, left_out = wire.batches(many, 2)
    assert len(found) == 2
    assert 0 < left_out < 100
    assert [p for data in found for p in wire.read_batch(data)[::-1]] == many[left_out:]
    assert wire.batches([], 2) == ([], 0)
    everything, left_out = wire.batches(many, 9)
    assert (len(everything), left_out) == (4, 0)
