"""Prompts that are tokenized between the reading of a body and the decision, through gRPC with a client that plays the proxy."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from extproc.config import Tenants
from extproc.core.types import Api, TokenBlocks
from extproc.envoy.exchange import Head, Steer
from extproc.envoy.intake import FakeRouter, Intake, Ready
from extproc.envoy.server import Server
from extproc.envoy.tokenizing import FakeTokenizing
from extproc.openai.tokens import Place, Question, Tokenized
from tests.envoy.client import ENDED, Stream, body, channel, headers
from tests.envoy.setup import CHAT, configured, prompt, route

KNOWN = Tokenized(TokenBlocks(16, (1, 2)), 40)


class Broken(Intake):
    def read(self, *_: Any, **__: Any) -> Any:
        raise ValueError("broken")


@dataclass
class At:
    server: Server
    router: FakeRouter
    tokenizing: FakeTokenizing
    channel: Any
    decided: list[float]

    async def answered(self, data: bytes) -> Any:
        stream = Stream(self.channel)
        await stream.send(headers(CHAT, 2).SerializeToString())
        await stream.ask()
        answer = await stream.ask(body(data))
        return await stream.ask() if answer is not None and not answer.WhichOneof("response") else answer


@asynccontextmanager
async def serving(
    answer: Tokenized | None = KNOWN, router: FakeRouter | None = None, kind: type[Intake] = Intake
) -> AsyncIterator[At]:
    router, tokenizing, decided = router or FakeRouter([route(1, 2)]), FakeTokenizing(answer), list[float]()
    config = configured({"a": [1]}, "127.0.0.1:21223")
    config = config.model_copy(update={"requests": config.requests.model_copy(update={"large_body_bytes": 2048})})
    intake = kind(router, config)
    server = Server(config, intake, router, time.monotonic, decided.append, tokenizing=tokenizing)
    address = await server.start()
    try:
        async with channel(address) as opened:
            yield At(server, router, tokenizing, opened, decided)
    finally:
        await server.stop(0)


async def test_the_router_is_told_the_tokens() -> None:
    async with serving() as at:
        data = prompt(5)
        assert await at.answered(data) is not ENDED
        assert at.tokenizing.asked == [((Place("default"),), Question(Api.CHAT), data)]
        ((request, _),) = at.router.arrived
        assert (request.tokens, request.prompt_tokens, request.tokenized) == (KNOWN.blocks, 40, True)
        assert len(at.decided) == 1


async def test_a_large_body_too() -> None:
    async with serving() as at:
        data = prompt(3000)
        assert await at.answered(data) is not ENDED
        assert [asked for _, _, asked in at.tokenizing.asked] == [data]
        assert at.router.arrived[0][0].tokens == KNOWN.blocks


async def test_without_an_answer_it_is_guessed() -> None:
    async with serving(None) as at:
        assert await at.answered(prompt(5)) is not ENDED
        ((request, _),) = at.router.arrived
        assert (request.tokens, request.prompt_tokens, request.tokenized) == (None, None, False)


async def test_what_is_refused_is_not_tokenized() -> None:
    async with serving() as at:
        answer = await at.answered(b"{}")
        assert answer.immediate_response.status.code == 400
        assert at.tokenizing.asked == []
        assert at.router.arrived == []


async def test_a_request_that_can_go_nowhere_is_not_tokenized() -> None:
    class Nowhere(FakeRouter):
        def reachable(self, model: str | None) -> list[tuple[str, str | None]]:
            return []

    async with serving(router=Nowhere([route(1)])) as at:
        assert await at.answered(prompt(5)) is not ENDED
        assert at.tokenizing.asked == []


async def test_a_mistake_in_the_reading_lets_the_request_pass() -> None:
    async with serving(kind=Broken) as at:
        answer = await at.answered(prompt(5))
        assert answer.WhichOneof("response") == "request_body"
        assert at.server.streams.failed == 1
        assert at.router.arrived == []


def test_token_ids_of_the_client_stay_its_own() -> None:
    data = b'{"model": "m", "prompt": [1, 2, 3]}'
    router = FakeRouter([route(1)])
    intake = Intake(router, configured({"a": [1]}))
    found = intake.read(Head("POST", "/v1/completions"), data, 0.0)
    assert isinstance(found, Ready)
    assert isinstance(intake.proceed(found, 0.0, Tokenized(TokenBlocks(16), 3)), Steer)
    ((request, _),) = router.arrived
    assert (request.prompt_tokens, request.tokenized, request.tokens) == (3, False, TokenBlocks(16))


def test_the_salt_is_that_which_the_engine_will_see() -> None:
    config = configured({"a": [1]})
    data = prompt(5, cache_salt="client's")
    plain = Intake(FakeRouter([route(1)]), config).read(Head("POST", CHAT), data, 0.0, rewritable=True)
    assert isinstance(plain, Ready)
    assert plain.question.salt is None  # the client's, which is in the body

    tenants = Tenants(unknown="anonymous", send_cache_salt=True)
    intake = Intake(FakeRouter([route(1)]), config.model_copy(update={"tenants": tenants}))
    salted = intake.read(Head("POST", CHAT), data, 0.0, rewritable=True)
    assert isinstance(salted, Ready)
    explained = intake.asked(Head("POST", CHAT), data)
    assert isinstance(explained, Ready)
    assert explained.question == salted.question
    answer = intake.proceed(salted, 0.0)
    assert isinstance(answer, Steer)
    assert answer.body is not None
    assert salted.question.salt == json.loads(answer.body)["cache_salt"] != "client's"

    late = intake.read(Head("POST", CHAT), data, 0.0, rewritable=False)
    assert isinstance(late, Ready)
    assert late.question.salt is None
