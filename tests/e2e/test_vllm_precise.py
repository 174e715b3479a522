"""Real vLLM behind the real Envoy: cached tokens as predicted when a request was routed, against what the engine reports of it.

Nothing is told by the engine but its KV events: prompts are tokenized by extproc. Run by `make test-vllm`; figures go to
build/precise-vllm.json and to standard output.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from tokenizers import Tokenizer

from extproc.adapters.tokenizing.folder import load
from extproc.adapters.tokenizing.prompts import tokenized
from extproc.config import Config, TokenizerConfig
from extproc.core.prefix.exact import token_chain
from extproc.core.types import Api
from extproc.envoy import bootstrap, endpoints
from extproc.openai.tokens import Question
from tests.e2e.stack import CHAT, Json, client, configured, connected
from tests.e2e.vllm import MODEL, Vllm, adapters, kv_events, words
from tests.support.envoy import EnvoyProcess
from tests.support.ports import free_port
from tests.support.process import Served
from tests.support.waiting import until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
COMPLETIONS = "/v1/completions"
REQUESTS, AFTERWARDS = 300, 150
AT_ONCE = 4
FIGURES = Path(__file__).parents[2] / "build/precise-vllm.json"
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}


@dataclass
class Client:
    """Conversations that grow, share their beginnings and are taken up again, and completions beside them: more than the caches hold."""

    http: aiohttp.ClientSession
    url: str
    rng: Random
    ids: Tokenizer = field(default_factory=lambda: Tokenizer.from_file(os.environ["MODEL"] + "/tokenizer.json"))
    sessions: list[Json] = field(default_factory=list)

    async def one(self) -> None:
        if self.rng.random() < 0.25:
            await self._completion()
        else:
            await self._turn()

    def _session(self) -> Json:
        rng = self.rng
        beginning = words(Random(rng.randrange(5)), rng.choice([100, 300, 600]))
        said = [{"role": "system", "content": beginning}]
        found: Json = {
            "model": rng.choice([MODEL, MODEL, *adapters()]),
            "messages": said,
            "max_tokens": rng.choice([1, 8, 60]),
        }
        if rng.random() < 0.3:
            found["cache_salt"] = rng.choice(["pepper", "salt"])
        if rng.random() < 0.2:
            found["tools"], found["tool_choice"] = [TOOL], "none"
        return found

    async def _turn(self) -> None:
        rng = self.rng
        if not self.sessions or rng.random() < 0.25:
            self.sessions = [*self.sessions[-7:], self._session()]
        session = rng.choice(self.sessions)
        said = session["messages"]
        text = words(rng, rng.randrange(5, 120))
        content: Any = [{"type": "text", "text": text}] if rng.random() < 0.2 else text
        said.append({"role": "user", "content": content})
        answer = await self._post(CHAT, {**session, "temperature": 0.7, "ignore_eos": True})
        said.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        if len(said) > 9:
            self.sessions.remove(session)

    async def _completion(self) -> None:
        rng = self.rng
        text = words(Random(rng.randrange(8)), rng.choice([50, 400, 900])) + " " + words(rng, rng.randrange(50))
        prompt = self.ids.encode(text).ids if rng.random() < 0.3 else text
        await self._post(COMPLETIONS, {"model": rng.choice([MODEL, *adapters()]), "prompt": prompt, "max_tokens": 8})

    async def _post(self, path: str, body: Json) -> Json:
        async with self.http.post(self.url + path, json=body) as response:
            found: Json = await response.json()
            assert response.status == 200, found
            return found


@dataclass(frozen=True)
class Scene:
    config: Config
    served: Served
    http: aiohttp.ClientSession
    seen: set[str] = field(default_factory=set)
    """Flights of phases before. Where the machine is so busy that extproc stands still, the proxy lets requests pass unrouted."""

    async def debug(self, path: str) -> Any:
        async with self.http.get(f"{self.served.url}/debug/{path}") as response:
            return await response.json()

    async def known(self, replicas: list[Vllm]) -> None:
        """All caches are known as a whole, and all replicas are well."""

        async def whole() -> bool:
            found = await self.served.metrics("extproc_kv_known")
            ready = [each["state"] == "ready" and each["models"] for each in await self.debug("replicas")]
            return list(found.values()) == [1.0] * len(replicas) and all(ready)

        await until(whole, timeout_s=60)

    async def settled(self) -> None:
        """What the engine told of its last step has come: some milliseconds after the answer."""
        seen, now = -1.0, 0.0
        while seen != now:
            seen = now
            await asyncio.sleep(0.03)
            now = sum((await self.served.metrics("extproc_kv_messages_total")).values())

    async def share(self, name: str, number: int, mine: list[Client], settling: bool = False) -> Json:
        """Requests by whether what was predicted is what the engine reports; `settling`: after a moment of silence each."""

        async def some(each: Client) -> None:
            for _ in range(number // len(mine)):
                await each.one()
                if settling:
                    await self.settled()

        await asyncio.gather(*map(some, mine))

        async def ended() -> list[Json] | None:
            found = [each for each in await self.debug(f"decisions?n={number}") if each["flight"] not in self.seen]
            return found if all(each["outcome"] for each in found) else None

        records: list[Json] = await until(ended)
        self.seen.update(each["flight"] for each in records)
        return {**figures(name, records), "unrouted": number - len(records)}


def figures(name: str, records: list[Json]) -> Json:
    differ = [
        (r["predicted"]["prefix_source"], r["api"], r["predicted"]["cached_tokens"], r["outcome"]["cached_tokens"] or 0)
        for r in records
    ]
    wrong = [each for each in differ if each[2] != each[3]]
    fallback = sum(each[0] != "exact" for each in differ)
    hits = sum(each[3] > 0 for each in differ)
    sizes = Counter(r["prompt_tokens"] == r["outcome"]["prompt_tokens"] for r in records)
    found = {
        "requests": len(records),
        "exact_share": round(1 - len(wrong) / len(records), 4),
        "fallback_share": round(fallback / len(records), 4),
        "hit_share": round(hits / len(records), 4),
        "sizes_right": sizes[True],
    }
    print(f"{name}: {found}; predicted and reported where they differ: {wrong[:20]}")
    return found


@asynccontextmanager
async def scene(directory: Path, replicas: list[Vllm], events: dict[str, Any]) -> AsyncIterator[Scene]:
    pool = {
        "labels": {},
        "replicas": [r.address for r in replicas],
        "kv_events": events,
        "tokenizer": {"path": os.environ["MODEL"], "timeout_s": 1.0},
    }
    config = configured(directory, pool)
    endpoints.create_if_missing(config)
    async with Served(config) as served, EnvoyProcess(bootstrap.render(config)) as envoy, client() as http:
        await until(lambda: connected(envoy))
        yield Scene(config, served, http)
        assert "Traceback" not in served.log()


async def test_predicted_cached_tokens_are_those_that_the_engine_reports(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        ports = [free_port() for _ in range(4)]
        replicas = [Vllm(tmp_path, *kv_events(f"tcp://*:{ports[i]}", f"tcp://*:{ports[i + 1]}")) for i in (0, 2)]
        for replica in replicas:
            await stack.enter_async_context(replica)
        await asyncio.gather(*(r.ready() for r in replicas))
        s = await stack.enter_async_context(scene(tmp_path, replicas, {}))
        await s.known(replicas)
        one = Client(s.http, f"http://{s.config.envoy.listen}", Random(3))
        several = [Client(s.http, one.url, Random(i), one.ids) for i in range(AT_ONCE)]
        found = {
            "settled": await s.share("one after the other, settled", REQUESTS, [one], settling=True),
            "sequential": await s.share("one right after the other", REQUESTS, [one]),
            "concurrent": await s.share(f"{AT_ONCE} at once", REQUESTS, several),
        }

        # One restarts in its place.
        port = replicas[0].port
        await replicas[0].__aexit__(None, None, None)
        again = Vllm(tmp_path, *kv_events(f"tcp://*:{ports[0]}", f"tcp://*:{ports[1]}"))
        again.port = port
        await stack.enter_async_context(again)
        await again.ready()
        await s.known(replicas)
        found["restarted"] = await s.share("after a restart, settled", AFTERWARDS, [one], settling=True)

        told = await s.served.metrics("extproc_prompt_tokens_told_total")
        removed = await s.served.metrics('extproc_kv_events_total{pool="default",type="BlockRemoved"}')
        waits = await s.served.metrics("extproc_tokenizing_seconds")
        prompts = await s.served.metrics("extproc_tokenized_prompts_total")
        stalls = await s.served.metrics("extproc_loop_stalls_total")
        print(told, removed, waits, prompts, stalls)
        total = sum(each["requests"] for each in found.values())
        shares = {
            key: round(sum(each[key] * each["requests"] for each in found.values()) / total, 4)
            for key in ("exact_share", "fallback_share")
        }
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps({**shares, "engines": "vllm"}) + "\n")
        assert sum(removed.values()) > 100
        for each in found.values():
            assert each["sizes_right"] == each["requests"]
            assert each["hit_share"] > 0.3
            assert each["requests"] > each["unrouted"]
            assert each["exact_share"] >= 0.95  # also where an event is still under way
        assert shares["exact_share"] >= 0.99
        assert found["settled"]["exact_share"] >= 0.99
        assert found["restarted"]["exact_share"] >= 0.99


BODIES: tuple[tuple[str, Json], ...] = (
    (CHAT, {"messages": [{"role": "user", "content": "Hello <|im_end|> there"}]}),
    (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "Be."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
            ]
        },
    ),
    (
        CHAT,
        {
            "messages": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "Well "}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}),
    (CHAT, {"messages": [{"role": "user", "content": "one two three four"}], "truncate_prompt_tokens": 5}),
    (
        CHAT,
        {
            "messages": [
                {"role": "developer", "content": "d"},
                {"role": "system", "content": "s"},
                {"role": "user", "content": ""},
            ]
        },
    ),
    (COMPLETIONS, {"prompt": "Hello world"}),
    (COMPLETIONS, {"prompt": ["Hello world"]}),
    (COMPLETIONS, {"prompt": [5, 6, 7]}),
    (COMPLETIONS, {"prompt": "one two three four five six", "truncate_prompt_tokens": 4}),
    (COMPLETIONS, {"prompt": "one two three four five six", "truncate_prompt_tokens": 4, "truncation_side": "right"}),
    (COMPLETIONS, {"prompt": "one two three four five six", "truncate_prompt_tokens": 4, "truncation_side": "left"}),
    (COMPLETIONS, {"prompt": [5, 6, 7, 8], "truncate_prompt_tokens": 2}),
    (COMPLETIONS, {"prompt": "Hello world", "add_special_tokens": False}),
    (COMPLETIONS, {"prompt": "<|im_start|>x <|begin_of_text|>漢字 \ud83d\ude00"}),
)


async def test_prompts_are_the_token_ids_that_the_engine_has(tmp_path: Path) -> None:
    model = load(TokenizerConfig(path=Path(os.environ["MODEL"])), datetime.now)
    async with Vllm(tmp_path) as replica, aiohttp.ClientSession() as http:
        await replica.ready()
        for path, body in BODIES:
            sent = {"model": MODEL, "max_tokens": 1, "return_token_ids": True, **body}
            async with http.post(replica.url + path, json=sent) as response:
                found = await response.json()
                assert response.status == 200, (body, found)
            ids = found.get("prompt_token_ids") or found["choices"][0]["prompt_token_ids"]
            api = Api.CHAT if path == CHAT else Api.COMPLETIONS
            known = tokenized(model, Question(api), json.dumps(sent).encode(), unit=1)
            assert known.prompt_tokens == len(ids), body
            assert known.blocks == token_chain(ids, size=1), body
