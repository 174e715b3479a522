"""The soak, short: what it checks can fail."""

from __future__ import annotations

import pytest

from extproc.core.types import End
from tests.bench.soak import Soak, lines


def test_every_request_ends_once_and_nothing_is_left() -> None:
    soak = Soak(seed=3)
    for _ in range(3000):
        soak.step()
    soak.finish()
    assert soak.tally.sent == 3000
    assert soak.tally.ends[End.OK] > 2000
    assert soak.tally.ends["lost"] > 0


def test_an_end_that_is_not_told_is_found() -> None:
    soak = Soak(seed=3)
    for _ in range(100):
        soak.step()
    flight = next(name for _, _, what, name in soak.due if what == End.OK)
    soak.router.ledger.close(flight)  # lost without a trace
    with pytest.raises(AssertionError):
        soak.finish()


def test_growth_is_said() -> None:
    assert list(lines({"growth": 1.06})) == ["memory grew by 6.0% after the warm-up, wanted 5% at most"]
    assert not list(lines({"growth": 1.05}))
