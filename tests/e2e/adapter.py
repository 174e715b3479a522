"""A LoRA adapter for a small Llama, as peft writes it: two files, made from the model's own shapes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final

RANK: Final = 8
_BYTES: Final = 2
"""Of a number in bf16."""


def write_adapter(directory: Path, model: Path) -> Path:
    """An adapter that changes nothing: its weights are zero, but an engine loads and applies it like any. Returns its folder."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    directory.mkdir(parents=True)
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.name, "bias": "none"}
    given = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**about, **given}))
    (directory / "adapter_model.safetensors").write_bytes(_tensors(config))
    return directory


def _tensors(config: dict[str, Any]) -> bytes:
    """In the safetensors format: length of the header, header as JSON, numbers."""
    hidden, head = config["hidden_size"], config["head_dim"]
    outputs = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    header, end = {}, 0
    for layer in range(config["num_hidden_layers"]):
        for name, output in outputs.items():
            for part, shape in (("A", (RANK, hidden)), ("B", (output, RANK))):
                start, end = end, end + shape[0] * shape[1] * _BYTES
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight"
                header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)
