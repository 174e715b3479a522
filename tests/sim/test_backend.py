from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from extproc.openai.simulated_prompt import TOKEN_BYTES
from extproc.sim.backend import Backend, BackendSpec, serve
from tests.sim import recorded
from tests.support.ports import free_port
from tests.support.waiting import until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello there"}]


def spec(**changes: Any) -> BackendSpec:
    """Like the replica of the recordings, a hundred times as fast as an H100."""
    like: dict[str, Any] = {"model": "tiny", "max_model_len": 4096, "labels": {"gpu": "h100"}, "time_scale": 0.01}
    return BackendSpec(**(like | {"cached_tokens": False} | changes))


class Client:
    """Talks to one backend."""

    def __init__(self, backend: Backend, http: aiohttp.ClientSession) -> None:
        self.backend, self._http = backend, http

    def post(self, path: str, body: Any) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._http.post(f"http://{self.backend.address}{path}", data=data)

    async def text(self, path: str, body: Any, status: int = 200) -> str:
        async with self.post(path, body) as response:
            assert response.status == status, await response.text()
            return str(await response.text())

    async def json(self, path: str, **body: Any) -> Any:
        return json.loads(await self.text(path, {"model": "tiny", **body}))

    async def chunks(self, path: str, **body: Any) -> list[Any]:
        return recorded.chunks(await self.text(path, {"model": "tiny", "stream": True, **body}))

    async def get(self, path: str) -> tuple[int, str]:
        async with self._http.get(f"http://{self.backend.address}{path}") as response:
            return response.status, await response.text()

    async def samples(self) -> dict[str, float]:
        """The lines of the metrics page without labels."""
        families = text_string_to_metric_families((await self.get("/metrics"))[1])
        return {s.name: s.value for family in families for s in family.samples}


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def client(http: aiohttp.ClientSession) -> AsyncIterator[Client]:
    async with Backend(spec()) as backend:
        yield Client(backend, http)


# --- shapes, against the recordings -----------------------------------------------------------------------------------


async def test_a_chat_answer_has_the_recorded_shape(client: Client) -> None:
    got = await client.json(CHAT, messages=HELLO, max_tokens=8, ignore_eos=True)
    assert recorded.shape(got) == recorded.shape(recorded.document("chat_nonstream"))
    assert got["usage"]["completion_tokens"] == 8
    assert len(got["choices"][0]["message"]["content"]) == 8 * TOKEN_BYTES
    assert got["choices"][0]["finish_reason"] == "length"


async def test_a_completion_has_the_recorded_shape(client: Client) -> None:
    got = await client.json(COMPLETIONS, prompt="Permission is hereby granted", max_tokens=8, ignore_eos=True)
    assert recorded.shape(got) == recorded.shape(recorded.document("completion_nonstream"))


async def test_a_chat_stream_has_the_recorded_chunks_in_their_order(client: Client) -> None:
    options = {"include_usage": True}
    got = await client.chunks(CHAT, messages=HELLO, max_tokens=8, ignore_eos=True, stream_options=options)
    want = recorded.chunks(recorded.body("chat_stream"))
    assert [recorded.shape(c) for c in got] == [recorded.shape(c) for c in want]
    assert got[-1] == "[DONE]"


async def test_a_completion_stream_has_usage_in_every_chunk_when_asked(client: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = await client.chunks(COMPLETIONS, prompt="x", max_tokens=5, ignore_eos=True, stream_options=options)
    want = recorded.chunks(recorded.body("completion_stream"))
    assert [recorded.shape(c) for c in got] == [recorded.shape(c) for c in want]
    assert [c["usage"]["completion_tokens"] for c in got[:-1]] == [1, 2, 3, 4, 5, 5]


async def test_a_stream_without_usage_ends_with_the_fingerprint(client: Client) -> None:
    got = await client.chunks(CHAT, messages=HELLO, max_tokens=2, ignore_eos=True)
    assert [set(c) - {"id", "object", "created", "model", "choices"} for c in got[:-1]] == [
        {"prompt_token_ids", "prompt_text"},
        set(),
        {"system_fingerprint"},
    ]


async def test_stream_and_plain_answer_say_the_same(client: Client) -> None:
    streamed = await client.chunks(CHAT, messages=HELLO, max_tokens=30)
    plain = await client.json(CHAT, messages=HELLO, max_tokens=30)
    said = "".join(c["choices"][0]["delta"]["content"] for c in streamed[:-1])
    assert said == plain["choices"][0]["message"]["content"]


async def test_cached_tokens_are_told_where_switched_on(http: aiohttp.ClientSession) -> None:
    async with Backend(spec(cached_tokens=True, adapters=("adapter-b",))) as backend:
        client = Client(backend, http)
        got = await client.json(COMPLETIONS, model="adapter-b", prompt="x", max_tokens=1)
        assert recorded.shape(got) == recorded.shape(recorded.document("lora_completion"))
        options = {"include_usage": True}
        prompt = {"prompt": "y" * 400, "max_tokens": 1, "stream_options": options}
        usages = [(await client.chunks(COMPLETIONS, **prompt))[-2]["usage"] for _ in range(2)]
        # 100 tokens are 6 full blocks of 16 and some
        assert [u["prompt_tokens_details"]["cached_tokens"] for u in usages] == [0, 96]


RECORDED_ERRORS = [
    ("err_bad_value", COMPLETIONS, {"model": "tiny", "prompt": "x", "max_tokens": -3}),
    ("err_invalid_json", CHAT, b'{"model":"tiny","messages":[{'),
    ("err_max_tokens_too_big", COMPLETIONS, {"model": "tiny", "prompt": "x", "max_tokens": 5000}),
    ("err_missing_field", CHAT, {"model": "tiny"}),
    ("err_too_long", COMPLETIONS, {"model": "tiny", "prompt": "x" * 4 * 5000}),
    ("err_too_long_stream", COMPLETIONS, {"model": "nope", "prompt": "x", "stream": True}),
    ("err_unknown_model", CHAT, {"model": "nope", "messages": HELLO}),
]


@pytest.mark.parametrize(("name", "path", "body"), RECORDED_ERRORS, ids=[e[0] for e in RECORDED_ERRORS])
async def test_errors_are_those_recorded_to_the_byte(client: Client, name: str, path: str, body: Any) -> None:
    want = recorded.body(name)
    async with client.post(path, body) as response:
        assert await response.text() == want
        assert response.status == json.loads(want)["error"]["code"]
        assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "body",
    [b"[]", b"\xff", {"messages": "x"}, {"messages": [1]}, {"messages": HELLO, "max_tokens": "1"}, {"messages": []}],
)
async def test_any_malformed_body_is_a_400_in_the_usual_form(client: Client, body: Any) -> None:
    error = json.loads(await client.text(CHAT, body, status=400))["error"]
    assert set(error) == {"message", "type", "param", "code"}


async def test_unknown_paths_and_methods_answer_as_fastapi_does(client: Client) -> None:
    assert await client.get("/v1/nope") == (404, recorded.body("err_404"))
    assert await client.get(COMPLETIONS) == (405, recorded.body("err_405"))


async def test_the_other_endpoints_have_the_recorded_shape(http: aiohttp.ClientSession) -> None:
    async with Backend(spec(adapters=("adapter-a", "adapter-b"))) as backend:
        client = Client(backend, http)
        for path, want in recorded.sections("get_endpoints").items():
            if path in {"/health", "/ping", "/version", "/load"}:
                assert await client.get(path) == (200, want)
        models = json.loads((await client.get("/v1/models"))[1])["data"]
        want_models = recorded.document("lora_models")["data"]
        assert [recorded.shape(m) for m in models] == [recorded.shape(m) for m in want_models]
        assert [m["id"] for m in models] == ["tiny", "adapter-a", "adapter-b"]


async def test_headers_are_those_of_uvicorn(client: Client) -> None:
    async with client.post(CHAT, {"messages": HELLO, "max_tokens": 1, "stream": True}) as response:
        assert response.headers["server"] == "uvicorn"
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["transfer-encoding"] == "chunked"


# --- what each API takes ----------------------------------------------------------------------------------------------


async def test_several_prompts_and_samples_are_choices_in_order(client: Client) -> None:
    got = await client.json(COMPLETIONS, prompt=["a", "bcdef"], n=2, max_tokens=2, ignore_eos=True)
    assert [c["index"] for c in got["choices"]] == [0, 1, 2, 3]
    assert got["usage"] == got["usage"] | {"prompt_tokens": 1 + 2, "completion_tokens": 8}
    streamed = await client.chunks(COMPLETIONS, prompt=["a", "bcdef"], n=2, max_tokens=2, ignore_eos=True)
    assert sorted(c["choices"][0]["index"] for c in streamed[:-1]) == [0, 0, 1, 1, 2, 2, 3, 3]


async def test_token_ids_count_as_they_are(client: Client) -> None:
    assert (await client.json(COMPLETIONS, prompt=[5, 6, 7], max_tokens=1))["usage"]["prompt_tokens"] == 3
    both = await client.json(COMPLETIONS, prompt=[[5, 6, 7], [8]], max_tokens=1)
    assert both["usage"]["prompt_tokens"] == 4


async def test_responses_stream_opens_and_completes(client: Client) -> None:
    got = await client.chunks("/v1/responses", input="Hello", max_output_tokens=3, ignore_eos=True)
    types = [event["type"].removeprefix("response.") for event in got]
    assert types[:2] == ["created", "in_progress"]
    assert types.count("output_text.delta") == 3
    assert types[-1] == "completed"
    assert [event["sequence_number"] for event in got] == list(range(len(got)))
    plain = await client.json("/v1/responses", input="Hello", max_output_tokens=3, ignore_eos=True)
    assert plain["usage"] == got[-1]["response"]["usage"] | {"input_tokens_details": {"cached_tokens": 0}}
    assert plain["usage"]["output_tokens"] == 3
    assert plain["output"][0]["content"][0]["text"] == got[-1]["response"]["output"][0]["content"][0]["text"]


async def test_embeddings_count_their_input(client: Client) -> None:
    got = await client.json("/v1/embeddings", input=["one", "three"])
    assert [d["index"] for d in got["data"]] == [0, 1]
    assert got["usage"]["prompt_tokens"] == 1 + 2


async def test_the_request_id_of_the_client_is_kept(client: Client, http: aiohttp.ClientSession) -> None:
    url, headers = f"http://{client.backend.address}{COMPLETIONS}", {"x-request-id": "my-req-2"}
    async with http.post(url, json={"prompt": "x", "max_tokens": 1}, headers=headers) as response:
        assert (await response.json())["id"] == "cmpl-my-req-2"


@pytest.mark.parametrize("fixed", [{"ignore_eos": True}, {"min_tokens": 1}])
async def test_a_fixed_length_is_reached(client: Client, fixed: dict[str, Any]) -> None:
    got = await client.json(CHAT, messages=HELLO, max_completion_tokens=77, **fixed)
    assert got["usage"]["completion_tokens"] == 77


async def test_an_open_length_depends_on_the_prompt_alone(client: Client, http: aiohttp.ClientSession) -> None:
    async with Backend(spec(labels={"gpu": "a100"}, time_scale=0.001)) as other:
        for i in range(4):
            messages = [{"role": "user", "content": f"Question {i}"}]
            one, two = (
                await client.json(CHAT, messages=messages),
                await Client(other, http).json(CHAT, messages=messages),
            )
            assert one["choices"] == two["choices"]
            assert one["usage"] == two["usage"]
            assert one["choices"][0]["finish_reason"] == "stop"


async def test_output_ends_where_the_context_ends(client: Client) -> None:
    got = await client.json(COMPLETIONS, prompt="x" * 4 * 4000, max_tokens=4096, ignore_eos=True)
    assert got["usage"]["total_tokens"] == 4096


# --- behaviour --------------------------------------------------------------------------------------------------------


async def test_the_second_turn_hits_the_first_and_its_answer(http: aiohttp.ClientSession) -> None:
    async with Backend(spec(cached_tokens=True)) as backend:
        client = Client(backend, http)
        long = {"role": "user", "content": "Tell me everything. " * 20}
        first = await client.json(CHAT, messages=[long], max_tokens=70, ignore_eos=True)
        said = first["choices"][0]["message"]["content"]
        turn = [long, {"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
        second = await client.json(CHAT, messages=turn, max_tokens=5)
        # the last token of an answer is never computed
        held = first["usage"]["prompt_tokens"] + 70 - 1
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == held // 16 * 16
        salted = await client.json(CHAT, messages=turn, max_tokens=5, cache_salt="pepper")
        assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_stream_headers_come_before_the_first_token(http: aiohttp.ClientSession) -> None:
    async with Backend(spec(hang=True)) as backend:
        client = Client(backend, http)
        async with client.post(CHAT, {"messages": HELLO, "stream": True, "max_tokens": 3}) as response:
            assert response.status == 200
            assert backend.engine.counters.steps == 0
            backend.hang = False
            assert recorded.chunks(await response.text())[-1] == "[DONE]"


async def test_a_hung_engine_answers_probes_and_looks_idle(http: aiohttp.ClientSession) -> None:
    async with Backend(spec()) as backend:
        client = Client(backend, http)
        backend.hang = True
        stuck = asyncio.create_task(client.json(CHAT, messages=HELLO, max_tokens=3, ignore_eos=True))
        await until(lambda: backend.in_flight == 1)
        assert (await client.get("/health"))[0] == 200
        samples = await client.samples()
        assert samples["vllm:num_requests_running"] == samples["vllm:num_requests_waiting"] == 0
        assert not stuck.done()
        backend.hang = False
        assert (await stuck)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_request(http: aiohttp.ClientSession, stream: bool) -> None:
    async with Backend(spec(time_scale=1.0)) as backend:
        body = json.dumps({"messages": HELLO, "max_tokens": 4000, "ignore_eos": True, "stream": stream}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", backend.port)
        writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
        await until(lambda: backend.engine.counters.generated_tokens > 2)
        writer.close()
        await until(lambda: backend.engine.running == 0)
        assert backend.in_flight == 0
        assert backend.engine.counters.aborted == 1
        assert (await Client(backend, http).samples())["vllm:num_requests_running"] == 0


@pytest.mark.parametrize("status", [500, 503])
async def test_a_failing_replica_says_so_to_every_completion(client: Client, status: int) -> None:
    client.backend.fail_with = status
    error = json.loads(await client.text(CHAT, {"messages": HELLO, "stream": True}, status=status))["error"]
    assert error["code"] == status
    assert (await client.get("/health"))[0] == 200
    client.backend.fail_with = None
    await client.json(CHAT, messages=HELLO, max_tokens=1)


async def test_a_full_replica_refuses_with_the_recorded_503(http: aiohttp.ClientSession) -> None:
    async with Backend(spec(max_in_flight=1, hang=True)) as backend:
        client = Client(backend, http)
        first = asyncio.create_task(client.json(CHAT, messages=HELLO, max_tokens=1))
        await until(lambda: backend.in_flight == 1)
        refused = await client.text(CHAT, {"messages": HELLO}, status=503)
        assert f"'{refused}'" in (recorded.FOLDER / "err_503_admission.txt").read_text()
        backend.hang = False
        await first


async def test_usage_can_be_left_out(http: aiohttp.ClientSession) -> None:
    async with Backend(spec(drop_usage=True)) as backend:
        client = Client(backend, http)
        assert (await client.json(CHAT, messages=HELLO, max_tokens=1))["usage"] is None
        options = {"include_usage": True, "continuous_usage_stats": True}
        got = await client.chunks(CHAT, messages=HELLO, max_tokens=2, stream_options=options)
        assert not any("usage" in c for c in got[:-1])


async def test_stopping_breaks_off_what_runs_and_refuses_the_rest(http: aiohttp.ClientSession) -> None:
    backend = Backend(spec(time_scale=1.0))
    await backend.start()
    client = Client(backend, http)
    async with client.post(
        CHAT, {"messages": HELLO, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    ) as response:
        await response.content.readany()
        await backend.stop()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    with pytest.raises(aiohttp.ClientConnectionError):
        await client.get("/health")


async def test_several_replicas_are_served_until_cancelled(http: aiohttp.ClientSession) -> None:
    ports = [free_port(), free_port()]
    task = asyncio.create_task(serve([spec(port=p) for p in ports]))

    async def listens(port: int) -> bool:
        try:
            async with http.get(f"http://127.0.0.1:{port}/health") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    for port in ports:
        await until(lambda port=port: listens(port))  # type: ignore[misc]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not await listens(ports[0])


# --- the metrics page -------------------------------------------------------------------------------------------------


def lines(page: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Sample name -> type and label names."""
    return {
        s.name: (family.type, frozenset(s.labels))
        for family in text_string_to_metric_families(page)
        for s in family.samples
    }


async def test_the_metrics_page_has_names_types_and_labels_of_the_real_one(http: aiohttp.ClientSession) -> None:
    async with Backend(spec(adapters=("adapter-a",))) as backend:
        client = Client(backend, http)
        await client.json(CHAT, messages=HELLO, max_tokens=3)
        await client.json(CHAT, model="adapter-a", messages=HELLO, max_tokens=3)
        ours = lines((await client.get("/metrics"))[1])
    theirs = lines((recorded.FOLDER / "metrics_loaded_30req.txt").read_text())
    for name, (type_, labels) in ours.items():
        assert theirs[name][0] == type_, name
        if name == "vllm:cache_config_info":
            assert labels <= theirs[name][1]
        else:
            assert labels == theirs[name][1], name
    assert len(ours) > 20


async def test_the_metrics_page_counts_what_happened(client: Client) -> None:
    prompt = {"prompt": "y" * 400, "max_tokens": 6, "ignore_eos": True}
    for _ in range(2):
        await client.json(COMPLETIONS, **prompt)
    samples = await client.samples()
    assert {name: samples[f"vllm:{name}"] for name in ("prompt_tokens_total", "generation_tokens_total")} == {
        "prompt_tokens_total": 200,
        "generation_tokens_total": 12,
    }
    assert samples["vllm:prefix_cache_queries_total"] == 200
    assert samples["vllm:prefix_cache_hits_total"] == 96
    assert samples["vllm:time_to_first_token_seconds_count"] == 2
    page = (await client.get("/metrics"))[1]
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 2.0' in page
    assert 'block_size="16"' in page
    assert 'num_gpu_blocks="25000"' in page


async def test_the_metrics_page_shows_who_runs_and_who_waits(http: aiohttp.ClientSession) -> None:
    async with Backend(spec(max_num_seqs=2, time_scale=1.0)) as backend:
        client = Client(backend, http)
        body = {"messages": HELLO, "max_tokens": 2000, "ignore_eos": True}
        tasks = [asyncio.create_task(client.text(CHAT, body)) for _ in range(5)]
        await until(lambda: backend.realtime.gauges.waiting == 3)
        samples = await client.samples()
        assert samples["vllm:num_requests_running"] == 2
        assert samples["vllm:num_requests_waiting"] == 3
        assert samples["vllm:kv_cache_usage_perc"] > 0
        assert (await client.get("/load"))[1] == '{"server_load":5}'
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- wall time --------------------------------------------------------------------------------------------------------


async def test_a_run_takes_as_long_as_its_steps_together(http: aiohttp.ClientSession) -> None:
    async with Backend(spec(time_scale=2.0)) as backend:
        step = backend.engine.config.step_time
        began = time.monotonic()
        await Client(backend, http).json(CHAT, messages=HELLO, max_tokens=40, ignore_eos=True)
        took = time.monotonic() - began
        steps = 2.0 * (step.prefill_s(17) + 39 * step.decode_step_s(1, 40) + 40 * backend.engine.config.cpu_overhead_s)
        # never early; late only by the last wake-up and by HTTP, for errors of single sleeps do not add up
        assert steps * 0.98 <= took <= steps + 0.25
