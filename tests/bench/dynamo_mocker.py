"""Dynamo's simulated worker, told in our terms: the time of its steps, its limits, and its reading of a Mooncake trace.

With these our simulator should come to what theirs does; where it does not, one of the two has the scheduler wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from extproc.core.steptime import StepTime
from extproc.core.types import Replica
from extproc.sim.engine import EngineConfig
from extproc.sim.node import NodeSpec
from extproc.sim.traces import Trace, Turn

TRACE_BLOCK: Final = 512
BLOCK: Final = 64
NUM_BLOCKS: Final = 16_384
ENGINE: Final[dict[str, Any]] = {
    "num_gpu_blocks": NUM_BLOCKS,
    "block_size": BLOCK,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "timing_model": {"type": "polynomial"},
}
"""Its defaults, said all the same: another version may have others."""

_DECODE_MS: Final = (5.74, 54.01, -25.74)
_PREFILL_MS: Final = (16.50142, 1.518344e-2, 4.209989e-7)


@dataclass(frozen=True, slots=True)
class MockerStepTime(StepTime):
    """A step as Dynamo's mocker has it (1.6.1, `timing_model: polynomial`): a sum of two polynomials, milliseconds.

    prefill = 16.50142 + 1.518344e-2 n + 4.209989e-7 n^2    n: new prompt tokens in the step, whatever context lies before
    decode  = 5.74 + 54.01 u - 25.74 u^2, at least 1        u: share of the KV cache that the decoding contexts fill

    The inherited constants stay zero but for `k`, by which the engine lengthens a row of like steps.
    """

    total_kv_tokens: int

    @classmethod
    def of(cls, total_kv_tokens: int) -> MockerStepTime:
        """For a worker with so large a cache."""
        return cls(0.0, 0.0, 0.0, 0.0, _DECODE_MS[1] * 1e-3 / total_kv_tokens, 0.0, total_kv_tokens)

    def step_s(
        self, new_tokens: float, prefill_chunks: Iterable[tuple[float, float]], kv_tokens: float, sequences: float
    ) -> float:
        prefill = sum(q for q, _ in prefill_chunks)
        total_ms = _polynomial(_PREFILL_MS, prefill) if prefill else 0.0
        if new_tokens > prefill:
            total_ms += max(_polynomial(_DECODE_MS, kv_tokens / self.total_kv_tokens), 1.0)
        return total_ms * 1e-3

    def scaled(self, prefill: float, decode: float) -> MockerStepTime:
        if (prefill, decode) != (1.0, 1.0):
            raise ValueError("the mocker's workers do not slow down")
        return self


def _polynomial(coefficients: tuple[float, float, float], x: float) -> float:
    constant, linear, square = coefficients
    return constant + linear * x + square * x * x


def fleet(workers: int, num_blocks: int = NUM_BLOCKS) -> tuple[NodeSpec, ...]:
    """So many workers. A step costs what it does with the usual cache, whatever `num_blocks`.

    Their scheduler decides each step when it begins and takes no time of its own.
    """
    engine = EngineConfig(
        step_time=MockerStepTime.of(NUM_BLOCKS * BLOCK),
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_num_seqs=ENGINE["max_num_seqs"],
        max_num_batched_tokens=ENGINE["max_num_batched_tokens"],
        max_model_len=num_blocks * BLOCK,
        async_scheduling=False,
        cpu_overhead_s=0.0,
    )
    return tuple(NodeSpec(Replica(f"10.0.0.{i}:8000", {"gpu": "h100"}), engine) for i in range(workers))


def trace(lines: Iterable[str]) -> Trace:
    """A Mooncake trace with the mocker's blocks: it takes an id for 512 tokens, so the last, partial one has full blocks too."""
    return Trace("mooncake", BLOCK, tuple(_turn(json.loads(line)) for line in lines))


def _turn(row: dict[str, Any]) -> Turn:
    full, ratio = row["input_length"] // BLOCK, TRACE_BLOCK // BLOCK
    runs = ((each * ratio, min(ratio, full - i * ratio)) for i, each in enumerate(row["hash_ids"]))
    return Turn(
        row["input_length"],
        row["output_length"],
        row["timestamp"] / 1e3,
        runs=tuple((start, length) for start, length in runs if length > 0),
    )
