"""One ext_proc stream as a state machine. All state of a stream lives here; no I/O, no clock, no protobuf.

Events go in by `Exchange.on`, commands come out. A state is a method, a transition an assignment, and `LEGAL` says which event may come when.
`Decide` leaves the machine and `Decided` comes back, so time may pass in between.

What the proxy is configured to send (`Mode`) decides the path:

1. Headers that end the request, paths that are not read, modes that never bring the whole body: decide on the headers and answer in them.
2. BUFFERED: let the headers pass, decide on the one body message, answer in it.
3. FULL_DUPLEX_STREAMED: hold the headers until the body is complete, answer them, give the body back in pieces.
4. STREAMED that does not wait for the header answer: hold the headers as in 3, then wave each body message through.

Then the RPC ends: one that stayed open would hold the response hostage, for Envoy keeps it until the response ends, and a restart of this process
would cut that response. Two things must come before. Where body messages may still be under way each is answered, because Envoy 1.40 sends
the body twice to the replica when an RPC ends over unanswered pieces. And where the proxy streams the response through us as well
(an end then loses the response) all of it is given back, and read as it passes: its end is the end of the flight, which nobody else will tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from enum import Enum

from extproc.core.record import record
from extproc.core.types import Usage
from extproc.openai import errors
from extproc.openai.errors import HttpError
from extproc.openai.usage import UsageReader, UsageStripper

CHUNK_BYTES = 62_000
"""Largest piece of a body given back: proxies read gRPC messages with a 64 KiB limit, and the envelope needs some of it."""

SMALL_BYTES = 4096
"""Pieces below are put together as they come: as objects, each would take some fifty bytes more than it brings, and clients make them small."""


Data = bytes | memoryview
"""A large body stays where it is in its message; whoever needs bytes copies them, and knows that."""


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


class Content(Enum):
    """What the body of a response is, as far as it is read."""

    STREAM = "stream"
    """Server-sent events."""
    JSON = "json"
    OTHER = "other"
    """Compressed bodies too."""


@record
class Head:
    """What is read of the request's headers."""

    method: str = ""
    path: str = ""
    content_length: int | None = None
    """Bytes; None where the client sends chunks."""
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    """Only those asked for, by lower-case name. API keys are among them, so they are never shown."""
    subset: frozenset[str] | None = None
    """Endpoints that the proxy allows; None is no restriction, empty is none allowed."""
    claims: Mapping[str, object] | None = field(default=None, repr=False)
    """Payloads of verified tokens by the name under which the proxy keeps them; None where it sent none."""
    usage_is_read: bool = True
    """Whether anybody reads the token counts of the response: our own filter in the proxy, or this stream."""
    mirrors: bool = False
    """Whether the proxy has the routes of our bootstrap, by which it can send a copy of the request to a second replica."""


@record
class Steer:
    """Send the request to the first of these that answers."""

    flight: str
    destination: str
    """`ip:port[,ip:port...]`, best first; empty where `pool` is a provider."""
    body: bytes | None = None
    """The body to send instead; None leaves it as it is."""
    strip_usage: bool = False
    """The usage chunk was asked for by us: the proxy takes it out of the response again, or this stream where that goes through us."""
    pool: str | None = None
    """Which cluster, where there are several."""
    patience_s: float | None = None
    """How long a replica may take to begin its response before the proxy asks the next; None for as long as it likes."""
    ratelimit: tuple[tuple[str, str], ...] = ()
    """Headers that the proxy is to add to the response."""
    rank: int | None = None
    """Which of the engines behind the destination; None where there is one."""
    prefiller: str | None = None
    """`ip:port` of the replica that computes the prompt for the destination; empty where that does it itself, so that nobody else may
    name one, and None in pools where none could be named."""
    mirror: str | None = None
    """`ip:port` of the replica that computes the prompt, where the proxy itself is to send it the same request."""
    retries: int | None = None
    """How often the proxy may try another, if not as often as it does."""


@record
class Refuse:
    """Answer the client at once."""

    error: HttpError


@record
class Reply:
    """Answer the client with what it asks for, which is known here."""

    response: HttpError


@record
class Pass:
    """Let the request go unrouted: the choice failed, which is no reason for the request to fail."""


Answer = Steer | Refuse | Reply | Pass

PASS = Pass()


# --- events -----------------------------------------------------------------------------------------------------------


@record
class HeadersArrived:
    """The request began."""

    head: Head
    end_of_stream: bool = False
    mode: Mode = Mode.UNTOLD
    duplex_response: bool = False
    """The proxy streams the response through us, and has it only from us."""


@record
class BodyArrived:
    """A piece of its body, or all of it."""

    data: Data
    end_of_stream: bool = False


@record
class TrailersArrived:
    """The request's trailers: its body is complete."""


@record
class ResponseArrived:
    """A part of the response."""

    part: Part
    data: bytes = b""
    end_of_stream: bool = False
    duplex: bool = False
    """This message, the first of its stream, says what `duplex_response` says."""
    status: int | None = None
    """Of the headers."""
    served: str | None = None
    """`ip:port` that answers, with the headers, where the proxy tells."""
    content: Content = Content.OTHER
    """Of the headers: as what the body can be read."""


@record
class Decided:
    """The answer to `Decide`."""

    answer: Answer


@record
class Delivered:
    """The answer that names the flight goes to the proxy: from now on the access log tells how the flight ends.

    Said before the answer is written. Proxies end the RPC as soon as they have what they need, often before our write returns, so
    a write that is cut off has mostly arrived; taking it for lost would close flights that are in the air.
    """


@record
class Ended:
    """The proxy ended the RPC, by EOF or by cancelling it, or it broke."""


@record
class Delayed:
    """The decision takes longer than the proxy waits by itself."""

    up_to_s: float


Event = HeadersArrived | BodyArrived | TrailersArrived | ResponseArrived | Delayed | Decided | Delivered | Ended

DELIVERED = Delivered()
ENDED = Ended()


# --- commands ---------------------------------------------------------------------------------------------------------


@record
class Continue:
    """Let this part pass unchanged."""

    part: Part
    unpicked: bool = False
    """But for a destination that the client wrote: nobody chose one, and a gateway may send wherever that header says."""


@record
class Decide:
    """Choose, and come back with `Decided`. Always the last command of its turn."""

    head: Head
    body: Data | None
    """The complete body, or None where it is not read."""
    rewritable: bool = False
    """Whether the answer may still replace the body."""


@record
class SetDestination:
    """Answer this part, with the pick as metadata."""

    part: Part
    steer: Steer
    in_header: bool = False
    """Also as a request header, which the endpoint picker protocol wants to be equal."""


@record
class EchoBody:
    """Give back a piece of a body, which the proxy no longer has."""

    data: Data
    end_of_stream: bool
    part: Part = Part.BODY


@record
class AskForTime:
    """Have the proxy wait so long for the answer. Once a stream at most: Envoy 1.40 ignores a second one, and then gives up."""

    up_to_s: float


@record
class Respond:
    """Answer the client in place of a replica."""

    error: HttpError


@record
class Abandon:
    """The flight was opened, and the proxy will never know of it. As a command: it has no way to the provider that was chosen."""

    flight: str


@record
class Report:
    """Tell how the response of a flight goes on, which nobody else will."""

    flight: str
    status: int | None
    served: str | None
    response_bytes: int
    """Of the body, so far."""
    over: bool
    """The last word on this flight."""
    cut: bool = False
    """The proxy ended the RPC before the response ended."""
    usage: Usage | None = None
    """With the last word: what the response says of itself."""
    broken: bool = False
    """With the last word: it said under status 200 that it failed."""


@record
class Close:
    """End the RPC with OK."""


Command = Continue | Decide | AskForTime | SetDestination | EchoBody | Respond | Abandon | Report | Close
Commands = Sequence[Command]

CLOSE = Close()


# --- the machine ------------------------------------------------------------------------------------------------------


class IllegalEvent(Exception):  # noqa: N818 - it names what came, like the events do
    """The proxy sent what it cannot send now."""

    def __init__(self, state: str, event: Event) -> None:
        super().__init__(f"{type(event).__name__} while {state}")


@record
class Rules:
    """What is the same for all streams."""

    max_body_bytes: int
    reads: Callable[[Head], bool]
    """Whether the body of this request matters."""
    too_large: HttpError
    """The answer to a body above `max_body_bytes`."""
    refused: Callable[[Head], HttpError | None] = lambda _head: None
    """The answer to whoever may not ask at all: then nothing of the body is waited for."""
    passes: bool = True
    """Whether a request may go on that was not decided."""


LEGAL: Mapping[str, frozenset[type[Event]]] = {
    "starting": frozenset({HeadersArrived, BodyArrived, TrailersArrived, ResponseArrived, Ended}),
    "buffering": frozenset({BodyArrived, TrailersArrived, ResponseArrived, Ended}),
    "holding": frozenset({BodyArrived, TrailersArrived, ResponseArrived, Ended}),
    "deciding": frozenset(
        {Delayed, Decided, Ended}
    ),  # nothing is read meanwhile: gRPC's flow control holds what streams on
    "orphaned": frozenset({Delayed, Decided}),
    "passing": frozenset({Delivered, BodyArrived, TrailersArrived, ResponseArrived, Ended}),
    "responding": frozenset({Delivered, BodyArrived, TrailersArrived, ResponseArrived, Ended}),
    "over": frozenset({Delivered, HeadersArrived, BodyArrived, TrailersArrived, ResponseArrived, Ended}),
}
"""Which event may come in which state."""

WHOLE_BODY = frozenset({Mode.BUFFERED, Mode.UNTOLD, Mode.FULL_DUPLEX, Mode.STREAMED_EARLY})
"""Modes under which all of the body is here before the request must move on."""
LEADING_OUT = frozenset({Mode.BUFFERED, Mode.UNTOLD})
"""Modes of our own bootstrap, which has a way to providers. A gateway that routes by itself would send the request, as it was changed for a
provider, to any replica, or where the client says."""
NO_WAY_OUT = errors.no_way_out()
PIECEMEAL = frozenset({Mode.STREAMED, Mode.STREAMED_EARLY, Mode.BUFFERED_PARTIAL, Mode.FULL_DUPLEX})
"""Modes under which body messages come after, or beside, an early header answer."""


class Exchange:
    """One stream, from its headers to its close."""

    __slots__ = (
        "_asked",
        "_chunks",
        "_duplex_response",
        "_flight",
        "_followed",
        "_head",
        "_mode",
        "_pieces",
        "_reader",
        "_received",
        "_responded",
        "_rules",
        "_served",
        "_size",
        "_state",
        "_status",
        "_stripper",
        "_strips",
        "_then",
        "_trailers",
    )

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        # Plain functions and not bound methods: these would refer back to this object, and every stream, its body included,
        # would stay until the cyclic collector comes.
        self._state: Callable[[Exchange, Event], Commands] = Exchange.starting
        self._then: Callable[[Exchange, Steer | None], Commands] = Exchange._end_with_headers
        self._head = Head()
        self._mode = Mode.UNTOLD
        self._duplex_response = False
        self._chunks: list[Data | bytearray] = []
        self._pieces = 0  # messages that brought them
        self._size = 0
        self._trailers = False
        self._asked = False  # for time
        self._responded = False  # the end of the response body was given back
        self._flight: str | None = None  # opened, and not yet delivered
        self._followed: str | None = None  # delivered, and its response goes through us
        self._status: int | None = None
        self._served: str | None = None
        self._received = 0  # bytes of the response body
        self._strips = False  # the usage event was asked for by us
        self._reader: UsageReader | None = None
        self._stripper: UsageStripper | None = None

    def __repr__(self) -> str:
        return f"<Exchange {self._state.__name__} {self._mode.value} {self._size} B, undelivered {self._flight}>"

    @property
    def body_bytes(self) -> int:
        """Of the request's body, as far as it is kept here."""
        return self._size if self._chunks else 0

    @property
    def follows(self) -> bool:
        """Whether the end of the flight will be reported by this stream."""
        return self._followed is not None

    @property
    def settled(self) -> bool:
        """Whether the proxy knows what becomes of the request, or never asked."""
        return self._state in (Exchange.passing, Exchange.responding, Exchange.over) and self._flight is None

    def on(self, event: Event) -> Commands:
        """What to do now, in this order. Raises IllegalEvent when the event cannot come in this state."""
        if type(event) not in LEGAL[self._state.__name__]:
            raise IllegalEvent(self._state.__name__, event)
        return self._state(self, event)

    # --- states ---

    def starting(self, event: Event) -> Commands:
        """Nothing has come yet."""
        if not isinstance(event, HeadersArrived):
            if not self._rules.passes and isinstance(event, BodyArrived | TrailersArrived):
                raise IllegalEvent("starting", event)
            self._state = Exchange.passing  # a proxy that sends no headers: Envoy would ignore a pick in later parts
            return self.passing(event)
        self._head, self._mode, self._duplex_response = event.head, event.mode, event.duplex_response
        if event.end_of_stream or event.mode not in WHOLE_BODY or not self._rules.reads(event.head):
            more = event.mode in PIECEMEAL and not event.end_of_stream
            return self._decide(None, then=Exchange._pass_on if more else Exchange._end_with_headers)
        if (error := self._rules.refused(event.head)) is not None:
            return self._refuse(error)
        if (event.head.content_length or 0) > self._rules.max_body_bytes:
            return self._refuse(self._rules.too_large)
        if event.mode in PIECEMEAL:
            self._state = Exchange.holding
            return ()
        self._state = Exchange.buffering
        return (Continue(Part.HEADERS),)

    def buffering(self, event: Event) -> Commands:
        """The headers have passed; the body comes as one message."""
        if isinstance(event, BodyArrived):
            if not self._keep(event.data):
                return self._refuse(self._rules.too_large)
            # Trailers may follow a complete body, so its end of stream is not always set. A proxy that does not tell its
            # mode may be streaming, though, and half a prompt would be refused as broken JSON: route it unread.
            known = self._mode is Mode.BUFFERED or event.end_of_stream
            return self._decide(event.data if known else None, then=Exchange._end_with_body, rewritable=known)
        if isinstance(event, TrailersArrived):
            return self._decide(b"", then=Exchange._end_with_trailers)
        return self._aside(event)

    def holding(self, event: Event) -> Commands:
        """Nothing is answered until the body is complete."""
        if isinstance(event, BodyArrived):
            if not self._keep(event.data):
                return self._refuse(self._rules.too_large)
            return self._decide_on_all() if event.end_of_stream else ()
        if isinstance(event, TrailersArrived):
            self._trailers = True
            return self._decide_on_all()
        return self._aside(event)

    def deciding(self, event: Event) -> Commands:
        """The decision is out; the stream stands still."""
        if isinstance(event, Delayed):
            # Envoy 1.40 measures no time while bodies are streamed both ways, and logs a warning for each time that is asked for.
            asked, self._asked = self._asked or self._mode is Mode.FULL_DUPLEX, True
            return () if asked else (AskForTime(event.up_to_s),)
        if not isinstance(event, Decided):
            self._state = Exchange.orphaned
            return ()
        if isinstance(event.answer, Refuse | Reply):
            self._state = Exchange.over
            answer = event.answer
            return (Respond(answer.error if isinstance(answer, Refuse) else answer.response), CLOSE)
        if isinstance(event.answer, Pass):
            return self._then(self, None)
        if not event.answer.destination and self._mode not in LEADING_OUT:
            return (Abandon(event.answer.flight), *self._refuse(NO_WAY_OUT))
        self._flight, self._strips = event.answer.flight, event.answer.strip_usage
        return self._then(self, event.answer)

    def orphaned(self, event: Event) -> Commands:
        """The stream is gone, its decision is still on the way."""
        if not isinstance(event, Decided):
            return ()
        self._state = Exchange.over
        return (Abandon(event.answer.flight),) if isinstance(event.answer, Steer) else ()

    def passing(self, event: Event) -> Commands:
        """The headers are answered; the body is of no interest, but each of its messages waits for an answer."""
        if isinstance(event, BodyArrived):
            # Of a partial body there is just this message; the rest passes without us.
            end = event.end_of_stream or self._mode is Mode.BUFFERED_PARTIAL
            return (*self._give(event.data, event.end_of_stream), *(self._finish() if end else ()))
        if isinstance(event, TrailersArrived):
            return (Continue(Part.TRAILERS), *self._finish())
        return self._aside(event)

    def responding(self, event: Event) -> Commands:
        """The request is done, and a repeated last piece of it is ignored; the response goes through us."""
        return () if isinstance(event, BodyArrived | TrailersArrived) else self._aside(event)

    def over(self, event: Event) -> Commands:
        """All is said. Proxies have been seen to repeat the last piece of a body: nothing is answered twice."""
        return self._aside(event) if isinstance(event, Delivered | Ended) else ()

    # --- moves ---

    def _aside(self, event: Event) -> Commands:
        """What means the same in every state."""
        if isinstance(event, ResponseArrived):
            self._duplex_response = self._duplex_response or event.duplex
            report = self._report(event) if self._followed is not None else ()
            if not self._duplex_response or event.part is Part.RESPONSE_HEADERS:
                return (*report, Continue(event.part))
            return (*report, *self._give_response(event))
        flight, self._flight = self._flight, None
        if isinstance(event, Delivered):
            self._followed = flight if self._duplex_response else None
            return ()
        self._state = Exchange.over
        if self._followed is not None:
            return (self._last_report(cut=True),)
        return () if flight is None else (Abandon(flight),)

    def _report(self, event: ResponseArrived) -> Commands:
        """What this part says of the flight."""
        assert self._followed is not None
        if event.part is Part.RESPONSE_HEADERS:
            self._begin_reading(event)
        elif self._reader is not None:
            self._reader.take(event.data)
        self._received += len(event.data)
        if event.end_of_stream or event.part is Part.RESPONSE_TRAILERS:
            return (self._last_report(cut=False),)
        if not event.data:
            return ()
        return (Report(self._followed, self._status, self._served, self._received, over=False),)

    def _begin_reading(self, headers: ResponseArrived) -> None:
        """Once, unless informational headers come before (1xx)."""
        self._status, self._served = headers.status, headers.served
        is_stream = headers.content is Content.STREAM
        self._reader = None if headers.content is Content.OTHER else UsageReader(is_stream, headers.status == 200)
        self._stripper = UsageStripper() if is_stream and self._strips else None

    def _last_report(self, cut: bool) -> Report:
        assert self._followed is not None
        flight, self._followed = self._followed, None
        usage, broken = (None, False) if self._reader is None else (self._reader.usage, self._reader.broken)
        return Report(
            flight, self._status, self._served, self._received, over=True, cut=cut, usage=usage, broken=broken
        )

    def _give_response(self, event: ResponseArrived) -> Commands:
        """Back as it came, but for a usage event that only we wanted."""
        if event.part is Part.RESPONSE_TRAILERS:
            held = self._stripper.end() if self._stripper is not None else b""
            return (*_echo(held, False, Part.RESPONSE_BODY), Continue(event.part))
        if self._responded:  # a last piece that is repeated (see `over`): two ends of one body would be an error
            return ()
        self._responded, data = event.end_of_stream, event.data
        if self._stripper is not None:
            data = self._stripper.take(data) + (self._stripper.end() if event.end_of_stream else b"")
        return _echo(data, event.end_of_stream, event.part)

    def _keep(self, data: Data) -> bool:
        """Whether the body with this piece is still of a size that we take."""
        self._size += len(data)
        self._pieces += 1
        small = len(data) < SMALL_BYTES
        if small and self._chunks and isinstance(last := self._chunks[-1], bytearray):
            last += data
        else:
            self._chunks.append(bytearray(data) if small else data)
        return self._size <= self._rules.max_body_bytes

    def _refuse(self, error: HttpError) -> Commands:
        self._state = Exchange.over
        self._chunks.clear()
        return (Respond(error), CLOSE)

    def _finish(self) -> Commands:
        """The request is done."""
        self._chunks.clear()
        self._state = Exchange.responding if self._duplex_response else Exchange.over
        return () if self._duplex_response else (CLOSE,)

    def _decide(
        self, body: Data | None, then: Callable[[Exchange, Steer | None], Commands], rewritable: bool = False
    ) -> Commands:
        self._state, self._then = Exchange.deciding, then
        return (Decide(self._head, body, rewritable),)

    def _decide_on_all(self) -> Commands:
        only = self._chunks[0] if len(self._chunks) == 1 else None
        body = b"".join(self._chunks) if only is None or isinstance(only, bytearray) else only
        if self._mode is Mode.FULL_DUPLEX:
            self._chunks = [body]  # the pieces would be a second copy
        return self._decide(body, then=Exchange._give_back, rewritable=self._mode is Mode.FULL_DUPLEX)

    def _give(self, data: Data, end: bool) -> Commands:
        """Answer one body message."""
        return _echo(data, end) if self._mode is Mode.FULL_DUPLEX else (Continue(Part.BODY),)

    # --- what follows the decision: None is an unrouted request ---

    def _steer(self, part: Part, steer: Steer | None) -> Command:
        if steer is None:
            return Continue(part, unpicked=self._mode is Mode.FULL_DUPLEX and part is Part.HEADERS)
        return SetDestination(part, steer, in_header=self._mode is Mode.FULL_DUPLEX and part is Part.HEADERS)

    def _end_with_headers(self, steer: Steer | None) -> Commands:
        return (self._steer(Part.HEADERS, steer), *self._finish())

    def _end_with_body(self, steer: Steer | None) -> Commands:
        return (self._steer(Part.BODY, steer), *self._finish())

    def _end_with_trailers(self, steer: Steer | None) -> Commands:
        return (self._steer(Part.TRAILERS, steer), *self._finish())

    def _pass_on(self, steer: Steer | None) -> Commands:
        self._state = Exchange.passing
        return (self._steer(Part.HEADERS, steer),)

    def _give_back(self, steer: Steer | None) -> Commands:
        """Headers, the whole body, trailers, as far as they came."""
        headers = self._steer(Part.HEADERS, steer)
        if self._mode is Mode.FULL_DUPLEX:
            new = steer.body if steer is not None else None
            body = _echo(self._chunks[0] if new is None else new, end=not self._trailers)
        else:
            body = (Continue(Part.BODY),) * self._pieces
        trailers = (Continue(Part.TRAILERS),) if self._trailers else ()
        return (headers, *body, *trailers, *self._finish())


def _echo(body: Data | bytearray, end: bool, part: Part = Part.BODY) -> Commands:
    """The body in pieces, with the end of stream on the last; none for an empty body that does not end the stream."""
    if not len(body):
        return (EchoBody(b"", True, part),) if end else ()
    last = (len(body) - 1) // CHUNK_BYTES * CHUNK_BYTES
    view = memoryview(body)  # slices of it copy nothing
    return [EchoBody(view[at : at + CHUNK_BYTES], end and at == last, part) for at in range(0, last + 1, CHUNK_BYTES)]
