"""One file of figures that several benchmarks fill: each part runs by itself, and one that fails costs the others nothing."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Part = Callable[[Path | None], Figures]
"""From the folder of recorded traces, if there is one, to figures by key."""


def gather(
    output: Path, keys: Sequence[str], parts: Mapping[str, Part], doc: str, argv: Sequence[str] | None = None
) -> int:
    """Run the parts that the command line names, all of them by default, and write `output`. `keys` are in it in any case, null
    where nobody found out; with `--only` the other parts keep what an earlier run has found. 0 when every part could be run.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="these parts")
    parser.add_argument("--traces", type=Path, help="folder of the recorded traces")
    given = parser.parse_args(argv)
    found: Figures = {**dict.fromkeys(keys), **(_before(output) if len(given.only) < len(parts) else {})}
    missing: dict[str, str] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        began = time.monotonic()
        try:
            found |= parts[name](given.traces)
        except Exception as e:  # the other parts are worth having
            missing[name] = f"{type(e).__name__}: {e}"
        print(f"{name}: {missing.get(name, 'done')}, {time.monotonic() - began:.0f} s", flush=True)
        output.write_text(json.dumps({**found, "missing": missing}, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in keys}), f"figures in {output}")
    return 1 if missing else 0


def _before(output: Path) -> Figures:
    found: Figures = json.loads(output.read_text()) if output.exists() else {}
    return found
