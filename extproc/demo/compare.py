"""The same load through extproc, then through Envoy's own policies: what came of each, side by side."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from extproc.demo.children import DemoError, cpu_s
from extproc.demo.settings import DemoSettings
from extproc.demo.stack import Running, Stack, open_stack
from extproc.sim.client import Limits, Load, Record
from extproc.sim.report import Counters, counters, predicted_share, summary, table, total
from extproc.sim.workload import sessions

REQUEST_LIMIT_S: Final = 60.0
SETTLE_S: Final = 5.0
"""For the last access log entries to arrive."""


async def run_demo(path: Path | None, output: Path, console: Console | None = None) -> None:
    """All runs, the table, and the figures in `output`; files and logs in the directory of the same name beside it.

    Raises ConfigError, and DemoError when a process does not start or dies.
    """
    console = console or Console()
    stack = open_stack(path, output.with_suffix(""))
    runs: dict[str, dict[str, Any]] = {}
    with _sigterm():
        for baseline in (None, *stack.settings.baselines):
            async with stack.running(baseline) as running:
                runs[running.name] = await _measured(running, console)
    _write(output, {**runs, **described(stack)})
    console.print(table(runs, titles(stack)))
    console.print(f"figures in {output}, logs in {stack.directory}")


def titles(stack: Stack) -> dict[str, str]:
    """Heads of the columns."""
    envoys: dict[str, str] = {baseline: f"Envoy {baseline.replace('_', ' ')}" for baseline in stack.settings.baselines}
    return {"extproc": f"extproc {stack.config.pools[0].policy}", **envoys}


def _write(path: Path, figures: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=2) + "\n")


def described(stack: Stack) -> dict[str, Any]:
    """What was run: with it the figures can be had again."""
    settings: DemoSettings = stack.settings
    kept = settings.model_dump(mode="json", include={"model", "model_size", "fleet", "time_scale", "workload"})
    return {**kept, "policy": stack.config.pools[0].policy, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


async def _measured(running: Running, console: Console) -> dict[str, Any]:
    """One run of the load and its summary."""
    stack = running.stack
    before = await _replica_counters(running)
    began, cpu = time.monotonic(), _cpu(running)
    records = await running.children.during(_load(stack, running.name, console))
    seconds = time.monotonic() - began
    used = {who: (value - cpu[who]) / seconds for who, value in _cpu(running).items()}
    predicted = None if running.baseline else await _predicted(running)
    after = await _replica_counters(running)
    counted = {address: after[address].since(before[address]) for address in after}
    planned = stack.settings.workload.sessions * stack.settings.workload.turns
    return {**summary(records, counted, stack.replicas, predicted), "planned": planned, "cpu_cores": used}


async def _load(stack: Stack, name: str, console: Console) -> list[Record]:
    workload = stack.settings.workload
    limits = Limits(REQUEST_LIMIT_S, stack.settings.run_limit_s)
    with _bar(console) as bar:
        task = bar.add_task(name, total=workload.sessions * workload.turns, errors="")
        failed = 0

        def on_record(record: Record) -> None:
            nonlocal failed
            failed += record.error is not None
            bar.update(task, advance=1, errors=f"[red]{failed} errors" if failed else "")

        load = Load(stack.url, stack.settings.model, limits=limits, on_record=on_record)
        return await load.run(sessions(workload))


def _bar(console: Console) -> Progress:
    # Redrawn twice a second: more would take CPU from what is measured.
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[errors]}"),
    )
    return Progress(*columns, console=console, refresh_per_second=2)


async def _replica_counters(running: Running) -> dict[str, Counters]:
    return {address: counters(await running.page(f"http://{address}/metrics")) for address in running.stack.replicas}


async def _predicted(running: Running) -> float | None:
    """What extproc predicted of prefix hits, once it has heard of every end."""
    url = f"http://{running.stack.ports.http}/metrics"

    async def all_ended() -> bool:
        return total(await running.page(url), "extproc_in_flight") == 0

    await running.children.until("the end of all flights", all_ended, SETTLE_S)
    return predicted_share(await running.page(url))


def _cpu(running: Running) -> Mapping[str, float]:
    """CPU seconds so far: children, and this process, which makes the load."""
    return {"client": time.process_time(), **{name: cpu_s(child.pid) for name, child in running.processes.items()}}


@contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM as Ctrl-C: the blocks are left in order, so that no child stays behind."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    terminated = False

    def on_signal() -> None:
        nonlocal terminated
        terminated = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, on_signal)
    try:
        yield
    except asyncio.CancelledError:
        if terminated:
            raise DemoError("ended by SIGTERM") from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
