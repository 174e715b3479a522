"""The replicas of a simulated cluster: from `--replica "gpu=h100,tp=1,count=8"`, or from a YAML file like the demo's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import yaml
from pydantic import AliasChoices, Field, ValidationError, model_validator

from extproc.config import ConfigError, Section, mistakes, yaml_mistake
from extproc.core.roles import ROLE
from extproc.core.settings import DisaggregationSettings
from extproc.core.steptime import prior
from extproc.core.types import Replica
from extproc.sim.engine import EngineConfig
from extproc.sim.node import NodeSpec

NUM_BLOCKS_TOKENS: Final = 16
"""Tokens of a block where `num_blocks` is told, as in vLLM and in the demo's file."""

_GPU_BYTES: Final = {"a100": 80e9, "h100": 80e9, "h200": 141e9}
_USED: Final = 0.9
"""vLLM's default `gpu_memory_utilization`."""
_OTHER_BYTES: Final = 4e9
"""Per GPU, for activations and CUDA graphs: with it an 8B model gets 397,000 tokens on 80 GB, as measured (about 400,000)."""
_KV_BYTES: Final = ((8.0, 131_072.0), (70.0, 327_680.0))
"""Billions of parameters -> bytes of KV cache per token, Llama 3.1 in bf16; other sizes lie on the power law through both."""


class Group(Section):
    """Replicas of one kind."""

    gpu: str = "h100"
    """a100, h100 or h200: sets the time of a step."""
    tp: int = Field(default=1, ge=1)
    """Tensor parallelism."""
    pp: int = Field(default=1, ge=1)
    """Pipeline stages."""
    count: int = Field(default=1, ge=1, le=1000)
    """How many of them."""
    num_blocks: int | None = Field(default=None, ge=1, validation_alias=AliasChoices("num_blocks", "blocks"))
    """KV cache in blocks of 16 tokens, whatever the block size of the simulation."""
    kv_tokens: int | None = Field(default=None, ge=1)
    """KV cache in tokens. Without either, what the GPUs' memory leaves beside the weights."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences in one step."""
    max_num_batched_tokens: int = Field(default=8192, ge=256)
    """Tokens in one step."""
    weight: float = Field(default=1.0, gt=0)
    """Share under the `weighted` policy."""
    role: Literal["both", "prefill", "decode"] = "both"
    """`prefill`: computes prompts for others alone; `decode`: prompts are computed for it, where that costs less."""

    @model_validator(mode="after")
    def _one_size(self) -> Group:
        if self.num_blocks is not None and self.kv_tokens is not None:
            raise ValueError("has both num_blocks and kv_tokens; keep one")
        return self

    @classmethod
    def from_text(cls, text: str) -> Group:
        """From `key=value,key=value`. Raises ConfigError with one line for each mistake."""
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        try:
            return cls.model_validate({key.strip(): value.strip() for key, _, value in pairs})
        except ValidationError as e:
            raise ConfigError("\n".join(f"--replica {text}: {mistake}" for mistake in mistakes(e, cls))) from None

    def kv_capacity(self, model_size: str) -> int:
        """KV cache in tokens. Raises ConfigError when the model does not fit."""
        if self.kv_tokens is not None:
            return self.kv_tokens
        if self.num_blocks is not None:
            return self.num_blocks * NUM_BLOCKS_TOKENS
        tokens = _left_for_kv(self.gpu, self.tp * self.pp, _billions(model_size))
        if tokens < 1024:
            raise ConfigError(f"a model of {model_size} leaves no KV cache on {self.tp * self.pp} {self.gpu}; raise tp")
        return tokens


def load_fleet(path: Path) -> tuple[tuple[Group, ...], str | None]:
    """The key `fleet` of a YAML file, and its `model_size` if it has one; other keys are the demo's business.

    Raises ConfigError with one line for each mistake.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; --fleet needs a YAML file with the key fleet") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not YAML: {yaml_mistake(e)}") from None
    rows = raw.get("fleet") if isinstance(raw, dict) else raw
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path}: has no list of replicas under the key fleet")
    size = raw.get("model_size") if isinstance(raw, dict) else None
    groups: list[Group] = []
    found: list[str] = []
    for place, row in enumerate(rows):
        try:
            groups.append(Group.model_validate(row))
        except ValidationError as e:
            found += [f"{path}: fleet[{place}]: {mistake}" for mistake in mistakes(e, Group)]
    if found:
        raise ConfigError("\n".join(found))
    return tuple(groups), None if size is None else str(size)


def nodes(groups: Sequence[Group], model_size: str, block_size: int, cpu_overhead_s: float) -> tuple[NodeSpec, ...]:
    """One entry for each replica, in the order of the groups. Raises ConfigError."""
    every = [group for group in groups for _ in range(group.count)]
    return tuple(_node(place, group, model_size, block_size, cpu_overhead_s) for place, group in enumerate(every, 1))


def disaggregation(groups: Sequence[Group], model_size: str) -> DisaggregationSettings | None:
    """Of a fleet with roles; None where every replica does both. Raises ConfigError."""
    if all(group.role == "both" for group in groups):
        return None
    if all(group.role == "prefill" for group in groups):
        raise ConfigError("every replica has the role prefill, so nobody answers; give some the role decode, or none")
    return DisaggregationSettings(kv_bytes_per_token=kv_bytes(_billions(model_size)))


def kv_bytes(billions: float) -> float:
    """Of one token's KV cache, for a model of so many billion parameters."""
    (small, low), (large, high) = _KV_BYTES
    return low * math.pow(billions / small, math.log(high / low) / math.log(large / small))


def _node(place: int, group: Group, model_size: str, block_size: int, cpu_overhead_s: float) -> NodeSpec:
    labels = {"gpu": group.gpu, "tp": str(group.tp), "pp": str(group.pp), "model_size": model_size}
    if group.role != "both":
        labels[ROLE] = group.role
    num_blocks = max(group.kv_capacity(model_size) // block_size, 1)
    try:
        engine = EngineConfig(
            step_time=prior(labels),
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_batched_tokens=group.max_num_batched_tokens,
            max_num_seqs=group.max_num_seqs,
            max_model_len=num_blocks * block_size,  # whatever fits: traces are of models with other limits
            cpu_overhead_s=cpu_overhead_s,
        )
    except ValueError as e:
        raise ConfigError(f"replica {place}: {e}") from None
    return NodeSpec(Replica(_address(place), labels, group.weight), engine)


def _address(place: int) -> str:
    """Nobody listens there; it is a name."""
    return f"10.0.{place >> 8}.{place & 255}:8000"


def _left_for_kv(gpu: str, gpus: int, billions: float) -> int:
    per_gpu = next((size for name, size in _GPU_BYTES.items() if name in gpu.lower()), 80e9)
    left = gpus * (_USED * per_gpu - _OTHER_BYTES) - 2e9 * billions
    return max(int(left / kv_bytes(billions)), 0)


def _billions(model_size: str) -> float:
    """`8b` or `500m`. Raises ConfigError."""
    text = model_size.strip().lower()
    unit = {"b": 1.0, "m": 1e-3}.get(text[-1:], 0.0)
    try:
        size = float(text[:-1]) * unit
    except ValueError:
        size = 0.0
    if not size > 0:
        raise ConfigError(f"model size {model_size!r} is not like 8b or 500m")
    return size
