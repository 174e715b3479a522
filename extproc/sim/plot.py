"""A page with three kinds of curves for simulated runs: TTFT and end-to-end distributions, and the load of each replica.

One HTML file with SVG in it, and nothing that is fetched: it opens anywhere and can be mailed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from extproc.core.types import End
from extproc.sim.cluster import Result
from extproc.sim.node import Node

_WIDTH, _HEIGHT = 640, 260
_LEFT, _BOTTOM, _TOP, _RIGHT = 56, 34, 12, 12
_POINTS: Final = 300
"""Of one curve: more cannot be seen."""
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b0a000")
"""Told apart by the colour-blind as well (Okabe and Ito)."""

Curve = list[tuple[float, float]]


def page(title: str, results: Mapping[str, Result]) -> str:
    """The whole document."""
    ttft = {name: [s.ttft_s for s in r.served if s.end is End.OK and s.ttft_s] for name, r in results.items()}
    e2e = {name: [s.e2e_s for s in r.served if s.end is End.OK and s.e2e_s] for name, r in results.items()}
    parts = [
        _section("Time to first token, seconds: share of requests that had it by then", _distributions(ttft)),
        _section("End to end, seconds: share of requests answered by then", _distributions(e2e)),
        *(
            _section(f"Requests on each replica over time, seconds: {name}", _loads(result.nodes))
            for name, result in results.items()
        ),
    ]
    style = "body{font:14px system-ui;margin:2em;max-width:60em}h2{font-size:1em}svg text{font:11px system-ui}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{style}</style><h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<h2>{escape(heading)}</h2>{body}"


def _distributions(values: Mapping[str, list[float]]) -> str:
    curves = {name: _cumulative(v) for name, v in values.items() if v}
    return _chart(curves, log_x=True)


def _loads(nodes: Sequence[Node]) -> str:
    curves = {
        node.address.partition(":")[0]: _thinned([(at, float(r + w)) for at, r, w in node.loads]) for node in nodes
    }
    return _chart({name: curve for name, curve in curves.items() if curve}, log_x=False)


def _cumulative(values: list[float]) -> Curve:
    ordered = sorted(values)
    n = len(ordered)
    return _thinned([(value, (i + 1) / n) for i, value in enumerate(ordered)])


def _thinned(curve: Curve) -> Curve:
    """At most so many points, the last among them; where points are left out, the mean of what they show would lie."""
    step = max(1, math.ceil(len(curve) / _POINTS))
    kept = curve[::step]
    return kept if not curve or kept[-1] == curve[-1] else [*kept, curve[-1]]


@dataclass(frozen=True, slots=True)
class _Axes:
    """Values to places on the drawing."""

    low: float
    high: float
    top: float
    log_x: bool

    def x(self, value: float) -> float:
        low, high = self._on_scale(self.low), self._on_scale(self.high)
        share = (self._on_scale(max(value, self.low)) - low) / ((high - low) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / (self.top or 1.0) * (_HEIGHT - _BOTTOM - _TOP)

    def _on_scale(self, value: float) -> float:
        return math.log10(value) if self.log_x else value

    def ticks(self) -> list[float]:
        """Round values along the x axis."""
        if self.log_x:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [10.0**p for p in powers if self.low <= 10.0**p <= self.high]
        step = 10.0 ** math.floor(math.log10(max(self.high, 1.0)))
        step = step if self.high / step >= 4 else step / 4
        return [i * step for i in range(int(self.high / step) + 1)]


def _chart(curves: Mapping[str, Curve], log_x: bool) -> str:
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return "<p>nothing to show</p>"
    xs = [x for x, _ in points if x > 0 or not log_x]
    axes = _Axes(min(xs), max(xs), max(y for _, y in points), log_x)
    lines = "".join(_line(axes, curve, _COLOURS[i % len(_COLOURS)]) for i, curve in enumerate(curves.values()))
    view = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">'
    return f"{view}{_frame(axes)}{lines}</svg><p>{_legend(curves)}</p>"


def _frame(axes: _Axes) -> str:
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<path d="M{left} {_TOP}V{bottom}H{right}" fill="none" stroke="#888"/>']
    for tick in axes.ticks():
        x = axes.x(tick)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for share in (0.0, 0.5, 1.0):
        value = share * axes.top
        parts.append(f'<text x="{left - 6}" y="{axes.y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    return "".join(parts)


def _line(axes: _Axes, curve: Curve, colour: str) -> str:
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in curve)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _legend(names: Iterable[str]) -> str:
    return " ".join(
        f'<span style="color:{_COLOURS[i % len(_COLOURS)]}">&#9632; {escape(name)}</span>'
        for i, name in enumerate(names)
    )
