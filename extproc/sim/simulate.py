"""The command `extproc simulate`: a trace, a fleet, one run for each policy, and a table of them side by side."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from extproc.config import ConfigError
from extproc.core.policies import PolicyError, create
from extproc.core.prefix.exact import UNIT
from extproc.sim import fleet_spec, simulate_report
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.disaggregation import Link
from extproc.sim.incidents import IncidentError, checked, incident
from extproc.sim.kv_events import Events
from extproc.sim.sharing import Sharing
from extproc.sim.sidecar import NO_QUEUE, Wiring
from extproc.sim.simulate_report import Load, Slo
from extproc.sim.traces import Generate, Starts, Trace, TraceError, flooded, generate, load, prioritized

DEFAULT_POLICIES: Final = ("predicted", "least_request", "round_robin")


class SimulateError(Exception):
    """The simulation cannot be run as asked; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asked for."""

    trace: Path | None = None
    format: str | None = None
    generate: str | None = None
    starts: Starts = field(default_factory=Starts)
    limit: int | None = None
    speed_ups: tuple[float, ...] = (1.0,)
    """Every policy runs at each of them."""
    replicas: tuple[str, ...] = ()
    fleet: Path | None = None
    model_size: str | None = None
    block_size: int | None = None
    cpu_overhead_s: float = 0.002
    policies: tuple[str, ...] = DEFAULT_POLICIES
    routers: int = 1
    wiring: Wiring = field(default_factory=Wiring)
    incidents: tuple[str, ...] = ()
    router_deaths: tuple[tuple[float, int], ...] = ()
    oracle_lengths: bool = False
    priority: float = 0.0
    """Share of the sessions that are urgent."""
    flood: float | None = None
    """One tenant of two asks so many times what the other does; None leaves the tenants of the trace."""
    ask_ttft: float | None = None
    """What every client wants, seconds; None where they wait."""
    seed: int = 1
    slo: Slo = field(default_factory=Slo)
    json: Path | None = None
    log: Path | None = None
    plot: Path | None = None


@dataclass(slots=True)
class _Chosen:
    """A policy with its options, as `name` or `name:option=value,...`."""

    text: str
    name: str = field(init=False)
    options: dict[str, float | int | str | bool] = field(init=False)

    def __post_init__(self) -> None:
        self.name, _, given = self.text.partition(":")
        pairs = (part.partition("=") for part in given.split(",") if part)
        self.options = {key: _value(value) for key, _, value in pairs}
        create(self.name, self.options)  # complains now, not after the first run


def from_options(**given: Any) -> None:
    """From the options of `extproc simulate`, by their names there. Raises SimulateError."""
    speed_ups = tuple(_factor(part) for text in given["speed_up"] for part in text.split(","))
    for name in ("sessions_per_s", "scrape_interval", "prior_error", "beat"):
        if not given[name] > 0:
            raise SimulateError(f"--{name.replace('_', '-')} must be above 0, not {given[name]:g}")
    if not 0 <= given["estimate_error"] <= 3:
        raise SimulateError(f"--estimate-error must be from 0 to 3, not {given['estimate_error']:g}")
    for name in ("flood", "ask_ttft"):
        if given[name] is not None and not given[name] > 0:
            raise SimulateError(f"--{name.replace('_', '-')} must be above 0, not {given[name]:g}")
    wiring = Wiring(
        scrape_interval_s=given["scrape_interval"],
        scrape_age_s=given["scrape_age"],
        log_flush_interval_s=given["log_flush"],
        completion_delay_s=given["completion_delay"],
        progress_interval_s=given["progress_interval"] or None,
        prior_error=given["prior_error"],
        estimate_error=given["estimate_error"],
        queue=Wiring().queue if given["queue"] else NO_QUEUE,
        sharing=Sharing(beat_s=given["beat"], loss=given["beat_loss"]) if given["share"] else None,
        events=None if given["events"] is None else Events(given["events"], given["events_loss"]),
    )
    alike = ("trace", "format", "generate", "limit", "fleet", "model_size", "block_size", "routers")
    clients = ("oracle_lengths", "priority", "flood", "ask_ttft")
    files = ("seed", "json", "log", "plot")
    order = Order(
        **{name: given[name] for name in (*alike, *clients, *files)},
        speed_ups=speed_ups,
        starts=Starts(given["sessions_per_s"], given["sessions"], given["max_pause"], given["seed"]),
        replicas=given["replica"],
        cpu_overhead_s=given["cpu_overhead"],
        policies=given["policy"] or DEFAULT_POLICIES,
        wiring=wiring,
        incidents=given["event"],
        router_deaths=tuple(_router_death(text, given["routers"]) for text in given["router_dies"]),
        slo=Slo(given["slo_ttft"], given["slo_tpot"]),
    )
    console = Console()
    # Into a pipe, as wide as it gets: nobody can read columns that were cut to fit a terminal that is not there.
    simulate(order, console if console.is_terminal else Console(width=200))


def simulate(order: Order, console: Console) -> dict[str, Any]:
    """Run everything, print the table, write the files. Returns what `--json` gets. Raises SimulateError."""
    try:
        scenario = _scenario(order)
        policies = [_Chosen(text) for text in order.policies]
    except (TraceError, ConfigError, IncidentError, PolicyError) as e:
        raise SimulateError(str(e)) from None
    _check_files(order)
    loads = []
    with _log(order.log) as log:
        for speed_up in order.speed_ups:
            faster = replace(scenario, trace=scenario.trace.faster(speed_up))
            load = _load(order, faster, policies, speed_up, log, console)
            at = f", speed-up {speed_up:g}" if len(order.speed_ups) > 1 else ""
            console.print(simulate_report.table(load.runs, f"{_title(scenario)}{at}"))
            loads.append(load)
    return _written(order, scenario, loads)


def _scenario(order: Order) -> Scenario:
    trace = _trace(order)
    block_size = order.block_size or trace.block_size
    if trace.block_size % block_size:
        raise SimulateError(
            f"--block-size {block_size} does not divide the trace's {trace.block_size}; choose one that does"
        )
    if order.wiring.events is not None and block_size % UNIT:
        raise SimulateError(
            f"--events tells of blocks of {UNIT} tokens or a multiple of it; --block-size is {block_size}"
        )
    groups, model_size = _groups(order)
    fleet = fleet_spec.nodes(groups, model_size, block_size, order.cpu_overhead_s)
    disaggregation = fleet_spec.disaggregation(groups, model_size)
    return Scenario(
        trace=trace,
        fleet=fleet,
        routers=order.routers,
        wiring=replace(order.wiring, disaggregation=disaggregation),
        link=Link() if disaggregation is None else Link(disaggregation.kv_bytes_per_token),
        incidents=checked(map(incident, order.incidents), len(fleet)),
        router_deaths=order.router_deaths,
        oracle_lengths=order.oracle_lengths,
        slo_ttft_s=order.ask_ttft,
        seed=order.seed,
    )


def _trace(order: Order) -> Trace:
    if (order.trace is None) is (order.generate is None):
        raise SimulateError("give either --trace PATH or --generate OPTIONS (an empty text takes the defaults)")
    if order.trace is not None:
        trace = load(order.trace, order.format, order.starts)
    else:
        trace = generate(Generate.from_text(order.generate or ""), order.seed)
    if order.limit is not None:
        trace = trace.limited(order.limit)
    if not trace.turns:
        raise SimulateError("the trace has no requests")
    return _marked(trace, order)


def _marked(trace: Trace, order: Order) -> Trace:
    """With the priorities and tenants that were asked for."""
    if order.priority:
        trace = prioritized(trace, order.priority, order.seed)
    return trace if order.flood is None else flooded(trace, order.flood, order.seed)


def _groups(order: Order) -> tuple[Sequence[fleet_spec.Group], str]:
    """Replicas of the file, then those of the options; and the size of their model."""
    groups, size = fleet_spec.load_fleet(order.fleet) if order.fleet else ((), None)
    groups += tuple(map(fleet_spec.Group.from_text, order.replicas))
    return groups or (fleet_spec.Group(count=8),), order.model_size or size or "8b"


def _load(
    order: Order, scenario: Scenario, policies: Sequence[_Chosen], speed_up: float, log: TextIO, console: Console
) -> Load:
    """Every policy, on a trace whose arrivals were sped up already."""
    runs, curves = {}, {}
    with _progress(console) as progress:
        for policy in policies:
            result, wall_s = _run(scenario, policy, progress)
            runs[policy.text] = _timed(simulate_report.summary(result, order.slo), wall_s)
            curves[policy.text] = simulate_report.curves(result)
            for served in result.served if order.log else ():
                log.write(
                    f'{{"speed_up":{speed_up:g},"policy":{json.dumps(policy.text)},{simulate_report.line(served)[1:]}'
                )
    return Load(speed_up, runs, curves)


def _run(scenario: Scenario, policy: _Chosen, progress: Progress) -> tuple[Result, float]:
    """One run, and how long it took in real time."""
    task = progress.add_task(policy.text, total=len(scenario.trace.turns))
    gc.collect()
    started = time.perf_counter()
    cluster = Cluster(scenario, policy.name, policy.options)
    result = cluster.run(lambda served: progress.update(task, completed=served))
    return result, time.perf_counter() - started


def _timed(summary: dict[str, Any], wall_s: float) -> dict[str, Any]:
    return {**summary, "wall_s": wall_s, "speed": summary["makespan_s"] / wall_s}


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _title(scenario: Scenario) -> str:
    trace, fleet = scenario.trace, scenario.fleet
    talk = "that talk" if scenario.wiring.sharing else "that do not talk"
    routers = f", {scenario.routers} routers {talk}" if scenario.routers > 1 else ""
    return f"{trace.name}: {len(trace.turns):,} requests on {len(fleet)} replicas{routers}, virtual time"


# --- files ----------------------------------------------------------------------------------------------------------------


def _check_files(order: Order) -> None:
    """Before the runs, not after them."""
    if order.plot is not None and order.plot.suffix not in (suffixes := _plot().SUFFIXES):
        raise SimulateError(f"--plot {order.plot}: HTML or PNG is written; end the name with {' or '.join(suffixes)}")
    for path in (order.json, order.log, order.plot):
        if path is not None and not path.parent.is_dir():
            raise SimulateError(f"{path}: {path.parent} is no directory; make it first")


def _log(path: Path | None) -> TextIO:
    """The file of single requests; without one, nothing is written."""
    return path.open("w") if path else StringIO()


def _plot() -> ModuleType:
    """Imported late: matplotlib takes a third of a second, and is there only for those who draw."""
    try:
        from extproc.sim import plot
    except ModuleNotFoundError as e:
        if e.name != "matplotlib":
            raise
        raise SimulateError("--plot needs matplotlib; pip install 'extproc[plot]'") from None
    return plot


def _written(order: Order, scenario: Scenario, loads: Sequence[Load]) -> dict[str, Any]:
    document = {
        "trace": scenario.trace.name,
        "requests": len(scenario.trace.turns),
        "loads": [{"speed_up": load.speed_up, "runs": dict(load.runs)} for load in loads],
    }
    try:
        if order.json:
            order.json.write_text(json.dumps(document, indent=1) + "\n")
        if order.plot:
            _plot().write(order.plot, _title(scenario), loads)
    except OSError as e:
        raise SimulateError(f"{e.filename}: {e.strerror}") from None
    return document


def _factor(text: str) -> float:
    """One of `--speed-up`. Raises SimulateError."""
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise SimulateError(f"--speed-up {text}: each must be a number above 0")
    return factor


def _router_death(text: str, routers: int) -> tuple[float, int]:
    """One of `--router-dies`. Raises SimulateError; one router must stay, or nobody answers."""
    at, _, place = text.partition(":")
    try:
        found = float(at), int(place)
    except ValueError:
        raise SimulateError(f"--router-dies {text}: write T:ROUTER, as 30:2") from None
    if not (found[0] >= 0 and 1 <= found[1] <= routers and routers > 1):
        raise SimulateError(f"--router-dies {text}: of several routers one from 1 to --routers, at a time from 0 on")
    return found


def _value(text: str) -> float | int | str | bool:
    """An option's value as YAML would read it."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
