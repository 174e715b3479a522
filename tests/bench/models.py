"""`make bench-models`: exact prefixes, disaggregation, canaries and fallbacks in figures; build/bench-models.json.

python -m tests.bench.models [--only PART ...] [--traces FOLDER]

Parts: `precise` (what exactness is worth in the simulator; the shares of exact predictions are those that `make test-vllm` found with
real engines, where it was not run those of simulated ones), `pd` (splitting by cost against always, never and by a threshold), `canary` (the share that
was asked for and the one that came out), `fallback` (errors that clients see while a pool dies and a provider takes over), `lora` (mean TTFT with knowledge of loaded adapters against none).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Final

from tests.bench.gathering import Figures, Part, gather

OUTPUT: Final = Path("build/bench-models.json")
REAL: Final = Path("build/precise-vllm.json")
"""Written by tests/e2e/test_vllm_precise.py: `exact_share` and `fallback_share` of requests to real engines."""
KEYS: Final = ("precise", "pd", "canary", "fallback", "lora")


def precise(traces: Path | None) -> Figures:
    """Shares of exact predictions by real engines, else by simulated ones, and the gain in mean TTFT by these."""
    shares = (
        json.loads(REAL.read_text()) if REAL.exists() else importlib.import_module("tests.bench.models_exact").run()
    )
    return {"precise": {**shares, **importlib.import_module("tests.bench.precise").briefly(traces)}}


def _of(module: str, traces: Path | None) -> Figures:
    found: Figures = importlib.import_module(f"tests.bench.{module}").run(traces)
    return found


PARTS: Final[dict[str, Part]] = {
    "precise": precise,
    "pd": lambda traces: {"pd": _of("disaggregation", traces)},
    "canary": lambda traces: {"canary": _of("models_canary", traces)},
    "lora": lambda traces: {"lora": _of("lora", traces)},
    "fallback": lambda traces: {"fallback": _of("models_fallback", traces)},
}


if __name__ == "__main__":
    sys.exit(gather(OUTPUT, KEYS, PARTS, __doc__ or ""))
