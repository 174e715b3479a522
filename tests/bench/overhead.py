"""What extproc costs, through the real Envoy, in one run: `make bench-overhead`, about two and a half minutes.

CPU of each request against a null ext_proc server of the same kind, in alternating blocks; latency against the same Envoy
without ext_proc, likewise; CPU of each periodic access log entry. Medians of the blocks, for a shared machine is noisy:
what disturbs one block disturbs its neighbour as well, and the alternation lets both sides have it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from extproc.demo.children import Child, Children, DemoError, answers, beside, cpu_s
from extproc.sim.report import total
from tests.bench.setting import Layout, write_files

OUTPUT = Path("build/bench-overhead.json")
READY_S = 30.0


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure."""

    rounds: int = 7
    """Alternations of the CPU and latency blocks."""
    requests: int = 2500
    """In a CPU block."""
    connections: int = 16
    rate: float = 100.0
    """Requests a second in a latency block."""
    latency_s: float = 3.0
    log_rounds: int = 3
    streams: int = 200
    """Slow streams side by side, for the access log."""
    stream_tokens: int = 7
    """Chunks of each, one a second."""


@dataclass(slots=True)
class Bench:
    """Processes and figures of one run."""

    layout: Layout
    effort: Effort
    children: Children
    http: aiohttp.ClientSession
    processes: dict[str, Child] = field(default_factory=dict)
    errors: int = 0

    async def start(self) -> None:
        """Everything that serves, one after the other."""
        layout = self.layout
        await self._module("canned", "tests.bench.canned", str(layout.backend))
        await self._module("null", "tests.bench.null_server", str(layout.null))
        self.processes["extproc"] = await self.children.start(
            "extproc", beside("extproc"), "serve", "--config", str(layout.config)
        )
        await self._until("extproc", f"http://127.0.0.1:{layout.http}/readyz")
        for name, ports in layout.envoys.items():
            options = ("--disable-hot-restart", "--concurrency", "1", "-l", "warning")
            command = (beside("envoy"), "-c", str(layout.bootstrap(name)), *options)
            self.processes[f"envoy_{name}"] = await self.children.start(f"envoy_{name}", *command)
            await self._until(f"Envoy {name}", f"http://127.0.0.1:{ports.admin}/ready")

    async def load(self, kind: str, envoy: str, *numbers: float) -> dict[str, Any]:
        """One block of the load generator on that Envoy."""
        port = str(self.layout.envoys[envoy].listen)
        command = (sys.executable, "-m", "tests.bench.load", kind, port, *map(str, numbers))
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            out, _ = await self.children.during(process.communicate())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise SystemExit(f"the load generator failed: {' '.join(command)}")
        result: dict[str, Any] = json.loads(out)
        self.errors += result["errors"]
        return result

    def cpu(self, name: str) -> float:
        return cpu_s(self.processes[name].pid)

    async def metric(self, name: str) -> float:
        """A series of extproc's own page, summed."""
        async with self.http.get(f"http://127.0.0.1:{self.layout.http}/metrics") as response:
            return total(await response.text(), name) or 0.0

    async def _module(self, name: str, module: str, *arguments: str) -> None:
        self.processes[name] = await self.children.start(name, sys.executable, "-m", module, *arguments)

    async def _until(self, what: str, url: str) -> None:
        await self.children.until(what, partial(answers, self.http, url), READY_S)


# --- the three measurements ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """CPU of one closed-loop block."""

    server_us: float
    """The ext_proc server, each request."""
    envoy_us: float
    rps: float


async def cpu_block(bench: Bench, server: str) -> Block:
    envoy = f"envoy_{server}"
    before = bench.cpu(server), bench.cpu(envoy)
    result = await bench.load("closed", server, bench.effort.requests, bench.effort.connections)
    count = result["requests"]
    used = [
        (after - then) / count * 1e6 for after, then in zip((bench.cpu(server), bench.cpu(envoy)), before, strict=True)
    ]
    return Block(used[0], used[1], count / result["seconds"])


def cpu_figures(blocks: dict[str, list[Block]]) -> dict[str, Any]:
    """The ratio is of medians; each side's spread is beside it, so that a reader sees what the ratio is worth."""
    servers = {name: [b.server_us for b in found] for name, found in blocks.items()}
    medians = {name: statistics.median(values) for name, values in servers.items()}
    return {
        "cpu_ratio_null": {"4KB": medians["extproc"] / medians["null"]},
        "cpu_us": medians,
        "cpu_us_range": {name: [min(values), max(values)] for name, values in servers.items()},
        "envoy_cpu_us": {name: statistics.median(b.envoy_us for b in found) for name, found in blocks.items()},
        "rps": {name: statistics.median(b.rps for b in found) for name, found in blocks.items()},
    }


PATHS = ("extproc", "none", "null")
PERCENTILES = ("p50", "p90", "p99")


async def latency_block(bench: Bench) -> dict[str, dict[str, Any]]:
    """Through extproc, on an Envoy without ext_proc, and through the null server, one after the other."""
    numbers = (bench.effort.rate, bench.effort.latency_s, bench.effort.connections)
    return {path: await bench.load("open", path, *numbers) for path in PATHS}


def latency_figures(blocks: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the differences of neighbours, and what each path takes by itself."""

    def added(path: str, p: str) -> Any:
        return statistics.median(block[path][f"{p}_ms"] - block["none"][f"{p}_ms"] for block in blocks)

    def taken(path: str, p: str) -> Any:
        return statistics.median(block[path][f"{p}_ms"] for block in blocks)

    return {
        **{f"added_{p}_ms": added("extproc", p) for p in PERCENTILES},
        "added_ms_null": {p: added("null", p) for p in PERCENTILES},
        "latency_ms": {path: {p: taken(path, p) for p in PERCENTILES} for path in PATHS},
    }


@dataclass(frozen=True, slots=True)
class Logged:
    """CPU of extproc while slow streams run, and the entries that it got of them."""

    cpu_s: float
    entries: float


async def log_block(bench: Bench, envoy: str) -> Logged:
    """With periodic entries or without: the requests and their last entries are in both."""
    counted = await bench.metric("extproc_access_log_entries_total")
    before = bench.cpu("extproc")
    await bench.load("streams", envoy, bench.effort.streams, bench.effort.stream_tokens)
    await asyncio.sleep(0.5)  # the last batch of entries; idle time costs both sides the same
    used = bench.cpu("extproc") - before
    return Logged(used, await bench.metric("extproc_access_log_entries_total") - counted)


def log_figures(pairs: Sequence[tuple[Logged, Logged]]) -> dict[str, Any]:
    """What the entries in between cost, over what the same streams cost without them; None when there were none."""
    extra = sum(with_.entries - without.entries for with_, without in pairs)
    cost = sum(with_.cpu_s - without.cpu_s for with_, without in pairs)
    return {
        "accesslog_entries": extra,
        "accesslog_cpu_us_per_entry": cost / extra * 1e6 if extra else None,
    }


# --- the run --------------------------------------------------------------------------------------------------------------


async def measure(effort: Effort, console: Console) -> dict[str, Any]:
    """Start, warm up, alternate, stop."""
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as scratch:
        layout = write_files(Path(scratch))
        async with aiohttp.ClientSession() as http, Children(Path(scratch)) as children:
            bench = Bench(layout, effort, children, http)
            await bench.start()
            with Progress(console=console, refresh_per_second=2) as bar:
                return await _blocks(bench, bar)


async def _blocks(bench: Bench, bar: Progress) -> dict[str, Any]:
    effort = bench.effort
    task = bar.add_task("measuring", total=2 * effort.rounds + effort.log_rounds)
    for envoy in ("extproc", "null", "none", "quiet"):
        await bench.load("closed", envoy, effort.requests // 2, effort.connections)
    cpu: dict[str, list[Block]] = {"extproc": [], "null": []}
    for _ in range(effort.rounds):
        for server, found in cpu.items():
            found.append(await cpu_block(bench, server))
        bar.advance(task)
    latency = []
    for _ in range(effort.rounds):
        latency.append(await latency_block(bench))
        bar.advance(task)
    logged = []
    for _ in range(effort.log_rounds):
        logged.append((await log_block(bench, "extproc"), await log_block(bench, "quiet")))
        bar.advance(task)
    return {
        **cpu_figures(cpu),
        **latency_figures(latency),
        **log_figures(logged),
        "rounds": effort.rounds,
        "errors": bench.errors,
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def table(figures: dict[str, Any]) -> Table:
    """For people; the JSON file has the rest."""
    grid = Table("", "extproc", "compared with", "", title="overhead of extproc, real Envoy, 4 KB chat bodies")
    cpu, spread, rps = figures["cpu_us"], figures["cpu_us_range"], figures["rps"]
    ratio = figures["cpu_ratio_null"]["4KB"]
    grid.add_row("CPU per request", f"{cpu['extproc']:.0f} us", f"null server {cpu['null']:.0f} us", f"x{ratio:.2f}")
    ranges = {name: f"{low:.0f}-{high:.0f}" for name, (low, high) in spread.items()}
    grid.add_row("  range of the blocks", ranges["extproc"], ranges["null"], "")
    grid.add_row("requests a second", f"{rps['extproc']:.0f}", f"{rps['null']:.0f}", "")
    for p in ("p50", "p99"):
        with_, without = figures["latency_ms"]["extproc"][p], figures["latency_ms"]["none"][p]
        grid.add_row(
            f"latency {p}, 100 req/s",
            f"{with_:.2f} ms",
            f"no ext_proc {without:.2f} ms",
            f"+{figures[f'added_{p}_ms']:.2f} ms",
        )
    entry = figures["accesslog_cpu_us_per_entry"]
    shown = "unknown" if entry is None else f"{entry:.0f} us"
    grid.add_row("CPU per progress entry", shown, f"{figures['accesslog_entries']:.0f} entries", "")
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU and latency that extproc adds; prints a table, writes JSON")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--quick", action="store_true", help="a tenth of the effort, to see that it runs")
    options = parser.parse_args()
    quick = Effort(rounds=2, requests=400, latency_s=1.0, log_rounds=1, streams=50, stream_tokens=3)
    console = Console()
    try:
        figures = asyncio.run(measure(quick if options.quick else Effort(), console))
    except DemoError as e:
        raise SystemExit(str(e)) from None
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(table(figures))
    console.print(f"figures in {options.output}; {figures['errors']} failed requests")


if __name__ == "__main__":
    main()
