"""Models by name behind one Envoy: aliases, a canary, what is not there, the list, and versions switched under load."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
import yaml

from extproc.app import App
from extproc.config import Config
from extproc.core.types import Request
from extproc.envoy import bootstrap, endpoints, names
from tests.e2e.stack import CHAT, Json, Stack, chat, client, configured, gathered, replica, stack
from tests.support.envoy import EnvoyProcess
from tests.support.ports import free_port
from tests.support.process import Served
from tests.support.waiting import until

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

STABLE, CANARY = "llama-8b", "llama-8b-v2"
MODELS: list[Json] = [
    {
        "name": "chat",
        "aliases": ["gpt-4o"],
        "targets": [
            {"pool": "stable", "model": STABLE, "weight": 95, "label": "v1"},
            {"pool": "canary", "model": CANARY, "weight": 5, "label": "v2"},
        ],
    },
    {"name": "gone", "targets": [{"pool": "nobody", "model": "x"}]},
    {"name": "backed", "targets": [{"pool": "nobody", "model": "x"}], "fallback": [{"pool": "canary", "model": CANARY}]},
]  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with AsyncExitStack() as exits:
        stable = await exits.enter_async_context(replica(model=STABLE))
        canary = await exits.enter_async_context(replica(model=CANARY))
        pools: list[Json] = [
            {"name": "stable", "replicas": [stable.address]},
            {"name": "canary", "replicas": [canary.address]},
            {"name": "nobody", "replicas": [f"127.0.0.1:{free_port()}"], "queue": {"absent_wait_s": 0}},
        ]
        directory = tmp_path_factory.mktemp("stack")
        made = await exits.enter_async_context(stack(directory, *pools, models=MODELS, ready=False))
        await until(lambda: {"chat", STABLE, CANARY} <= listed(made.app))
        await until(lambda: made.app.not_ready() is None)
        yield made


def listed(app: App) -> set[str]:
    """The names that can be asked for."""
    return {model.name for model in app.router.listed(Request(), time.monotonic())}


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def settles(running: Stack) -> AsyncIterator[None]:
    await running.seen()
    yield
    await running.settled()


async def answered(running: Stack, body: Json, **options: Any) -> tuple[int, Json]:
    async with running.post(body, **options) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("name", ["chat", "gpt-4o"])
async def test_an_alias_is_served_and_the_answer_names_the_engines_model(running: Stack, name: str) -> None:
    status, body = await answered(running, {**chat(), "model": name})
    assert (status, body["model"] in (STABLE, CANARY)) == (200, True)
    record = await running.ended()
    assert record.decision.target is not None
    assert record.decision.target.model == "chat"


async def test_a_stream_is_renamed_and_asked_for_usage_at_once(running: Stack) -> None:
    async with running.post({**chat(stream=True), "model": "gpt-4o"}) as response:
        text = (await response.read()).decode()
    assert response.status == 200
    assert "usage" not in text, "taken out again"
    record = await running.ended()
    assert record.ended is not None
    assert record.ended.outcome.usage is not None


async def test_a_large_body_is_renamed_too(running: Stack) -> None:
    large = {**chat(user="x" * 200_000), "model": "chat"}
    assert len(json.dumps(large)) > running.config.requests.large_body_bytes
    status, body = await answered(running, large)
    assert (status, body["model"] in (STABLE, CANARY)) == (200, True)


async def test_a_name_that_replicas_list_needs_no_entry(running: Stack) -> None:
    status, body = await answered(running, {**chat(), "model": CANARY})
    assert (status, body["model"]) == (200, CANARY)


async def test_a_canary_gets_its_share_and_keeps_its_sessions(running: Stack) -> None:
    async def one(i: int) -> str:
        body = {**chat(f"{i}", max_tokens=1), "model": "chat"}
        _, answer = await answered(running, body, headers={"x-session-id": f"session {i % 200}"})
        model: str = answer["model"]
        return model

    first = await gathered(200, one)
    again = await gathered(200, one)
    assert first == again
    # 5 % of 200 sessions: 10, and within five standard deviations of that.
    assert 1 <= Counter(first)[CANARY] <= 25

    def counted() -> float:
        return running.metric("extproc_model_requests_total", model="chat", target="canary", version="v2", end="ok")

    await until(lambda: counted() >= 2 * Counter(first)[CANARY])  # ends come by the access log, a little later


async def test_an_unknown_model_is_not_found(running: Stack) -> None:
    status, body = await answered(running, {**chat(), "model": "nope"})
    error = body["error"]
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "chat" in error["message"]


async def test_a_known_model_without_replicas_is_unavailable(running: Stack) -> None:
    async with running.post({**chat(), "model": "gone"}) as response:
        assert response.status == 503
        assert int(response.headers["retry-after"]) >= 1


async def test_a_fallback_serves_where_nobody_is_there(running: Stack) -> None:
    status, body = await answered(running, {**chat(), "model": "backed"})
    assert (status, body["model"]) == (200, CANARY)
    assert running.metric("extproc_model_spilled_total", model="backed", target="canary", reason="absent") >= 1


async def test_the_list_is_of_the_whole_fleet(running: Stack) -> None:
    async with running.client.get(f"{running.url}/v1/models") as response:
        listed = await response.json()
        assert (response.status, response.headers["content-type"]) == (200, "application/json")
        assert names.REPLICA_HEADER not in response.headers
    assert [m["id"] for m in listed["data"]] == ["chat", "gpt-4o", "backed", STABLE, CANARY]
    async with running.client.get(f"{running.url}/v1/models/gpt-4o") as response:
        assert (response.status, (await response.json())["root"]) == (200, "chat")
    async with running.client.get(f"{running.url}/v1/models/gone") as response:
        assert response.status == 404
    assert running.metric("extproc_streams_total", kind="replied") >= 2


# --- blue and green ----------------------------------------------------------------------------------------------------


def shifted(config: Config, weights: tuple[int, int]) -> None:
    """Write other weights into the configuration file."""
    path = config.envoy.bootstrap_file.parent / "extproc.yaml"
    raw = yaml.safe_load(path.read_text())
    for target, weight in zip(raw["models"][0]["targets"], weights, strict=True):
        target["weight"] = weight
    path.write_text(yaml.safe_dump(raw))


class Answer(NamedTuple):
    """What became of one request; the time is that of the monotonic clock."""

    asked_at: float
    status: int
    model: str
    whole: bool


async def loaded(http: Any, config: Config, stream: bool, answers: list[Answer], done: asyncio.Event) -> None:
    """Ask, one after the other."""
    while not done.is_set():
        body = {**chat(f"{len(answers)}", stream=stream), "model": "chat"}
        asked_at = time.monotonic()
        async with http.post(f"http://{config.envoy.listen}{CHAT}", json=body) as response:
            text = await response.text()
        (model,) = set(re.findall(r'"model": ?"([^"]*)"', text))
        whole = not stream or text.rstrip().endswith("data: [DONE]")
        answers.append(Answer(asked_at, response.status, model, whole))


async def test_versions_switch_under_load_and_back_without_a_lost_request(tmp_path: Path) -> None:
    async with replica(model=STABLE) as blue, replica(model=CANARY) as green, client() as http:
        targets = [
            {"pool": "blue", "model": STABLE, "weight": 1, "label": "blue"},
            {"pool": "green", "model": CANARY, "weight": 0, "label": "green"},
        ]
        pools = [{"name": "blue", "replicas": [blue.address]}, {"name": "green", "replicas": [green.address]}]
        config = configured(tmp_path, *pools, models=[{"name": "chat", "targets": targets}])
        endpoints.create_if_missing(config)
        answers: list[Answer] = []
        done = asyncio.Event()

        async with Served(config) as served, EnvoyProcess(bootstrap.render(config)):
            await until(lambda: is_served(http, config))
            streams = (False, False, True, True)
            clients = [asyncio.create_task(loaded(http, config, stream, answers, done)) for stream in streams]
            for n, (weights, old, new) in enumerate([((0, 1), STABLE, CANARY), ((1, 0), CANARY, STABLE)], 1):
                await asked_since(answers, time.monotonic(), 20)
                long = {**chat("long", stream=True, max_tokens=150, ignore_eos=True), "model": "chat"}
                async with http.post(f"http://{config.envoy.listen}{CHAT}", json=long) as running:
                    began = await running.content.readline()
                    shifted(config, weights)
                    os.kill(served.pid, signal.SIGHUP)
                    await applied(served, n)
                    later = await asked_since(answers, time.monotonic(), 30)
                    assert {answer.model for answer in later} == {new}
                    assert f'"{old}"' in began.decode()
                    assert (await running.text()).rstrip().endswith("data: [DONE]"), (
                        "the old version ends what it began"
                    )
            done.set()
            await asyncio.gather(*clients)
            assert {(answer.status, answer.whole) for answer in answers} == {(200, True)}
            assert "Traceback" not in served.log()


async def asked(http: Any, config: Config) -> tuple[int, str]:
    body = {**chat(), "model": "chat"}
    async with http.post(f"http://{config.envoy.listen}{CHAT}", json=body) as response:
        return response.status, await response.text()


async def is_served(http: Any, config: Config) -> bool:
    """Ten in a row: each of Envoy's worker threads knows extproc."""
    return all([(await asked(http, config))[0] == 200 for _ in range(10)])


async def applied(served: Served, count: int) -> None:
    """Wait until so many versions of the file were taken over."""

    async def enough() -> bool:
        return await served.metrics("extproc_config_applied_total") == {"extproc_config_applied_total": count}

    await until(enough)


async def asked_since(answers: list[Answer], moment: float, count: int) -> list[Answer]:
    """Those to requests sent since then, once there are so many."""

    def found() -> list[Answer]:
        return [answer for answer in answers if answer.asked_at >= moment]

    await until(lambda: len(found()) >= count, timeout_s=20)
    return found()
