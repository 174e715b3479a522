"""KV events in a whole process: from simulated replicas to the router's knowledge, and on and off by the configuration."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from prometheus_client import generate_latest

from extproc.app import App
from extproc.config import Config
from extproc.core.prefix.exact import token_chain
from extproc.core.types import Api, Request
from extproc.openai.simulated_prompt import token_ids, tokenized
from extproc.sim.backend import Backend
from tests.e2e.stack import MODEL, all_ready, configured, replica
from tests.support.waiting import until

PROMPT = "word" * 16 * 20


@asynccontextmanager
async def started(config: Config, path: Path | None = None) -> AsyncIterator[App]:
    app = App(config, path=path)
    await app.start()
    try:
        yield app
    finally:
        await app.stop(grace_s=0)


async def complete(backend: Backend, prompt: str = PROMPT, **more: Any) -> int:
    """Past the router; the cached tokens of its usage."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, **more}
    async with (
        aiohttp.ClientSession(f"http://{backend.address}") as http,
        http.post("/v1/completions", json=body) as response,
    ):
        cached = (await response.json())["usage"]["prompt_tokens_details"]
        return 0 if cached is None else int(cached["cached_tokens"])


def known(app: App, backend: Backend, prompt: str = PROMPT, salt: str | None = None) -> int | None:
    """Tokens of the prompt that the router knows to be cached there; None where it does not know."""
    caches = app.router.pools["default"].caches
    if not caches.exact.knows(backend.address):
        return None
    ids = token_ids(tokenized([prompt]))
    request = Request(Api.COMPLETIONS, MODEL, prompt_tokens=len(ids), tokens=token_chain(ids, salt=salt))
    return caches.known(request).get(backend.address, 0)


def page(app: App) -> str:
    return generate_latest(app.registry).decode()


async def test_what_the_router_knows_is_what_the_replica_finds(tmp_path: Path) -> None:
    async with replica(kv_events=0, num_blocks=60) as one, replica(kv_events=0, num_blocks=60) as other:
        config = configured(tmp_path, {"replicas": [one.address, other.address], "kv_events": {}})
        async with started(config) as app:
            await until(lambda: (known(app, one), known(app, other)) == (0, 0))
            assert await complete(one) == 0
            await until(lambda: known(app, one) == 19 * 16)
            assert known(app, other) == 0
            assert await complete(one) == 19 * 16
            for n in range(4):  # others push it out
                await complete(one, f"{n}   " + PROMPT)
            await until(lambda: known(app, one) == 0)
            assert await complete(one) == 0
            assert await complete(one, cache_salt="pepper") == 0
            await until(lambda: known(app, one, salt="pepper") == 19 * 16)
            assert known(app, one, salt="salt") == 0
            text = page(app)
            assert f'extproc_kv_known{{pool="default",replica="{one.address}"}} 1.0' in text
            assert 'extproc_kv_events_total{pool="default",type="BlockRemoved"} ' in text
            assert 'extproc_kv_lag_seconds_count{pool="default"} ' in text
            app.router.check()


async def test_what_explain_says_is_what_the_replica_finds(tmp_path: Path) -> None:
    async with replica(kv_events=0) as one, replica(kv_events=0) as other:
        addresses = [one.address, other.address]
        pool = {"replicas": addresses, "kv_events": {}, "tokenizer": {"simulated": True, "timeout_s": 5}}
        async with started(configured(tmp_path, pool)) as app, aiohttp.ClientSession() as http:
            await until(lambda: (known(app, one), known(app, other)) == (0, 0))
            await until(lambda: all_ready(app))

            async def explained(**body: Any) -> dict[str, Any]:
                url = f"http://{app.config.listen.http}/debug/explain"
                async with http.post(url, json={"model": MODEL, **body}) as response:
                    found: dict[str, Any] = await response.json()
                    return found

            await complete(other)
            await until(lambda: known(app, other) == 19 * 16)
            found = await explained(prompt=PROMPT)
            assert (found["tokens"], found["prompt_tokens"]) == ("tokenized", 20 * 16)
            assert (found["endpoints"][0], found["predicted"]["cached_tokens"]) == (other.address, 19 * 16)
            assert found["predicted"]["prefix_source"] == "exact"
            assert await complete(other) == 19 * 16
            salted = await explained(prompt=PROMPT, cache_salt="pepper")
            assert (salted["tokens"], salted["predicted"]["cached_tokens"]) == ("tokenized", 0)
            assert (await explained(prompt=[PROMPT, PROMPT]))["tokens"] == "prompts"
            assert "extproc_tokenized_prompts_total{" in page(app)
            assert 'extproc_tokenized_prompts_total{pool="default",result="tokenized"} 0.0' in page(app)


async def test_a_router_that_starts_later_knows_at_once(tmp_path: Path) -> None:
    async with replica(kv_events=0) as one:
        await complete(one)
        async with started(configured(tmp_path, {"replicas": [one.address], "kv_events": {}})) as app:
            await until(lambda: known(app, one) == 19 * 16)


async def test_on_and_off_by_reload(tmp_path: Path) -> None:
    async with replica(kv_events=0) as one:
        config = configured(tmp_path, {"replicas": [one.address]})
        path = tmp_path / "extproc.yaml"
        off = config.model_dump(mode="json", exclude_unset=True)
        on = {**off, "pools": [{**off["pools"][0], "kv_events": {"mode": "auto"}}]}
        path.write_text(yaml.safe_dump(off))
        async with started(config, path) as app:
            await complete(one)
            assert app._listening.following is None
            assert "extproc_kv_messages_total{" not in page(app)
            path.write_text(yaml.safe_dump(on))
            await until(lambda: known(app, one) == 19 * 16)
            path.write_text(yaml.safe_dump(off))
            await until(lambda: known(app, one) is None)


WITHOUT = """
import sys
sys.modules["zmq"] = None
from random import Random
from extproc.adapters.kv_events.listening import Listening
from extproc.config import ConfigError, PoolConfig
listening = Listening(print, Random(1))
listening.configure([PoolConfig.model_validate({"replicas": ["10.0.0.1:8000"]})], lambda pool: [])
print(listening)
try:
    listening.configure([PoolConfig.model_validate({"replicas": ["10.0.0.1:8000"], "kv_events": {}})], lambda pool: [])
except ConfigError as e:
    print(e)
"""


def test_without_pyzmq_only_those_are_told_who_want_events() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "<Listening to nobody>",
        "pool default: kv_events needs the package pyzmq; pip install 'extproc[events]'",
    ]


def test_nobody_imports_zmq_who_does_not_listen() -> None:
    script = "import sys, extproc.app, extproc.sim.backend; print('zmq' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
