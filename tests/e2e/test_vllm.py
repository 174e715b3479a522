"""Against real vLLM: what the simulated replica promises of it holds."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from extproc.config import Config
from extproc.envoy import bootstrap, endpoints, names
from tests.e2e.stack import CHAT, Json, client, configured, connected, gathered
from tests.e2e.vllm import BLOCK_SIZE, MODEL, NUM_BLOCKS, Vllm
from tests.support.envoy import EnvoyProcess
from tests.support.process import Served
from tests.support.waiting import until

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

GROUPS, REQUESTS_PER_GROUP, PREFIX_WORDS = 10, 8, 900
"""Together the prefixes need more than one cache of 6,400 tokens, and less than two: who keeps each on one replica keeps them all."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replicas(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Vllm]]:
    directory = tmp_path_factory.mktemp("vllm")
    async with AsyncExitStack() as exits:
        both = [await exits.enter_async_context(Vllm(directory)) for _ in range(2)]
        await asyncio.gather(*(r.ready() for r in both))
        yield both


@dataclass
class Scene:
    config: Config
    served: Served
    http: aiohttp.ClientSession

    async def post(self, body: Any, path: str = CHAT, at: str | None = None, **headers: str) -> tuple[int, bytes, str]:
        """Status, body, and who answered; through Envoy, or straight to the replica `at`."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"{at or f'http://{self.config.envoy.listen}'}{path}"
        headers = {"content-type": "application/json", **headers}
        async with self.http.post(url, data=data, headers=headers) as response:
            return response.status, await response.read(), response.headers.get(names.REPLICA_HEADER, "")

    async def debug(self, path: str) -> Any:
        async with self.http.get(f"{self.served.url}/debug/{path}") as response:
            return await response.json()

    async def last(self, n: int = 1) -> list[Json]:
        """The newest decisions, newest first, once their ends are known."""

        async def ended() -> list[Json] | None:
            records = await self.debug(f"decisions?n={n}")
            return records if all(r["outcome"] for r in records) else None

        records: list[Json] = await until(ended)
        return records

    async def settled(self) -> None:
        async def empty() -> bool:
            return (await self.served.metrics("extproc_in_flight ")) == {"extproc_in_flight": 0.0}

        await until(empty, timeout_s=20)


@asynccontextmanager
async def scene(directory: Path, replicas: list[Vllm], policy: str = "predicted") -> AsyncIterator[Scene]:
    pool = {"policy": policy, "labels": {}, "replicas": [r.address for r in replicas]}
    config = configured(directory, pool)
    endpoints.create_if_missing(config)
    async with Served(config) as served, EnvoyProcess(bootstrap.render(config)) as envoy, client() as http:
        await until(lambda: connected(envoy))
        running = Scene(config, served, http)

        async def sampled() -> bool:
            return all(r["state"] == "ready" and r["models"] for r in await running.debug("replicas"))

        await until(sampled, timeout_s=20)
        yield running
        await running.settled()
        assert "Traceback" not in served.log()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(replicas: list[Vllm], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with scene(tmp_path_factory.mktemp("stack"), replicas) as s:
        yield s


def chat(content: str, **more: Any) -> Json:
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0, **more}


WORDS = ("return", "import", "value", "self", "index", "class", "error", "count", "string", "number", "while", "break")


def words(count: int, seed: str) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


async def cached_share(s: Scene, seed: str) -> float:
    """Share of prompt tokens found in the cache, of requests that share prefixes in groups, as vLLM reports it."""
    prompts = [
        words(PREFIX_WORDS, f"{seed} {group}") + f" question {i}"
        for i in range(REQUESTS_PER_GROUP)
        for group in random.Random(i).sample(range(GROUPS), GROUPS)
    ]

    async def one(i: int) -> tuple[int, int]:
        status, body, _ = await s.post(chat(prompts[i]))
        assert status == 200, body
        usage = json.loads(body)["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

    counts = await gathered(len(prompts), one, at_once=2)
    cached, prompt = (float(sum(column)) for column in zip(*counts, strict=True))
    return cached / prompt


async def test_shared_prefixes_are_found_where_they_lie(
    replicas: list[Vllm], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = {}
    for policy in ("round_robin", "predicted"):
        (tmp_path / policy).mkdir()
        async with scene(tmp_path / policy, replicas, policy) as s:
            shares[policy] = await cached_share(s, policy)
            if policy == "predicted":
                predicted = await s.served.metrics("extproc_predicted_cached_tokens_total")
                actual = await s.served.metrics("extproc_actual_cached_tokens_total")
    with capsys.disabled():
        print(f"\n  prompt tokens from the cache: {shares}, predicted {predicted}, actual {actual}")
    assert shares["predicted"] > 0.6
    assert shares["predicted"] > shares["round_robin"] + 0.2


async def test_scrapes_read_what_vllm_tells(running: Scene, replicas: list[Vllm]) -> None:
    for replica in await running.debug("replicas"):
        assert replica["models"] == [MODEL]
        assert replica["sample"]["block_size"] == BLOCK_SIZE
        assert replica["sample"]["num_blocks"] == NUM_BLOCKS
        assert (replica["sample"]["running"], replica["sample"]["waiting"]) == (0, 0)


async def test_a_running_request_shows_in_the_sample(running: Scene) -> None:
    sent = asyncio.create_task(running.post(chat("Tell me all.", max_tokens=1500, ignore_eos=True)))

    async def seen() -> bool:
        return bool(sum(r["sample"]["running"] for r in await running.debug("replicas")) == 1)

    await until(seen, timeout_s=10)
    assert sum(r["in_flight"] for r in await running.debug("replicas")) == 1
    status, _, _ = await sent
    assert status == 200


async def test_usage_corrects_the_estimates(running: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(12):
        await running.post(chat(words(400, f"estimate {i}")))
        await running.settled()
    records = (await running.last(12))[::-1]
    ratios = [r["prompt_tokens"] / r["outcome"]["prompt_tokens"] for r in records]
    with capsys.disabled():
        print(f"\n  estimated over actual prompt tokens: {[round(r, 2) for r in ratios]}")
    assert abs(ratios[-1] - 1) < 0.1
    assert all(r["outcome"]["ttft_s"] and r["outcome"]["output_tokens"] == 4 for r in records)


REFUSED = {
    "unknown model": (CHAT, json.dumps({**chat("x"), "model": "nope"}).encode()),
    "unknown model, completions": ("/v1/completions", b'{"model": "nope", "prompt": "x", "stream": true}'),
    "broken JSON": (CHAT, b'{"model":"tiny","messages":[{'),
    "just a brace": (CHAT, b"{"),
    "an array": (CHAT, b"[]"),
    "nothing in it": (CHAT, b"{}"),
    "no messages": (CHAT, b'{"model":"tiny"}'),
    "nothing at all": (CHAT, b"null"),
    "empty salt": (CHAT, json.dumps(chat("x", cache_salt="")).encode()),
    "no samples": (CHAT, json.dumps(chat("x", n=0)).encode()),
    "half a token": (CHAT, json.dumps(chat("x", max_tokens=1.5)).encode()),
    "a number for a model": (CHAT, json.dumps({**chat("x"), "model": 5}).encode()),
    "no prompt": ("/v1/completions", b'{"model": "tiny"}'),
    "negative limit": (CHAT, json.dumps(chat("x", max_tokens=-3)).encode()),
    "no limit left": ("/v1/completions", b'{"model": "tiny", "prompt": "x", "max_tokens": 0}'),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_refusal_is_to_the_byte_what_vllm_says(running: Scene, replicas: list[Vllm], case: str) -> None:
    path, body = REFUSED[case]
    before = await running.served.metrics("extproc_decisions_total")
    through = await running.post(body, path)
    assert through[:2] == (await running.post(body, path, at=replicas[0].url))[:2]
    assert await running.served.metrics("extproc_decisions_total") == before  # it was us


async def test_a_prompt_that_is_too_long_is_refused_by_the_engine(running: Scene, replicas: list[Vllm]) -> None:
    body = chat(words(8_000, "long"))
    through = await running.post(body)
    assert through[:2] == (await running.post(body, at=replicas[0].url))[:2]
    assert through[0] == 400
    [record] = await running.last()
    assert (record["outcome"]["end"], record["outcome"]["status"]) == ("client_error", 400)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": False}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
    ids=["plain", "usage", "no usage", "continuous"],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_a_stream_is_what_vllm_alone_would_have_sent(
    running: Scene, replicas: list[Vllm], path: str, options: Json
) -> None:
    body = {**chat("Hello there, what do you think of this? " * 10), "stream": True, "max_tokens": 12, **options}
    if path != CHAT:
        body["prompt"] = body.pop("messages")[0]["content"]
    headers = {"x-request-id": "r"}
    await running.post(body, path)  # so that all that follow find the same in the cache
    await running.settled()
    status, through, served = await running.post(body, path, **headers)
    _, direct, _ = await running.post(body, path, at=f"http://{served}", **headers)
    _, through, again = await running.post(body, path, **headers)
    assert (status, again) == (200, served)
    assert seen(through) == seen(direct)
    [record] = await running.last()
    assert record["outcome"]["output_tokens"] == 12
    assert record["outcome"]["cached_tokens"] > 0


def seen(body: bytes) -> Json:
    """What a client makes of a stream.

    Events are not compared one by one: vLLM puts two tokens into one when it is behind. The fingerprint is left out: it comes in
    the last event, so it leaves with the usage event that we asked for.
    """
    texts = body.decode().removesuffix("\n\n").split("\n\n")
    data = [json.loads(t.removeprefix("data: ")) for t in texts[:-1]]
    choices = [c for d in data for c in d["choices"]]
    return {
        "text": "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices),
        "keys": {tuple(sorted(set(d) - {"system_fingerprint"})) for d in data},
        "ids": {d["id"] for d in data},
        "finished": [c["finish_reason"] for c in choices if c["finish_reason"]],
        "usage": [d["usage"] for d in data if d.get("usage")][-1:],
        "last": texts[-1],
    }


async def test_a_hung_engine_is_avoided_though_its_server_says_that_all_is_well(
    running: Scene, replicas: list[Vllm], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its page says that nothing runs and nothing waits there; only the streams without a first token tell."""
    hung = replicas[0]
    hung.signal_engine(signal.SIGSTOP)
    try:
        sent = []
        for i in range(20):
            sent.append(asyncio.create_task(running.post(chat(words(100, f"hang {i}"), stream=True))))
            await asyncio.wait(sent[-1:], timeout=1.0)
        stuck = [task for task in sent if not task.done()]
        with capsys.disabled():
            print(f"\n  of 20 streams {len(stuck)} went to the hung engine")
        assert len(stuck) < 6
    finally:
        hung.signal_engine(signal.SIGCONT)
    assert {status for status, _, _ in await asyncio.gather(*sent)} == {200}


async def test_requests_go_on_when_a_replica_is_terminated(
    running: Scene, replicas: list[Vllm], capsys: pytest.CaptureFixture[str]
) -> None:
    """The last test: nothing starts the replica again. vLLM answers 500 to what it has when the signal comes, and that is lost."""
    gone, left = replicas
    statuses: list[int] = []
    done = asyncio.Event()

    async def keep_asking() -> None:
        while not done.is_set():
            status, _, _ = await running.post(chat(words(50, f"gone {len(statuses)}")))
            statuses.append(status)

    asking = [asyncio.create_task(keep_asking()) for _ in range(2)]
    await until(lambda: len(statuses) > 10, timeout_s=20)
    await gone.terminate()
    before = len(statuses)
    await until(lambda: len(statuses) > before + 30, timeout_s=20)
    done.set()
    await asyncio.gather(*asking)
    with capsys.disabled():
        print(f"\n  statuses around the signal: {dict(Counter(statuses))}")
    assert statuses.count(200) >= len(statuses) - len(asking)
    assert set(statuses[before:]) == {200}
    await running.settled()

    async def states() -> bool:
        return {r["replica"]: r["state"] for r in await running.debug("replicas")} == {
            gone.address: "open",
            left.address: "ready",
        }

    await until(states)
    outcomes = await running.served.metrics("extproc_outcomes_total")
    assert sum(v for k, v in outcomes.items() if 'outcome="ok"' in k) >= statuses.count(200)
