"""Runs of a real vLLM on one GPU, as LLMServingSim publishes them: three files a run, found by their endings.

NAME_meta.json        how the engine was set up
NAME_requests.jsonl   lengths and times of each request
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from extproc.core.steptime import prior
from extproc.sim.engine import EngineConfig
from extproc.sim.replay import Timed

SOURCE: Final = "github.com/casys-kaist/LLMServingSim (MIT), bench/examples"


class MissingRunsError(Exception):
    """There is nothing to compare with; the message says where to get it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run."""

    name: str
    config: EngineConfig
    """As far as recorded; the step time is the prior of an unknown GPU."""
    requests: tuple[Timed, ...]
    """In order of arrival; seconds since the first."""


def load(folder: Path | None) -> list[Run]:
    """The runs in a folder, by name. Raises MissingRunsError where there are none."""
    metas = sorted(folder.glob("*_meta.json")) if folder else []
    if not metas:
        raise MissingRunsError(
            f"no recorded runs{f' in {folder}' if folder else ''}: name a folder with NAME_meta.json and NAME_requests.jsonl "
            f"by --runs (make: TRACES=, the folder above real_vllm_runs); they are published by {SOURCE}"
        )
    return [_run(meta) for meta in metas]


def _run(meta: Path) -> Run:
    name = meta.name.removesuffix("_meta.json")
    lines = meta.with_name(f"{name}_requests.jsonl").read_text().splitlines()
    return Run(name, config(json.loads(meta.read_text())), requests([json.loads(line) for line in lines]))


def config(meta: Mapping[str, Any]) -> EngineConfig:
    """The engine as it was set up. What was not recorded stays at our default, which no recorded run comes near."""
    asked = meta["engine_kwargs"]
    cache = meta.get("kv_cache", {})
    found = {
        "max_num_seqs": asked["max_num_seqs"],
        "max_num_batched_tokens": asked["max_num_batched_tokens"],
        "max_model_len": asked.get("max_model_len"),
        "num_blocks": cache["num_gpu_blocks"] - 1 if cache else None,  # the first one is never used
        "block_size": cache.get("block_size"),
        "prefix_caching": cache.get("enable_prefix_caching"),
        "async_scheduling": meta.get("resolved_config", {}).get("scheduler_config", {}).get("async_scheduling"),
    }
    known = {key: value for key, value in found.items() if value is not None}
    return EngineConfig(prior({}), cpu_overhead_s=0.0, **known)


def requests(rows: Sequence[Mapping[str, Any]]) -> tuple[Timed, ...]:
    """Arrivals are of the client's clock, the rest is of the engine's.

    The engine looks for new requests between two steps only, so the least time from arrival to queue is all but nothing: the
    clocks differ by that. Counting from `queued_ts` instead would leave out the wait for a step to end.
    """
    apart_s = min(row["queued_ts"] - row["arrival_time"] for row in rows)
    start_s = min(row["arrival_time"] for row in rows) + apart_s
    timed = [
        Timed(
            prompt_tokens=row["input_toks"],
            output_tokens=row["output_toks"],
            arrived_s=row["arrival_time"] + apart_s - start_s,
            scheduled_s=row["scheduled_ts"] - start_s,
            first_token_s=row["first_token_ts"] - start_s,
            last_token_s=row["last_token_ts"] - start_s,
        )
        for row in rows
    ]
    return tuple(sorted(timed, key=lambda t: t.arrived_s))
