"""What runs under the interpreter that has ai-dynamo-runtime: its selector on a tape of decisions, or its replay of a trace.

Standard library and Dynamo only, for that interpreter has nothing of ours. JSON on standard input, and on standard output.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Any, Final

PACKAGE: Final = "ai-dynamo-runtime"
NOT_INSTALLED: Final = 3
"""Exit status."""
MODEL: Final = "peer"
ENVIRONMENT: Final = {
    "DYN_ROUTER_USE_KV_EVENTS": "false",  # believe what was routed; without events a worker would never count as ready
    "DYN_ROUTER_TTL_SECS": "86400",  # real seconds: of a run in virtual time nothing may be forgotten by the clock
    "DYN_LOG": "off",
}
"""The selection service is set up by its environment alone."""


def tokens(prompt_tokens: int, runs: Sequence[Sequence[int]], block_size: int) -> list[int]:
    """A prompt in which equal block ids are equal tokens. What fills no block can match nothing, whatever it is."""
    known = [t for start, length in runs for t in range(start * block_size, (start + length) * block_size)]
    return known[:prompt_tokens] + [0] * (prompt_tokens - len(known))


async def decide(service: Any, row: dict[str, Any], block_size: int) -> dict[str, Any]:
    """Bring its books to the state of one decision, let it choose, and book what was chosen in truth."""
    for flight in row["prefilled"]:
        await service.prefill_complete(flight)
    for flight in row["ended"]:
        await service.free_reservation(flight)
    prompt = {"model_name": MODEL, "token_ids": tokens(row["prompt_tokens"], row["runs"], block_size)}
    (before,) = service.loads(model_name=MODEL)
    loads = await service.potential_loads(prompt)
    candidates = [int(worker) for worker in row["workers"]]
    chosen = await service.select(prompt | {"selection_id": f"ask {row['id']}", "allowed_worker_ids": candidates})
    booked = {"selection_id": row["id"], "worker_id": row["chosen"], "effective_prefill_tokens": row["uncached_tokens"]}
    await service.create_reservation(prompt | booked)
    queued = {load["worker_id"]: load["potential_prefill_tokens"] for load in before["loads"]}
    return {"chosen": chosen["worker_id"], "workers": [_seen(load, queued, row["prompt_tokens"]) for load in loads]}


def _seen(load: dict[str, Any], queued: dict[int, int], prompt_tokens: int) -> dict[str, Any]:
    waiting = queued.get(load["worker_id"], 0)
    return {
        "worker": load["worker_id"],
        "queued_tokens": waiting,
        "cached_tokens": waiting + prompt_tokens - load["potential_prefill_tokens"],
        "held_blocks": load["potential_decode_blocks"],
    }


async def select(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Its choice at each decision of the tape, and what it saw of each worker."""
    service = import_module("dynamo.llm").SelectionService(indexer_threads=1)
    for worker in range(given["workers"]):
        about = {"worker_id": worker, "model_name": MODEL, "endpoint": f"http://10.0.0.{worker}:8000"}
        size = {
            "block_size": given["block_size"],
            "max_num_batched_tokens": 8192,
            "total_kv_blocks": given["num_blocks"],
        }
        await service.upsert_worker(about | size)
    await _all_there(service, given["workers"], given["block_size"])
    return [await decide(service, row, given["block_size"]) for row in given["rows"]]


async def _all_there(service: Any, workers: int, block_size: int) -> None:
    """A worker is told to the scheduler some time after `upsert_worker` returns."""
    probe = {"model_name": MODEL, "token_ids": [0] * block_size}
    for _ in range(1000):
        if len(await service.potential_loads(probe)) >= workers:
            return
        await asyncio.sleep(0.01)
    raise TimeoutError(f"the selector does not know all of its {workers} workers after 10 s")


def replay(given: dict[str, Any]) -> dict[str, Any]:
    """Its own simulator on a Mooncake trace: the summary of each mode."""
    config = import_module("dynamo.llm").KvRouterConfig
    run = import_module("dynamo._core").run_mocker_trace_replay
    return {
        mode: run(
            [given["trace"]],
            extra_engine_args={"engine": given["engine"]},
            router_config=config() if mode == "kv_router" else None,
            num_workers=given["workers"],
            router_mode=mode,
            arrival_speedup_ratio=given["speed_up"],
            trace_block_size=given["trace_block_size"],
        ).summary
        for mode in given["modes"]
    }


def main() -> None:
    """`select` or `replay`."""
    try:
        import_module("dynamo.llm")
    except ImportError as e:
        print(e, file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    given = json.load(sys.stdin)
    answer = asyncio.run(select(given)) if sys.argv[1] == "select" else replay(given)
    json.dump({"version": metadata.version(PACKAGE), "answer": answer}, sys.stdout)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)  # read when the library is loaded
    main()
