"""A proxy that keeps count: which answers it is waiting for, and whether what it gets is one of them."""

from __future__ import annotations

from collections import Counter

from extproc.envoy.exchange import (
    CHUNK_BYTES,
    AskForTime,
    BodyArrived,
    Close,
    Command,
    Continue,
    EchoBody,
    Event,
    HeadersArrived,
    Mode,
    Part,
    Respond,
    ResponseArrived,
    SetDestination,
    TrailersArrived,
)


class Illegal(AssertionError):  # noqa: N818 - says what the answer is
    """An answer that Envoy would count as spurious, and answer the client with 500 for."""


def _part(event: Event) -> Part | None:
    match event:
        case HeadersArrived():
            return Part.HEADERS
        case BodyArrived():
            return Part.BODY
        case TrailersArrived():
            return Part.TRAILERS
        case ResponseArrived(part=part):
            return part
        case _:
            return None


class Proxy:
    """One stream as the proxy sees it."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._pending: Counter[Part] = Counter()
        self._sent: Counter[Part] = Counter()  # bytes of bodies
        self._back: Counter[Part] = Counter()
        self._ended: set[Part] = set()
        self._asked = False
        self.closed = False

    def sends(self, event: Event) -> None:
        """This message goes to extproc."""
        if (part := _part(event)) is None:
            return
        self._pending[part] += 1
        if isinstance(event, BodyArrived | ResponseArrived):
            self._sent[part] += len(event.data)

    def takes(self, command: Command) -> None:
        """This is the answer. Raises Illegal."""
        if self.closed:
            raise Illegal(f"{command} after the end")
        match command:
            case Close():
                self.closed = True
            case AskForTime():
                self._needs(not self._asked, command)
                self._asked = True
            case Respond():
                self._needs(self._pending.total() > 0, command)
                self._pending.clear()
            case Continue(part=part) | SetDestination(part=part):
                self._needs(self._pending[part] > 0, command)
                self._pending[part] -= 1
            case EchoBody():
                self._echo(command)

    def _echo(self, echo: EchoBody) -> None:
        part = echo.part
        self._needs(len(echo.data) <= CHUNK_BYTES and part not in self._ended, echo)
        self._needs(part is not Part.BODY or not self._pending[Part.HEADERS], echo)  # headers are answered first
        self._back[part] += len(echo.data)
        if echo.end_of_stream:
            self._ended.add(part)

    def _needs(self, legal: bool, command: Command) -> None:
        if not legal:
            raise Illegal(f"{command} in {self._mode}, waiting for {dict(self._pending)}")
