"""Our policy against those of other routers on one matrix of workloads: `make bench-routing`, under 15 minutes on two cores.

Traces x load x cache x state of knowledge x routers x fleets x failures; `tests/bench/matrix` says what each of them is, and how
load, floor and windows are defined. The quick matrix varies one thing at a time over three seeds; `make bench-routing-full`
runs the whole product over five, for which `--only trace=chat,load=0.9` picks a part, and `--sample 63` draws so many of its cells
by lot and replays them as quickly as the quick matrix. The results do not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from extproc.sim.traces import TraceError
from extproc.sim.traces.files import SOURCES
from tests.bench.matrix import cells, ignorance, page
from tests.bench.matrix.cells import Cell, CellError
from tests.bench.matrix.load import Kind, LoadError, kinds, replica_rate_per_s, total_rate_per_s
from tests.bench.matrix.runs import CLAIRVOYANT, OURS, POLICIES, Job, bounded, run
from tests.bench.matrix.summary import Row, cell_of, row, summary
from tests.bench.matrix.windows import GENERATED, RECORDED, Source

OUTPUT: Final = Path("build/bench-routing.json")
In = TypeVar("In")
Out = TypeVar("Out")
Mapper = Callable[[Callable[[In], Out], Sequence[In]], Iterable[Out]]
_STAGES: Final[Mapping[Callable[..., Any], str]] = {
    replica_rate_per_s: "saturation",
    run: "runs",
    ignorance.compare: "ignorance",
}


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is run."""

    seeds: int
    requests: int
    """Of one window; some traces have other needs (`REQUESTS`)."""
    turns: int
    """After which a session is cut."""
    evaluations: int
    """Of the search for the clairvoyant bound; with the few of the quick matrix it is 1 or 2 % too loose."""


QUICK: Final = Effort(seeds=3, requests=750, turns=6, evaluations=3000)
FULL: Final = Effort(seeds=5, requests=4000, turns=20, evaluations=150_000)
REQUESTS: Final[Mapping[str, float]] = {"azure": 2.0, "agentic": 0.75}
"""Factors: requests of 1,100 tokens are over sooner than the state of the fleet settles, those of 50,000 take long to simulate."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run: every policy in every cell on every seed."""

    sources: Mapping[str, Source]
    cells: Sequence[Cell]
    policies: Sequence[str]
    seeds: Sequence[int]
    evaluations: int = 0
    """Of the search for the clairvoyant bound; 0 leaves it out."""
    ignorance: Sequence[Cell] = ()
    """In which it is measured what ignorance costs our policy."""


def sources(effort: Effort, folder: Path | None, extra: Sequence[Path]) -> dict[str, Source]:
    """Every trace that there is, by name. Raises TraceError for a file that is not there."""
    recorded = {name: folder / file for name, file in RECORDED.items()} if folder else {}
    recorded |= {path.stem: path for path in extra}
    for path in recorded.values():
        if not path.is_file():
            raise TraceError(f"{path}: no such file; {SOURCES}")
    paths: dict[str, Path | None] = {**recorded, **dict.fromkeys(GENERATED)}
    return {
        name: Source(name, int(effort.requests * REQUESTS.get(name, 1.0)), effort.turns, path)
        for name, path in paths.items()
    }


def measure(plan: Plan, each: Mapper[Any, Any]) -> dict[str, Any]:
    """All runs. `each` maps a function over jobs, in order. Raises LoadError, TraceError."""
    saturation = _saturation(plan, each)
    jobs = list(_jobs(plan, saturation))
    found: dict[tuple[Cell, str | None], dict[int, Any]] = {}
    for job, result in zip(jobs, each(run, jobs), strict=True):
        if result is not None:
            found.setdefault((job.cell, job.policy), {})[job.seed] = result
    rows = [
        row(cell, policy, figures, found[cell, None]) for (cell, policy), figures in found.items() if policy is not None
    ]
    ordered = _in_order(rows, plan)
    ignorant = _ignorance(plan, saturation, each)
    return {"cells": ordered, "summary": summary(ordered) | ignorance.summary(ignorant), "ignorance": ignorant}


def _ignorance(
    plan: Plan, saturation: Mapping[tuple[Cell, int], float], each: Mapper[Any, Any]
) -> list[ignorance.Entry]:
    jobs = [
        Job(cell, plan.sources[cell.trace], seed, OURS, saturation[cell, seed])
        for cell in plan.ignorance
        for seed in plan.seeds
    ]
    found: dict[Cell, list[Mapping[str, ignorance.Pair]]] = {}
    for job, result in zip(jobs, each(ignorance.compare, jobs), strict=True):
        found.setdefault(job.cell, []).append(result)
    return [entry for cell, seeds in found.items() for entry in ignorance.entries(cell, seeds)]


def _saturation(plan: Plan, each: Mapper[Any, Any]) -> dict[tuple[Cell, int], float]:
    """Requests a second that the fleet of a cell can take."""
    every_cell = dict.fromkeys((*plan.cells, *plan.ignorance))
    needed = {(cell, seed): kinds(cell, plan.sources[cell.trace], seed) for cell in every_cell for seed in plan.seeds}
    every = list(dict.fromkeys(kind for found in needed.values() for kind, _ in found))
    every.sort(key=_window_of)
    rates: dict[Kind, float] = dict(zip(every, each(replica_rate_per_s, every), strict=True))
    return {key: total_rate_per_s([(rates[kind], n) for kind, n in found]) for key, found in needed.items()}


def _jobs(plan: Plan, saturation: Mapping[tuple[Cell, int], float]) -> Iterator[Job]:
    """Those of one window follow each other, so that a process makes it once."""
    for trace in dict.fromkeys(cell.trace for cell in plan.cells):
        for seed in plan.seeds:
            for cell in (cell for cell in plan.cells if cell.trace == trace):
                policies = (None, *plan.policies, *([CLAIRVOYANT] if plan.evaluations and bounded(cell) else []))
                for policy in policies:
                    yield Job(cell, plan.sources[trace], seed, policy, saturation[cell, seed], plan.evaluations)


def _window_of(kind: Kind) -> tuple[str, int]:
    return kind.source.name, kind.seed


def _in_order(rows: Iterable[Row], plan: Plan) -> list[Row]:
    policies = {policy: place for place, policy in enumerate((*plan.policies, CLAIRVOYANT))}
    places = {cell: place for place, cell in enumerate(plan.cells)}
    return sorted(rows, key=lambda each: (places[cell_of(each)], policies[each["policy"]]))


# --- processes ----------------------------------------------------------------------------------------------------------


def in_process(function: Callable[[In], Out], jobs: Sequence[In]) -> Iterator[Out]:
    """One after the other, here."""
    return map(function, jobs)


@contextmanager
def pool(
    processes: int, console: Console, stages: Mapping[Callable[..., Any], str] = _STAGES
) -> Iterator[Mapper[Any, Any]]:
    """Maps over jobs in several processes, in their order, and shows how far it is. `stages`: what is mapped, and how it is called."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = get_context("spawn")  # a fork would depend on what this process has loaded
    with (
        ProcessPoolExecutor(processes, context, tuned) as executor,
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress,
    ):

        def each(function: Callable[[In], Out], jobs: Sequence[In]) -> Iterator[Out]:
            task = progress.add_task(stages[function], total=len(jobs))
            for result in executor.map(function, jobs):
                progress.advance(task)
                yield result

        yield each


def tuned() -> None:
    """As `extproc simulate`: with the default thresholds the collector takes a tenth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


# --- the command --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    console = Console()
    console = console if console.is_terminal else Console(width=240)
    started = time.monotonic()
    try:
        plan = _plan(options)
        _say(console, plan, options)
        with pool(options.jobs, console) as each:
            document = measure(plan, each)
    except (TraceError, CellError, LoadError) as e:
        raise SystemExit(str(e)) from None
    took_s = time.monotonic() - started
    _write(options, document | {"took_s": round(took_s, 1)})
    console.print(page.console_table(document["cells"]))
    if document["ignorance"]:
        console.print(page.console_ignorance(document["ignorance"]))
    for line in page.console_summary(document["summary"]):
        console.print(line)
    console.print(f"{took_s / 60:.1f} minutes; figures in {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="compare routing policies in virtual time; prints a table, writes JSON"
    )
    parser.add_argument("--full", action="store_true", help="the whole product of settings, longer windows, five seeds")
    parser.add_argument(
        "--sample",
        type=int,
        help="so many cells of the whole product, drawn by lot (the same each time), in windows of the quick matrix",
    )
    parser.add_argument("--traces", type=Path, help=f"folder with {', '.join(RECORDED.values())}")
    parser.add_argument("--trace", type=Path, action="append", default=[], help="a further trace file; repeatable")
    parser.add_argument("--only", action="append", default=[], help="cells such as trace=chat,load=0.9; repeatable")
    parser.add_argument("--policy", action="append", choices=POLICIES, help=f"only {OURS} and this one; repeatable")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--requests", type=int, help="of one window")
    parser.add_argument("--evaluations", type=int, help="of the search for the clairvoyant bound; 0 leaves it out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--docs", type=Path, help="write the page here as well")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    """Raises TraceError, CellError."""
    effort = FULL if options.full else QUICK
    given = {
        name: value for name in ("seeds", "requests", "evaluations") if (value := getattr(options, name)) is not None
    }
    effort = replace(effort, **given)
    found = sources(effort, options.traces, options.trace)
    every = _cells(options, list(found))
    chosen = cells.only(every, options.only)
    if not chosen:
        raise CellError(f"no cell is left by --only; there are {len(every)}, such as {every[0]}")
    others = [policy for policy in POLICIES if policy != OURS and policy in (options.policy or POLICIES)]
    if not others:
        raise CellError(f"--policy {OURS} alone compares nothing; name a baseline as well")
    seeds = range(1, effort.seeds + 1)
    ignorant = cells.only(ignorance.bases(found), options.only)
    return Plan(found, chosen, (OURS, *others), seeds, effort.evaluations, ignorant)


def _cells(options: argparse.Namespace, traces: Sequence[str]) -> list[Cell]:
    if options.sample is not None:
        return cells.sample(traces, options.sample)
    return (cells.full if options.full else cells.quick)(traces)


def _say(console: Console, plan: Plan, options: argparse.Namespace) -> None:
    runs = len(plan.cells) * len(plan.policies) * len(plan.seeds)
    console.print(f"{len(plan.cells)} cells x {len(plan.policies)} policies x {len(plan.seeds)} seeds: {runs:,} runs")
    if options.traces is None:
        console.print(f"generated traces only; --traces DIR (TRACES=DIR with make) adds recorded ones: {SOURCES}")


def _write(options: argparse.Namespace, document: dict[str, Any]) -> None:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(finite(document), indent=1) + "\n")
    if options.docs:
        options.docs.write_text(page.markdown(document, command(sys.argv[1:])))


def command(arguments: Sequence[str], module: str = "tests.bench.routing") -> str:
    """How to get the same again; folders of this machine are left out."""
    shown, paths = [], {"--traces": "DIR", "--trace": "FILE", "--output": None, "--docs": None, "--jobs": None}
    words = iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in paths:
            shown.append(shlex.quote(word))
            continue
        if not equals:
            next(words, None)
        if stands := paths[name]:
            shown += [name, stands]
    return " ".join([f"python -m {module}", *shown])


def finite(value: Any) -> Any:
    """Rounded, and what is infinite as null, which JSON has no other word for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
