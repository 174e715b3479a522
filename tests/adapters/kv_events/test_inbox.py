from __future__ import annotations

import pytest

from extproc.adapters.kv_events.inbox import Inbox, Sorter, named
from extproc.adapters.kv_events.sockets import CONNECTED

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.2:8001"


@pytest.mark.parametrize(
    ("topic", "name"),
    [
        (b"kv@10.0.0.1:8000@tiny", A),
        (b"kv@10.0.0.1@tiny", "10.0.0.1"),
        (b"kv@[::1]:8000@tiny", "[::1]:8000"),
        (b"kv@10.0.0.1:8000", A),
        (b"kv-events", ""),
        (b"", ""),
        (b"\xff@\xff@", "\ufffd"),
    ],
)
def test_a_topic_names_a_replica(topic: bytes, name: str) -> None:
    assert named(topic) == name


async def test_messages_go_to_the_replica_that_their_topic_names() -> None:
    inboxes = {address: Inbox(10, lambda: None) for address in (A, B, C)}
    sorter = Sorter(inboxes)
    for topic in (b"kv@10.0.0.1:8000@m", b"kv@10.0.0.1@m", b"kv@10.0.0.2@m", b"kv@10.0.0.9:8000@m", b"kv-events", b""):
        sorter._sort([topic, b"", b""])
    sorter._sort([])
    assert [await inboxes[A].next() for _ in range(3)] == [
        CONNECTED,
        [b"kv@10.0.0.1:8000@m", b"", b""],
        [b"kv@10.0.0.1@m", b"", b""],
    ]
    assert sorter.strangers == 5  # the third could be either of two
    assert len(inboxes[B]._waiting) == len(inboxes[C]._waiting) == 1


async def test_a_full_inbox_drops_what_comes() -> None:
    inbox = Inbox(3, lambda: None)
    for n in range(9):
        inbox.put([b"%d" % n])
    assert [await inbox.next() for _ in range(3)] == [CONNECTED, [b"0"], [b"1"]]
    inbox.put([b"9"])
    assert await inbox.next() == [b"9"]
