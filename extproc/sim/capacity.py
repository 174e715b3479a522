"""How much GPU memory a model takes, how many GPUs that is, and how many replicas a load needs: arithmetic before the first GPU is paid for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from extproc.config import ConfigError, Section, mistakes

GB = 1e9
MOST_GPUS = 64
"""Of one replica."""
T = TypeVar("T", bound=Section)


class Model(Section):
    """What of a model takes memory. The names are those of its `config.json`."""

    parameters_b: float = Field(gt=0)
    """Billions of parameters."""
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    """Of attention: tensor parallelism divides them."""
    kv_heads: int = Field(gt=0)
    """Fewer than heads with grouped queries."""
    head_size: int = Field(gt=0)
    weight_bytes: float = Field(default=2.0, gt=0)
    """Of one parameter: 2 in FP16 and BF16, 1 in FP8."""
    kv_bytes: float = Field(default=2.0, gt=0)
    """Of one number in the KV cache."""

    @model_validator(mode="after")
    def _grouped(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads do not share {self.kv_heads} KV heads evenly; look at the model's config.json"
            )
        return self

    @property
    def weights_gb(self) -> float:
        """GB of all weights."""
        return self.parameters_b * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of all layers; what `disaggregation.kv_bytes_per_token` wants."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.kv_bytes

    def kv_gb(self, tokens: int) -> float:
        """GB of the KV cache of one sequence."""
        return self.kv_bytes_per_token * tokens / GB

    def total_gb(self, tokens: int, concurrent: int, overhead: float = 0.15) -> float:
        """GB for so many sequences of that length at once; `overhead` for activations and fragments, 0.1 to 0.2 in practice."""
        return (self.weights_gb + self.kv_gb(tokens) * concurrent) * (1 + overhead)

    @property
    def tensor_parallel(self) -> list[int]:
        """Degrees that divide the heads, up to 64 GPUs."""
        return [n for n in range(1, MOST_GPUS + 1) if self.heads % n == 0]


class Asked(Section):
    """What the fleet is to carry, and on what."""

    tokens: int = Field(default=4096, gt=0)
    """Prompt and output of one sequence."""
    concurrent: int = Field(default=32, gt=0)
    """Sequences at once on one replica."""
    gpu_gb: float = Field(default=80.0, gt=0)
    """Memory of one GPU."""
    gpu_share: float = Field(default=0.9, gt=0, le=1)
    """Of it for the engine, as vLLM's `--gpu-memory-utilization`."""
    overhead: float = Field(default=0.15, ge=0, le=1)
    pipeline_parallel: int = Field(default=1, ge=1, le=MOST_GPUS)
    rate: float | None = Field(default=None, gt=0)
    """Requests a second of all clients."""
    rate_per_replica: float | None = Field(default=None, gt=0)
    """Of one replica, measured; `extproc simulate` estimates it."""


def answer(model: Model, asked: Asked) -> dict[str, Any]:
    """The figures by name, sizes in GB. `tensor_parallel`, and what follows from it, is None where no degree up to 64 GPUs is enough."""
    total_gb = model.total_gb(asked.tokens, asked.concurrent, asked.overhead)
    usable_gb = asked.gpu_gb * asked.gpu_share
    fits = [n for n in model.tensor_parallel if n * asked.pipeline_parallel * usable_gb >= total_gb]
    tensor_parallel = fits[0] if fits else None
    gpus = tensor_parallel * asked.pipeline_parallel if tensor_parallel else None
    replicas = math.ceil(asked.rate / asked.rate_per_replica) if asked.rate and asked.rate_per_replica else None
    return {
        "weights_gb": model.weights_gb,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "kv_gb_per_sequence": model.kv_gb(asked.tokens),
        "total_gb": total_gb,
        "tensor_parallel_choices": model.tensor_parallel,
        "tensor_parallel": tensor_parallel,
        "gpus_per_replica": gpus,
        "replicas": replicas,
        "gpus": replicas * gpus if replicas and gpus else None,
    }


def load_model(path: Path, parameters_b: float, weight_bytes: float = 2.0, kv_bytes: float = 2.0) -> Model:
    """From a model's `config.json`, which does not say how many parameters there are. Raises ConfigError."""
    try:
        raw = json.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; pass the path of the model's config.json") from None
    except ValueError as e:
        raise ConfigError(f"{path}: not JSON: {e}") from None
    raw = raw.get("text_config", raw) if isinstance(raw, dict) else {}
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    size = raw.get("head_dim") or (hidden // heads if heads and hidden else None)
    fields = {
        "parameters_b": parameters_b,
        "layers": raw.get("num_hidden_layers"),
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_size": size,
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
    }
    return checked(Model, fields, str(path))


def checked(kind: type[T], fields: dict[str, Any], source: str) -> T:
    """Raises ConfigError with one line for each mistake."""
    try:
        return kind(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as e:
        raise ConfigError("\n".join(f"{source}: {mistake}" for mistake in mistakes(e, kind))) from None


def lines(model: Model, asked: Asked) -> list[str]:
    """The answer in words."""
    found = answer(model, asked)
    choices = ", ".join(map(str, found["tensor_parallel_choices"]))
    told = [
        f"weights              {found['weights_gb']:,.1f} GB",
        f"KV cache             {found['kv_bytes_per_token'] / 1024:,.0f} KiB a token, {found['kv_gb_per_sequence']:,.2f} GB for {asked.tokens:,} tokens",
        f"in all               {found['total_gb']:,.1f} GB with {asked.concurrent} sequences at once and {asked.overhead:.0%} more",
        f"tensor parallelism   {model.heads} heads allow {choices}",
    ]
    if found["tensor_parallel"] is None:
        told.append(
            f"GPUs                 more than {MOST_GPUS} of {asked.gpu_gb:g} GB for a replica: ask for fewer or shorter sequences"
        )
        return told
    parallel = f"TP {found['tensor_parallel']} x PP {asked.pipeline_parallel}"
    told.append(f"GPUs of a replica    {found['gpus_per_replica']} of {asked.gpu_gb:g} GB ({parallel})")
    if found["replicas"] is not None:
        told.append(
            f"for {asked.rate:,g} requests/s   {found['replicas']:,} replicas of {asked.rate_per_replica:g}, {found['gpus']:,} GPUs"
        )
    return told
