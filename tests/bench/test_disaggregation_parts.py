"""The comparison of rules for splitting, on a few sessions."""

from __future__ import annotations

import pytest

from tests.bench.disaggregation import RULES, TOGETHER, Cell, Figures, Source, figures, measure, play, summary, table


def test_rules_differ_in_what_they_split_alone() -> None:
    cells = measure([Source("small", 2000, 4.0, sessions=30)], prefills=(2,))
    found = {cell.rule: cell.figures for cell in cells if cell.seed == 1}
    assert found.keys() == RULES.keys()
    assert found["always"].split > 0.95  # all but those that came before anything was heard of the replicas
    assert found["never"].split == found[TOGETHER].split == 0.0
    assert 0.0 <= found["cost"].split < 1.0
    assert found["threshold 256"].split > found["threshold 4096"].split
    assert table(cells).row_count == len(RULES)


def test_the_same_run_twice_gives_the_same_figures() -> None:
    trace = Source("small", 800, 4.0, sessions=10).trace(1)
    assert figures(play(trace, 2, RULES["cost"], 1)) == figures(play(trace, 2, RULES["cost"], 1))


def test_a_threshold_counts_with_its_best() -> None:
    def cell(rule: str, ttft_s: float) -> Cell:
        return Cell("t", 2, 1, rule, Figures(ttft_s, 0.01, 1.0, 0.5, 0, 2.0))

    cells = [cell("cost", 1.0), cell("always", 4.0), cell("never", 2.0), cell(TOGETHER, 0.5)]
    cells += [cell("threshold 256", 5.0), cell("threshold 1024", 1.25)]
    found = summary(cells)
    assert found["vs_always"] == pytest.approx(0.25)
    assert found["vs_never"] == pytest.approx(0.5)
    assert found["vs_threshold"] == pytest.approx(0.8)
    assert found["vs_together"] == pytest.approx(2.0)
