"""NVIDIA Dynamo: frontends are the replicas, and their load is that of the workers behind them, by the workers' own pages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from tests.e2e.stack import same_members, stack
from tests.support.backend import Backend
from tests.support.waiting import until

SHIPPED = Path(__file__).parents[2] / "deploy" / "interplay" / "dynamo" / "extproc.yaml"

WORKER = """\
# HELP dynamo_component_requests_total Total number of requests processed by work handler
# TYPE dynamo_component_requests_total counter
dynamo_component_requests_total{{dynamo_component="backend",dynamo_endpoint="generate",dynamo_namespace="cell"}} 9
# HELP dynamo_component_inflight_requests Number of requests currently being processed by work handler
# TYPE dynamo_component_inflight_requests gauge
dynamo_component_inflight_requests{{dynamo_component="backend",dynamo_endpoint="generate",dynamo_namespace="cell"}} 3
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{dynamo_component="backend",dynamo_namespace="cell",engine="0",model_name="sim",worker_id="7587"}} {running}.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{dynamo_component="backend",dynamo_namespace="cell",engine="0",model_name="sim",worker_id="7587"}} {waiting}.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{dynamo_component="backend",dynamo_namespace="cell",engine="0",model_name="sim",worker_id="7587"}} 0.25
"""
"""What a vLLM worker of Dynamo shows at DYN_SYSTEM_PORT: its own metrics, and the engine's passed through. In documented form (1.x); not recorded."""


def worker(running: int, waiting: int) -> Any:
    async def handle(request: web.Request) -> web.StreamResponse:
        found = request.path == "/metrics"
        return web.Response(
            text=WORKER.format(running=running, waiting=waiting) if found else "", status=200 if found else 404
        )

    return handle


def frontend(name: str) -> Any:
    """It has metrics of its own, which say nothing of an engine."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == "/metrics":
            return web.Response(
                text="# TYPE dynamo_frontend_requests_total counter\ndynamo_frontend_requests_total 1\n"
            )
        return web.json_response({"name": name})

    return handle


@asynccontextmanager
async def cells(directory: Path) -> AsyncIterator[Any]:
    """Two cells of a frontend and two workers each; nothing waits in the first."""
    async with (
        Backend(frontend("idle")) as idle,
        Backend(frontend("busy")) as busy,
        Backend(worker(1, 0)) as w1,
        Backend(worker(2, 0)) as w2,
        Backend(worker(64, 40)) as w3,
        Backend(worker(64, 30)) as w4,
    ):
        pool = yaml.safe_load(SHIPPED.read_text())["pools"][0]
        pool |= {"models": ["sim"], "policy": "least_queue", "scrape": {"interval_s": 0.1}}
        pool["replicas"] = [
            {"address": busy.address, "labels": {"metrics": f"{w3.address},{w4.address}"}},
            {"address": idle.address, "labels": {"metrics": f"{w1.address},{w2.address}"}},
        ]
        async with stack(directory, pool, ready=False) as running:  # a `Backend` lists no models
            await until(lambda: same_members(running.app, running.envoy))
            yield running, busy.address, idle.address


@pytest.mark.envoy
async def test_the_load_of_a_cell_is_that_of_its_workers_added_up(tmp_path: Path) -> None:
    async with cells(tmp_path) as (running, busy, idle):

        def load(address: str) -> tuple[Any, Any]:
            sample = next(m.sample for _, m in running.app.router.members() if m.address == address)
            return (sample.running, sample.waiting) if sample is not None else (None, None)

        await until(lambda: load(busy) == (128, 70))
        await until(lambda: load(idle) == (3, 0))
        for _ in range(6):
            async with running.post() as response:
                assert (response.status, (await response.json())["name"]) == (200, "idle")
