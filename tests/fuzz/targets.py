"""What is fuzzed: each target takes any bytes, and raises where the code does what it never may.

Run by `make fuzz` with coverage to guide it, and by the ordinary tests with Hypothesis and the seeds below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from random import Random

from extproc.config import Config
from extproc.core.router import PoolSettings, Router
from extproc.core.types import End, Outcome, Replica, Reset
from extproc.envoy import codec
from extproc.envoy.access_log import LogCounts, deliver
from extproc.envoy.exchange import (
    DELIVERED,
    ENDED,
    LEGAL,
    Abandon,
    BodyArrived,
    Command,
    Decide,
    Decided,
    Delayed,
    Event,
    Exchange,
    Head,
    HeadersArrived,
    IllegalEvent,
    Mode,
    Part,
    Report,
    ResponseArrived,
    SetDestination,
    Steer,
    TrailersArrived,
)
from extproc.envoy.intake import Hold, Intake
from extproc.openai import body as bodies
from extproc.openai import errors, requests
from extproc.openai.requests import Parsed
from tests.fuzz.proxy import Proxy

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/chat/completions?x=1", "/")
MODES = tuple(Mode)
RESPONSES = (Part.RESPONSE_HEADERS, Part.RESPONSE_BODY, Part.RESPONSE_TRAILERS)
CONFIG = Config.model_validate(
    {
        "pools": [{"models": ["m"], "replicas": ["127.0.0.1:1"]}],
        "requests": {"max_body_bytes": 4096, "tenant_header": "x-tenant"},
    }
)


def body(data: bytes) -> None:
    """A request body: read or refused, and changed in its usage options alone."""
    path = PATHS[data[0] % len(PATHS)] if data else PATHS[0]
    raw = data[1:]
    parsed = requests.read("POST", path, raw)
    if not isinstance(parsed, Parsed):
        answer = errors.of_bad_request(parsed)
        assert 400 <= answer.status < 500
        assert len(answer.body) < 16 * 1024, "an answer that grows with the request"
        return
    request = parsed.request
    assert len(request.blocks) <= 1024
    assert request.samples >= 1
    assert request.max_output_tokens is None or request.max_output_tokens >= 0
    changed = requests.with_usage(parsed, raw)
    if changed is not None:
        before, after = bodies.load(raw), bodies.load(changed)
        assert after.pop("stream_options")["include_usage"] is True
        before.pop("stream_options", None)
        assert repr(before) == repr(after)  # NaN is not equal to itself


def wire(data: bytes) -> None:
    """A gRPC message, of ext_proc or of the access log."""
    for read in (codec.event, codec.health_service):
        with contextlib.suppress(codec.Unreadable):
            read(data)
    try:
        entries = codec.log_entries(data)
    except codec.Unreadable:
        return
    deliver(entries, _router(), LogCounts(), 1.0)


def stream(data: bytes) -> None:
    """The messages of one stream in any order: every answer legal, every flight delivered or abandoned, none left."""
    feed = iter(data)
    mode = MODES[next(feed, 0) % len(MODES)]
    router = _router()
    run = _Run(mode, router)
    for event in _events(feed, mode):
        if run.over or not run.say(event):
            break
    run.end()
    assert router.in_flight == run.delivered - run.reported, run
    assert run.opened == run.delivered + run.abandoned, run
    router.check()


class _Run:
    """One stream between a counting proxy and the real router."""

    def __init__(self, mode: Mode, router: Router) -> None:
        self._intake = Intake(router, CONFIG, key=b"k")
        self._exchange = Exchange(self._intake.rules)
        self._proxy = Proxy(mode)
        self._router = router
        self.opened = self.delivered = self.abandoned = self.reported = 0

    def __repr__(self) -> str:
        return f"<{self._exchange!r} {self.opened} = {self.delivered} + {self.abandoned}>"

    @property
    def over(self) -> bool:
        return self._proxy.closed

    def say(self, event: Event) -> bool:
        """Whether the stream goes on."""
        state = self._exchange._state.__name__
        self._proxy.sends(event)
        try:
            commands = self._exchange.on(event)
        except IllegalEvent:
            assert type(event) not in LEGAL[state], f"{event} refused in {state}"
            return False
        return self._take(commands)

    def _take(self, commands: object) -> bool:
        for command in commands:  # type: ignore[attr-defined]
            if isinstance(command, Decide):
                return self._take(self._decided(command))
            if isinstance(command, Abandon | Report):
                self._told(command)
                continue
            self._proxy.takes(command)
            if isinstance(command, SetDestination):
                self.delivered += 1
                self._exchange.on(DELIVERED)
        return not self.over

    def _decided(self, command: Decide) -> list[Command]:
        asked: list[Command] = list(self._exchange.on(Delayed(1.0)))
        before = self._router.in_flight
        answer = self._intake.decide(command.head, _bytes(command.body), 1.0, command.rewritable)
        assert not isinstance(answer, Hold), "an idle fleet holds nothing"
        self.opened += self._router.in_flight - before
        return [*asked, *self._exchange.on(Decided(answer))]

    def _told(self, command: Abandon | Report) -> None:
        """What is not for the proxy."""
        if isinstance(command, Abandon):
            self._intake.abandon(command.flight, 1.0)
            self.abandoned += 1
        elif command.over:
            self._router.finish(command.flight, Outcome(End.OK), 1.0)
            self.reported += 1

    def end(self) -> None:
        """The proxy ends the RPC."""
        for command in self._exchange.on(ENDED):
            assert isinstance(command, Abandon | Report), command
            self._told(command)


def _router() -> Router:
    router = Router([PoolSettings("default", ("m",), scraped=False)], Random(1))
    router.learn(Reset("default", (Replica("127.0.0.1:1"), Replica("127.0.0.1:2"))), 0.0)
    return router


def _events(feed: Iterator[int], mode: Mode) -> Iterator[Event]:
    """At most as many as there are bytes; mostly headers first, as from a proxy."""
    yield _headers(feed, mode)
    for kind in feed:
        if kind < 128:
            yield BodyArrived(_piece(feed), end_of_stream=kind % 2 == 1)
        elif kind < 144:
            yield TrailersArrived()
        elif kind < 208:
            yield ResponseArrived(RESPONSES[kind % 3], _piece(feed), kind % 5 == 0, duplex=kind % 7 == 0)
        else:
            yield _headers(feed, mode)


def _headers(feed: Iterator[int], mode: Mode) -> HeadersArrived:
    flags = next(feed, 0)
    lengths = (None, 0, 100, 10**9)
    values = {"x-request-priority": str(flags), "x-slo-ttft-ms": "1" * (flags % 25), "x-tenant": "t" * (flags % 3)}
    subset = frozenset({"127.0.0.1:1"}) if flags & 64 else None
    head = Head("POST", PATHS[flags % len(PATHS)], lengths[flags // 8 % 4], values, subset)
    return HeadersArrived(head, end_of_stream=flags & 32 > 0, mode=mode, duplex_response=flags & 128 > 0)


def _bytes(body: bytes | memoryview | None) -> bytes | None:
    return None if body is None else bytes(body)


def _piece(feed: Iterator[int]) -> bytes:
    """A request, or some bytes."""
    size = next(feed, 0)
    if size >= 250:
        return b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hello"}]}'
    return bytes(b for b, _ in zip(feed, range(size), strict=False))


TARGETS: Mapping[str, Callable[[bytes], None]] = {"body": body, "wire": wire, "stream": stream}

SEEDS: Mapping[str, tuple[bytes, ...]] = {
    "body": (
        b'\x00{"model":"m","stream":true,"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"tools":[]}',
        b'\x01{"model":"m","prompt":[[1,2,3],[4]],"n":2,"best_of":3,"stream":true,"stream_options":{"include_usage":false}}',
        b'\x02{"model":"m","input":[{"role":"user","content":"x"}],"instructions":"i","max_output_tokens":3}',
        b'\x03{"model":"m","input":["a","b"],"cache_salt":"s"}',
        b'\x00{"model":"m","messages":[{"role":"assistant","tool_calls":[{"id":"1","function":{"name":"f","arguments":"{}"}}]}]}',
        b"\x00" + b"[" * 2000,
    ),
    "wire": (
        codec.answer(SetDestination(Part.BODY, Steer("f", "d"))),
        b"\x12\x04\x0a\x02\x0a\x00",
    ),
    "stream": (
        bytes([4, 0, 1, 250]),
        bytes([7, 0, 2, 3, 97, 98, 99, 1, 250, 130]),
        bytes([3, 32]),
        bytes([1, 0, 1, 255, 150, 0]),
        bytes([6, 128, 1, 250, 145, 2, 65, 66]),
    ),
}
"""Where the search begins."""
