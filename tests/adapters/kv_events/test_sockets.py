from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from extproc.adapters.kv_events.sockets import CONNECTED, REPLAYS_AT_ONCE, Connected, Sockets, Subscriber
from tests.adapters.kv_events.support import port_of, publishing, stored
from tests.support.waiting import until

LARGE = bytes(100_000)


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    found = Sockets()
    yield found
    found.close()


async def message(subscriber: Subscriber) -> list[bytes]:
    while isinstance(found := await subscriber.next(), Connected):
        pass
    return found


async def test_at_most_so_many_messages_wait(sockets: Sockets) -> None:
    """The kernel's buffers hold some more, then the publisher drops: what nobody takes does not pile up."""
    async with publishing(hwm=5) as publisher:
        lazy = sockets.subscriber(publisher.endpoint, "", 16)
        eager = sockets.subscriber(publisher.endpoint, "", 1000)
        await until(lambda: publisher.subscribers() == 2)
        for n in range(1, 401):
            publisher.send(n, LARGE)
            assert int.from_bytes((await message(eager))[1], "big") == n
        waited = 0
        while lazy.take() is not None:
            waited += 1
        assert waited < 150
        for each in (lazy, eager):
            each.close()


async def test_only_topics_that_begin_so(sockets: Sockets) -> None:
    async with publishing() as publisher:
        subscriber = sockets.subscriber(publisher.endpoint, "kv@", 16)
        await until(publisher.subscribers)
        for topic in ("other", "kv@10.0.0.1:8000@m"):
            publisher.topic = topic
            publisher.publish([stored(1)])
        assert (await message(subscriber))[0] == b"kv@10.0.0.1:8000@m"
        subscriber.close()


async def test_news_of_each_connection(sockets: Sockets) -> None:
    async with publishing() as publisher:
        subscriber = sockets.subscriber(publisher.endpoint, "", 16)
        assert await subscriber.next() is CONNECTED
        port = port_of(publisher.endpoint)
    async with publishing(port=port):
        assert await subscriber.next() is CONNECTED
    subscriber.close()


async def test_a_port_that_is_taken_is_said(sockets: Sockets) -> None:
    async with publishing() as publisher:
        with pytest.raises(OSError, match=f"cannot listen on {publisher.endpoint}: Address already in use"):
            sockets.subscriber(publisher.endpoint, "", 16, bind=True)


async def test_a_replay_that_nobody_answers_ends_in_time(sockets: Sockets) -> None:
    async with sockets.replay("tcp://127.0.0.1:9") as replay:
        replay.ask(0)
        assert await replay.next(0.01) is None


async def test_replays_have_their_turns(sockets: Sockets) -> None:
    """Of a fleet whose replicas all replay at once each answer would lie here as a whole."""
    replays = [sockets.replay("tcp://127.0.0.1:9") for _ in range(REPLAYS_AT_ONCE + 1)]
    for replay in replays[:-1]:
        await replay.__aenter__()
    last = asyncio.create_task(replays[-1].__aenter__())
    await asyncio.sleep(0)
    assert not last.done()
    await replays[0].__aexit__()
    await last
    for replay in replays[1:]:
        await replay.__aexit__()


async def test_an_endpoint_that_cannot_be_is_said(sockets: Sockets) -> None:
    with pytest.raises(OSError, match="cannot connect to tcp://a b:1: Invalid argument"):
        sockets.subscriber("tcp://a b:1", "", 16)
    for _ in range(REPLAYS_AT_ONCE + 1):  # none of them keeps its turn
        with pytest.raises(OSError, match="cannot connect to tcp://a b:1"):
            await sockets.replay("tcp://a b:1").__aenter__()


async def test_waiting_can_be_broken_off(sockets: Sockets) -> None:
    async with publishing() as publisher:
        subscriber = sockets.subscriber(publisher.endpoint, "", 16)
        assert await subscriber.next() is CONNECTED
        await until(publisher.subscribers)
        waiting = asyncio.create_task(subscriber.next())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        publisher.publish([stored(1)])
        await until(lambda: subscriber.take() is not None)
        subscriber.close()
