"""How well the simulated engine foretells a real one: `make bench-sim`, about two minutes.

Each recorded run is replayed with the engine settings recorded with it. The six constants of the step time are fitted to the
requests of one half of the run, first come or last come, and the errors are those of the other half: of another load, and in
the second half of a queue that the simulation itself has built up since the start. Even against odd requests would prove
little, for they share every step.

What the files do not tell is which prompts begin alike, so the replay shares no blocks. On the RTX 4090, which is short of
them, some do: 28 s after the start the contexts add up to 2,638 blocks, and vLLM holds them in 2,560 of its 2,587. The last
few requests of each burst then find room in reality and wait in the replay, and the first half ends later there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from extproc.sim.fit import EVALUATIONS, ROUNDS, fit
from extproc.sim.replay import Timed, replay
from extproc.sim.report import percentile
from tests.bench.recorded_runs import MissingRunsError, Run, load

OUTPUT: Final = Path("build/bench-sim.json")
HALVES: Final = {"early": "late", "late": "early"}
"""The one that is scored, and the one that is fitted to."""
WANTED: Final = {("ttft_s", "mean"): 0.10, ("ttft_s", "p99"): 0.20, ("makespan_s", ""): 0.03}
"""Largest error that we want to see."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, as it was and as it was foretold."""

    real: float
    sim: float

    @property
    def error(self) -> float:
        """As a share of the real one; above 0 where the simulation is slower."""
        return self.sim / self.real - 1 if self.real else float(self.sim > 0)

    def json(self) -> dict[str, float]:
        return {"real": self.real, "sim": self.sim, "error": self.error}


def half(requests: Sequence[Timed], name: str) -> range:
    """Places of the first or the last half to arrive; the requests are in order of arrival."""
    middle = len(requests) // 2
    return range(middle) if name == "early" else range(middle, len(requests))


def figures(real: Sequence[Timed], simulated: Sequence[Timed]) -> dict[str, Any]:
    """The same requests twice. `each` is the mean error of one request, whatever its sign. The makespan reaches from the first arrival among them to the last token."""
    found: dict[str, Any] = {}
    for name in ("queue_s", "ttft_s", "tpot_s"):
        sides = [_known(name, side) for side in (real, simulated)]
        found[name] = {
            "mean": Figure(*map(fmean, sides)).json(),
            "p99": Figure(*map(_p99, sides)).json(),
        }
    found["ttft_s"]["each"] = fmean(abs(Figure(r.ttft_s, s.ttft_s).error) for r, s in zip(real, simulated, strict=True))
    return found | {"makespan_s": Figure(_makespan_s(real), _makespan_s(simulated)).json()}


def _known(name: str, side: Sequence[Timed]) -> list[float]:
    return sorted(value for request in side if (value := getattr(request, name)) is not None)


def _p99(ordered: Sequence[float]) -> float:
    found = percentile(ordered, 99)
    assert found is not None
    return found


def _makespan_s(side: Sequence[Timed]) -> float:
    return max(t.last_token_s for t in side) - min(t.arrived_s for t in side)


def compare(run: Run, scored: str, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Fit to one half of a run, and score the other."""
    step_time = fit(run.requests, run.config, half(run.requests, HALVES[scored]), tick)
    simulated = replay(run.requests, replace(run.config, step_time=step_time))
    places = half(run.requests, scored)
    sides = [[side[i] for i in places] for side in (run.requests, simulated)]
    return {"half": scored, **figures(*sides), "constants": asdict(step_time)}


def measure(runs: Sequence[Run], console: Console) -> dict[str, Any]:
    """All runs, each scored on both halves."""
    found: dict[str, Any] = {}
    with Progress(console=console, refresh_per_second=2) as bar:
        task = bar.add_task("replaying", total=len(runs) * len(HALVES) * len(ROUNDS) * EVALUATIONS)
        for done, (run, scored) in enumerate(((run, scored) for run in runs for scored in HALVES), start=1):
            found[f"{run.name}, {scored} half"] = compare(run, scored, lambda: bar.advance(task))
            bar.update(task, completed=done * len(ROUNDS) * EVALUATIONS)
    return {"runs": found, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def misses(runs: dict[str, Any]) -> list[str]:
    """What is further off than wanted."""
    return [
        f"{name}: {what} {which} {_of(found, what, which)['error']:+.1%}".replace("  ", " ")
        for name, found in runs.items()
        for (what, which), limit in WANTED.items()
        if abs(_of(found, what, which)["error"]) > limit
    ]


def _of(found: dict[str, Any], what: str, which: str) -> dict[str, float]:
    figure: dict[str, float] = found[what][which] if which else found[what]
    return figure


ROWS: Final = (
    ("queue_s", "mean", 1.0, "s"),
    ("queue_s", "p99", 1.0, "s"),
    ("ttft_s", "mean", 1.0, "s"),
    ("ttft_s", "p99", 1.0, "s"),
    ("tpot_s", "mean", 1e3, "ms"),
    ("tpot_s", "p99", 1e3, "ms"),
    ("makespan_s", "", 1.0, "s"),
)


def table(runs: dict[str, Any]) -> Table:
    """For people; the JSON file has the constants."""
    grid = Table(
        "fitted on the other half, scored on this", title="the simulated engine against real vLLM: real, simulated"
    )
    for what, which, _, unit in ROWS:
        grid.add_column(f"{what.removesuffix('_s')} {which}\n{unit}", justify="right")
    grid.add_column("each ttft\noff by", justify="right")
    for name, found in runs.items():
        cells = []
        for what, which, scale, _ in ROWS:
            figure = _of(found, what, which)
            cells.append(f"{figure['real'] * scale:.2f}\n{figure['sim'] * scale:.2f}\n{figure['error']:+.1%}")
        grid.add_row(name, *cells, f"{found['ttft_s']['each']:.1%}", end_section=True)
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description="replay recorded runs of a real vLLM; prints a table, writes JSON")
    parser.add_argument("--runs", type=Path, help="folder with NAME_meta.json and NAME_requests.jsonl of each run")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    console = Console()
    try:
        found = measure(load(options.runs), console)
    except MissingRunsError as e:
        raise SystemExit(str(e)) from None
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    console.print(table(found["runs"]))
    for miss in misses(found["runs"]):
        console.print(f"further off than wanted: {miss}")
    console.print(f"figures in {options.output}")


if __name__ == "__main__":
    main()
