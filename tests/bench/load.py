"""The load generator, in a process of its own: raw keep-alive HTTP/1.1, so that it costs little beside what is measured.

    python -m tests.bench.load closed  PORT REQUESTS CONNECTIONS     as fast as the connections allow
    python -m tests.bench.load open    PORT RATE SECONDS CONNECTIONS at fixed times, whatever comes back
    python -m tests.bench.load streams PORT STREAMS TOKENS           all at once, started evenly over one second

Prints one JSON object: `{"requests", "errors", "seconds", "p50_ms", "p90_ms", "p99_ms"}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Final

import uvloop

from extproc.sim.report import percentile
from tests.bench.http1 import message_end
from tests.bench.requests import Bodies

STALLED_S: Final = 60.0
"""No run lasts longer than this beyond its own length."""


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it; `on_end` is called after each response."""

    def __init__(self, on_end: Callable[[Connection, float, bool], None]) -> None:
        self._on_end = on_end
        self._buffer = bytearray()
        self._sent = 0.0
        self._transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's own class, which is none of asyncio's

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sent:
            self._ended(False)

    def send(self, request: bytes) -> None:
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if message_end(self._buffer) is not None:
            good = self._buffer.startswith(b"HTTP/1.1 200")
            self._buffer.clear()
            self._ended(good)

    def _ended(self, good: bool) -> None:
        taken, self._sent = time.perf_counter() - self._sent, 0.0
        self._on_end(self, taken, good)


class Run:
    """Counts and times of one run."""

    def __init__(self, wanted: int, bodies: Bodies) -> None:
        self.wanted, self.bodies = wanted, bodies
        self.started = 0
        self.times: list[float] = []
        self.errors = 0
        self.idle: list[Connection] = []
        self.done = asyncio.Event()

    def next_on(self, connection: Connection) -> None:
        self.started += 1
        connection.send(self.bodies.request())

    def ended(self, taken: float, good: bool) -> None:
        self.times.append(taken)
        self.errors += not good
        if len(self.times) >= self.wanted:
            self.done.set()

    def result(self, seconds: float) -> dict[str, float | None]:
        ordered = sorted(self.times)
        shares = {f"p{p}_ms": _ms(percentile(ordered, p)) for p in (50, 90, 99)}
        return {"requests": len(ordered), "errors": self.errors, "seconds": seconds, **shares}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


async def _connect(port: int, count: int, on_end: Callable[[Connection, float, bool], None]) -> list[Connection]:
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Connection(on_end), "127.0.0.1", port) for _ in range(count)]
    return [connection for _, connection in made]


async def closed(port: int, requests: int, connections: int) -> dict[str, float | None]:
    """Each connection sends its next request when it has its answer."""
    run = Run(requests, Bodies())

    def on_end(connection: Connection, taken: float, good: bool) -> None:
        run.ended(taken, good)
        if run.started < requests:
            run.next_on(connection)

    connected = await _connect(port, connections, on_end)

    def start() -> None:
        for connection in connected:
            run.next_on(connection)

    return await _timed(run, start)


async def opened(port: int, rate: float, seconds: float, connections: int) -> dict[str, float | None]:
    """Requests at fixed times; one that finds all connections busy counts as an error, for it would distort the rest."""
    run = Run(round(rate * seconds), Bodies())

    def on_end(connection: Connection, taken: float, good: bool) -> None:
        run.ended(taken, good)
        run.idle.append(connection)

    def send() -> None:
        if run.idle:
            run.next_on(run.idle.pop())
        else:
            run.ended(0.0, False)

    def start() -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        for n in range(run.wanted):
            loop.call_at(begin + n / rate, send)

    run.idle = await _connect(port, connections, on_end)
    return await _timed(run, start)


async def streams(port: int, count: int, tokens: int) -> dict[str, float | None]:
    """Slow streams side by side."""
    run = Run(count, Bodies(stream_tokens=tokens))
    connections = await _connect(port, count, lambda _, taken, good: run.ended(taken, good))

    def start() -> None:
        loop = asyncio.get_running_loop()
        for n, connection in enumerate(connections):
            loop.call_later(n / count, run.next_on, connection)

    return await _timed(run, start)


async def _timed(run: Run, start: Callable[[], object]) -> dict[str, float | None]:
    began = time.perf_counter()
    start()
    await asyncio.wait_for(run.done.wait(), STALLED_S)
    return run.result(time.perf_counter() - began)


async def main(kind: str, *numbers: str) -> None:
    port, *rest = numbers
    if kind == "closed":
        result = await closed(int(port), int(rest[0]), int(rest[1]))
    elif kind == "open":
        result = await opened(int(port), float(rest[0]), float(rest[1]), int(rest[2]))
    else:
        result = await streams(int(port), int(rest[0]), int(rest[1]))
    print(json.dumps(result))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
