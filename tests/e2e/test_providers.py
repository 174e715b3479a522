"""Pools and providers behind one Envoy: what a provider gets and what clients get of it, and who is paid for what."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from extproc.core.types import End
from extproc.envoy import bootstrap, credentials, endpoints
from tests.e2e.stack import CHAT, Json, Stack, chat, configured, replica, stack
from tests.support import provider as fake
from tests.support.backend import Received
from tests.support.envoy import EnvoyProcess
from tests.support.ports import free_port
from tests.support.provider import Provider, certificate
from tests.support.waiting import until

pytestmark = [
    pytest.mark.envoy,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl"),
]

KEY = "sk-ours"
DOLLARS = {"prompt_per_million": 2.5, "output_per_million": 10.0}
COST = (fake.PROMPT_TOKENS * 2.5 + fake.OUTPUT_TOKENS * 10.0) / 1e6
PRIVATE = {
    "authorization": "Bearer sk-clients",
    "x-api-key": "sk-clients",
    "cookie": "session=1",
    "x-session-id": "s1",
    "x-tenant": "acme",
    "x-request-priority": "1",
    "x-forwarded-for": "10.1.2.3",
    "accept-encoding": "gzip, br",
    "openai-organization": "org-of-theirs",
    "idempotency-key": "theirs",
    "x-house": "secret",
}
"""Of clients: nothing of it may leave the house."""


@dataclass
class Scene:
    running: Stack
    provider: Provider
    directory: Path

    async def asked(self, model: str = "chat", **more: Any) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request that the pools cannot serve."""
        options = {key: more.pop(key) for key in ("headers",) if key in more}
        async with self.running.post({**chat(), "model": model, **more}, **options) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()

    def new_key(self, key: str) -> None:
        """Put another key in place by rename, with the line's end that editors leave."""
        (self.directory / ".key").write_text(key + "\n")
        (self.directory / ".key").replace(self.directory / "openai.key")

    def new_secret(self, key: str) -> None:
        """The same as Kubernetes does it with mounted secrets: the link to the directory of all of them is replaced."""
        version = self.directory / f"..{key}"
        version.mkdir()
        (version / "openai.key").write_text(key)
        (self.directory / "..link").symlink_to(version.name)
        (self.directory / "..link").replace(self.directory / "..data")
        path = self.directory / "openai.key"
        if not path.is_symlink():
            (self.directory / ".key").symlink_to("..data/openai.key")
            (self.directory / ".key").replace(path)

    @property
    def last(self) -> Received:
        return self.provider.received[-1]


def fallback(name: str, provider: str) -> Json:
    """A model whose pool has nobody."""
    return {"name": name, "targets": [{"pool": "nobody", "model": "x"}], "fallback": [{"provider": provider}]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    directory = tmp_path_factory.mktemp("stack")
    async with AsyncExitStack() as exits:
        provider = await exits.enter_async_context(Provider(directory, KEY))
        small = await exits.enter_async_context(replica(model="small"))
        ours = {"api_key_file": "openai.key", "price": DOLLARS}
        providers: list[Json] = [
            provider.section("openai", **ours),
            provider.section("impatient", **ours, timeout_s=0.3),
            # The same server, known under a certificate of somebody else, and by a name that its own does not have.
            provider.section("stranger", **ours) | {"ca_file": str(certificate(directory, "other"))},
            provider.section("misnamed", **ours) | {"host": "127.0.0.1"},
            provider.section("unvouched", **ours) | {"ca_file": None},
            provider.section("keyless"),
            provider.section("azure", **ours, api_key_header="api-key"),
        ]
        pools: list[Json] = [
            {"name": "small", "models": ["small"], "replicas": [small.address]},
            {"name": "nobody", "replicas": [f"127.0.0.1:{free_port()}"], "queue": {"absent_wait_s": 0}},
        ]
        models = [fallback("chat", "openai"), *(fallback(p["name"], p["name"]) for p in providers[1:])]
        scene = Scene(None, provider, directory)  # type: ignore[arg-type]
        scene.new_key(KEY)
        scene.running = await exits.enter_async_context(
            stack(
                directory,
                *pools,
                models=models,
                providers=providers,
                ready=False,
                requests={"tenant_header": "x-tenant"},
            )
        )
        app = scene.running.app
        await until(lambda: app.not_ready() is None)
        await until(lambda: scene.running.config.pools and any(m.models for _, m in app.router.members()))
        yield scene


@pytest_asyncio.fixture(loop_scope="module")
async def scene(made: Scene) -> AsyncIterator[Scene]:
    await made.running.seen()
    await until(lambda: is_served_by_all(made), timeout_s=20)
    await made.running.settled()
    yield made
    made.provider.fail_with, made.provider.held, made.provider.cuts, made.provider.drops = None, None, False, False
    made.provider.failure = web.Response(text=f"<html>{fake.ACCOUNT}</html>", content_type="text/html")
    # A success, so that failures of one test are not added to those of the next.
    await until(lambda: is_served(made), timeout_s=20)
    await made.running.settled()


async def is_served(scene: Scene) -> bool:
    return (await scene.asked())[0] == 200


async def is_served_by_all(scene: Scene) -> bool:
    """By each thread of Envoy: they learn one after the other that extproc is well, and until then let requests pass to the first pool."""
    return all(await asyncio.gather(*(is_served(scene) for _ in range(8))))


# --- what a provider gets ----------------------------------------------------------------------------------------------


async def test_a_provider_gets_the_request_as_if_it_were_made_for_it(scene: Scene) -> None:
    status, _, body = await scene.asked("chat", headers=PRIVATE)
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, fake.TEXT)
    got = scene.last
    assert (got.method, got.path) == ("POST", CHAT)
    assert got.headers["host"] == f"localhost:{scene.provider.port}"
    assert got.headers["authorization"] == f"Bearer {KEY}"
    assert json.loads(got.body) == {**chat(), "model": fake.MODEL}
    assert got.headers["content-length"] == str(len(got.body))


async def test_nothing_of_the_house_or_the_client_goes_along(scene: Scene) -> None:
    await scene.asked("chat", headers=PRIVATE)
    wanted = {"host", "authorization", "accept", "content-length", "content-type", "user-agent"}
    assert scene.last.headers.keys() == wanted
    sent = repr(scene.last)
    for value in ("clients", "acme", "10.1.2.3", "theirs", "secret", "gzip", "session"):
        assert value not in sent


async def test_without_a_key_none_is_sent_and_not_the_clients_either(scene: Scene) -> None:
    status, _, _ = await scene.asked("keyless", headers=PRIVATE)
    assert status == 503, "the fake wants one"
    assert "authorization" not in scene.last.headers


async def test_a_key_may_stand_in_another_header(scene: Scene) -> None:
    scene.provider.key_header = "api-key"
    status, _, _ = await scene.asked("azure", headers=PRIVATE | {"api-key": "sk-clients"})
    scene.provider.key_header = "authorization"
    assert status == 200
    assert scene.last.headers["api-key"] == KEY
    assert "authorization" not in scene.last.headers


async def test_path_and_query_are_the_providers(tmp_path: Path) -> None:
    async with Provider(tmp_path, tls=False, base="/openai/deployments/x") as provider, replica(model="small") as small:
        pool = {"name": "small", "replicas": [small.address]}
        models = [{"name": "chat", "targets": [{"provider": "p"}]}]
        section = provider.section("p", query="api-version=1")
        async with stack(tmp_path, pool, models=models, providers=[section], ready=False) as s:
            async with s.post({**chat(), "model": "chat"}, path=f"{CHAT}?key=sk-clients&api-version=2") as response:
                assert response.status == 200, await response.text()
            assert provider.received[-1].path == "/openai/deployments/x/chat/completions?api-version=1"
            assert provider.received[-1].headers["host"] == f"localhost:{provider.port}"


async def test_a_large_body_goes_there_too(scene: Scene) -> None:
    prompt = "word " * 100_000
    status, _, body = await scene.asked("chat", messages=[{"role": "user", "content": prompt}])
    assert status == 200, body
    assert json.loads(scene.last.body)["messages"][0]["content"] == prompt


# --- what clients get of it, and what is counted -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_counted_and_priced(scene: Scene, stream: bool) -> None:
    running = scene.running
    dollars = running.metric("extproc_provider_cost_dollars_total", provider="openai")
    status, headers, body = await scene.asked("chat", stream=stream)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream" if stream else "application/json")
    if stream:
        assert b"usage" not in body.replace(b'"usage": null', b""), "asked for by extproc, and taken out again"
        assert json.loads(scene.last.body)["stream_options"] == {"include_usage": True}
    record = await running.ended()
    assert record.ended is not None
    usage, outcome = record.ended.outcome.usage, record.ended.outcome
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (fake.PROMPT_TOKENS, fake.OUTPUT_TOKENS)
    assert usage.cached_tokens == fake.CACHED_TOKENS
    assert (outcome.end, outcome.broken, record.ended.moved) == (End.OK, False, False)
    assert (record.decision.pool, record.decision.endpoints) == ("openai", ())
    now = running.metric("extproc_provider_cost_dollars_total", provider="openai")
    assert now - dollars == pytest.approx(COST)
    assert running.metric("extproc_provider_in_flight", provider="openai") == 0


async def test_a_client_that_asks_for_usage_itself_gets_it(scene: Scene) -> None:
    _, _, body = await scene.asked("chat", stream=True, stream_options={"include_usage": True})
    assert f'"completion_tokens": {fake.OUTPUT_TOKENS}'.encode() in body


async def test_headers_between_the_provider_and_us_stay_here(scene: Scene) -> None:
    _, headers, _ = await scene.asked("chat")
    assert headers["x-request-id"] == fake.HEADERS["x-request-id"]
    assert not headers.keys() & (fake.HEADERS.keys() - {"x-request-id"})


@pytest.mark.parametrize(
    ("status", "sent", "seen", "retry_after"),
    [
        (500, {}, 500, "1"),
        (502, {}, 502, "1"),
        (503, {"retry-after": "7"}, 503, "7"),
        (429, {"retry-after": "20"}, 429, "20"),
        (429, {}, 429, "1"),
        (401, {}, 503, "1"),
        (402, {}, 503, "1"),
        (403, {}, 503, "1"),
        (302, {"location": "https://login.example"}, 502, "1"),
    ],
)
async def test_its_failures_are_told_in_openais_form(
    scene: Scene, status: int, sent: dict[str, str], seen: int, retry_after: str
) -> None:
    scene.provider.fail_with = status
    scene.provider.failure.headers.update(sent)
    before = len(scene.provider.received)
    insists = {"x-envoy-retry-on": "5xx,4xx", "x-envoy-max-retries": "5", "x-envoy-hedge-on-per-try-timeout": "true"}
    got, headers, body = await scene.asked("chat", headers=insists)
    assert (got, headers["retry-after"], headers["content-type"]) == (seen, retry_after, "application/json")
    error = json.loads(body)["error"]
    assert (error["code"], error["param"], bool(error["message"]), bool(error["type"])) == (seen, None, True, True)
    assert fake.ACCOUNT.encode() not in body + repr(headers).encode()
    assert len(scene.provider.received) == before + 1, "and is not tried again"
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.status == seen
    assert record.ended.output_tokens in (None, 0)


async def test_errors_of_the_request_pass_as_they_are(scene: Scene) -> None:
    scene.provider.fail_with = 400
    scene.provider.failure = web.json_response({"error": {"message": "bad temperature"}})
    status, headers, body = await scene.asked("chat")
    assert (status, json.loads(body)) == (400, {"error": {"message": "bad temperature"}})
    assert "retry-after" not in headers


def is_openais(status: int, headers: dict[str, str], body: bytes) -> None:
    error = json.loads(body)["error"]
    assert (status, headers["content-type"], error["code"]) == (503, "application/json", 503)
    assert int(headers["retry-after"]) >= 1


async def test_a_provider_that_is_down_is_unavailable(scene: Scene) -> None:
    await scene.provider.stop()
    try:
        is_openais(*await scene.asked("chat"))
        record = await scene.running.ended()
        assert record.ended is not None
        assert record.ended.outcome.end is End.UNREACHABLE
    finally:
        await scene.provider.start()


async def test_what_it_may_have_begun_is_not_asked_for_again(scene: Scene) -> None:
    scene.provider.drops = True
    before = len(scene.provider.received)
    is_openais(*await scene.asked("chat"))
    assert len(scene.provider.received) == before + 1
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.end is End.UPSTREAM_ERROR


async def test_a_stream_that_breaks_off_ends_and_is_paid_for_as_far_as_it_came(scene: Scene) -> None:
    scene.provider.cuts = True
    before = scene.running.metric("extproc_provider_cost_dollars_total", provider="openai")
    with pytest.raises(aiohttp.ClientPayloadError):
        await scene.asked("chat", stream=True)
    record = await scene.running.ended()
    assert record.ended is not None
    assert (record.ended.outcome.end, record.ended.outcome.usage) == (End.UPSTREAM_ERROR, None)
    assert scene.running.metric("extproc_provider_cost_dollars_total", provider="openai") > before
    assert scene.running.metric("extproc_provider_in_flight", provider="openai") == 0


@pytest.mark.parametrize("model", ["stranger", "misnamed", "unvouched"])
async def test_a_certificate_that_is_not_of_the_host_ends_it(scene: Scene, model: str) -> None:
    before = len(scene.provider.received)
    is_openais(*await scene.asked(model))
    assert len(scene.provider.received) == before
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.end is End.UNREACHABLE


async def test_silence_ends_after_its_own_timeout(scene: Scene) -> None:
    scene.provider.held = asyncio.Event()
    status, headers, body = await scene.asked("impatient")
    scene.provider.held.set()
    assert (status, json.loads(body)["error"]["code"], headers["retry-after"]) == (504, 504, "1")
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.end is End.TIMEOUT


async def test_after_three_failures_it_is_passed_over(scene: Scene) -> None:
    scene.provider.fail_with = 500
    for _ in range(3):
        assert (await scene.asked("chat"))[0] == 500
        await scene.running.ended()
    before = len(scene.provider.received)
    is_openais(*await scene.asked("chat"))
    assert len(scene.provider.received) == before


@pytest.mark.parametrize("put", [Scene.new_key, Scene.new_secret])
async def test_a_new_key_counts_without_a_restart(scene: Scene, put: Callable[[Scene, str], None]) -> None:
    for key in ("sk-one", "sk-two"):
        scene.provider.key = key
        assert (await scene.asked("chat"))[0] == 503, "the old one"
        put(scene, key)
        await until(lambda: is_served(scene), timeout_s=20)
        assert scene.last.headers["authorization"] == f"Bearer {key}"
    scene.provider.key = KEY
    scene.new_key(KEY)
    await until(lambda: is_served(scene), timeout_s=20)


async def test_the_key_is_nowhere_but_in_its_file_and_on_the_wire(scene: Scene) -> None:
    running = scene.running
    assert (await scene.asked("chat"))[0] == 200
    assert KEY not in json.dumps(await running.envoy.config_dump())
    assert KEY not in json.dumps(bootstrap.render(running.config))
    for path in (path for path in scene.directory.iterdir() if path.is_file()):
        assert path.name == "openai.key" or KEY not in path.read_text(errors="replace"), path


# --- nobody but extproc sends anything there ---------------------------------------------------------------------------

SPELLINGS = (
    [("x-extproc-pool", "openai")],
    [("X-Extproc-Pool", "openai")],
    [("X-EXTPROC-POOL", "openai")],
    [("x_extproc_pool", "openai")],
    [("x-extproc-pool", "small"), ("x-extproc-pool", "openai")],
    [("x-extproc-pool", "openai"), ("X-Extproc-Pool", "nobody")],
    [("x-extproc-pool", " openai ")],
)


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_a_client_cannot_choose_a_provider(scene: Scene, spelling: list[tuple[str, str]]) -> None:
    before = len(scene.provider.received)
    status, _, body = await raw(scene.running.config.envoy.listen, spelling, {**chat(), "model": "small"})
    assert (status, json.loads(body)["model"]) == (200, "small")
    status, _, _ = await raw(scene.running.config.envoy.listen, spelling, None)
    assert status == 200, "of a replica of the first pool"
    assert len(scene.provider.received) == before


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_while_extproc_is_away_nothing_is_paid_for(tmp_path: Path, spelling: list[tuple[str, str]]) -> None:
    async with Provider(tmp_path, KEY) as provider, replica(model="small") as small:
        (tmp_path / "openai.key").write_text(KEY)
        config = configured(
            tmp_path,
            {"name": "small", "models": ["small"], "replicas": [small.address]},
            models=[fallback("chat", "openai") | {"targets": [{"provider": "openai"}], "fallback": []}],
            providers=[provider.section("openai", api_key_file="openai.key")],
        )
        endpoints.create_if_missing(config)
        credentials.write(config)
        async with EnvoyProcess(bootstrap.render(config)):
            status, _, body = await raw(config.envoy.listen, spelling, {**chat(), "model": "small"})
            assert (status, json.loads(body)["model"]) == (200, "small")
            status, _, _ = await raw(config.envoy.listen, spelling, {**chat(), "model": "chat"})
            assert status == 404, "of the replica, which does not have it"
        assert not provider.received


async def raw(listen: str, headers: list[tuple[str, str]], body: Json | None) -> tuple[int, str, bytes]:
    """One request with headers as they are written, which HTTP libraries do not leave so."""
    host, _, port = listen.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    text = b"" if body is None else json.dumps(body).encode()
    head = "GET /version HTTP/1.1\r\n" if body is None else f"POST {CHAT} HTTP/1.1\r\n"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    writer.write(f"{head}host: x\r\nconnection: close\r\ncontent-length: {len(text)}\r\n{lines}\r\n".encode() + text)
    answer = await reader.read()
    writer.close()
    head_bytes, _, rest = answer.partition(b"\r\n\r\n")
    whole = head_bytes.decode().lower()
    if "transfer-encoding: chunked" in whole:
        rest = b"".join(rest.split(b"\r\n")[1::2])
    return int(head_bytes.split()[1]), whole, rest


# --- a pool dies -------------------------------------------------------------------------------------------------------


async def test_a_provider_takes_over_from_a_pool_that_dies_and_gives_back(tmp_path: Path) -> None:
    (tmp_path / "openai.key").write_text(KEY)
    async with Provider(tmp_path, KEY) as provider, replica(model="small") as small, replica(model="large") as large:
        config: Json = {
            "models": [{"name": "chat", "targets": [{"pool": "large", "model": "large"}], "fallback": [{"provider": "p"}]}],
            "providers": [provider.section("p", api_key_file="openai.key", price=DOLLARS)],
        }  # fmt: skip
        pools: list[Json] = [
            {"name": "small", "models": ["small"], "replicas": [small.address]},
            {"name": "large", "replicas": [large.address], "health": {"interval_s": 0.2}},
        ]
        async with stack(tmp_path, *pools, **config) as s:
            assert await model_of(s) == "large"
            await large.stop()
            await until(lambda: is_from(s, fake.MODEL), timeout_s=20)
            assert [await model_of(s) for _ in range(5)] == [fake.MODEL] * 5
            assert await model_of(s, "small") == "small"
            await s.settled()
            assert s.metric("extproc_provider_cost_dollars_total", provider="p") >= 5 * COST
            await large.start()
            await until(lambda: is_from(s, "large"), timeout_s=30)


async def model_of(running: Stack, model: str = "chat") -> str | None:
    """The model that answered; None where none did."""
    async with running.post({**chat(), "model": model}) as response:
        found: str | None = (await response.json()).get("model")
        return found


async def is_from(running: Stack, model: str) -> bool:
    return await model_of(running) == model


# --- what is not there at the start ------------------------------------------------------------------------------------


async def test_a_key_that_comes_late_is_found(tmp_path: Path) -> None:
    async with Provider(tmp_path, KEY) as provider, replica(model="small") as small:
        (keys := tmp_path / "keys").mkdir()
        section = provider.section("p", api_key_file="keys/openai.key")
        async with stack(tmp_path, *one_pool(small.address), providers=[section], models=OUTSIDE, ready=False) as s:
            await until(lambda: s.app.not_ready() is None)
            assert await model_of(s, "small") == "small"
            async with s.post({**chat(), "model": "chat"}) as response:
                is_openais(response.status, lower(response.headers), await response.read())
            assert not provider.received
            (keys / ".key").write_text(KEY)
            (keys / ".key").replace(keys / "openai.key")
            await until(lambda: is_from(s, fake.MODEL), timeout_s=30)


async def test_a_name_that_nobody_has_harms_nobody_else(tmp_path: Path) -> None:
    async with replica(model="small") as small:
        section = {"name": "p", "host": "nowhere.invalid"}
        async with stack(tmp_path, *one_pool(small.address), providers=[section], models=OUTSIDE, ready=False) as s:
            await until(lambda: s.app.not_ready() is None)
            assert await model_of(s, "small") == "small"
            async with s.post({**chat(), "model": "chat"}) as response:
                is_openais(response.status, lower(response.headers), await response.read())


OUTSIDE: list[Json] = [{"name": "chat", "targets": [{"provider": "p"}]}]


def one_pool(address: str) -> list[Json]:
    return [{"name": "small", "models": ["small"], "replicas": [address]}]


def lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
