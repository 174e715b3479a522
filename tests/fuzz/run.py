"""`make fuzz`: each target in a process of its own, guided by coverage (atheris, libFuzzer's engine for Python), bounded in time and memory.

python -m tests.fuzz.run [--seconds 60] [--target body]

What is found lies in build/fuzz/TARGET as crash-*, and is shown again by `python -m tests.fuzz.run --show FILE --target TARGET`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DIRECTORY = Path("build/fuzz")
MEMORY_MB = 1024
"""Of a target's process; libFuzzer ends it above."""
LONGEST_BYTES = {"stream": 300}
"""Of an input, where it is not 8 KiB: each byte of a stream can be a message."""
SLOWEST_S = 5
"""One input that takes longer is a finding."""
GRACE_S = 30
"""Start and end of a process beside the time that it fuzzes."""


def main() -> int:
    """The number of targets that found something."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--show", type=Path, help="run one input instead")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return fuzz(given.target, given.seconds)
    from tests.fuzz.targets import SEEDS, TARGETS

    if given.show:
        TARGETS[given.target](given.show.read_bytes())
        return 0
    results = {}
    for name in [given.target] if given.target else sorted(TARGETS):
        corpus = DIRECTORY / name
        corpus.mkdir(parents=True, exist_ok=True)
        for seed in SEEDS[name]:
            (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
        results[name] = run(name, given.seconds)
        print(
            f"{name:8} {results[name]['runs']:>9} runs, {results[name]['edges']:>5} edges, "
            f"{results[name]['memory_mb']:>4} MB, {'found something' if results[name]['failed'] else 'nothing found'}"
        )
    (DIRECTORY.parent / "fuzz.json").write_text(json.dumps(results, indent=1) + "\n")
    return sum(bool(result["failed"]) for result in results.values())


def run(name: str, seconds: int) -> dict[str, Any]:
    """One target in a child; its figures, from libFuzzer's last words."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--child", "--target", name, "--seconds", str(seconds)]
    with (DIRECTORY / f"{name}.log").open("w") as log:
        child = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds + GRACE_S, check=False)
    text = (DIRECTORY / f"{name}.log").read_text(errors="replace")
    runs, edges = re.findall(r"^#(\d+)", text, re.M), re.findall(r"cov: (\d+)", text)
    memory = re.findall(r"rss: (\d+)Mb", text)
    return {
        "runs": int(runs[-1]) if runs else 0,
        "edges": int(edges[-1]) if edges else 0,
        "memory_mb": max(map(int, memory), default=0),
        "failed": child.returncode != 0,
    }


def fuzz(name: str, seconds: int) -> int:
    """In the child: never returns, libFuzzer ends the process."""
    atheris: Any = importlib.import_module("atheris")  # installed by `make fuzz` alone; ships no types
    with atheris.instrument_imports(include=["extproc"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS
    corpus = DIRECTORY / name
    limits = [
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-max_len={LONGEST_BYTES.get(name, 8192)}",
        f"-timeout={SLOWEST_S}",
        f"-artifact_prefix={corpus}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
