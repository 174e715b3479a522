"""From runs to rows, and from rows to the few numbers that sum them up. A row is a JSON object: one policy in one cell.

Ratios below 1 are better for times, above 1 for goodput. Over cells they are geometric means, so that a cell in which everything
takes long weighs no more than another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from statistics import fmean
from typing import Any, Final

from tests.bench.matrix.cells import Cell
from tests.bench.matrix.runs import CLAIRVOYANT, OURS, Figures

Row = dict[str, Any]
Group = Mapping[str, Row]
"""The rows of one cell, by policy."""

MEASURES: Final = ("ttft_mean_s", "e2e_mean_s", "goodput")
GOODPUT_FLOOR: Final = 1e-3
"""Less counts as this much in ratios, or one cell in which nothing is in time would decide over all others."""
PARTS: Final = ("fleet", "routers", "state", "fault")
"""What cells are grouped by, to see where the gain comes from."""
_KEYS: Final = tuple(f.name for f in fields(Cell))


def row(cell: Cell, policy: str, seeds: Mapping[int, Figures], floors: Mapping[int, float]) -> Row:
    """Means over the seeds; `spread` has the least and the greatest, `seeds` each. Errors and requests are sums."""
    names = [f.name for f in fields(Figures)]
    columns = {name: [getattr(figures, name) for figures in seeds.values()] for name in names}
    counts = {name: sum(columns.pop(name)) for name in ("errors", "requests")}
    floor_s = fmean(floors[seed] for seed in seeds)
    means = {name: fmean(values) for name, values in columns.items()}
    return {
        **asdict(cell),
        "policy": policy,
        **means,
        **counts,
        "floor_s": floor_s,
        "avoidable_s": means["ttft_mean_s"] - floor_s,
        "spread": {name: [min(values), max(values)] for name, values in columns.items()},
        "seeds": {str(seed): asdict(figures) | {"floor_s": floors[seed]} for seed, figures in seeds.items()},
    }


def groups(rows: Iterable[Row]) -> dict[Cell, dict[str, Row]]:
    """The rows of each cell, by policy, in the order of the rows."""
    found: dict[Cell, dict[str, Row]] = {}
    for each in rows:
        found.setdefault(cell_of(each), {})[each["policy"]] = each
    return found


def cell_of(row: Row) -> Cell:
    """The cell that a row belongs to."""
    return Cell(*(row[key] for key in _KEYS))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """`predicted` against the best single baseline of each measure, and in its worst cells against the best of the cell."""
    cells = groups(rows)
    best = {measure: best_single(cells.values(), measure) for measure in MEASURES}
    worst = {measure: worst_cell(cells, measure) for measure in MEASURES}
    gaps = clairvoyant_gaps(cells)
    return {
        "best_baseline": best["ttft_mean_s"],
        "best_baseline_e2e": best["e2e_mean_s"],
        "best_baseline_goodput": best["goodput"],
        "ttft_geomean_ratio": mean_ratio(cells.values(), OURS, best["ttft_mean_s"], "ttft_mean_s"),
        "e2e_geomean_ratio": mean_ratio(cells.values(), OURS, best["e2e_mean_s"], "e2e_mean_s"),
        "goodput_ratio": mean_ratio(cells.values(), OURS, best["goodput"], "goodput"),
        "worst_cell_ttft_ratio": worst["ttft_mean_s"][0],
        "worst_cell_e2e_ratio": worst["e2e_mean_s"][0],
        "worst_cell_goodput_ratio": worst["goodput"][0],
        "worst_cells": {measure: str(cell) for measure, (_, cell) in worst.items()},
        "clairvoyant_ttft_gap": max((gap for _, gap in gaps), default=None),
        "clairvoyant_gaps": [{"cell": str(cell), "gap": gap} for cell, gap in gaps],
        "policies": {policy: _against_ours(cells.values(), policy) for policy in baselines(cells.values())},
        "traces": by("trace", cells, best),
        "parts": {key: by(key, cells, best) for key in PARTS},
    }


def baselines(cells: Iterable[Group]) -> list[str]:
    """The policies that are compared with ours."""
    return [p for p in dict.fromkeys(p for cell in cells for p in cell) if p not in (OURS, CLAIRVOYANT)]


def best_single(cells: Iterable[Group], measure: str) -> str:
    """The baseline with the best geometric mean over all cells."""
    every = list(cells)
    return _best(measure, {p: geomean(_value(c[p], measure) for c in every) for p in baselines(every)})


def best_of(cell: Group, measure: str) -> str:
    """The baseline that is best in this cell."""
    return _best(measure, {p: _value(cell[p], measure) for p in baselines([cell])})


def ratio(cell: Group, policy: str, other: str, measure: str) -> float:
    """The one's figure over the other's."""
    return _value(cell[policy], measure) / _value(cell[other], measure)


def ratio_spread(cell: Group, policy: str, other: str, measure: str) -> tuple[float, float]:
    """The least and the greatest ratio of the seeds, each of the same requests."""
    one, two = cell[policy]["seeds"], cell[other]["seeds"]
    ratios = [_value(one[seed], measure) / _value(two[seed], measure) for seed in one]
    return min(ratios), max(ratios)


def mean_ratio(cells: Iterable[Group], policy: str, other: str, measure: str) -> float:
    """Geometric mean of the ratios."""
    return geomean(ratio(cell, policy, other, measure) for cell in cells)


def worst_cell(cells: Mapping[Cell, Group], measure: str) -> tuple[float, Cell]:
    """Where ours does worst against the best baseline of the cell, and how it does."""
    found = [(ratio(group, OURS, best_of(group, measure), measure), cell) for cell, group in cells.items()]
    return _first_best(found, min if measure == "goodput" else max)


def clairvoyant_gaps(cells: Mapping[Cell, Group]) -> list[tuple[Cell, float]]:
    """How much longer the mean TTFT of ours is than that of the bound, as a share, in each cell that has it."""
    return [
        (cell, ratio(group, OURS, CLAIRVOYANT, "ttft_mean_s") - 1)
        for cell, group in cells.items()
        if CLAIRVOYANT in group
    ]


def by(key: str, cells: Mapping[Cell, Group], best: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Geometric means of the cells alike in this, against the best single baselines of the whole matrix, and how many they are."""
    alike: dict[str, list[Group]] = {}
    for cell, group in cells.items():
        alike.setdefault(str(getattr(cell, key)), []).append(group)
    return {
        value: {"cells": len(chosen)} | {m: mean_ratio(chosen, OURS, best[m], m) for m in MEASURES}
        for value, chosen in alike.items()
    }


def _against_ours(cells: Iterable[Group], policy: str) -> dict[str, float]:
    every = list(cells)
    ratios = {measure: mean_ratio(every, policy, OURS, measure) for measure in MEASURES}
    return ratios | {"errors": sum(cell[policy]["errors"] for cell in every)}


def _value(figures: Mapping[str, Any], measure: str) -> float:
    return valued(measure, float(figures[measure]))


def valued(measure: str, value: float) -> float:
    """As it counts in ratios."""
    return max(value, GOODPUT_FLOOR) if measure == "goodput" else value


def _best(measure: str, values: Mapping[str, float]) -> str:
    return (max if measure == "goodput" else min)(values, key=values.__getitem__)


def _first_best(found: Sequence[tuple[float, Cell]], choose: Callable[[Iterable[float]], float]) -> tuple[float, Cell]:
    extreme = choose(value for value, _ in found)
    return next(each for each in found if each[0] == extreme)


def geomean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    return math.exp(fmean(math.log(value) for value in values))
