"""What inference engines say of themselves, one small table each and one parser for all: pages of bytes in, samples out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from extproc.adapters.engines.models import listed_models, listed_parents
from extproc.adapters.engines.parser import Engine, told
from extproc.adapters.engines.ray import RAY
from extproc.adapters.engines.sglang import SGLANG
from extproc.adapters.engines.table import HealthPaths
from extproc.adapters.engines.tensorrt import TENSORRT_LLM
from extproc.adapters.engines.tgi import TGI
from extproc.adapters.engines.triton import TRITON, TRITON_TENSORRT_LLM
from extproc.adapters.engines.vllm import VLLM
from extproc.core.types import Sample

__all__ = [
    "CHOICES",
    "ENGINES",
    "Engine",
    "HealthPaths",
    "detect",
    "health_paths",
    "listed_models",
    "listed_parents",
]

ENGINES: Final[Mapping[str, Engine]] = {
    table.name: Engine(table) for table in (VLLM, SGLANG, RAY, TENSORRT_LLM, TRITON_TENSORRT_LLM, TGI, TRITON)
}
"""By name, the most telling first."""

CHOICES: Final[Mapping[str, tuple[Engine, ...]]] = {
    "auto": tuple(ENGINES.values()),
    "triton": (ENGINES["triton_trtllm"], ENGINES["triton"]),
    **{name: (ENGINES[name],) for name in ("vllm", "sglang", "ray", "trtllm", "tgi")},
    "none": (),
}
"""What `pools[].engine` may say, and what its replicas may then be."""


def detect(page: bytes, engines: Iterable[Engine]) -> tuple[Engine, Sample] | None:
    """Whose page it is, by who reads the most from it, and what it says; None where nobody reads anything."""
    read = [(engine, sample) for engine in engines if (sample := engine.parse(page)) is not None and told(sample)]
    return max(read, key=lambda pair: told(pair[1]), default=None)


def health_paths(engines: Iterable[Engine]) -> tuple[HealthPaths, ...]:
    """Where these may tell how they are, each once."""
    return tuple(dict.fromkeys(paths for engine in engines for paths in engine.table.health))
