"""ZMQ on the event loop, and nothing of what is said over it. The only module of the service that imports zmq.

Plain sockets with our own wait for their file descriptor: pyzmq's asyncio sockets cost 50 us a message, these a tenth.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Final, Self

import zmq

from extproc.adapters.kv_events.wire import SEQUENCE_BYTES

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""A publisher that sends more is cut off. A step that stores 128,000 tokens takes 0.7 MB; to read 16 MiB takes a quarter of a second."""
RECONNECT_MS, LONGEST_RECONNECT_MS = 200, 5_000
"""Pause before a lost connection is tried again, doubled up to the longest."""
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 5_000, 15_000
"""So that a host that is gone without a word is noticed; TCP alone would take a quarter of an hour."""
REPLAY_QUEUE: Final = 20_000
"""Messages of a replay that may wait here: twice what vLLM keeps. Its socket drops what does not fit, without a word."""
REPLAYS_AT_ONCE: Final = 4
"""They come faster than they are learned from, so each waits here as a whole, some 80 MB. One that nobody answers keeps its turn for seconds."""


class Connected:
    """A publisher's connection was made, or made again."""


CONNECTED: Final = Connected()


class Sockets:
    """One ZMQ context: a thread that does all its network I/O."""

    def __init__(self) -> None:
        self._context = zmq.Context(io_threads=1)
        self._turns = asyncio.Semaphore(REPLAYS_AT_ONCE)

    def subscriber(self, endpoint: str, topic: str, most: int, *, bind: bool = False) -> Subscriber:
        """Listen to what is published under topics that begin with `topic`; at most `most` messages wait.

        Raises OSError where the port is taken, or where this is no endpoint.
        """
        return Subscriber(self._context, endpoint, topic, most, bind)

    def replay(self, endpoint: str) -> Replay:
        """To be entered, which takes until it is its turn and raises OSError where this is no endpoint; then to be asked."""
        return Replay(self._context, endpoint, self._turns)

    def close(self) -> None:
        """Of what was opened here, nothing may be used any more."""
        self._context.destroy(linger=0)


class Subscriber:
    """A SUB socket, and the news of its connections."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, topic: str, most: int, bind: bool
    ) -> None:
        self._socket = _opened(context, zmq.SUB, endpoint, most)
        self._news = None if bind else self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.subscribe(topic.encode())
        try:
            _at(self._socket, endpoint, bind)
        except OSError:
            self.close()
            raise

    def take(self) -> list[bytes] | Connected | None:
        """What is there; None where nothing is."""
        if self._news is not None and _received(self._news) is not None:
            return CONNECTED
        return _received(self._socket)

    async def next(self) -> list[bytes] | Connected:
        """The frames of the next message, or the news of a connection. Does not yield while there is something."""
        while (found := self.take()) is None:
            await _readable(self._socket, *([self._news] if self._news is not None else []))
        return found

    def close(self) -> None:
        """Nothing may follow."""
        if self._news is not None:
            self._socket.disable_monitor()
            self._news.close(linger=0)
        self._socket.close(linger=0)


class Replay:
    """A DEALER that asks a publisher's ROUTER for its last messages: `async with sockets.replay(endpoint) as replay`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, turns: asyncio.Semaphore) -> None:
        self._context, self._endpoint, self._turns = context, endpoint, turns

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._turns)
            self._socket = _opened(self._context, zmq.DEALER, self._endpoint, REPLAY_QUEUE)
            stack.callback(self._socket.close, linger=0)
            _at(self._socket, self._endpoint)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def ask(self, first: int) -> None:
        """For the messages from this sequence number on."""
        self._socket.send_multipart([b"", first.to_bytes(SEQUENCE_BYTES, "big")], zmq.NOBLOCK)

    async def next(self, within_s: float) -> list[bytes] | None:
        """The frames of the next message without the empty one before them; None where none comes in time."""
        while (frames := _received(self._socket)) is None:
            try:
                async with asyncio.timeout(within_s):
                    await _readable(self._socket)
            except TimeoutError:
                return None
        return frames[1:]


def _opened(context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str, most: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    for option, value in {
        zmq.LINGER: 0,
        zmq.RCVHWM: most,
        zmq.MAXMSGSIZE: MAX_MESSAGE_BYTES,
        zmq.RECONNECT_IVL: RECONNECT_MS,
        zmq.RECONNECT_IVL_MAX: LONGEST_RECONNECT_MS,
        zmq.HEARTBEAT_IVL: HEARTBEAT_MS,
        zmq.HEARTBEAT_TIMEOUT: HEARTBEAT_TIMEOUT_MS,
        zmq.IPV6: int("[" in endpoint),
    }.items():
        socket.setsockopt(option, value)
    return socket


def _at(socket: zmq.Socket[bytes], endpoint: str, bind: bool = False) -> None:
    try:
        (socket.bind if bind else socket.connect)(endpoint)
    except zmq.ZMQError as e:
        raise OSError(e.errno, f"cannot {'listen on' if bind else 'connect to'} {endpoint}: {e.strerror}") from None


def _received(socket: zmq.Socket[bytes]) -> list[bytes] | None:
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None


async def _readable(*sockets: zmq.Socket[bytes]) -> None:
    """Until one of them may have something. To be called after each of them had nothing: only news wakes.

    The descriptor stays readable until the socket is asked again, so it is watched while we wait and no longer.
    """
    loop = asyncio.get_running_loop()
    woken = loop.create_future()
    descriptors = [int(socket.getsockopt(zmq.FD)) for socket in sockets]
    for descriptor in descriptors:
        loop.add_reader(descriptor, _wake, woken)
    try:
        await woken
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
