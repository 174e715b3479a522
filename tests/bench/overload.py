"""What late binding gains, and what it costs: `make bench-overload`, under five minutes on two cores.

Windows of traces at 0.7, 1.0 and 1.2 times the load that the fleet can take, each on the same router with its queue and without it.
`overload_runs` says what saturation is, who asks, and what is counted. The results do not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from rich.console import Console

from extproc.sim.traces import TraceError
from extproc.sim.traces.files import SOURCES
from extproc.sim.traces.marks import FLOODING, MODEST
from tests.bench import overload_page as page
from tests.bench.matrix.load import LoadError
from tests.bench.matrix.summary import geomean
from tests.bench.matrix.windows import RECORDED, Source
from tests.bench.overload_runs import Case, Clients, Job, Place, fairness, run, saturation
from tests.bench.routing import Mapper, command, finite, pool

OUTPUT: Final = Path("build/bench-overload.json")
PAGE: Final = Path("docs/benchmark-overload.md")
OVERLOAD: Final = 1.2
LOADS: Final = (0.7, 1.0, OVERLOAD)
SEEDS: Final = 3
TURNS: Final = 6
"""After which a session is cut."""
GENERATED: Final[Mapping[str, int]] = {"chat": 3000, "siblings": 3000, "documents": 3000}
"""Trace -> requests of a window: some minutes at saturation, so that what piles up decides and not how it begins."""
REQUESTS: Final[Mapping[str, int]] = {"conversation": 3000, "agentic": 1500, "azure": 12_000}
_STAGES: Final[Mapping[Callable[..., Any], str]] = {saturation: "saturation", run: "runs"}

Cell = dict[str, Any]


def sources(folder: Path | None, requests: int | None = None) -> list[Source]:
    """Every trace that there is. `requests`: of a window, whatever the trace. Raises TraceError for a file that is not there."""
    recorded = {name: folder / file for name, file in RECORDED.items()} if folder else {}
    for path in recorded.values():
        if not path.is_file():
            raise TraceError(f"{path}: no such file; {SOURCES}")
    sizes = {**(REQUESTS if folder else {}), **GENERATED}
    return [Source(name, requests or size, TURNS, recorded.get(name)) for name, size in sizes.items()]


def settings() -> Iterator[tuple[Case, float]]:
    """What is run of each window, with the queue and without."""
    yield from ((Case.PRIORITY, load) for load in LOADS)
    yield from ((case, OVERLOAD) for case in (Case.SLO, Case.FLOOD))


def measure(places: Sequence[Place], each: Mapper[Any, Any]) -> dict[str, Any]:
    """All runs. `each` maps a function over jobs, in order. Raises LoadError, TraceError."""
    rates = dict(zip(places, each(saturation, places), strict=True))
    jobs = [Job(p, *how, queue, rates[p]) for p, how, queue in product(places, settings(), (False, True))]
    found: dict[tuple[str, Case, float, bool], dict[int, dict[str, Clients]]] = {}
    for job, result in zip(jobs, each(run, jobs), strict=True):
        found.setdefault((job.place.source.name, job.case, job.load, job.queue), {})[job.place.seed] = result
    cells = [cell(*setting, seeds) for setting, seeds in found.items()]
    saturations: dict[str, dict[str, float]] = {}
    for place, rate in rates.items():
        saturations.setdefault(place.source.name, {})[str(place.seed)] = rate
    return {"saturation_per_s": saturations, "cells": cells, "summary": summary(cells)}


def cell(trace: str, case: Case, load: float, queue: bool, seeds: Mapping[int, Mapping[str, Clients]]) -> Cell:
    """One setting with its figures: means over the seeds, and for each seed."""
    first = next(iter(seeds.values()))
    means = {kind: _means([found[kind] for found in seeds.values()]) for kind in first}
    single: dict[str, Any] = {str(s): {k: asdict(c) for k, c in found.items()} for s, found in seeds.items()}
    if case is Case.FLOOD:
        for seed, found in seeds.items():
            single[str(seed)]["jain"] = fairness([found[MODEST], found[FLOODING]])
    return {"trace": trace, "case": case.value, "load": load, "queue": queue, "kinds": means, "seeds": single} | (
        {"jain": fmean(one["jain"] for one in single.values())} if case is Case.FLOOD else {}
    )


def _means(alike: Sequence[Clients]) -> dict[str, float]:
    return {f.name: fmean(getattr(each, f.name) for each in alike) for f in fields(Clients)}


def summary(cells: Sequence[Cell]) -> dict[str, float]:
    """Over all traces and seeds: geometric means of times with the queue over those without it, means of shares."""
    figures: dict[str, float] = {}
    for load in sorted({c["load"] for c in cells}):
        at = [c for c in cells if c["load"] == load]
        figures |= {
            f"urgent_ttft_p50_ratio_{load:g}": _ratio(at, Case.PRIORITY, "urgent", "ttft_p50_s"),
            f"urgent_ttft_p99_ratio_{load:g}": _ratio(at, Case.PRIORITY, "urgent", "ttft_p99_s"),
            f"others_ttft_p50_ratio_{load:g}": _ratio(at, Case.PRIORITY, "others", "ttft_p50_s"),
            f"ttft_mean_ratio_{load:g}": _ratio(at, Case.PRIORITY, "all", "ttft_mean_s"),
            f"e2e_mean_ratio_{load:g}": _ratio(at, Case.PRIORITY, "all", "e2e_mean_s"),
        } | _both(at, Case.PRIORITY, "all", ("goodput", "ttft_met"), f"_{load:g}")
    over = [c for c in cells if c["load"] == OVERLOAD]
    figures |= _both(over, Case.PRIORITY, "urgent", ("goodput", "ttft_met"), "_urgent")
    figures |= _both(over, Case.SLO, "all", ("goodput", "ttft_met"), "_asked")
    figures |= {
        "modest_ttft_p50_ratio": _ratio(over, Case.FLOOD, MODEST, "ttft_p50_s"),
        "modest_ttft_p99_ratio": _ratio(over, Case.FLOOD, MODEST, "ttft_p99_s"),
        "modest_served_ratio": _ratio(over, Case.FLOOD, MODEST, "served_tokens_per_s"),
    }
    for queue, name in _WAYS.items():
        figures[f"jain_{name}"] = fmean(c["jain"] for c in over if c["case"] == Case.FLOOD and c["queue"] is queue)
    return figures


_WAYS: Final = {False: "without", True: "with"}


def _ratio(cells: Iterable[Cell], case: Case, kind: str, figure: str) -> float:
    pairs: dict[tuple[str, str], dict[bool, float]] = {}
    for each in cells:
        if each["case"] == case:
            for seed, found in each["seeds"].items():
                pairs.setdefault((each["trace"], seed), {})[each["queue"]] = found[kind][figure]
    return geomean(pair[True] / pair[False] for pair in pairs.values())


def _both(cells: Iterable[Cell], case: Case, kind: str, figures: Sequence[str], suffix: str) -> dict[str, float]:
    alike = [c for c in cells if c["case"] == case]
    return {
        f"{figure}{suffix}_{name}": fmean(c["kinds"][kind][figure] for c in alike if c["queue"] is queue)
        for figure in figures
        for queue, name in _WAYS.items()
    }


# --- the command --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, print the tables, write the figures and the page."""
    options = _parser().parse_args(arguments)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    started = time.monotonic()
    try:
        every = [s for s in sources(options.traces, options.requests) if not options.only or s.name in options.only]
        places = [Place(source, seed) for source in every for seed in range(1, options.seeds + 1)]
        with pool(options.jobs, console, _STAGES) as each:
            document = measure(places, each)
    except (TraceError, LoadError) as e:
        raise SystemExit(str(e)) from None
    took_s = time.monotonic() - started
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(finite(document) | {"took_s": round(took_s, 1)}, indent=1) + "\n")
    if options.docs:
        options.docs.write_text(page.markdown(document, command(sys.argv[1:], "tests.bench.overload")))
    for part in page.short(document["summary"], OVERLOAD):
        console.print(part, markup=False, highlight=False)
    console.print(f"{took_s / 60:.1f} minutes; figures in {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="one router with its queue and without it, in virtual time")
    parser.add_argument("--traces", type=Path, help=f"folder with {', '.join(RECORDED.values())}")
    parser.add_argument("--only", action="append", default=[], help="one of the traces; repeatable")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--requests", type=int, help="of one window")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--docs", type=Path, help=f"write the page here as well, such as {PAGE}")
    return parser


if __name__ == "__main__":
    main()
