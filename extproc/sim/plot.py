"""Curves of simulated runs, as one HTML file that fetches nothing (SVG in it) or as one PNG.

For each load, side by side: the distributions of TTFT and of the time to the end by policy, and the requests on each replica
over time under each policy. Last, goodput against the offered load. Needs matplotlib (the extra `plot`); nothing else imports this module
before it is asked for.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from extproc.sim.simulate_report import Curves, Load

SUFFIXES: Final = (".html", ".htm", ".png")
_PANEL_INCHES: Final = (7.0, 3.0)
_DPI: Final = 100
_MAX_PIXELS: Final = 60_000
"""Of either side of a PNG; Agg refuses more than 65,535."""
_POINTS: Final = 150
"""Of the load of a replica."""
_SHOWN: Final = 16
"""Lines that a legend names; more would hide them."""
_STYLE: Final[dict[Any, Any]] = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(linestyle=["-", "--"]) * cycler(color=matplotlib.color_sequences["petroff10"]),
    # Petroff (2021): colours that the colour-blind can tell apart; the second ten lines are dashed.
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched and copied
    "svg.hashsalt": "extproc",  # ids of SVG elements would be random otherwise
    "text.parse_math": False,  # a `$` in the name of a policy is one
}

Panel = Callable[[Axes], None]
"""Draws one chart."""


def write(path: Path, title: str, loads: Sequence[Load]) -> None:
    """All charts into one file; its suffix, one of `SUFFIXES`, tells the format. The same runs write the same bytes.

    Raises OSError.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc would change the bytes
        matplotlib.rcParams.update(_STYLE)
        figure = _figure(title, loads)
        path.write_bytes(_png(figure) if path.suffix == ".png" else _html(title, figure))


def _figure(title: str, loads: Sequence[Load]) -> Figure:
    """A column for each load; goodput, which is about all of them, below."""
    columns = [list(_panels(load)) for load in loads]
    rows = len(columns[0]) + 1
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(len(loads) * width, rows * height), layout="constrained")
    figure.suptitle(title)
    for row, panels in enumerate(zip(*columns, strict=True)):
        for column, draw in enumerate(panels, 1):
            _draw(figure.add_subplot(rows, len(loads), row * len(loads) + column), draw)
    _draw(figure.add_subplot(rows, len(loads), (rows - 1) * len(loads) + 1), partial(_goodput, loads))
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    panel(axes)
    if len(axes.lines) <= _SHOWN:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _panels(load: Load) -> Iterator[Panel]:
    at = f", speed-up {load.speed_up:g}"
    yield partial(_distribution, f"Time to first token{at}", {name: c.ttft_s for name, c in load.curves.items()})
    yield partial(_distribution, f"End to end{at}", {name: c.e2e_s for name, c in load.curves.items()})
    for policy, curves in load.curves.items():
        yield partial(_replicas, f"Load of each replica: {policy}{at}", curves)


def _distribution(title: str, values: Mapping[str, Sequence[float]], axes: Axes) -> None:
    """Cumulative, over seconds on a log scale."""
    axes.set(title=title, xscale="log", xlabel="seconds", ylabel="share of whole answers by then")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    for policy, each in values.items():
        axes.plot(sorted(each), [(i + 1) / len(each) for i in range(len(each))], label=policy)


def _replicas(title: str, curves: Curves, axes: Axes) -> None:
    axes.set(title=title, xlabel="virtual time, seconds", ylabel="requests, running and waiting")
    for address, points in curves.requests.items():
        at_s, requests = _smooth(points)
        axes.plot(at_s, requests, label=address.partition(":")[0])


def _goodput(loads: Sequence[Load], axes: Axes) -> None:
    """A line per policy with a point per load."""
    axes.set(title="Goodput against offered load", xlabel="offered, requests/s", ylabel="within the SLO, requests/s")
    for policy in loads[0].curves:
        runs = [load.runs[policy] for load in loads]
        points = sorted((r["offered_requests_per_s"] or 0.0, r["goodput_requests_per_s"] or 0.0) for r in runs)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=policy)
    axes.set(xlim=(0, None), ylim=(0, None))


def _smooth(points: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    """Times and means over stretches of equal length: a line through every point of an hour would fill the panel."""
    size = math.ceil(len(points) / _POINTS)
    stretches = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [s[0][0] for s in stretches], [fmean(n for _, n in s) for s in stretches]


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    dpi = min(_DPI, _MAX_PIXELS / max(figure.get_size_inches()))
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def _html(title: str, figure: Figure) -> bytes:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    _, tag, rest = out.getvalue().partition("<svg")  # what comes before is for a file of its own
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    return f"{head}{tag}{rest}</html>\n".encode()
