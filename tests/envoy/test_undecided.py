"""Where nobody is served who is not known, or Envoy is told not to fail open, no request passes that nothing was decided on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from extproc.config import Config, parse
from extproc.core.types import Request, Turn, Verdict, Wait
from extproc.envoy import bootstrap
from extproc.envoy.exchange import Answer, Data, Head, Steer
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.reading import Reader
from extproc.envoy.server import Server
from extproc.openai.keys import KeyEntry, key_hash
from extproc.openai.reading import NotRead, Reading, Task
from extproc.pb.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingResponse
from tests.envoy.client import ENDED, Stream, body, channel, headers
from tests.envoy.setup import CHAT, prompt, route
from tests.support.ports import free_port
from tests.support.waiting import until

SECRET = b"0123456789abcdef"
KEYED: dict[str, Any] = {"tenants": {"secret_file": "/s", "keys_file": "/k"}}
CLOSED: dict[str, Any] = {"envoy": {"fail_open": False}}
ANYBODY: dict[str, Any] = {"tenants": {"unknown": "anonymous"}}
HERS = {"authorization": "Bearer sk-hers"}


class Keys:
    """One is known."""

    def find(self, digest: str) -> KeyEntry | None:
        return KeyEntry("her") if digest == key_hash(SECRET, "sk-hers") else None


class Broken(FakeRouter):
    def arrive(self, request: Request, now: float) -> Verdict:
        raise ZeroDivisionError("mistake")


class Unreadable:
    """A reader that cannot."""

    async def read(self, task: Task, body: bytes | memoryview) -> Reading | NotRead:
        return NotRead.FAILED


class Unwritable(Intake):
    """Gives an answer that cannot be put on the wire."""

    def decide(self, head: Head, body: Data | None, now: float, rewritable: bool = False) -> Answer:
        super().decide(head, body, now, rewritable)
        return Steer("f1", None)  # type: ignore[arg-type]


class Unresumable(Intake):
    """Fails when the wait is over."""

    def resume(self, hold: Any, verdict: Any) -> Answer:
        raise ZeroDivisionError("mistake")


def configured(**sections: Any) -> Config:
    listen = {"grpc": f"127.0.0.1:{free_port()}"}
    return parse(json.dumps({"listen": listen, "pools": [{"replicas": ["127.0.0.1:1"]}], **sections}))


class At:
    def __init__(self, server: Server, router: FakeRouter, opened: Any) -> None:
        self.server, self.router, self.stream = server, router, Stream(opened)

    async def refused(self, status: int = 500) -> Any:
        """The next answer, which must be this error, and the last."""
        answer = await self.stream.ask()
        assert answer is not ENDED, "it would pass"
        found = error(answer)
        assert found["code"] == status
        assert await self.stream.ask() is ENDED
        assert await self.stream.code() == "OK"
        assert self.server.streams.refused == 1
        return found

    async def sent(self, data: bytes | None = None) -> None:
        """Headers, which pass, and the body."""
        first = await self.stream.ask(headers(CHAT, 2, authorization=HERS["authorization"]))
        assert first is not None
        assert first.WhichOneof("response") == "request_headers"
        await self.stream.send(body(data or prompt(5)).SerializeToString())


def error(answer: ProcessingResponse) -> Any:
    """What the client is told."""
    assert answer.WhichOneof("response") == "immediate_response", answer
    told = json.loads(answer.immediate_response.body)["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    assert told["code"] in (answer.immediate_response.status.code, "invalid_api_key")
    return told


@asynccontextmanager
async def serving(
    router: FakeRouter | None = None,
    sections: dict[str, Any] = KEYED,
    intake: type[Intake] = Intake,
    reader: Reader | None = None,
) -> AsyncIterator[At]:
    config, router = configured(**sections), router or FakeRouter([route(1)])
    keys = Keys() if "keys_file" in sections.get("tenants", {}) else None
    server = Server(config, intake(router, config, SECRET, keys), router, time.monotonic, reader=reader)
    try:
        async with channel(await server.start()) as opened:
            yield At(server, router, opened)
    finally:
        await server.stop(0)


@pytest.mark.parametrize("sections", [KEYED, CLOSED], ids=["keys", "fail_open false"])
async def test_a_mistake_in_the_decision_refuses_the_request(
    sections: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Broken(), sections) as at:
        await at.sent()
        assert (await at.refused())["type"] == "InternalServerError"
        assert at.server.streams.failed == 1
    assert "a decision failed; the request is refused" in caplog.text
    assert "sk-hers" not in caplog.text


async def test_where_anybody_is_served_it_lets_the_request_pass() -> None:
    async with serving(Broken(), ANYBODY) as at:
        await at.sent()
        answer = await at.stream.ask()
        assert answer is not None
        assert answer.WhichOneof("response") == "request_body"
        assert await at.stream.ask() is ENDED


async def test_so_does_a_mistake_after_the_wait() -> None:
    async with serving(FakeRouter([Wait("t1", deadline=30.0)]), intake=Unresumable) as at:
        await at.sent()
        await at.stream.ask()  # for time
        await until(lambda: len(at.server.holding) == 1)
        at.router.due.append(Turn("t1", route(1)))
        at.server.holding.poke()
        await at.refused()


async def test_so_does_a_large_body_that_nobody_can_read() -> None:
    async with serving(reader=Unreadable()) as at:
        await at.sent(prompt(1 << 20))
        await at.stream.ask()  # for time
        await at.refused()


async def test_so_does_an_answer_that_cannot_be_written() -> None:
    async with serving(intake=Unwritable) as at:
        await at.sent()
        await at.refused()
        assert at.server.streams.abandoned == 1


@pytest.mark.parametrize("raw", [b"\xff\xff", body(prompt(5)).SerializeToString()], ids=["garbage", "no headers"])
async def test_so_does_what_cannot_be_read_or_cannot_come(raw: bytes) -> None:
    async with serving() as at:
        await at.stream.send(raw)
        await at.refused()
        assert at.server.streams.unexpected == 1


async def test_what_was_answered_is_not_answered_again() -> None:
    """The proxy streams the response through us, and then says what cannot be read: an error now would end a good answer."""
    async with serving() as at:
        message = headers(CHAT, 4, authorization=HERS["authorization"])
        message.protocol_config.response_body_mode = 4  # type: ignore[assignment]
        await at.stream.send(message.SerializeToString())
        answer = await at.stream.ask(body(prompt(5)))
        assert answer is not None
        assert "envoy.lb" in answer.dynamic_metadata
        await at.stream.ask()  # the body again
        await at.stream.send(b"\xff\xff")
        assert await at.stream.ask() is ENDED
        assert await at.stream.code() == "OK"
        assert (at.server.streams.unexpected, at.server.streams.refused) == (1, 0)


async def test_a_stream_that_outlasts_the_grace_period_is_refused() -> None:
    async with serving() as at:
        await at.stream.ask(headers(CHAT, 2, authorization=HERS["authorization"]))
        async with asyncio.timeout(10):
            await at.server.stop(1.0)
        assert "shutting down" in (await at.refused(503))["message"]
        assert at.server.streams.cut == 1


async def test_who_is_not_known_is_refused_before_the_body_is_sent() -> None:
    async with serving() as at:
        answer = await at.stream.ask(headers(CHAT, 2, authorization="Bearer sk-nobody"))
        assert answer is not None
        assert error(answer)["code"] == "invalid_api_key"
        assert answer.immediate_response.status.code == 401
        assert await at.stream.ask() is ENDED
        identity = at.server._intake.identity
        assert identity is not None
        assert dict(identity.sources) == {"refused": 1}, "counted once"


async def test_of_two_keys_none_counts() -> None:
    """Which of them the replica would take nobody knows."""
    async with serving() as at:
        message = headers(CHAT, 2, authorization="Bearer sk-other")
        added = message.request_headers.headers.headers.add()
        added.key, added.raw_value = "authorization", b"Bearer sk-hers"
        answer = await at.stream.ask(message)
        assert answer is not None
        assert error(answer)["code"] == "invalid_api_key"


def test_nothing_that_is_logged_shows_a_key() -> None:
    assert "sk-hers" not in repr(Head("POST", CHAT, headers=HERS, claims={"sub": "sk-hers"}))


@pytest.mark.parametrize(
    ("sections", "opens", "passes"),
    [
        ({}, True, True),
        (CLOSED, False, False),
        (ANYBODY, True, True),
        (KEYED, False, False),
        ({**KEYED, "envoy": {"fail_open": True}}, True, False),
        ({**ANYBODY, "envoy": {"fail_open": False}}, False, False),
    ],
    ids=["default", "closed", "anybody", "keys", "keys, open all the same", "anybody, closed"],
)
def test_what_passes_undecided(sections: dict[str, Any], opens: bool, passes: bool, tmp_path: Path) -> None:
    config = configured(**sections)
    assert (config.fails_open, config.undecided_pass) == (opens, passes)
    rendered = json.dumps(bootstrap.render(config))
    assert ('"failure_mode_allow": true' in rendered or '"failureModeAllow": true' in rendered) == opens, tmp_path
