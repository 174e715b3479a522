"""One ext_proc stream as a state machine. All state of a stream lives here; no I/O, no clock, no protobuf.

Events go in by `Exchange.on`, commands come out. A state is a method, a transition an assignment, and `LEGAL` says which event may come when.
`Decide` leaves the machine and `Decided` comes back, so time may pass in between.

What Envoy is configured to send (`Mode`) decides the path:

1. Headers that end the request, paths that are not read, and modes that never bring the whole body: decide on the headers, answer in them, close.
2. BUFFERED: let the headers pass, decide on the one body message, answer in it, close. An RPC that stayed open would hold the request hostage:
   Envoy keeps it until the response ends, and a restart of this process would cut that response.
3. FULL_DUPLEX_STREAMED: hold the headers until the body is complete, answer them, give the body back in pieces, close.
4. STREAMED that does not wait for the header answer: hold the headers as in 3, then wave each body message through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from extproc.openai.errors import HttpError

CHUNK_BYTES = 62_000
"""Largest piece of a body given back: proxies read gRPC messages with a 64 KiB limit, and the envelope needs some of it."""


class Mode(Enum):
    """How the proxy sends request bodies."""

    UNTOLD = "untold"  # proxies older than protocol_config: the order of messages is that of BUFFERED
    NONE = "none"
    STREAMED = "streamed"
    STREAMED_EARLY = "streamed_early"  # STREAMED, without waiting for the header answer
    BUFFERED = "buffered"
    BUFFERED_PARTIAL = "buffered_partial"
    FULL_DUPLEX = "full_duplex"
    GRPC = "grpc"


class Part(Enum):
    """What a message of the proxy is about, and so which answer it waits for."""

    HEADERS = "request_headers"
    BODY = "request_body"
    TRAILERS = "request_trailers"
    RESPONSE_HEADERS = "response_headers"
    RESPONSE_BODY = "response_body"
    RESPONSE_TRAILERS = "response_trailers"

    __hash__ = object.__hash__  # Enum hashes the name in Python code; members are singletons


@dataclass(frozen=True, slots=True)
class Head:
    """What is read of the request's headers."""

    method: str = ""
    path: str = ""
    content_length: int | None = None
    """Bytes; None where the client sends chunks."""
    headers: Mapping[str, str] | None = None
    """Only those asked for, by lower-case name."""
    subset: frozenset[str] | None = None
    """Endpoints that the proxy allows; None is no restriction, empty is none allowed."""


@dataclass(frozen=True, slots=True)
class Steer:
    """Send the request to the first of these that answers."""

    flight: str
    destination: str
    """`ip:port[,ip:port...]`, best first."""
    body: bytes | None = None
    """The body to send instead; None leaves it as it is."""
    strip_usage: bool = False
    """The usage chunk was asked for by us: the proxy takes it out of the response again."""
    pool: str | None = None
    """Which cluster, where there are several."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the client at once."""

    error: HttpError


Answer = Steer | Refuse


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeadersArrived:
    head: Head
    end_of_stream: bool = False
    mode: Mode = Mode.UNTOLD


@dataclass(frozen=True, slots=True)
class BodyArrived:
    data: bytes
    end_of_stream: bool = False


@dataclass(frozen=True, slots=True)
class TrailersArrived:
    """The request's trailers: its body is complete."""


@dataclass(frozen=True, slots=True)
class ResponseArrived:
    """A part of the response, which we never asked for."""

    part: Part


@dataclass(frozen=True, slots=True)
class Decided:
    answer: Answer


@dataclass(frozen=True, slots=True)
class Delivered:
    """The answer that names the flight is on its way: from now on the access log tells how the flight ends."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The proxy ended the RPC, by EOF or by cancelling it, or it broke."""


Event = HeadersArrived | BodyArrived | TrailersArrived | ResponseArrived | Decided | Delivered | Ended

DELIVERED = Delivered()
ENDED = Ended()


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Continue:
    """Let this part pass unchanged."""

    part: Part


@dataclass(frozen=True, slots=True)
class Decide:
    """Choose, and come back with `Decided`. Always the last command of its turn."""

    head: Head
    body: bytes | None
    """The complete body, or None where it is not read."""
    rewritable: bool = False
    """Whether the answer may still replace the body."""


@dataclass(frozen=True, slots=True)
class SetDestination:
    """Answer this part, with the pick as metadata."""

    part: Part
    steer: Steer
    in_header: bool = False
    """Also as a request header, which the endpoint picker protocol wants to be equal."""


@dataclass(frozen=True, slots=True)
class EchoBody:
    """Give back a piece of the body, which the proxy no longer has."""

    data: bytes
    end_of_stream: bool


@dataclass(frozen=True, slots=True)
class Respond:
    """Answer the client in place of a replica."""

    error: HttpError


@dataclass(frozen=True, slots=True)
class Abandon:
    """The flight was opened, and the proxy will never know of it."""

    flight: str


@dataclass(frozen=True, slots=True)
class Close:
    """End the RPC with OK."""


Command = Continue | Decide | SetDestination | EchoBody | Respond | Abandon | Close
Commands = Sequence[Command]

CLOSE = Close()


# --- the machine ------------------------------------------------------------------------------------------------------


class IllegalEvent(Exception):  # noqa: N818 - it names what came, like the events do
    """The proxy sent what it cannot send now."""

    def __init__(self, state: str, event: Event) -> None:
        super().__init__(f"{type(event).__name__} while {state}")


@dataclass(frozen=True, slots=True)
class Rules:
    """What is the same for all streams."""

    max_body_bytes: int
    reads: Callable[[Head], bool]
    """Whether the body of this request matters."""
    too_large: HttpError
    """The answer to a body above `max_body_bytes`."""


LEGAL: Mapping[str, frozenset[type[Event]]] = {
    "starting": frozenset({HeadersArrived, ResponseArrived, Ended}),
    "buffering": frozenset({BodyArrived, TrailersArrived, ResponseArrived, Ended}),
    "holding": frozenset({BodyArrived, TrailersArrived, ResponseArrived, Ended}),
    "deciding": frozenset({Decided, Ended}),  # nothing is read meanwhile: gRPC's flow control holds what streams on
    "orphaned": frozenset({Decided}),
    "echoing": frozenset({Delivered, BodyArrived, TrailersArrived, ResponseArrived, Ended}),
    "over": frozenset({Delivered, HeadersArrived, BodyArrived, TrailersArrived, ResponseArrived, Ended}),
}
"""Which event may come in which state."""

WHOLE_BODY = frozenset({Mode.BUFFERED, Mode.UNTOLD, Mode.FULL_DUPLEX, Mode.STREAMED_EARLY})
"""Modes under which all of the body is here before the request must move on."""


class Exchange:
    """One stream, from its headers to its close."""

    __slots__ = ("_chunks", "_flight", "_head", "_mode", "_rules", "_size", "_state", "_then", "_trailers")

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._state: Callable[[Event], Commands] = self.starting
        self._then: Callable[[Steer], Commands] = self._close_with_headers
        self._head = Head()
        self._mode = Mode.UNTOLD
        self._chunks: list[bytes] = []  # one for each body message
        self._size = 0
        self._trailers = False
        self._flight: str | None = None  # opened, and not yet delivered

    def __repr__(self) -> str:
        return f"<Exchange {self._state.__name__} {self._mode.value} {self._size} B, undelivered {self._flight}>"

    def on(self, event: Event) -> Commands:
        """What to do now, in this order. Raises IllegalEvent when the event cannot come in this state."""
        if type(event) not in LEGAL[self._state.__name__]:
            raise IllegalEvent(self._state.__name__, event)
        return self._state(event)

    # --- states ---

    def starting(self, event: Event) -> Commands:
        """Nothing has come yet."""
        if not isinstance(event, HeadersArrived):
            return self._aside(event)
        self._head, self._mode = event.head, event.mode
        if event.end_of_stream or event.mode not in WHOLE_BODY or not self._rules.reads(event.head):
            echoes = event.mode is Mode.FULL_DUPLEX and not event.end_of_stream
            return self._decide(None, then=self._echo_on if echoes else self._close_with_headers)
        if (event.head.content_length or 0) > self._rules.max_body_bytes:
            return self._refuse_size()
        if event.mode in (Mode.FULL_DUPLEX, Mode.STREAMED_EARLY):
            self._state = self.holding
            return ()
        self._state = self.buffering
        return (Continue(Part.HEADERS),)

    def buffering(self, event: Event) -> Commands:
        """The headers have passed; the body comes as one message."""
        if isinstance(event, BodyArrived):
            if not self._keep(event.data):
                return self._refuse_size()
            # Trailers may follow a complete body, so its end of stream is not always set. A proxy that does not tell its
            # mode may be streaming, though, and half a prompt would be refused as broken JSON: route it unread.
            known = self._mode is Mode.BUFFERED or event.end_of_stream
            return self._decide(event.data if known else None, then=self._close_with_body, rewritable=known)
        if isinstance(event, TrailersArrived):
            return self._decide(b"", then=self._close_with_trailers)
        return self._aside(event)

    def holding(self, event: Event) -> Commands:
        """Nothing is answered until the body is complete."""
        if isinstance(event, BodyArrived):
            if not self._keep(event.data):
                return self._refuse_size()
            return self._decide_on_all() if event.end_of_stream else ()
        if isinstance(event, TrailersArrived):
            self._trailers = True
            return self._decide_on_all()
        return self._aside(event)

    def deciding(self, event: Event) -> Commands:
        """The decision is out; the stream stands still."""
        if not isinstance(event, Decided):
            self._state = self.orphaned
            return ()
        self._state = self.over
        if isinstance(event.answer, Refuse):
            return (Respond(event.answer.error), CLOSE)
        self._flight = event.answer.flight
        return self._then(event.answer)

    def orphaned(self, event: Event) -> Commands:
        """The stream is gone, its decision is still on the way."""
        assert isinstance(event, Decided)
        self._state = self.over
        return (Abandon(event.answer.flight),) if isinstance(event.answer, Steer) else ()

    def echoing(self, event: Event) -> Commands:
        """The request moves on; its body, of no interest, is given back as it comes."""
        if isinstance(event, BodyArrived):
            return (*_echo(event.data, event.end_of_stream), *self._over_if(event.end_of_stream))
        if isinstance(event, TrailersArrived):
            return (Continue(Part.TRAILERS), *self._over_if(True))
        return self._aside(event)

    def over(self, event: Event) -> Commands:
        """All is said. Proxies have been seen to repeat the last piece of a body: nothing is answered twice."""
        return self._aside(event) if isinstance(event, Delivered | Ended) else ()

    # --- moves ---

    def _aside(self, event: Event) -> Commands:
        """What means the same in every state."""
        if isinstance(event, ResponseArrived):
            return (Continue(event.part),)
        flight, self._flight = self._flight, None
        if isinstance(event, Delivered):
            return ()
        self._state = self.over
        return () if flight is None else (Abandon(flight),)

    def _keep(self, data: bytes) -> bool:
        """Whether the body with this piece is still of a size that we take."""
        self._size += len(data)
        self._chunks.append(data)
        return self._size <= self._rules.max_body_bytes

    def _refuse_size(self) -> Commands:
        self._state = self.over
        self._chunks.clear()
        return (Respond(self._rules.too_large), CLOSE)

    def _over_if(self, end: bool) -> Commands:
        if not end:
            return ()
        self._state = self.over
        return (CLOSE,)

    def _decide(self, body: bytes | None, then: Callable[[Steer], Commands], rewritable: bool = False) -> Commands:
        self._state, self._then = self.deciding, then
        return (Decide(self._head, body, rewritable),)

    def _decide_on_all(self) -> Commands:
        duplex = self._mode is Mode.FULL_DUPLEX
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        return self._decide(body, then=self._give_back if duplex else self._wave_through, rewritable=duplex)

    # --- what follows the decision ---

    def _close_with_headers(self, steer: Steer) -> Commands:
        return (SetDestination(Part.HEADERS, steer, in_header=self._mode is Mode.FULL_DUPLEX), CLOSE)

    def _close_with_body(self, steer: Steer) -> Commands:
        return (SetDestination(Part.BODY, steer), CLOSE)

    def _close_with_trailers(self, steer: Steer) -> Commands:
        return (SetDestination(Part.TRAILERS, steer), CLOSE)

    def _echo_on(self, steer: Steer) -> Commands:
        self._state = self.echoing
        return (SetDestination(Part.HEADERS, steer, in_header=True),)

    def _give_back(self, steer: Steer) -> Commands:
        body = steer.body if steer.body is not None else b"".join(self._chunks)
        trailers = (Continue(Part.TRAILERS),) if self._trailers else ()
        echo = _echo(body, end=not self._trailers)
        return (SetDestination(Part.HEADERS, steer, in_header=True), *echo, *trailers, CLOSE)

    def _wave_through(self, steer: Steer) -> Commands:
        bodies = (Continue(Part.BODY),) * len(self._chunks)
        trailers = (Continue(Part.TRAILERS),) if self._trailers else ()
        return (SetDestination(Part.HEADERS, steer), *bodies, *trailers, CLOSE)


def _echo(body: bytes, end: bool) -> Commands:
    """The body in pieces, with the end of stream on the last; none for an empty body that does not end the stream."""
    if not body:
        return (EchoBody(b"", True),) if end else ()
    last = (len(body) - 1) // CHUNK_BYTES * CHUNK_BYTES
    return [EchoBody(body[at : at + CHUNK_BYTES], end and at == last) for at in range(0, last + 1, CHUNK_BYTES)]
