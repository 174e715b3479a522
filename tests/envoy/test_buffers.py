"""Claims on the bytes that request bodies may take up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.envoy.buffers import Buffers


def test_what_fits_is_counted_and_given_back() -> None:
    buffers = Buffers(100)
    one, other = buffers.claim(), buffers.claim()
    assert one.resize(60)
    assert not other.resize(41)
    assert (buffers.held, other.size) == (60, 0)
    assert other.resize(40)
    assert one.resize(10)
    assert repr(buffers) == "<buffers 50 of 100 B>"
    one.close()
    other.close()
    assert buffers.held == 0


def test_a_claim_ends_once() -> None:
    claim = Buffers(100).claim()
    claim.close()
    assert repr(claim) == "<claim 0 B, closed>"
    with pytest.raises(RuntimeError, match="is over"):
        claim.close()
    with pytest.raises(RuntimeError, match="is over"):
        claim.resize(1)


@given(steps=st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(0, 60)), max_size=40))
def test_the_sum_is_exact_and_never_above_the_limit(steps: list[tuple[int, int | None]]) -> None:
    buffers = Buffers(100)
    claims = {i: buffers.claim() for i in range(5)}
    for i, size in steps:
        if size is None:
            claims.pop(i, buffers.claim()).close()
            claims[i] = buffers.claim()
        else:
            fits = buffers.held - claims[i].size + size <= 100 or size <= claims[i].size
            assert claims[i].resize(size) == fits
        assert buffers.held == sum(claim.size for claim in claims.values()) <= 100
    for claim in claims.values():
        claim.close()
    assert buffers.held == 0
