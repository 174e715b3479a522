from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.types import Usage
from extproc.envoy.exchange import (
    CHUNK_BYTES,
    DELIVERED,
    ENDED,
    LEGAL,
    Abandon,
    BodyArrived,
    Close,
    Command,
    Content,
    Continue,
    Decide,
    Decided,
    EchoBody,
    Event,
    Exchange,
    Head,
    HeadersArrived,
    IllegalEvent,
    Mode,
    Part,
    Refuse,
    Report,
    Respond,
    ResponseArrived,
    Rules,
    SetDestination,
    Steer,
    TrailersArrived,
)
from tests.envoy.transcripts import (
    ASKED,
    BUSY,
    CHAT,
    DONE,
    RULES,
    SCRIPTS,
    STEER,
    TOKEN,
    TOKENIZE,
    TOO_LARGE,
    USAGE,
    Script,
    play,
)

READ_ALL = Rules(10 * CHUNK_BYTES, lambda _: True, TOO_LARGE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_transcript(name: str) -> None:
    script = SCRIPTS[name]
    assert play(script, Exchange(RULES)) == script.turns


def test_the_player_sees_a_missing_command() -> None:
    script = Script() >> HeadersArrived(CHAT, mode=Mode.BUFFERED)
    assert play(script, Exchange(RULES)) != script.turns


def test_every_state_is_told_what_may_come() -> None:
    exchange = Exchange(RULES)
    assert all(callable(getattr(exchange, state)) for state in LEGAL)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((DELIVERED,), "Delivered while starting"),
        ((BodyArrived(b""), HeadersArrived(CHAT)), "HeadersArrived while passing"),
        ((HeadersArrived(CHAT, mode=Mode.BUFFERED),) * 2, "HeadersArrived while buffering"),
        ((HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX), Decided(STEER)), "Decided while holding"),
        ((HeadersArrived(TOKENIZE), BodyArrived(b"")), "BodyArrived while deciding"),
        ((ENDED, Decided(STEER)), "Decided while over"),
    ],
)
def test_what_cannot_come_is_named_with_the_state(events: Sequence[Event], message: str) -> None:
    exchange = Exchange(RULES)
    for event in events[:-1]:
        exchange.on(event)
    with pytest.raises(IllegalEvent) as raised:
        exchange.on(events[-1])
    assert str(raised.value) == message


def test_repr_is_a_status_line() -> None:
    exchange = Exchange(RULES)
    exchange.on(HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX))
    exchange.on(BodyArrived(b"abc"))
    assert repr(exchange) == "<Exchange holding full_duplex 3 B, undelivered None>"


# --- properties -------------------------------------------------------------------------------------------------------


def cut(body: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({min(c, len(body)) for c in cuts} | {0, len(body)})
    return [body[a:b] for a, b in pairwise(at)]


def arrivals(pieces: list[bytes], ending: str) -> list[Event]:
    """The messages of one body: its end is on the last piece, on an empty message after it, or on trailers."""
    if ending == "last" and pieces:
        return [*(BodyArrived(p) for p in pieces[:-1]), BodyArrived(pieces[-1], True)]
    tail: Event = TrailersArrived() if ending == "trailers" else BodyArrived(b"", True)
    return [*(BodyArrived(p) for p in pieces), tail]


def run(mode: Mode, events: list[Event], answer: object = STEER) -> list[Command]:
    """All commands of one stream, as the server would drive it."""
    exchange = Exchange(READ_ALL)
    done: list[Command] = []
    for event in [HeadersArrived(CHAT, mode=mode), *events]:
        turn = list(exchange.on(event))
        if turn and isinstance(turn[-1], Decide):
            turn += exchange.on(Decided(answer))  # type: ignore[arg-type]
            exchange.on(DELIVERED)
        done += turn
    return done


bodies = st.one_of(st.binary(max_size=200), st.integers(CHUNK_BYTES - 2, 3 * CHUNK_BYTES).map(lambda n: b"x" * n))
cuts = st.lists(st.integers(0, 3 * CHUNK_BYTES), max_size=6)
endings = st.sampled_from(["last", "empty", "trailers"])


@given(bodies, cuts, endings)
def test_any_chunking_gives_the_same_decision_and_the_same_bytes_back(body: bytes, at: list[int], ending: str) -> None:
    done = run(Mode.FULL_DUPLEX, arrivals(cut(body, at), ending))
    assert [c.body for c in done if isinstance(c, Decide)] == [body]
    echoes = [c for c in done if isinstance(c, EchoBody)]
    assert b"".join(e.data for e in echoes) == body
    assert all(len(e.data) <= CHUNK_BYTES for e in echoes)
    ends = [e.end_of_stream for e in echoes]
    assert ends.count(True) == (0 if ending == "trailers" else 1)
    assert ending == "trailers" or ends[-1]
    assert sum(isinstance(c, Continue) and c.part is Part.TRAILERS for c in done) == (ending == "trailers")
    assert sum(isinstance(c, Close) for c in done) == 1


@given(bodies, cuts, endings)
def test_streamed_early_answers_every_message_once(body: bytes, at: list[int], ending: str) -> None:
    events = arrivals(cut(body, at), ending)
    done = run(Mode.STREAMED_EARLY, events)
    assert [c.body for c in done if isinstance(c, Decide)] == [body]
    assert sum(isinstance(c, Continue | SetDestination) for c in done) == len(events) + 1
    assert isinstance(done[-1], Close)


@given(bodies, cuts, endings)
def test_an_unread_body_comes_back_whole(body: bytes, at: list[int], ending: str) -> None:
    exchange = Exchange(RULES)
    exchange.on(HeadersArrived(TOKENIZE, mode=Mode.FULL_DUPLEX))
    exchange.on(Decided(STEER))
    done = [c for event in arrivals(cut(body, at), ending) for c in exchange.on(event)]
    echoes = [c for c in done if isinstance(c, EchoBody)]
    assert b"".join(e.data for e in echoes) == body
    assert sum(e.end_of_stream for e in echoes) == (ending != "trailers")
    assert isinstance(done[-1], Close)


def test_small_pieces_take_no_more_room_than_their_bytes() -> None:
    exchange = Exchange(READ_ALL)
    exchange.on(HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX))
    for _ in range(2_000):
        exchange.on(BodyArrived(b"ab"))
    assert len(exchange._chunks) == 1
    (decide,) = exchange.on(BodyArrived(b"", True))
    assert isinstance(decide, Decide)
    assert decide.body == b"ab" * 2_000


def answered(
    pieces: list[bytes], ending: str, leaves_after: int | None = None, steer: Steer = ASKED, status: int = 200
) -> list[Command]:
    """What is said while a response comes, for which we asked the usage unless `steer` says otherwise."""
    exchange = Exchange(READ_ALL)
    exchange.on(HeadersArrived(CHAT, mode=Mode.FULL_DUPLEX, duplex_response=True))
    exchange.on(BodyArrived(b"{}", True))
    exchange.on(Decided(steer))
    exchange.on(DELIVERED)
    body = (Part.RESPONSE_BODY, Part.RESPONSE_TRAILERS)
    events: list[Event] = [ResponseArrived(Part.RESPONSE_HEADERS, status=status, content=Content.STREAM)]
    for event in arrivals(pieces, ending):
        assert isinstance(event, BodyArrived | TrailersArrived)
        of_body = isinstance(event, BodyArrived)
        data, end = (bytes(event.data), event.end_of_stream) if isinstance(event, BodyArrived) else (b"", False)
        events.append(ResponseArrived(body[not of_body], data, end))
    return [command for event in [*events[:leaves_after], ENDED] for command in exchange.on(event)]


@given(st.lists(st.integers(0, len(TOKEN + USAGE + DONE)), max_size=9), endings)
def test_any_chunking_of_a_response_gives_the_same_bytes_back_and_the_same_end(at: list[int], ending: str) -> None:
    whole = TOKEN + USAGE + DONE
    done = answered(cut(whole, at), ending)
    echoes = [c for c in done if isinstance(c, EchoBody)]
    assert b"".join(e.data for e in echoes) == TOKEN + DONE
    assert sum(e.end_of_stream for e in echoes) == (ending != "trailers")
    assert sum(isinstance(c, Continue) and c.part is Part.RESPONSE_TRAILERS for c in done) == (ending == "trailers")
    (last,) = (c for c in done if isinstance(c, Report) and c.over)
    assert last.usage is not None
    assert (last.response_bytes, last.cut, last.usage.completion_tokens) == (len(whole), False, 1)


def given_back(done: list[Command]) -> bytes:
    return b"".join(bytes(c.data) for c in done if isinstance(c, EchoBody))


@pytest.mark.parametrize("ending", ["last", "empty", "trailers"])
def test_a_stream_that_ends_within_the_usage_event_is_given_back_whole(ending: str) -> None:
    assert given_back(answered([TOKEN, USAGE[:-1]], ending)) == TOKEN + USAGE[:-1]


def test_a_usage_event_that_the_client_asked_for_stays() -> None:
    done = answered([TOKEN + USAGE + DONE], "last", steer=STEER)
    assert given_back(done) == TOKEN + USAGE + DONE
    assert [c.usage for c in done if isinstance(c, Report)] == [Usage(9, 1)]


@pytest.mark.parametrize(("status", "broken"), [(200, True), (500, False)])
def test_an_error_under_status_200_is_told(status: int, broken: bool) -> None:
    done = answered([b'data: {"error": {"message": "m"}}\n\n'], "last", status=status)
    assert [c.broken for c in done if isinstance(c, Report)] == [broken]


@given(st.lists(st.integers(0, len(TOKEN + USAGE)), max_size=9), endings, st.integers(0, 12))
def test_wherever_a_client_leaves_its_response_the_flight_ends_once(at: list[int], ending: str, after: int) -> None:
    done = answered(cut(TOKEN + USAGE, at), ending, after)
    assert sum(isinstance(c, Report) and c.over for c in done) == 1
    assert not any(isinstance(c, Abandon) for c in done)


@given(
    mode=st.sampled_from(Mode),
    head=st.sampled_from([CHAT, TOKENIZE, Head("POST", "/v1/chat/completions", content_length=10**9)]),
    empty=st.booleans(),
    pieces=st.lists(st.binary(max_size=20), max_size=4),
    ending=endings,
    ends_after=st.integers(0, 8),
    steers=st.booleans(),
    delivered=st.booleans(),
)
def test_each_flight_is_delivered_or_abandoned_exactly_once(
    mode: Mode,
    head: Head,
    empty: bool,
    pieces: list[bytes],
    ending: str,
    ends_after: int,
    steers: bool,
    delivered: bool,
) -> None:
    """Wherever the proxy leaves: before, while the decision is out, or before its answer is written."""
    exchange = Exchange(RULES)
    opened = handed = 0
    abandoned: list[Command] = []

    def take(commands: Sequence[Command]) -> bool:
        nonlocal handed
        for command in commands:
            if isinstance(command, SetDestination):
                if not delivered:
                    return False
                exchange.on(DELIVERED)
                handed += 1
            if isinstance(command, Abandon):
                abandoned.append(command)
            if isinstance(command, Close):
                return False
        return True

    messages = arrivals(pieces, ending) if not empty else []
    for n, event in enumerate([HeadersArrived(head, empty, mode), *messages]):
        commands = exchange.on(event)
        if commands and isinstance(commands[-1], Decide):
            opened += steers
            if n >= ends_after:
                exchange.on(ENDED)
                take(exchange.on(Decided(STEER if steers else Refuse(BUSY))))
                break
            commands = exchange.on(Decided(STEER if steers else Refuse(BUSY)))
        if n >= ends_after or not take(commands):
            take(exchange.on(ENDED))
            break
    else:
        take(exchange.on(ENDED))
    assert handed + len(abandoned) == opened
    assert opened <= 1


@given(st.sampled_from(Mode), st.lists(st.binary(max_size=9), max_size=3), endings)
def test_a_refusal_answers_the_client_and_nothing_else_follows(mode: Mode, pieces: list[bytes], ending: str) -> None:
    done = run(mode, arrivals(pieces, ending), Refuse(BUSY))
    assert sum(isinstance(c, Respond) for c in done) == 1
    assert not any(isinstance(c, SetDestination | EchoBody) for c in done)
    assert isinstance(done[-1], Close)
