"""Conversations of one ext_proc stream, as data: `>>` is what the proxy says, `<<` what must be done about it.

`SCRIPTS` is used by the tests, and by benchmarks that want realistic streams without a proxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from extproc.core.types import Usage
from extproc.envoy.exchange import (
    CHUNK_BYTES,
    CLOSE,
    DELIVERED,
    ENDED,
    NO_WAY_OUT,
    PASS,
    Abandon,
    AskForTime,
    BodyArrived,
    Command,
    Content,
    Continue,
    Decide,
    Decided,
    Delayed,
    EchoBody,
    Event,
    Exchange,
    Head,
    HeadersArrived,
    Mode,
    Part,
    Refuse,
    Reply,
    Report,
    Respond,
    ResponseArrived,
    Rules,
    SetDestination,
    Steer,
    TrailersArrived,
)
from extproc.openai.errors import HttpError

TOO_LARGE = HttpError(413, b"too large", (("content-type", "application/json"),))
LISTED = HttpError(200, b'{"object":"list"}', (("content-type", "application/json"),))
BUSY = HttpError(503, b"nobody there", (("content-type", "application/json"), ("retry-after", "1")))
LIMIT = 1_000_000
RULES = Rules(LIMIT, lambda head: head.path.startswith("/v1/chat"), TOO_LARGE)

CHAT = Head("POST", "/v1/chat/completions", headers={"x-session-id": "s1"})
SIZED = Head("POST", "/v1/chat/completions", content_length=9)
HUGE = Head("POST", "/v1/chat/completions", content_length=LIMIT + 1)
TOKENIZE = Head("POST", "/tokenize", content_length=LIMIT + 1)
MODELS = Head("GET", "/v1/models")

STEER = Steer("f1", "10.0.0.1:8000,10.0.0.2:8000")
REWRITTEN = Steer("f2", "10.0.0.1:8000", body=b"{...}", strip_usage=True)
OUTSIDE = Steer("f3", "", body=b"{...}", pool="cloud")
ASKED = Steer("f4", "10.0.0.1:8000", body=b"{...}", strip_usage=True)
LONG = b"x" * (CHUNK_BYTES + 1)
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1}}\n\n'
DONE = b"data: [DONE]\n\n"
JSON = b'{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1}}'


@dataclass(frozen=True, slots=True)
class Script:
    """Events and the commands expected between them, in order."""

    steps: tuple[Event | Command, ...] = ()

    def __rshift__(self, event: Event) -> Script:
        return Script((*self.steps, event))

    def __lshift__(self, command: Command) -> Script:
        return Script((*self.steps, command))

    @property
    def turns(self) -> list[tuple[Event, list[Command]]]:
        """Each event with the commands that answer it."""
        turns: list[tuple[Event, list[Command]]] = []
        for step in self.steps:
            if isinstance(step, Event):
                turns.append((step, []))
            else:
                turns[-1][1].append(step)
        return turns


def play(script: Script, exchange: Exchange) -> list[tuple[Event, list[Command]]]:
    """What really happens, turn by turn; equal to `script.turns` when all is well."""
    return [(event, list(exchange.on(event))) for event, _ in script.turns]


SCRIPTS: Mapping[str, Script] = {
    "buffered: pick in the body answer, then the RPC ends": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.BODY, STEER)
        << CLOSE
        >> DELIVERED
        >> ENDED
    ),
    "buffered with trailers: the one body message is complete without its end of stream": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}")
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(REWRITTEN)
        << SetDestination(Part.BODY, REWRITTEN)
        << CLOSE
        >> DELIVERED
        >> TrailersArrived()
        >> ENDED
    ),
    "buffered, trailers without a body": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> TrailersArrived()
        << Decide(CHAT, b"")
        >> Decided(STEER)
        << SetDestination(Part.TRAILERS, STEER)
        << CLOSE
    ),
    "mode not told: the order of messages is that of buffered": (
        Script()
        >> HeadersArrived(CHAT)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.BODY, STEER)
        << CLOSE
    ),
    "mode not told, and the body is not complete: routed unread": (
        Script()
        >> HeadersArrived(CHAT)
        << Continue(Part.HEADERS)
        >> BodyArrived(b'{"mess')
        << Decide(CHAT, None)
        >> Decided(STEER)
        << SetDestination(Part.BODY, STEER)
        << CLOSE
    ),
    "a decision that takes long: the proxy is asked for time, once": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Delayed(35.0)
        << AskForTime(35.0)
        >> Delayed(35.0)
        >> Decided(STEER)
        << SetDestination(Part.BODY, STEER)
        << CLOSE
    ),
    "a decision that takes long, full duplex: no time is measured": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Delayed(35.0)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << EchoBody(b"{}", end_of_stream=True)
        << CLOSE
    ),
    "the client leaves while its decision waits: nobody is asked for time then": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> ENDED
        >> Delayed(35.0)
        >> Decided(STEER)
        << Abandon("f1")
    ),
    "no body: pick in the header answer": (
        Script()
        >> HeadersArrived(MODELS, end_of_stream=True, mode=Mode.BUFFERED)
        << Decide(MODELS, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER)
        << CLOSE
        >> DELIVERED
        >> ENDED
    ),
    "what is known here is answered here: no flight, nothing to deliver": (
        Script()
        >> HeadersArrived(MODELS, end_of_stream=True, mode=Mode.BUFFERED)
        << Decide(MODELS, None)
        >> Decided(Reply(LISTED))
        << Respond(LISTED)
        << CLOSE
        >> ENDED
    ),
    "a provider: a pool without endpoints": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(OUTSIDE)
        << SetDestination(Part.BODY, OUTSIDE)
        << CLOSE
        >> DELIVERED
        >> ENDED
    ),
    "a provider behind a gateway that routes by itself: there is no way to it": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(OUTSIDE)
        << Abandon(OUTSIDE.flight)
        << Respond(NO_WAY_OUT)
        << CLOSE
        >> ENDED
    ),
    "a path that is not read, whatever its size: pick in the header answer, the body is not waited for": (
        Script()
        >> HeadersArrived(TOKENIZE, mode=Mode.BUFFERED)
        << Decide(TOKENIZE, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER)
        << CLOSE
    ),
    "refused: the client is answered": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(Refuse(BUSY))
        << Respond(BUSY)
        << CLOSE
        >> ENDED
    ),
    "too large by its content-length: refused before any of it came": (
        Script() >> HeadersArrived(HUGE, mode=Mode.BUFFERED) << Respond(TOO_LARGE) << CLOSE >> ENDED
    ),
    "too large in one message": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"x" * (LIMIT + 1), end_of_stream=True)
        << Respond(TOO_LARGE)
        << CLOSE
    ),
    "of exactly the limit: taken": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"x" * LIMIT, end_of_stream=True)
        << Decide(CHAT, b"x" * LIMIT, rewritable=True)
    ),
    "too large in many messages": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(b"x" * LIMIT)
        >> BodyArrived(b"x")
        << Respond(TOO_LARGE)
        << CLOSE
        >> BodyArrived(b"x", end_of_stream=True)
    ),
    "full duplex: headers held to the end of the body, which is then given back": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(b"{")
        >> BodyArrived(b"}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << EchoBody(b"{}", end_of_stream=True)
        << CLOSE
        >> DELIVERED
        >> BodyArrived(b"}", end_of_stream=True)
        >> ENDED
    ),
    "full duplex, end of stream in an empty message, a body of two pieces": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(LONG)
        >> BodyArrived(b"", end_of_stream=True)
        << Decide(CHAT, LONG, rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << EchoBody(LONG[:CHUNK_BYTES], end_of_stream=False)
        << EchoBody(LONG[CHUNK_BYTES:], end_of_stream=True)
        << CLOSE
    ),
    "full duplex, an empty body": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(b"", end_of_stream=True)
        << Decide(CHAT, b"", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << EchoBody(b"", end_of_stream=True)
        << CLOSE
    ),
    "full duplex with trailers: they end the stream, not the body": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(b"{}")
        >> TrailersArrived()
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << EchoBody(b"{}", end_of_stream=False)
        << Continue(Part.TRAILERS)
        << CLOSE
    ),
    "full duplex, trailers alone": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> TrailersArrived()
        << Decide(CHAT, b"", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << Continue(Part.TRAILERS)
        << CLOSE
    ),
    "full duplex, rewritten: the new body is given back": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(REWRITTEN)
        << SetDestination(Part.HEADERS, REWRITTEN, in_header=True)
        << EchoBody(b"{...}", end_of_stream=True)
        << CLOSE
    ),
    "full duplex, refused": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(Refuse(BUSY))
        << Respond(BUSY)
        << CLOSE
        >> BodyArrived(b"", end_of_stream=True)
    ),
    "full duplex without a body": (
        Script()
        >> HeadersArrived(MODELS, end_of_stream=True, mode=Mode.FULL_DUPLEX)
        << Decide(MODELS, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << CLOSE
    ),
    "full duplex, a path that is not read: the body is given back as it comes": (
        Script()
        >> HeadersArrived(TOKENIZE, mode=Mode.FULL_DUPLEX)
        << Decide(TOKENIZE, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        >> DELIVERED
        >> BodyArrived(b"ab")
        << EchoBody(b"ab", end_of_stream=False)
        >> BodyArrived(b"", end_of_stream=False)
        >> BodyArrived(b"c", end_of_stream=True)
        << EchoBody(b"c", end_of_stream=True)
        << CLOSE
    ),
    "full duplex, a path that is not read, with trailers": (
        Script()
        >> HeadersArrived(TOKENIZE, mode=Mode.FULL_DUPLEX)
        << Decide(TOKENIZE, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        >> DELIVERED
        >> BodyArrived(b"ab")
        << EchoBody(b"ab", end_of_stream=False)
        >> TrailersArrived()
        << Continue(Part.TRAILERS)
        << CLOSE
    ),
    "streamed early: headers held, then each message waved through": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.STREAMED_EARLY)
        >> BodyArrived(b"{")
        >> BodyArrived(b"}")
        >> BodyArrived(b"", end_of_stream=True)
        << Decide(CHAT, b"{}")
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER)
        << Continue(Part.BODY)
        << Continue(Part.BODY)
        << Continue(Part.BODY)
        << CLOSE
    ),
    "streamed early, with trailers": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.STREAMED_EARLY)
        >> BodyArrived(b"{}")
        >> TrailersArrived()
        << Decide(CHAT, b"{}")
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER)
        << Continue(Part.BODY)
        << Continue(Part.TRAILERS)
        << CLOSE
    ),
    "streamed early, a path that is not read": (
        Script()
        >> HeadersArrived(TOKENIZE, mode=Mode.STREAMED_EARLY)
        << Decide(TOKENIZE, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER)
        >> DELIVERED
        >> BodyArrived(b"a")
        << Continue(Part.BODY)
        >> BodyArrived(b"b", end_of_stream=True)
        << Continue(Part.BODY)
        << CLOSE
    ),
    "streamed: the body waits for the header answer, so its size is all there is": (
        Script()
        >> HeadersArrived(SIZED, mode=Mode.STREAMED)
        << Decide(SIZED, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER)
        >> DELIVERED
        >> BodyArrived(b"{")
        << Continue(Part.BODY)
        >> BodyArrived(b"}", end_of_stream=True)
        << Continue(Part.BODY)
        << CLOSE
    ),
    "streamed, with trailers": (
        Script()
        >> HeadersArrived(SIZED, mode=Mode.STREAMED)
        << Decide(SIZED, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER)
        >> DELIVERED
        >> BodyArrived(b"{}")
        << Continue(Part.BODY)
        >> TrailersArrived()
        << Continue(Part.TRAILERS)
        << CLOSE
    ),
    "buffered partial: part of a body is not read, and comes once": (
        Script()
        >> HeadersArrived(SIZED, mode=Mode.BUFFERED_PARTIAL)
        << Decide(SIZED, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER)
        >> DELIVERED
        >> BodyArrived(b"{")
        << Continue(Part.BODY)
        << CLOSE
    ),
    "no body sent": (
        Script()
        >> HeadersArrived(HUGE, mode=Mode.NONE)
        << Decide(HUGE, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER)
        << CLOSE
    ),
    "the choice failed, buffered: the request passes": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(PASS)
        << Continue(Part.BODY)
        << CLOSE
    ),
    "the choice failed, full duplex: the request passes with its body": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(PASS)
        << Continue(Part.HEADERS, unpicked=True)
        << EchoBody(b"{}", end_of_stream=True)
        << CLOSE
    ),
    "a body comes first: the proxy sends no headers, so nothing can be chosen": (
        Script()
        >> BodyArrived(b"a")
        << Continue(Part.BODY)
        >> BodyArrived(b"b", end_of_stream=True)
        << Continue(Part.BODY)
        << CLOSE
    ),
    "full duplex both ways: the response is given back too": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX, duplex_response=True)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << EchoBody(b"{}", end_of_stream=True)
        >> DELIVERED
        >> BodyArrived(b"", end_of_stream=True)
        >> ResponseArrived(Part.RESPONSE_HEADERS, status=200, served="10.0.0.1:8000")
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_BODY, b"data: 1")
        << Report("f1", 200, "10.0.0.1:8000", 7, over=False)
        << EchoBody(b"data: 1", end_of_stream=False, part=Part.RESPONSE_BODY)
        >> ResponseArrived(Part.RESPONSE_BODY, b"", end_of_stream=True)
        << Report("f1", 200, "10.0.0.1:8000", 7, over=True)
        << EchoBody(b"", end_of_stream=True, part=Part.RESPONSE_BODY)
        >> ResponseArrived(Part.RESPONSE_BODY, b"", end_of_stream=True)
        >> ENDED
    ),
    "no body, and the response comes full duplex with trailers": (
        Script()
        >> HeadersArrived(MODELS, end_of_stream=True, mode=Mode.FULL_DUPLEX, duplex_response=True)
        << Decide(MODELS, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        >> DELIVERED
        >> ResponseArrived(Part.RESPONSE_HEADERS)
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_BODY, b"{}")
        << Report("f1", None, None, 2, over=False)
        << EchoBody(b"{}", end_of_stream=False, part=Part.RESPONSE_BODY)
        >> ResponseArrived(Part.RESPONSE_TRAILERS)
        << Report("f1", None, None, 2, over=True)
        << Continue(Part.RESPONSE_TRAILERS)
        >> ENDED
    ),
    "the usage of a response that goes through us is read, and its last word is the flight's": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX, duplex_response=True)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << EchoBody(b"{}", end_of_stream=True)
        >> DELIVERED
        >> ResponseArrived(Part.RESPONSE_HEADERS, status=103)
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_HEADERS, status=200, content=Content.JSON)
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_BODY, JSON[:30])
        << Report("f1", 200, None, 30, over=False)
        << EchoBody(JSON[:30], end_of_stream=False, part=Part.RESPONSE_BODY)
        >> ResponseArrived(Part.RESPONSE_BODY, JSON[30:], end_of_stream=True)
        << Report("f1", 200, None, len(JSON), over=True, usage=Usage(9, 1))
        << EchoBody(JSON[30:], end_of_stream=True, part=Part.RESPONSE_BODY)
        >> ENDED
    ),
    "a usage event that only we wanted does not reach the client": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX, duplex_response=True)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(ASKED)
        << SetDestination(Part.HEADERS, ASKED, in_header=True)
        << EchoBody(b"{...}", end_of_stream=True)
        >> DELIVERED
        >> ResponseArrived(Part.RESPONSE_HEADERS, status=200, content=Content.STREAM)
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_BODY, TOKEN + USAGE[:20])
        << Report("f4", 200, None, len(TOKEN) + 20, over=False)
        << EchoBody(TOKEN, end_of_stream=False, part=Part.RESPONSE_BODY)
        >> ResponseArrived(Part.RESPONSE_BODY, USAGE[20:])
        << Report("f4", 200, None, len(TOKEN + USAGE), over=False)
        >> ResponseArrived(Part.RESPONSE_BODY, DONE)
        << Report("f4", 200, None, len(TOKEN + USAGE + DONE), over=False)
        << EchoBody(DONE, end_of_stream=False, part=Part.RESPONSE_BODY)
        >> ResponseArrived(Part.RESPONSE_BODY, b"", end_of_stream=True)
        << Report("f4", 200, None, len(TOKEN + USAGE + DONE), over=True, usage=Usage(9, 1))
        << EchoBody(b"", end_of_stream=True, part=Part.RESPONSE_BODY)
        >> ENDED
    ),
    "what is kept of a stream goes on before its trailers": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX, duplex_response=True)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(ASKED)
        << SetDestination(Part.HEADERS, ASKED, in_header=True)
        << EchoBody(b"{...}", end_of_stream=True)
        >> DELIVERED
        >> ResponseArrived(Part.RESPONSE_HEADERS, status=200, content=Content.STREAM)
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_BODY, TOKEN + USAGE[:-1])
        << Report("f4", 200, None, len(TOKEN + USAGE) - 1, over=False)
        << EchoBody(TOKEN, end_of_stream=False, part=Part.RESPONSE_BODY)
        >> ResponseArrived(Part.RESPONSE_TRAILERS)
        << Report("f4", 200, None, len(TOKEN + USAGE) - 1, over=True, usage=Usage(9, 1))
        << EchoBody(USAGE[:-1], end_of_stream=False, part=Part.RESPONSE_BODY)
        << Continue(Part.RESPONSE_TRAILERS)
        >> ENDED
    ),
    "a response without a body: its headers are its end": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX, duplex_response=True)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        << EchoBody(b"{}", end_of_stream=True)
        >> DELIVERED
        >> ResponseArrived(Part.RESPONSE_HEADERS, status=204, end_of_stream=True)
        << Report("f1", 204, None, 0, over=True)
        << Continue(Part.RESPONSE_HEADERS)
        >> ENDED
    ),
    "a response that comes before the request is complete": (
        Script()
        >> HeadersArrived(TOKENIZE, mode=Mode.FULL_DUPLEX, duplex_response=True)
        << Decide(TOKENIZE, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        >> DELIVERED
        >> BodyArrived(b"ab")
        << EchoBody(b"ab", end_of_stream=False)
        >> ResponseArrived(Part.RESPONSE_HEADERS, status=413)
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_BODY, b"{}", end_of_stream=True)
        << Report("f1", 413, None, 2, over=True)
        << EchoBody(b"{}", end_of_stream=True, part=Part.RESPONSE_BODY)
        >> BodyArrived(b"c", end_of_stream=True)
        << EchoBody(b"c", end_of_stream=True)
        >> ENDED
    ),
    "the gateway answers by itself before the body is complete: no flight": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX, duplex_response=True)
        >> BodyArrived(b"{")
        >> ResponseArrived(Part.RESPONSE_HEADERS, status=408)
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_BODY, b"too late", end_of_stream=True)
        << EchoBody(b"too late", end_of_stream=True, part=Part.RESPONSE_BODY)
        >> ENDED
    ),
    "the client leaves while the response goes through us: the flight ends": (
        Script()
        >> HeadersArrived(MODELS, end_of_stream=True, mode=Mode.FULL_DUPLEX, duplex_response=True)
        << Decide(MODELS, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        >> DELIVERED
        >> ResponseArrived(Part.RESPONSE_HEADERS, status=200)
        << Continue(Part.RESPONSE_HEADERS)
        >> ENDED
        << Report("f1", 200, None, 0, over=True, cut=True)
        >> ENDED
    ),
    "a response comes first, full duplex": (
        Script()
        >> ResponseArrived(Part.RESPONSE_HEADERS, duplex=True)
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_BODY, b"ab", end_of_stream=True)
        << EchoBody(b"ab", end_of_stream=True, part=Part.RESPONSE_BODY)
        >> ENDED
    ),
    "a response comes first: passed on": (
        Script()
        >> ResponseArrived(Part.RESPONSE_HEADERS)
        << Continue(Part.RESPONSE_HEADERS)
        >> ResponseArrived(Part.RESPONSE_BODY)
        << Continue(Part.RESPONSE_BODY)
        >> ResponseArrived(Part.RESPONSE_TRAILERS)
        << Continue(Part.RESPONSE_TRAILERS)
        >> ENDED
    ),
    "a response comes while the body is awaited: passed on": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> ResponseArrived(Part.RESPONSE_HEADERS)
        << Continue(Part.RESPONSE_HEADERS)
        >> ENDED
    ),
    "the client leaves before the body is complete": (
        Script() >> HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX) >> BodyArrived(b"{") >> ENDED
    ),
    "the client leaves while the decision is out: the flight is abandoned": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> ENDED
        >> Decided(STEER)
        << Abandon("f1")
    ),
    "the client leaves while a refusal is on its way: nothing to abandon": (
        Script()
        >> HeadersArrived(MODELS, end_of_stream=True, mode=Mode.BUFFERED)
        << Decide(MODELS, None)
        >> ENDED
        >> Decided(Refuse(BUSY))
    ),
    "the client leaves before the answer is delivered: the flight is abandoned, once": (
        Script()
        >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
        << Continue(Part.HEADERS)
        >> BodyArrived(b"{}", end_of_stream=True)
        << Decide(CHAT, b"{}", rewritable=True)
        >> Decided(STEER)
        << SetDestination(Part.BODY, STEER)
        << CLOSE
        >> ENDED
        << Abandon("f1")
        >> ENDED
    ),
    "the client leaves while the body is given back: the flight is the access log's": (
        Script()
        >> HeadersArrived(TOKENIZE, mode=Mode.FULL_DUPLEX)
        << Decide(TOKENIZE, None)
        >> Decided(STEER)
        << SetDestination(Part.HEADERS, STEER, in_header=True)
        >> DELIVERED
        >> ENDED
    ),
    "the stream ends before it began": Script() >> ENDED,
}
