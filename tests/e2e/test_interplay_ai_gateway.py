"""Envoy AI Gateway: a filter of its own reads the body and names the model, a route by that name leads to the pool, and there extproc picks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from extproc.envoy import names
from extproc.pb.envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from tests.e2e.gateway import ORIGINAL_DST, OVERRIDE_HOST, POOL, gateway, service
from tests.e2e.stack import Json, Stack, chat
from tests.e2e.test_interplay_picker import asked, echo, values
from tests.envoy import lab
from tests.envoy.setup import SEND
from tests.support.backend import Backend
from tests.support.ports import free_port
from tests.support.processor import Processor

pytestmark = pytest.mark.envoy

MODEL_HEADER = "x-ai-eg-model"
OUTER = "ai_gateway"


def named(_headers: dict[str, str], body: bytes) -> pb.ProcessingResponse:
    """The gateway's own level: the model of the body into a header, by which the route is chosen once more, and a name that the pool knows."""
    request = json.loads(body)
    answer = pb.ProcessingResponse()
    change = answer.request_body.response
    change.clear_route_cache = True
    new = json.dumps({**request, "model": "sim"}).encode()
    for key, value in ((MODEL_HEADER, request["model"].encode()), ("content-length", str(len(new)).encode())):
        option = change.header_mutation.set_headers.add()
        option.header.key, option.header.raw_value = key, value
    change.body_mutation.body = new
    return answer


def two_levels(port: int, rendered: Json) -> None:
    """Put the gateway's own level before extproc's, and lead nothing to the pool that it has not named."""
    static = rendered["static_resources"]
    static["listeners"][0]["per_connection_buffer_limit_bytes"] = (
        32 << 20
    )  # its level buffers: less is 413 for longer bodies
    manager = static["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    outer = lab.http_filter(
        "ext_proc",
        "ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": OUTER}},
        processing_mode={**SEND, "request_body_mode": "BUFFERED"},
        message_timeout="5s",
    )
    manager["http_filters"].insert(0, {**outer, "name": "envoy.filters.http.ext_proc/aigateway"})
    static["clusters"].append(service(OUTER, port))
    by_model = {"prefix": "/", "headers": [{"name": MODEL_HEADER, "string_match": {"exact": "team-chat"}}]}
    nowhere = {"match": {"prefix": "/"}, "direct_response": {"status": 404}}
    hosts = manager["route_config"]["virtual_hosts"]
    hosts[0]["routes"] = [{"match": by_model, "route": {"cluster": POOL, "timeout": "0s"}}, nowhere]


@asynccontextmanager
async def behind(directory: Path, shape: str) -> AsyncIterator[tuple[Stack, dict[str, str]]]:
    port = free_port()
    async with (
        Processor(f"127.0.0.1:{port}", named),
        Backend(echo("a")) as a,
        Backend(echo("b")) as b,
    ):
        pool = {"engine": "none", "models": ["sim"], "replicas": [a.address, b.address]}
        async with gateway(directory, shape, pool, change=lambda r: two_levels(port, r)) as running:
            yield running, {"a": a.address, "b": b.address}


@pytest.mark.parametrize("shape", [ORIGINAL_DST, OVERRIDE_HOST], ids=["fails closed", "fails open"])
@pytest.mark.parametrize("size", [10, 100_000, 1_500_000])
async def test_extproc_decides_on_the_body_that_the_gateway_made(tmp_path: Path, shape: str, size: int) -> None:
    async with behind(tmp_path, shape) as (running, addresses):
        body = chat("word " * (size // 5), stream=False)
        seen = await asked(running, {**body, "model": "team-chat"})
        decision = running.last().decision
        assert decision.model == "sim", "the name that the gateway gave it"
        assert addresses[seen["name"]] == decision.endpoints[0]
        assert values(seen, names.DESTINATION) == [decision.endpoints[0]]
        assert values(seen, MODEL_HEADER) == ["team-chat"]


async def test_a_model_that_the_gateway_does_not_lead_to_the_pool_is_not_its_answer(tmp_path: Path) -> None:
    """The filter of the picker is on for the pool's routes alone; here it is on for all, and what it says changes nothing elsewhere."""
    async with (
        behind(tmp_path, ORIGINAL_DST) as (running, _),
        running.post({**chat(), "model": "somebody-elses"}) as response,
    ):
        assert response.status == 404
