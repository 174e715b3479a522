"""Tokenizing in threads: what comes in time, what does not, and whose word counts."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from extproc.adapters.tokenizing.prompts import MAX_BODY_BYTES
from extproc.adapters.tokenizing.tokenizing import TRIED, WAITING_PER_THREAD, WRONG, Judge, Tokenizing
from extproc.config import ConfigError, TokenizerConfig, parse
from extproc.core.types import Api
from extproc.openai.tokens import Place, Question, Untokenized
from tests.adapters.tokenizing.models import TEMPLATE, folder
from tests.support.waiting import until

CHAT = Question(Api.CHAT)
A, B = Place("a"), Place("b")
NOON = datetime(2026, 5, 4, 12)
SLOW = "{{ strftime_now('') }}" + TEMPLATE
"""Takes as long as the clock that it asks."""


def body(text: str = "Hello") -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


class Gate:
    """A clock that stands still while it is shut."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self) -> datetime:
        assert self.open.wait(10)
        return NOON


@asynccontextmanager
async def serving(
    path: Path, template: str = TEMPLATE, now: Callable[[], datetime] = lambda: NOON, pools: str = "a", **settings: Any
) -> AsyncIterator[Tokenizing]:
    config = TokenizerConfig(path=folder(path, chat_template=template), **{"timeout_s": 5.0, **settings})
    found = Tokenizing(dict.fromkeys(pools, config), now)
    try:
        yield found
    finally:
        found.close()


async def test_a_prompt_in_time(tmp_path: Path) -> None:
    took: list[tuple[str, float]] = []
    settings = TokenizerConfig(path=folder(tmp_path, chat_template=TEMPLATE), timeout_s=5.0)
    ticks = iter([1.0, 1.25])
    tokenizing = Tokenizing({"a": settings}, lambda: NOON, lambda: next(ticks), lambda *each: took.append(each))
    found = await tokenizing.tokens([A], CHAT, memoryview(body()))
    tokenizing.close()
    assert found is not None
    assert found.prompt_tokens > 3
    assert took == [("a", 0.25)]
    assert tokenizing.counts["a"].prompts == {"tokenized": 1}
    assert repr(tokenizing) == "<tokenizing for a>"


async def test_one_that_is_late_is_given_up_and_kept(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, SLOW, gate, timeout_s=0.01) as tokenizing:
        engine = tokenizing.engines["a"]
        assert await tokenizing.tokens([A], CHAT, body()) is None
        assert tokenizing.counts["a"].prompts["late"] == 1
        assert engine.waiting == 1
        cache = engine.cache
        assert cache is not None
        assert cache.bytes == 0
        gate.open.set()
        await until(lambda: engine.waiting == 0)
        assert cache.bytes > 0


async def test_what_is_given_up_before_a_thread_has_it_is_not_begun(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, SLOW, gate, timeout_s=0.01, threads=1) as tokenizing:
        engine = tokenizing.engines["a"]
        assert await tokenizing.tokens([A], CHAT, body("first")) is None
        assert await tokenizing.tokens([A], CHAT, body("second")) is None
        assert tokenizing.counts["a"].prompts["late"] == 2
        assert engine.waiting == 2
        gate.open.set()
        await until(lambda: engine.waiting == 0)
        kept = ("<|start|>user\nfirst", "<|start|>user\nsecond")
        assert engine.cache is not None
        assert [each is not None for each in engine.cache.find(kept)] == [True, False]


async def test_a_body_that_is_too_large_is_not_copied(tmp_path: Path) -> None:
    class Large(bytes):
        def __len__(self) -> int:
            return MAX_BODY_BYTES + 1

        def __bytes__(self) -> bytes:
            raise AssertionError("copied")

    async with serving(tmp_path) as tokenizing:
        assert await tokenizing.tokens([A], CHAT, Large()) is None
        assert +tokenizing.counts["a"].prompts == {"large": 1}


async def test_to_explain_counts_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as tokenizing:
        assert await tokenizing.explained([A], CHAT, body()) == await tokenizing.tokens([A], CHAT, body())
        assert await tokenizing.explained([A], Question(Api.RESPONSES), body()) is Untokenized.API
        assert await tokenizing.explained([B], CHAT, body()) is None
        assert +tokenizing.counts["a"].prompts == {"tokenized": 1}


async def test_simulated_replicas_have_no_folder() -> None:
    found = Tokenizing({"a": TokenizerConfig(simulated=True)})
    prompt = await found.tokens([A], Question(Api.COMPLETIONS), b'{"prompt": "eight by"}')
    found.close()
    assert prompt is not None
    assert prompt.prompt_tokens == 2
    assert found.engines["a"].cache is None


async def test_a_client_that_leaves_frees_nothing_before_its_thread_does(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, SLOW, gate) as tokenizing:
        engine = tokenizing.engines["a"]
        asked = asyncio.ensure_future(tokenizing.tokens([A], CHAT, body()))
        await until(lambda: engine.waiting == 1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert engine.waiting == 1
        gate.open.set()
        await until(lambda: engine.waiting == 0)


async def test_no_more_wait_than_there_is_room_for(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, SLOW, gate, threads=1) as tokenizing:
        room = 1 + WAITING_PER_THREAD
        waiting = [asyncio.ensure_future(tokenizing.tokens([A], CHAT, body(str(i)))) for i in range(room)]
        await until(lambda: tokenizing.engines["a"].waiting == room)
        assert await tokenizing.tokens([A], CHAT, body()) is None
        assert tokenizing.counts["a"].prompts["busy"] == 1
        gate.open.set()
        assert all(await asyncio.gather(*waiting))
        assert await tokenizing.tokens([A], CHAT, body())


async def test_what_would_be_late_behind_others_is_not_tried(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, SLOW, gate, threads=2, timeout_s=5.0) as tokenizing:
        engine = tokenizing.engines["a"]
        engine.mean_s = 6.0
        waiting = [asyncio.ensure_future(tokenizing.tokens([A], CHAT, body(str(i)))) for i in range(2)]
        await until(
            lambda: engine.waiting == 2
        )  # for a thread that has nothing to do takes it, however long it may take
        assert await tokenizing.tokens([A], CHAT, body()) is None
        assert tokenizing.counts["a"].prompts["busy"] == 1
        engine.mean_s = 2.4
        waiting.append(asyncio.ensure_future(tokenizing.tokens([A], CHAT, body())))
        await until(lambda: engine.waiting == 3)
        assert await tokenizing.tokens([A], CHAT, body()) is None
        assert tokenizing.counts["a"].prompts["busy"] == 2
        gate.open.set()
        assert all(await asyncio.gather(*waiting))
        assert engine.mean_s != 2.4  # learned


@pytest.mark.parametrize(
    ("places", "api", "why"),
    [
        ([A], Api.RESPONSES, Untokenized.API),
        ([A, B], Api.CHAT, Untokenized.AMBIGUOUS),
        ([B, A], Api.CHAT, Untokenized.AMBIGUOUS),
        ([A, Place("a", lora="x")], Api.CHAT, Untokenized.AMBIGUOUS),
        ([A], Api.COMPLETIONS, Untokenized.PROMPTS),
    ],
)
async def test_what_is_not_tokenized_is_counted(
    tmp_path: Path, places: list[Place], api: Api, why: Untokenized
) -> None:
    async with serving(tmp_path) as tokenizing:
        assert await tokenizing.tokens(places, Question(api), body()) is None
        assert +tokenizing.counts["a"].prompts == {why: 1}


async def test_places_without_a_tokenizer(tmp_path: Path) -> None:
    async with serving(tmp_path) as tokenizing:
        assert await tokenizing.tokens([B], CHAT, body()) is None
        assert +tokenizing.counts["a"].prompts == {}


async def test_pools_with_one_tokenizer_share_it(tmp_path: Path) -> None:
    async with serving(tmp_path, pools="ab") as tokenizing:
        assert tokenizing.engines["a"] is tokenizing.engines["b"]
        assert await tokenizing.tokens([A, B], CHAT, body())


async def test_the_adapter_is_where_the_request_goes(tmp_path: Path) -> None:
    async with serving(tmp_path) as tokenizing:
        text = body("x" * 200)
        plain = await tokenizing.tokens([A], CHAT, text)
        adapted = await tokenizing.tokens([Place("a", lora="x")], CHAT, text)
        assert plain is not None
        assert adapted is not None
        assert len(plain.blocks.hashes) == len(adapted.blocks.hashes) > 2
        assert plain.blocks != adapted.blocks


async def test_a_mistake_of_ours_costs_only_the_knowledge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class PanicError(BaseException):
        """As the library's own, which are no exceptions."""

    said = "secret"

    def broken() -> datetime:
        raise PanicError(said)

    async with serving(tmp_path, SLOW, broken) as tokenizing:
        for _ in range(3):
            assert await tokenizing.tokens([A], CHAT, body(said)) is None
        assert tokenizing.counts["a"].prompts["failed"] == 3
        [told] = caplog.messages
        assert "PanicError" in told
        assert "in broken" in told
        assert said not in told


async def test_the_engines_word_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with serving(tmp_path, pools="ab") as tokenizing:
        for _ in range(WRONG - 1):
            tokenizing.told("a", 5, 6)
        assert await tokenizing.tokens([A], CHAT, body())
        assert caplog.text == ""
        tokenizing.told("b", 5, 6)
        assert "pool b: the engine counts other prompt tokens" in caplog.text
        assert await tokenizing.tokens([A], CHAT, body()) is None
        assert tokenizing.counts["a"].prompts["distrusted"] == 1
        assert tokenizing.counts["a"].told == {True: 0, False: WRONG - 1}
        tokenizing.told("another", 5, 6)


def test_now_and_then_wrong_is_not_wrong() -> None:
    judge = Judge()

    def after(*told: bool) -> tuple[int, bool]:
        """How often it was found out, and whether it is a wrong one."""
        return [judge.told(each) for each in told].count(True), judge.distrusted

    assert after(*(i % 3 > 0 for i in range(10 * TRIED))) == (0, False)
    assert after(*[False] * TRIED) == (1, True)
    assert after(*[True] * (10 * TRIED)) == (0, True)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        Tokenizing({"a": TokenizerConfig(path=tmp_path)})


def test_its_folder_is_found_from_the_file(tmp_path: Path) -> None:
    text = "pools: [{replicas: ['10.0.0.1:80'], tokenizer: {path: models/m, chat_template: t.jinja}}]"
    [pool] = parse(text, base=tmp_path).pools
    assert pool.tokenizer is not None
    assert (pool.tokenizer.path, pool.tokenizer.chat_template) == (tmp_path / "models/m", tmp_path / "t.jinja")
