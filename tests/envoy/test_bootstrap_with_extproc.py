"""The rendered bootstrap with something that answers in the place of extproc."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from google.protobuf import json_format, struct_pb2

from extproc.config import Config, parse
from extproc.envoy import bootstrap, endpoints, names
from extproc.pb.envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from tests.envoy import steering
from tests.support.backend import Backend
from tests.support.envoy import EnvoyProcess
from tests.support.processor import Processor
from tests.support.waiting import until

pytestmark = pytest.mark.envoy


def url(config: Config, path: str = "/v1/chat/completions") -> str:
    return f"http://{config.envoy.listen}{path}"


def rendered(config: Config) -> dict[str, Any]:
    endpoints.create_if_missing(config)
    return bootstrap.render(config)


def answer(
    pick: str | None = None,
    *,
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
    clear_route_cache: bool = False,
    **extproc: Any,
) -> ext_proc.ProcessingResponse:
    """What extproc would answer to a body."""
    common: dict[str, Any] = {"clear_route_cache": clear_route_cache}
    if headers:
        common["header_mutation"] = {"set_headers": [_header(k, v) for k, v in headers.items()]}
    if body is not None:
        common["body_mutation"] = {"body": body}
    metadata = {names.NAMESPACE: {names.FLIGHT: "f1", **extproc}}
    if pick:
        metadata[names.LB_NAMESPACE] = {names.DESTINATION: pick}
    return ext_proc.ProcessingResponse(
        request_body=ext_proc.BodyResponse(response=ext_proc.CommonResponse(**common)),
        dynamic_metadata=json_format.ParseDict(metadata, struct_pb2.Struct()),
    )


def _header(key: str, value: str) -> dict[str, Any]:
    return {"header": {"key": key, "raw_value": value.encode()}}


async def test_extproc_picks_and_sees_headers_but_no_secrets(tmp_path: Path) -> None:
    sent = {
        "authorization": "Bearer k",
        "cookie": "c",
        "x-api-key": "k",
        "x-session-id": "s",
        names.DESTINATION: "spoofed",
    }
    async with Backend() as a, Backend() as b:
        config = steering.config(tmp_path, a.address, b.address)
        async with (
            Processor(config.listen.grpc, lambda *_: answer(b.address)) as processor,
            EnvoyProcess(rendered(config)),
            aiohttp.ClientSession() as client,
        ):
            for _ in range(4):
                async with client.post(url(config), headers=sent, data=b"{}") as response:
                    assert await response.text() == b.address
            async with client.post(url(config, "/health"), headers=sent) as response:
                assert response.status == 200
    assert len(processor.headers) == 4  # /health went past extproc
    assert [set(sent) & set(seen) for seen in processor.headers] == [{"x-session-id"}] * 4


async def test_a_secret_is_shown_when_it_names_the_tenant(tmp_path: Path) -> None:
    async with Backend() as a:
        config = steering.config(tmp_path, a.address, requests={"tenant_header": "Authorization"})
        async with (
            Processor(config.listen.grpc, lambda *_: answer(a.address)) as processor,
            EnvoyProcess(rendered(config)),
            aiohttp.ClientSession() as client,
            client.post(url(config), headers={"authorization": "k", "cookie": "c"}, data=b"{}") as response,
        ):
            assert response.status == 200
    assert (processor.headers[0]["authorization"], "cookie" in processor.headers[0]) == ("k", False)
    assert a.received[0].headers["authorization"] == "k"


async def test_a_rewritten_body_arrives_with_its_length_and_only_allowed_headers(tmp_path: Path) -> None:
    new = b'{"stream": true, "stream_options": {"include_usage": true}}'
    headers = {"content-length": str(len(new)), "x-vllm-priority": "3", "x-other": "no", "authorization": "no"}
    async with Backend() as a:
        config = steering.config(tmp_path, a.address)
        async with (
            Processor(config.listen.grpc, lambda *_: answer(a.address, headers=headers, body=new)),
            EnvoyProcess(rendered(config)),
            aiohttp.ClientSession() as client,
            client.post(url(config), data=b"{}") as response,
        ):
            assert response.status == 200
    [received] = a.received
    assert (received.body, received.headers["content-length"]) == (new, str(len(new)))
    assert received.headers["x-vllm-priority"] == "3"
    assert not {"x-other", "authorization"} & set(received.headers)


async def test_a_refusal_keeps_its_status_body_and_headers(tmp_path: Path) -> None:
    error = b'{"error": {"message": "m", "type": "t", "param": null, "code": null}}'
    mutation = {"set_headers": [_header("retry-after", "2"), _header("content-type", "application/json")]}
    refusal = ext_proc.ProcessingResponse(
        immediate_response=ext_proc.ImmediateResponse(
            status={"code": 429}, headers=mutation, body=error, details=names.REFUSED_DETAILS
        )
    )
    config = steering.config(tmp_path, response_headers=True)
    async with (
        Processor(config.listen.grpc, lambda *_: refusal),
        EnvoyProcess(rendered(config)),
        aiohttp.ClientSession() as client,
        client.post(url(config), data=b"{}") as response,
    ):
        assert (response.status, await response.read()) == (429, error)
        assert (response.headers["retry-after"], response.content_type) == ("2", "application/json")
        assert response.headers.get(names.REPLICA_HEADER) is None


async def test_a_body_within_the_limit_arrives_and_one_far_above_is_refused(tmp_path: Path) -> None:
    limit = 3_000_000
    seen: list[int] = []

    def measured(headers: dict[str, str], body: bytes) -> ext_proc.ProcessingResponse:
        seen.append(len(body))
        return answer(None)

    async with Backend() as a:
        config = steering.config(tmp_path, a.address, requests={"max_body_bytes": limit})
        async with (
            Processor(config.listen.grpc, measured),
            EnvoyProcess(rendered(config)),
            aiohttp.ClientSession() as client,
        ):
            statuses = []
            for size in (limit, limit + 10_000, limit * 2):
                try:
                    async with client.post(url(config), data=io.BytesIO(b"x" * size)) as response:
                        statuses.append(response.status)
                except aiohttp.ClientConnectionError:
                    statuses.append(413)  # Envoy answers and closes while the client still sends
    assert statuses == [200, 200, 413]
    assert seen == [limit, limit + 10_000]  # the one a little above is for extproc to refuse


async def test_the_access_log_brings_flight_usage_and_first_token(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 14, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 4}}
    last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(0.3)
        for piece in (b'data: {"choices": [{}]}\n\n', last, b"data: [DONE]\n\n"):
            await response.write(piece)
            await asyncio.sleep(0.15)
        return response

    async with Backend(slow) as a:
        config = steering.config(tmp_path, a.address, progress_interval_s=0.1)
        async with (
            Processor(config.listen.grpc, lambda *_: answer(a.address, strip_usage=True)) as processor,
            EnvoyProcess(rendered(config)),
            aiohttp.ClientSession() as client,
        ):
            async with client.post(url(config), data=b"{}") as response:
                assert last not in await response.read()
            entries = processor.entries
            await until(lambda: entries and not entries[-1].common_properties.intermediate_log_entry)
    final = entries[-1].common_properties
    found = {name: json_format.MessageToDict(s) for name, s in final.metadata.filter_metadata.items()}
    assert found[names.NAMESPACE] == {names.FLIGHT: "f1", names.STRIP_USAGE: True}
    assert found[names.LB_NAMESPACE][names.SERVED] == a.address
    assert found[names.USAGE_NAMESPACE] == {"prompt_tokens": 14, "completion_tokens": 8, "cached_tokens": 4}
    assert 0.3e6 <= int(final.custom_tags[names.REPLICA_TTFT_TAG]) <= int(final.custom_tags[names.TTFT_TAG]) < 1e6
    running = [e for e in entries if e.common_properties.intermediate_log_entry]
    tags = [dict(e.common_properties.custom_tags) for e in running]
    assert tags[0] == {}  # still in prefill
    assert names.TTFT_TAG in tags[-1]


def two_pools(directory: Path, first: str, second: str, **envoy: Any) -> Config:
    one = steering.config(directory, first, **envoy)
    raw = one.model_dump(mode="json")
    pool = raw["pools"][0]
    raw["pools"] = [
        {**pool, "name": "small", "models": ["s"]},
        {**pool, "name": "large", "models": ["l"], "replicas": [second]},
    ]
    return parse(json.dumps(raw))


async def test_extproc_chooses_the_pool_and_a_client_cannot(tmp_path: Path) -> None:
    def by_model(headers: dict[str, str], body: bytes) -> ext_proc.ProcessingResponse:
        pool = json.loads(body)["model"]
        return answer(headers={names.POOL_HEADER: pool}, clear_route_cache=True)

    spoofed = {names.POOL_HEADER: "large"}
    async with Backend() as a, Backend() as b:
        config = two_pools(tmp_path, a.address, b.address)
        async with EnvoyProcess(rendered(config)) as envoy, aiohttp.ClientSession() as client:
            async with Processor(config.listen.grpc, by_model):
                await until(lambda: healthy(envoy, 1))
                for model, wanted in (("large", b), ("small", a)) * 3:
                    async with client.post(url(config), json={"model": model}, headers=spoofed) as response:
                        assert await response.text() == wanted.address
            for _ in range(3):  # extproc is gone: open, and to the first pool
                async with client.post(url(config), json={"model": "large"}, headers=spoofed) as response:
                    assert await response.text() == a.address
    assert not any(names.POOL_HEADER in r.headers for r in (*a.received, *b.received))


async def healthy(envoy: EnvoyProcess, count: int) -> bool:
    """Whether Envoy sees so many healthy processes of extproc."""
    name = f"cluster.{names.SERVICE_CLUSTER}.membership_healthy"
    return (await envoy.stats(name))[name] == count


@pytest.mark.parametrize(("fail_open", "status"), [(True, 200), (False, 503)])
async def test_without_extproc(tmp_path: Path, fail_open: bool, status: int) -> None:
    async with Backend() as a:
        config = steering.config(tmp_path, a.address, fail_open=fail_open)
        async with EnvoyProcess(rendered(config)) as envoy, aiohttp.ClientSession() as client:
            for _ in range(3):
                async with client.post(url(config), data=b"{}") as response:
                    assert response.status == status
            async with Processor(config.listen.grpc, lambda *_: answer(a.address)) as processor:
                await until(lambda: healthy(envoy, 1))
                async with client.post(url(config), data=b"{}") as response:
                    assert response.status == 200
            assert len(processor.headers) == 1


async def test_a_unix_socket(tmp_path: Path) -> None:
    async with Backend() as a:
        config = steering.config(tmp_path, a.address, fail_open=False)
        at = f"unix:{tmp_path}/grpc.sock"
        config = config.model_copy(update={"listen": config.listen.model_copy(update={"grpc": at})})
        async with (
            Processor(at, lambda *_: answer(a.address)),
            EnvoyProcess(rendered(config)),
            aiohttp.ClientSession() as client,
            client.post(url(config), data=b"{}") as response,
        ):
            assert response.status == 200


@pytest.mark.parametrize("baseline", bootstrap.BASELINES)
async def test_a_baseline_spreads_without_extproc(tmp_path: Path, baseline: str) -> None:
    async with Backend() as a, Backend() as b:
        config = steering.config(tmp_path, a.address, b.address)
        endpoints.create_if_missing(config)
        async with EnvoyProcess(bootstrap.render(config, baseline=baseline)), aiohttp.ClientSession() as client:
            for _ in range(20):
                async with client.post(url(config), data=b"{}", headers={"x-session-id": "s"}) as response:
                    assert response.status == 200
    assert len(a.received) + len(b.received) == 20
    assert min(len(a.received), len(b.received)) >= (8 if baseline == "round_robin" else 1)
    assert "x-session-id" not in a.received[0].headers
