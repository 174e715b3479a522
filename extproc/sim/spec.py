"""What a simulated replica is: from Python, from command line options, or from a YAML list."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from extproc.config import ConfigError, Section, mistakes, yaml_mistake
from extproc.core.steptime import prior
from extproc.sim.engine import EngineConfig


class BackendSpec(Section):
    """One simulated replica."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free one."""
    labels: Mapping[str, str] = Field(default_factory=dict)
    """`gpu`, `tp`, `pp`, `model_size`: how fast it is."""
    model: str = "sim"
    adapters: tuple[str, ...] = ()
    """LoRA adapters, served as models of their own."""
    max_loras: int | None = Field(default=None, ge=1)
    """Adapters that one batch may use, and that are held at once, like `--max-loras`. null: all of them."""
    lora_load_s: float = Field(default=0.0, ge=0)
    """Seconds for which the engine stands still while it loads one that it does not hold."""
    num_blocks: int = Field(default=25_000, ge=1)
    """KV blocks; the default is about what 80 GB leave to an 8B model in bf16."""
    block_size: int = Field(default=16, ge=1)
    """Tokens."""
    max_model_len: int = Field(default=131_072, ge=2)
    """Tokens of prompt and output; cut to what the KV cache holds."""
    max_num_seqs: int = Field(default=256, ge=1)
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    mean_output_tokens: float = Field(default=200.0, ge=1)
    """Of answers whose length the client leaves open."""
    time_scale: float = Field(default=1.0, gt=0)
    """Above 1 the GPU is slower than real by this factor: so that a busy machine can keep up with many replicas."""
    max_in_flight: int | None = Field(default=None, ge=1)
    """Requests; above it 503 at once, like `--max-num-queued-reqs`. null: no limit."""
    cached_tokens: bool = True
    """Tell the prefix hit in the usage, like `--enable-prompt-tokens-details`."""
    fail_with: int | None = Field(default=None, ge=400, le=599)
    """Answer every completion with this status."""
    hang: bool = False
    """The engine stands still: streams get headers and nothing else, the rest nothing at all, while probes say 200."""
    drop_usage: bool = False
    """Leave the usage out of every response."""
    kv_events: int | None = Field(default=None, ge=0, le=65535)
    """Publish KV events on this port, and the last of them again on `kv_replay`; 0 takes a free one. null: none."""
    kv_replay: int | None = Field(default=None, ge=0, le=65535)
    """null: one above `kv_events`, or a free one."""

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_too(cls, value: Any) -> Any:
        """`tp: 4` in YAML is a number."""
        return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _runs(self) -> Self:
        self.engine_config()
        return self

    @classmethod
    def from_options(cls, *, gpu: str, tp: int, model_size: str, **fields: Any) -> Self:
        """From the options of `extproc backend`. Raises ConfigError."""
        labels = {"gpu": gpu, "tp": str(tp), "model_size": model_size}
        try:
            return cls(labels=labels, **fields)
        except ValidationError as e:
            raise ConfigError("\n".join(f"options: {mistake}" for mistake in mistakes(e, cls))) from None

    def engine_config(self) -> EngineConfig:
        """Raises ValueError when the token budget is below the number of sequences."""
        return EngineConfig(
            step_time=prior(self.labels),
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_loras=(self.max_loras or len(self.adapters)) if self.adapters else None,
            lora_load_s=self.lora_load_s,
            # vLLM refuses to start when one request of the greatest length would not fit; here it is made to fit.
            max_model_len=min(self.max_model_len, self.num_blocks * self.block_size),
        )


_SPECS = TypeAdapter(list[BackendSpec])


def load_specs(path: Path) -> list[BackendSpec]:
    """Read a YAML list of replicas, each a mapping of the fields above. Raises ConfigError with one line for each mistake."""
    try:
        return _SPECS.validate_python(yaml.safe_load(path.read_text()))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; pass --config with the path of a YAML file") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not YAML: {yaml_mistake(e)}") from None
    except ValidationError as e:
        raise ConfigError("\n".join(f"{path}: {mistake}" for mistake in mistakes(e, BackendSpec))) from None
