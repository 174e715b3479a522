"""NVIDIA Dynamo's own code beside ours: its selector against our model of its rule, and its simulator against ours.

    python -m tests.bench.dynamo_peer --python /path/to/venv/bin/python --trace conversation_trace.jsonl

Its runtime runs in process, but under an interpreter of its own: its dependencies are not ours. Both halves run on the same
window of a Mooncake trace, on eight workers with the settings and step times of its mocker (`dynamo_mocker.py`).

 * Choices: a run of ours with the rule `dynamo` is taped, and at each decision Dynamo's selector is asked in the same state.
 * Replays: each simulator runs the window with round robin and with Dynamo's rule, ours with `predicted` too. The rule is
   theirs in one and ours in the other, and so is the scheduler.

Known differences of the replays. Requests of one instant: theirs share the first step of an idle worker, ours begins with the
first of them, so the rest come a step later and the first sooner; with round robin, where both place alike, that is nearly
all that is left. Facts: their router sees each first token and each change of a cache at once, ours sees first tokens by the
access log, here every 0.1 s, and guesses at caches. Ties: theirs go by a lot without a seed, so its figures with the rule
move by a percent from run to run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from extproc.sim.cluster import Cluster, Scenario
from extproc.sim.sidecar import NO_QUEUE, Wiring
from extproc.sim.simulate_report import Slo, summary
from extproc.sim.traces import Trace
from tests.bench import dynamo_child
from tests.bench.baselines import installed
from tests.bench.dynamo_choices import Agreement, agreement, ample_blocks, taped
from tests.bench.dynamo_mocker import BLOCK, ENGINE, TRACE_BLOCK, fleet, trace

OUTPUT: Final = Path("build/dynamo_peer.json")
VERSION: Final = "1.6.1"
WORKERS: Final = 8
WIRING: Final = Wiring(log_flush_interval_s=0.0, progress_interval_s=0.1, queue=NO_QUEUE)
"""As soon as the access log can tell: Dynamo's router is told at once. Both place every request as it comes."""
POLICIES: Final = ("round_robin", "dynamo", "predicted")
MODES: Final = {"round_robin": "round_robin", "dynamo": "kv_router"}
"""Our policy -> Dynamo's mode."""
FIGURES: Final = {
    "ttft_mean_s": ("mean_ttft_ms", 1e-3),
    "ttft_p99_s": ("p99_ttft_ms", 1e-3),
    "e2e_mean_s": ("mean_e2e_latency_ms", 1e-3),
    "prefix_hit_actual": ("prefix_cache_reused_ratio", 1.0),
}
"""Figure of our summary -> the same in Dynamo's, and the factor to our unit."""
TIMEOUT_S: Final = 1800.0

Figures = dict[str, float]
Runs = Mapping[str, Figures]
"""Policy -> figures."""


class PeerError(Exception):
    """The comparison cannot run; the text says what to do."""


def ask(python: Path, command: str, given: Mapping[str, Any]) -> Any:
    """What Dynamo answers to `select` or `replay`, in the other interpreter. Raises PeerError."""
    arguments = [str(python), "-I", dynamo_child.__file__, command]
    try:
        done = subprocess.run(arguments, input=json.dumps(given), capture_output=True, text=True, timeout=TIMEOUT_S)
    except OSError as e:
        raise PeerError(f"--python {python}: {e.strerror}; {_remedy()}") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"{command}: no answer within {TIMEOUT_S:g} s; take fewer --requests") from None
    if done.returncode == dynamo_child.NOT_INSTALLED:
        raise PeerError(f"--python {python}: {dynamo_child.PACKAGE} is not installed there; {_remedy()}")
    if done.returncode:
        raise PeerError(f"{command} failed under {python}:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    if answer["version"] != VERSION:
        raise PeerError(
            f"--python {python}: version {answer['version']}; step times are those of {VERSION}; {_remedy()}"
        )
    return answer["answer"]


def _remedy() -> str:
    package = f"{dynamo_child.PACKAGE}=={VERSION}"
    return f"in an environment of its own: python3 -m venv VENV && VENV/bin/pip install {package}; then --python VENV/bin/python"


# --- the two halves --------------------------------------------------------------------------------------------------------


def choices(python: Path, window: Trace) -> Agreement:
    """Decision by decision, in caches so large that neither side forgets."""
    blocks = ample_blocks(window)
    rows = taped(Scenario(window, fleet(WORKERS, blocks), wiring=WIRING))
    given = {"workers": WORKERS, "block_size": BLOCK, "num_blocks": blocks, "rows": [asdict(row) for row in rows]}
    return agreement(rows, ask(python, "select", given))


def our_replays(window: Trace) -> dict[str, Figures]:
    """Each policy in our simulator."""
    scenario = Scenario(window, fleet(WORKERS), wiring=WIRING)
    with installed():
        found = {policy: summary(Cluster(scenario, policy).run(), Slo()) for policy in POLICIES}
    return {policy: {name: run[name] for name in FIGURES} for policy, run in found.items()}


def their_replays(python: Path, lines: Sequence[str], speed_up: float) -> dict[str, Figures]:
    """Each mode in Dynamo's."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "window.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines))
        given = {"trace": str(path), "engine": ENGINE, "workers": WORKERS, "speed_up": speed_up}
        found = ask(python, "replay", given | {"trace_block_size": TRACE_BLOCK, "modes": list(MODES.values())})
    return {policy: theirs(found[mode]) for policy, mode in MODES.items()}


def theirs(found: Mapping[str, float]) -> Figures:
    """Dynamo's summary by our names and in our units."""
    return {name: found[key] * factor for name, (key, factor) in FIGURES.items()}


def gain(runs: Runs) -> float:
    """Mean TTFT with Dynamo's rule over that of round robin: what a simulator is asked for."""
    return runs["dynamo"]["ttft_mean_s"] / runs["round_robin"]["ttft_mean_s"]


# --- shown -----------------------------------------------------------------------------------------------------------------


def choices_table(found: Agreement) -> Table:
    grid = Table("", title="our rule `dynamo` beside Dynamo's selector, in the same state")
    grid.add_column("decisions", justify="right")
    grid.add_row("all", f"{found.decisions:,}")
    grid.add_row("same choice", f"{found.equal:,}")
    for cause, count in found.causes.items():
        grid.add_row(f"another, by {cause}", f"{count:,}")
    grid.add_row("the selector's is least by the published formula", f"{found.by_formula:,}")
    return grid


def replays_table(ours: Runs, dynamos: Runs) -> Table:
    grid = Table("", title="the same window in both simulators")
    for label in ("TTFT mean, ms", "TTFT p99, ms", "end to end mean, ms", "prefix hit"):
        grid.add_column(label, justify="right")
    for policy in POLICIES:
        for name, runs in (("Dynamo's", dynamos), ("ours", ours)):
            if policy in runs:
                *times, hit = (runs[policy][figure] for figure in FIGURES)
                grid.add_row(f"{policy}, {name}", *(f"{t * 1e3:,.1f}" for t in times), f"{hit:.1%}")
        if policy in dynamos:
            off = (f"{ours[policy][figure] / dynamos[policy][figure] - 1:+.1%}" for figure in FIGURES)
            grid.add_row("ours is off by", *off, end_section=True)
    return grid


def window_of(path: Path, requests: int) -> list[str]:
    """The first lines of a trace. Raises PeerError."""
    try:
        with path.open() as file:
            lines = [line for line, _ in zip(file, range(requests), strict=False)]
    except OSError as e:
        raise PeerError(f"--trace {path}: {e.strerror}; it wants a trace of kvcache-ai/Mooncake") from None
    if not lines or "hash_ids" not in lines[0]:
        raise PeerError(f"--trace {path}: not a trace of kvcache-ai/Mooncake")
    return [line.strip() for line in lines]


def measure(python: Path, lines: Sequence[str], speed_up: float, console: Console) -> dict[str, Any]:
    """Both halves, printed as they are there. Returns what the file gets. Raises PeerError."""
    window = trace(lines).faster(speed_up)
    dynamos = their_replays(python, lines, speed_up)
    ours = our_replays(window)
    console.print(replays_table(ours, dynamos))
    console.print(f"mean TTFT, Dynamo's rule over round robin: Dynamo's {gain(dynamos):.3f}, ours {gain(ours):.3f}")
    chosen = choices(python, window)
    console.print(choices_table(chosen))
    return {"requests": len(lines), "speed_up": speed_up, "dynamo": dynamos, "ours": ours, "choices": asdict(chosen)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Dynamo's selector and simulator beside ours; prints tables, writes JSON"
    )
    parser.add_argument("--python", type=Path, required=True, help="of an environment that has ai-dynamo-runtime")
    parser.add_argument("--trace", type=Path, required=True, help="of kvcache-ai/Mooncake")
    parser.add_argument("--requests", type=int, default=2000, help="of the trace, from its start")
    parser.add_argument("--speed-up", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    try:
        lines = window_of(options.trace, options.requests)
        found = measure(options.python, lines, options.speed_up, Console())
    except PeerError as e:
        raise SystemExit(str(e)) from None
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"figures in {options.output}")


if __name__ == "__main__":
    main()
