"""The clients: requests come when they like (Poisson), whatever became of those before; each leaves one record."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Final

import aiohttp

from extproc.envoy.names import REPLICA_HEADER
from extproc.sim.stream import Stream
from extproc.sim.workload import BYTES_PER_TOKEN, text
from tests.chaos.rows import Sent
from tests.chaos.settings import MODEL, TENANT_HEADER, Settings

CHAT: Final = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to send."""

    tenant: str
    priority: int
    session: str
    stream: bool
    body: bytes
    leaves_after_s: float | None = None
    """The client goes away then, whatever has come."""


class Requests:
    """Makes the requests of one run, from a seed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rng = Random(f"{settings.seed}/requests")
        self._systems = [text(Random(f"system/{i}"), settings.system_tokens) for i in range(settings.groups)]
        self._sessions = [text(Random(f"session/{i}"), settings.session_tokens) for i in range(settings.sessions)]

    def steady(self) -> Ask:
        """Of the mix of tenants, sessions and forms."""
        tenants = self._settings.tenants
        name = self._rng.choices(list(tenants), [t.share for t in tenants.values()])[0]
        return self.of(name, tenants[name].priority)

    def of(self, tenant: str, priority: int) -> Ask:
        session = self._rng.randrange(len(self._sessions))
        stream = self._rng.random() < self._settings.stream_share
        question = text(self._rng, self._settings.question_tokens)
        return Ask(tenant, priority, f"s{session}", stream, self._body(session, question, stream))

    def vanishing(self) -> Ask:
        """The client leaves before or while the answer comes; one in eight before it has sent all of a large body."""
        ask, after_s = self.steady(), self._rng.uniform(0.01, 0.8)
        if self._rng.random() < 1 / 8:
            ask, after_s = self.large(), 0.01
        return replace(ask, leaves_after_s=after_s)

    def large(self, size: int = 10 * 1024 * 1024) -> Ask:
        """With an image of so many bytes, as base64."""
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "QUJD" * (size // 4)}}
        content = [{"type": "text", "text": text(self._rng, 50)}, image]
        return Ask("silver", 0, "large", True, self._body(0, content, True))

    def _body(self, session: int, question: Any, stream: bool) -> bytes:
        system, past = self._systems[session % len(self._systems)], self._sessions[session]
        if self._rng.random() < self._settings.alone_share:
            system, past = (text(self._rng, len(one) // BYTES_PER_TOKEN) for one in (system, past))
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": past},
            {"role": "user", "content": question},
        ]
        length = self._rng.randint(*self._settings.output_tokens)
        body = {"model": MODEL, "messages": messages, "max_tokens": length, "ignore_eos": True, "stream": stream}
        return json.dumps(body).encode()


class Load:
    """Sends to one URL. `sent` has the records of the present row, open ones too."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.sent: list[Sent] = []
        self.paused = False
        """Nothing new is sent: a balancer in front of Envoy knows that it is away."""
        self.worst_lag_s = 0.0
        """Furthest that this process fell behind its own schedule."""
        self._url, self._settings = url + CHAT, settings
        self._rng = Random(f"{settings.seed}/arrivals")
        self._open: set[asyncio.Task[None]] = set()
        self._numbers = 0
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=settings.request_timeout_s),
        )

    def __repr__(self) -> str:
        return f"<load: {len(self.sent)} sent, {len(self._open)} open>"

    @property
    def open(self) -> int:
        """Requests without an end."""
        return len(self._open)

    @asynccontextmanager
    async def at(self, rate: float, make: Callable[[], Ask]) -> AsyncIterator[None]:
        """So many a second for the length of a block; those sent run on after it."""
        task = asyncio.create_task(self._arrivals(rate, make))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _arrivals(self, rate: float, make: Callable[[], Ask]) -> None:
        due = time.monotonic()
        while True:
            due += self._rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.worst_lag_s = max(self.worst_lag_s, time.monotonic() - due)
            if not self.paused and len(self._open) < self._settings.max_open:
                self.send(make())

    def send(self, ask: Ask) -> None:
        """Send now."""
        self._numbers += 1
        sent = Sent(f"chaos-{self._numbers}", ask.tenant, ask.stream, time.monotonic())
        self.sent.append(sent)
        task = asyncio.create_task(self._one(ask, sent))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def finished(self) -> None:
        """Wait for the answers that are still to come; the clients' patience bounds it."""
        while self._open:
            await asyncio.wait(self._open)

    async def close(self) -> None:
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self._http.close()

    async def _one(self, ask: Ask, sent: Sent) -> None:
        """One request, one record, whatever happens to it."""
        try:
            async with asyncio.timeout(ask.leaves_after_s):
                sent.error = await self._answered(ask, sent)
        except TimeoutError:
            sent.left = ask.leaves_after_s is not None
            sent.error = f"no end within {self._settings.request_timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as e:
            sent.error = f"{type(e).__name__}: {e}"
        finally:
            sent.ended_at = time.monotonic()

    async def _answered(self, ask: Ask, sent: Sent) -> str | None:
        headers = {
            "content-type": "application/json",
            "x-request-id": sent.id,
            "x-session-id": ask.session,
            "x-request-priority": str(ask.priority),
            TENANT_HEADER: ask.tenant,
        }
        async with self._http.post(self._url, data=io.BytesIO(ask.body), headers=headers) as response:
            sent.status, sent.began_at = response.status, time.monotonic()
            sent.replica = response.headers.get(REPLICA_HEADER)
            if response.status != 200:
                return (await response.text())[:160]
            if not ask.stream:
                return mistake(await response.read())
            stream = Stream()
            while chunk := await response.content.readany():
                stream.feed(chunk, time.monotonic())
                sent.first_at = stream.first_at
            return stream.answer().error


def mistake(body: bytes) -> str | None:
    """What is wrong with a whole answer of status 200; None for a good one."""
    try:
        choices = json.loads(body)["choices"]
        aborted = any(choice["finish_reason"] == "abort" for choice in choices)
    except (ValueError, KeyError, TypeError):
        return f"no chat completion: {body[:80]!r}"
    if not choices:
        return "no choices"
    return "aborted by the engine" if aborted else None
