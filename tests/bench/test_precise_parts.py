"""The comparison of exact and approximate knowledge of caches, on a window of a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from extproc.sim.traces import TraceError
from tests.bench.matrix.windows import Source
from tests.bench.precise import APPROXIMATE, Place, Way, cost, measure, sources, summary, table
from tests.bench.routing import in_process

SMALL = Source("siblings", 150, 2)


def test_ways_are_told_apart_on_the_same_windows() -> None:
    ways = (APPROXIMATE, Way(0.0), Way(0.0, pending=False))
    document = measure([Place(SMALL, 1, "hbm"), Place(SMALL, 1, "third")], ways, in_process)
    cells = {(cell["cache"], cell["way"]): cell for cell in document["cells"]}
    assert len(cells) == 6
    for cache in ("hbm", "third"):
        guessed, exact, unsent = (cells[cache, str(way)] for way in ways)
        assert (guessed["gain_ttft"], guessed["exact"]) == (0.0, 0.0)
        assert exact["right"] > max(guessed["right"], unsent["right"])
        assert exact["exact"] > 0.9
        assert exact["failed"] == unsent["failed"] == 0
    assert document["right"].keys() == {"approximate", "0 ms", "0 ms, without pending"}
    assert table(document).row_count == 6


def test_gains_are_geometric_means_over_traces_and_caches() -> None:
    cells = [
        {"way": "approximate", "gain_ttft": 0.0, "right": 0.5},
        {"way": "2 ms", "gain_ttft": 0.5, "right": 1.0},
        {"way": "2 ms", "gain_ttft": -1.0, "right": 0.9},
    ]
    found = summary(cells)
    assert found["gain_ttft"] == pytest.approx(0.0)
    assert found["gain_ttft_by_lag"] == {"2 ms": pytest.approx(0.0)}
    assert found["right"] == {"approximate": 0.5, "2 ms": 0.95}


def test_the_cost_of_asking_is_measured() -> None:
    assert all(us > 0 for us in cost(1000, 2, rounds=2).values())


def test_recorded_traces_are_there_only_when_asked_for(tmp_path: Path) -> None:
    assert [source.name for source in sources(None, 100)] == ["chat", "siblings", "hot"]
    with pytest.raises(TraceError, match=r"mooncake_conversation\.jsonl: no such file"):
        sources(tmp_path, 100)
