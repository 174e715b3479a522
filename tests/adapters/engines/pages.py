"""Pages that the tests of engines read."""

from __future__ import annotations

from pathlib import Path

from extproc.adapters.engines import ENGINES

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECORDED = ("metrics_idle_fresh.txt", "metrics_loaded_30req.txt", "metrics_kv_pressure.txt")

parse_vllm = ENGINES["vllm"].parse


def recorded(name: str, version: str = "vllm-0.32") -> bytes:
    return (FIXTURES / version / name).read_bytes()


def documented(name: str) -> bytes:
    """A page of another engine, in the form that its documentation or source gives; see the README beside them."""
    return (FIXTURES / "engines" / name).read_bytes()
