"""The load: sessions over HTTP against one base URL, as OpenAI clients would send them.

Open between sessions, closed inside one: a slow fleet delays the next turn of a session, but not the next session.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import aiohttp

from extproc.sim.stream import Answer, Stream
from extproc.sim.workload import Conversation, Session, Turn

PATH: Final = "/v1/chat/completions"
UNFINISHED: Final = "not finished when the load ended"


@dataclass(frozen=True, slots=True)
class Record:
    """What the client saw of one request."""

    session: str
    turn: int
    started_s: float
    """Seconds after the start of the load."""
    ttft_s: float | None
    """From sending to the first text; None when none came."""
    e2e_s: float
    """From sending to the end, or to the failure."""
    status: int | None
    """None when there was no response."""
    output_tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Both None unless the stream tells, which it does not do unasked."""
    error: str | None = None
    """What went wrong, for people; None for a whole answer."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up."""

    request_s: float = 120.0
    """One request, from sending to its last byte."""
    total_s: float = 600.0
    """The whole load; what runs then is cut off and recorded as unfinished."""


class Load:
    """One run of the load. `records` grows while it runs."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        limits: Limits = Limits(),
        on_record: Callable[[Record], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`url` is the base, without a path. `on_record` is called at the end of each request."""
        self.records: list[Record] = []
        self._url, self._model, self._limits = url.rstrip("/") + PATH, model, limits
        self._on_record, self._clock = on_record, clock
        self._began = clock()

    def __repr__(self) -> str:
        failed = sum(1 for record in self.records if record.error)
        return f"<load on {self._url}: {len(self.records)} requests, {failed} failed>"

    async def run(self, sessions: Iterable[Session]) -> list[Record]:
        """Send everything; the records in order of completion. Failures are records, never exceptions."""
        self._began = self._clock()
        timeout = aiohttp.ClientTimeout(total=self._limits.request_s)
        # Without a limit of connections: waiting for one here would hide queueing in the client's own pool.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as http:
            tasks = [asyncio.create_task(self._session(http, session)) for session in sessions]
            try:
                await asyncio.wait(tasks, timeout=self._limits.total_s)
            finally:
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end
        return self.records

    async def _session(self, http: aiohttp.ClientSession, session: Session) -> None:
        conversation = Conversation(session)
        await asyncio.sleep(session.starts_s)
        for number, turn in enumerate(session.turns):
            await asyncio.sleep(turn.think_s)
            await self._turn(http, conversation, number, turn)

    async def _turn(self, http: aiohttp.ClientSession, conversation: Conversation, number: int, turn: Turn) -> None:
        """One request, one record, whatever happens to it."""
        body = conversation.request(turn, self._model)
        headers = {"content-type": "application/json", "x-session-id": conversation.session.name}
        stream, sent = Stream(), self._clock()
        status: int | None = None
        error: str | None = UNFINISHED
        answer: Answer | None = None
        try:
            async with http.post(self._url, data=body, headers=headers) as response:
                status = response.status
                while chunk := await response.content.readany():
                    stream.feed(chunk, self._clock())
            answer = stream.answer()
            error = answer.error if status == 200 else f"status {status}"
        except TimeoutError:
            error = f"no end within {self._limits.request_s:g} s"
        except (aiohttp.ClientError, OSError) as e:
            error = f"{type(e).__name__}: {e}"
        finally:
            ended = self._clock()
            self._note(
                Record(
                    session=conversation.session.name,
                    turn=number,
                    started_s=sent - self._began,
                    ttft_s=stream.first_at - sent if stream.first_at is not None else None,
                    e2e_s=ended - sent,
                    status=status,
                    output_tokens=answer.output_tokens if answer else 0,
                    prompt_tokens=answer.prompt_tokens if answer else None,
                    cached_tokens=answer.cached_tokens if answer else None,
                    error=error,
                )
            )
        if answer and error is None:
            conversation.answered(turn, answer.text)

    def _note(self, record: Record) -> None:
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)
