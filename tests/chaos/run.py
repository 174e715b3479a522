"""`make chaos`: one row after the other, the targets, build/chaos.json.

python -m tests.chaos.run [--only FAULT ...] [--docs docs/chaos.md] [--saturation]

Exit status 1 when a target is missed. Files and logs of the run lie in build/chaos/; the figures of some rows alone go to
build/chaos-part.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp

from extproc.demo.children import DemoError
from tests.chaos import rows
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.page import page
from tests.chaos.rows import Decided, Kind, Marks, Row, Seen
from tests.chaos.settings import Settings
from tests.chaos.stack import Scene, scene
from tests.support.waiting import until

OUTPUT: Final = Path("build/chaos.json")
ROW_LIMIT_S: Final = 75.0
"""No row takes so long: a fault that waits for what never comes ends here, and the row says so."""
LOOK_S: Final = 0.25
"""Between two looks at the states of replicas, for the details."""
WATCH_S: Final = 4.0
"""How long the load runs on after a fault whose recovery cannot be told while it runs."""


@dataclass
class Results:
    """What the run found."""

    settings: Settings
    rows: list[Row] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def view(self) -> dict[str, Any]:
        """As build/chaos.json."""
        targets = {
            "dead": rows.DEAD_S,
            "hung": rows.HUNG_S,
            "factor": rows.HUNG_FACTOR,
            "fallback": rows.FALLBACK_S,
            "slow": rows.UNHURRIED_S,
        }
        return {
            "rows": [asdict(row) for row in self.rows],
            "missed": self.missed,
            "settings": asdict(self.settings),
            "targets": targets,
            "details": self.details,
        }


async def run(names: list[str], settings: Settings) -> Results:
    """All rows, as far as the time allows; those without time are missed targets."""
    results = Results(settings)
    left = list(names)
    with _sigterm():
        try:
            async with asyncio.timeout(settings.limit_s) as limit, scene(settings, OUTPUT.with_suffix("")) as running:
                while left:
                    await one_row(running, FAULTS[left[0]], results)
                    left.pop(0)
        except TimeoutError:
            if not limit.expired():
                raise
        except (AssertionError, DemoError, aiohttp.ClientError) as e:
            results.missed.append(f"the run broke off: {_first_line(e)}")
            print(f"{type(e).__name__}: {e}", flush=True)
    results.missed += [f"{name}: not run to its end" for name in left]
    return results


def _first_line(error: BaseException) -> str:
    """What follows it may be the end of a log, which is for the console alone."""
    return f"{type(error).__name__} {error}".splitlines()[0]


async def one_row(running: Scene, fault: Fault, results: Results) -> None:
    """Load, fault, recovery, the end of the load, and what all of it came to."""
    began, marks, load = time.monotonic(), Marks(), running.load
    load.sent, load.worst_lag_s = [], 0.0
    async with watched(running) as turns:
        trouble = await _played(running, fault, marks) or await running.dead()
        await load.finished()
    seen = await _seen(running, marks, began)
    row = rows.row(fault.name, fault.kind, marks, seen)
    results.rows.append(row)
    more = rows.details(fault.kind, marks, seen)
    results.details[fault.name] = {
        **more,
        "states": [turn.view(marks.at or began) for turn in turns],
        "client_lag_s": round(load.worst_lag_s, 3),
        "trouble": trouble,
        "not_back": await _not_back(running, marks) if row.recover_s is None else [],
    }
    limit = more.get("detect_limit_s", rows.HUNG_S)
    found = [*rows.missed(row, fault.kind, limit), *([trouble] if trouble else [])]
    results.missed += [f"{fault.name}: {each}" for each in found]
    print(f"{time.monotonic() - began:5.1f} s  {row}\n         {more}", *found, sep="\n         ! ", flush=True)


async def _played(running: Scene, fault: Fault, marks: Marks) -> str | None:
    """Load, fault, recovery. Returns what went against the plan; then everything is made whole again."""
    try:
        async with asyncio.timeout(ROW_LIMIT_S), running.load.at(running.settings.rate, running.requests.steady):
            await asyncio.sleep(running.settings.lead_s)
            amiss = await running.not_normal()  # under load: a replica on trial needs requests to pass
            await fault.run(running, marks)
            await _recovered(running, fault.kind, marks)
            await asyncio.sleep(running.settings.tail_s)
            return amiss
    except (AssertionError, aiohttp.ClientError, TimeoutError) as e:
        print(f"{fault.name}: {type(e).__name__}: {e}", flush=True)
        await running.heal()
        return f"the fault could not be played: {_first_line(e)}"


@dataclass(frozen=True, slots=True)
class Turn:
    """A replica came into another state, as extproc has it."""

    at: float
    name: str
    state: str

    def view(self, fault_at: float) -> str:
        """Seconds after the fault, who, what, why."""
        return f"{self.at - fault_at:+.1f} s {self.name}: {self.state}"


@asynccontextmanager
async def watched(running: Scene) -> AsyncIterator[list[Turn]]:
    """The changes of state during the block, as they come."""
    turns: list[Turn] = []
    task = asyncio.create_task(_watch(running, turns))
    try:
        yield turns
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _watch(running: Scene, turns: list[Turn]) -> None:
    """Note what changes, until cancelled."""
    names = {r.address: r.name for r in running.replicas}
    before: dict[str, str] = {}
    while True:
        with suppress(aiohttp.ClientError, TimeoutError):
            views = await running.views()
            now = {names[v["replica"]]: f"{v['state']} ({v.get('reason')})" for v in views}
            turns += [Turn(time.monotonic(), name, state) for name, state in now.items() if before.get(name) != state]
            turns += [Turn(time.monotonic(), name, "no member") for name in before if name not in now]
            before = now
        await asyncio.sleep(LOOK_S)


async def _recovered(running: Scene, kind: Kind, marks: Marks) -> None:
    """Until what failed serves again, or for a while where that cannot be told."""
    if not marks.victims or marks.over is None or kind is Kind.AROUND:
        await asyncio.sleep(WATCH_S if kind in (Kind.EXTPROC, Kind.LOAD) else 0)
        return
    over, deadline = marks.over, time.monotonic() + running.settings.recovery_limit_s
    while time.monotonic() < deadline:
        if any(s.well and s.replica in marks.victims and s.sent_at >= over for s in running.load.sent):
            return
        await asyncio.sleep(0.1)


async def _seen(running: Scene, marks: Marks, began: float) -> Seen:
    leftover = await _leftover(running)
    ends = envoys_ends(running.files.access_log)
    decided = await _decided(running, began)
    ids = [sent.id for sent in running.load.sent]
    accepted = [at for r in running.replicas if r.address in marks.victims for at in await r.accepted(running.http)]
    return Seen(
        sent=running.load.sent,
        decided={i: decided[ends[i].flight] for i in ids if i in ends and ends[i].flight in decided},
        by_fallback=frozenset(i for i in ids if i in ends and ends[i].without_extproc),
        how={i: ends[i].how for i in ids if i in ends},
        accepted=accepted,
        leftover=leftover,
    )


async def _not_back(running: Scene, marks: Marks) -> list[dict[str, Any]]:
    """What extproc knows of the victims in the end."""
    return [view for view in await running.views() if view["replica"] in marks.victims]


async def _leftover(running: Scene) -> int:
    """What extproc still counts, once nothing moves any more or the time is up."""
    with suppress(AssertionError):
        await until(partial(_nothing_left, running), timeout_s=running.settings.settle_s, every_s=0.1)
    return await running.unfinished()


async def _nothing_left(running: Scene) -> bool:
    return not await running.unfinished()


async def _decided(running: Scene, began: float) -> dict[str, Decided]:
    """Decisions by flight, of the present life of extproc."""
    records = json.loads(await running.page("/debug/decisions?n=5000"))
    return {
        r["flight"]: Decided(r["at_s"], r["endpoints"][0], r["predicted"]["ttft_s"])
        for r in records
        if r["at_s"] >= began and r["endpoints"]
    }


@dataclass(frozen=True, slots=True)
class End:
    """A request as Envoy's own log has it."""

    flight: str
    """Empty where extproc did not route it."""
    attempts: int
    """0: it was sent to no replica."""
    how: str

    @property
    def without_extproc(self) -> bool:
        """Routed by the fallback policy."""
        return not self.flight and self.attempts > 0


def envoys_ends(path: Path) -> dict[str, End]:
    """By request id, from the last entry of each: those before it are of its progress."""
    found: dict[str, End] = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of an Envoy that was ended
        attempts = entry["attempts"] or 0
        how = f"{entry['details']}, {entry['flags'] or '-'}, {attempts} attempts"
        found[entry["request_id"]] = End(entry["flight"] or "", attempts, how)
    return found


async def saturation(settings: Settings) -> None:
    """Print how many requests a second end well while 64 are always open: what `saturation` should be."""
    async with scene(settings, OUTPUT.with_suffix("")) as running:
        for seconds in (10, 20):
            async with asyncio.timeout(seconds + 60):
                before, end = len(running.load.sent), time.monotonic() + seconds
                while time.monotonic() < end:
                    while running.load.open < 64:
                        running.load.send(running.requests.steady())
                    await asyncio.sleep(0.005)
                done = [s for s in running.load.sent[before:] if s.well]
                print(f"{len(done) / seconds:.1f} requests/s end well; lag {running.load.worst_lag_s:.3f} s")
        await running.load.finished()


@contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM as Ctrl-C: the blocks are left in order, so that no process stays behind."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def main() -> int:
    """0 when all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="these rows")
    parser.add_argument("--docs", type=Path, help="write the page there")
    parser.add_argument("--saturation", action="store_true", help="measure what the fleet can carry, and end")
    given = parser.parse_args()
    settings = Settings()
    if given.saturation:
        asyncio.run(saturation(settings))
        return 0
    began = time.monotonic()
    try:
        results = asyncio.run(run(given.only or list(FAULTS), settings))
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("ended by a signal")
        return 1
    output = OUTPUT.with_name("chaos-part.json") if given.only else OUTPUT
    output.write_text(json.dumps(results.view(), indent=1) + "\n")
    if given.docs:
        given.docs.write_text(page(results.view(), {f.name: f.text for f in FAULTS.values()}))
    print(f"{len(results.rows)} rows in {time.monotonic() - began:.0f} s; figures in {output}")
    for line in results.missed:
        print(f"missed: {line}")
    return 1 if results.missed else 0


if __name__ == "__main__":
    sys.exit(main())
