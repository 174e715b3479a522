"""All replicas of a pool, as they come and go, over real sockets; where they publish is asked of a fake of the network."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import orjson
import pytest
import zmq

from extproc.adapters.kv_events import following, sources
from extproc.adapters.kv_events.following import Following
from extproc.adapters.pages import FakePages, Page
from extproc.config import KvEvents
from extproc.core.types import Add, Remove, Replica, Reset, ScrapeFailure
from extproc.sim.kv_publisher import KvPublisher
from tests.adapters.kv_events.support import Learner, port_of, publishing, stored
from tests.support.ports import free_port
from tests.support.waiting import until

POOL, A, B = "p", "127.0.0.1:8000", "127.0.0.1:8001"


class Bench:
    """Following at work, with everything around it in reach."""

    def __init__(self, settings: KvEvents, data_parallel: int = 1) -> None:
        self.pages = FakePages()
        self.learner = Learner()
        self.by_address: defaultdict[str, Learner] = defaultdict(Learner)
        self.following = Following(
            {POOL: settings}, self._learn, rng=Random(1), data_parallel={POOL: data_parallel}, pages=self.pages
        )
        self.publishers: dict[str, KvPublisher] = {}
        self.counts = self.following.counts[POOL]

    def _learn(self, fact: Any) -> None:
        self.learner.learn(fact)
        self.by_address[fact.address].learn(fact)

    def publishes(self, address: str, publisher: KvPublisher, *, replay: bool = True) -> None:
        self.publishers[address] = publisher
        source = {"endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint if replay else None}
        self.pages.answers[address, sources.PATH] = orjson.dumps({"0": source})

    async def knows(self, address: str, *blocks: int) -> None:
        await until(lambda: self.by_address[address].held == sorted(blocks), every_s=0.005)

    async def known(self, *addresses: str) -> None:
        """Of these replicas, and of no others, something was told, and what they publish now comes."""
        await until(lambda: {address for _, address in self.following.known()} == set(addresses), every_s=0.005)
        told = [publisher for address, publisher in self.publishers.items() if address in addresses]
        await until(lambda: all(publisher.subscribers() for publisher in told), every_s=0.005)


@asynccontextmanager
async def bench(data_parallel: int = 1, **settings: Any) -> AsyncIterator[Bench]:
    each = Bench(KvEvents(**settings), data_parallel)
    try:
        yield each
    finally:
        await each.following.stop()
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("KV events")]


def joined(*addresses: str, **labels: str) -> Reset:
    return Reset(POOL, tuple(Replica(address, labels) for address in addresses))


class TestWhere:
    async def test_a_replica_is_asked(self) -> None:
        async with bench() as b, publishing() as publisher:
            b.publishes(A, publisher)
            b.following.follow(joined(A))
            await b.known(A)
            publisher.publish([stored(1)])
            await b.knows(A, 1)

    async def test_one_that_does_not_know_the_question_publishes_as_configured(self) -> None:
        async with publishing() as publisher:
            endpoint = publisher.endpoint.replace("127.0.0.1", "{host}")
            async with bench(endpoint=endpoint, replay_endpoint=publisher.replay_endpoint) as b:
                b.pages.answers[A, sources.PATH] = Page(404)
                b.following.follow(joined(A))
                await b.known(A)

    async def test_one_that_is_not_up_yet_is_asked_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following, "RETRY_S", 0.01)
        async with bench() as b, publishing() as publisher:
            b.following.follow(joined(A))
            await until(lambda: len(b.pages.asked) > 2, every_s=0.005)
            b.pages.answers[A, sources.PATH] = ScrapeFailure.LATE
            asked = len(b.pages.asked)
            await until(lambda: len(b.pages.asked) > asked + 2, every_s=0.005)
            b.publishes(A, publisher)
            await b.known(A)

    async def test_one_with_events_off_is_left_alone(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        async with bench() as b:
            b.pages.answers[A, sources.PATH] = b"{}"
            b.following.follow(joined(A))
            await until(lambda: "off; start it with --kv-events-config" in caplog.text)
            assert b.following.known() == {}
            assert b.learner.facts == []

    async def test_an_answer_that_leads_elsewhere_is_said_and_not_followed(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        async with bench() as b:
            b.pages.answers[A, sources.PATH] = b'{"0": {"endpoint": "tcp://10.9.9.9:5557"}}'
            b.following.follow(joined(A))
            await until(lambda: "another host; if the engine connects there, set kv_events.mode: bind" in caplog.text)

    async def test_a_replica_that_moved_is_followed_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following, "RECHECK_S", 0.02)
        async with bench() as b, publishing() as first, publishing() as second:
            b.publishes(A, first)
            b.following.follow(joined(A))
            await b.known(A)
            first.publish([stored(1)])
            await b.knows(A, 1)
            second.publish([stored(2)])
            b.publishes(A, second)
            await b.knows(A, 2)

    async def test_a_replica_that_tells_no_more_is_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following, "RECHECK_S", 0.02)
        async with bench() as b, publishing() as publisher:
            b.publishes(A, publisher)
            b.following.follow(joined(A))
            await b.known(A)
            b.pages.answers[A, sources.PATH] = b"{}"
            await until(lambda: b.learner.unknowns == 1)
            assert b.following.known() == {}

    async def test_labels_of_one_replica(self) -> None:
        async with publishing() as one, publishing() as other, bench(mode="connect") as b:
            for address, publisher in ((A, one), (B, other)):
                labels = {"kv_events": publisher.endpoint, "kv_replay": publisher.replay_endpoint}
                b.publishers[address] = publisher
                b.following.follow(Add(POOL, Replica(address, labels)))
            await b.known(A, B)
            one.publish([stored(1)])
            other.publish([stored(2)])
            await b.knows(A, 1)
            await b.knows(B, 2)

    async def test_a_label_that_is_no_endpoint_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        async with bench(mode="connect") as b:
            b.following.follow(joined(A, kv_events="5557"))
            await until(lambda: "label kv_events: '5557' is not tcp://host:port" in caplog.text)

    async def test_where_two_publish_neither_is_followed(self, caplog: pytest.LogCaptureFixture) -> None:
        """Two on one host, taken for the configured endpoint: the blocks of the one would count for the other."""
        async with bench() as b, publishing() as publisher, publishing() as other:
            b.publishes(A, publisher)
            b.following.follow(joined(A))
            await b.known(A)
            b.publishes(B, publisher)
            b.following.follow(joined(A, B))
            await until(lambda: b.following.known() == {} and b.by_address[A].unknowns)
            where = ", ".join(sorted((publisher.endpoint, publisher.replay_endpoint)))
            for one, rival in ((A, B), (B, A)):
                b.following.wake(one)
                await until(lambda one=one: not b.following._tasks[POOL, one][0].woken.is_set())  # type: ignore[misc]
                assert f"KV events of {one} in pool p: {where} is where {rival} publishes too" in caplog.text
            assert caplog.text.count("so neither is followed") == 2
            b.publishes(B, other)
            for one in (B, A):
                b.following.wake(one)
                await until(lambda one=one: (POOL, one) in b.following.known())  # type: ignore[misc]

    async def test_one_replica_in_two_pools_is_followed_for_both(self) -> None:
        async with bench() as b, publishing() as publisher:
            b.publishes(A, publisher)
            b.following.follow(joined(A))
            b.following.retarget("other", KvEvents(), [Replica(A)])
            await until(lambda: b.following.known() == {(POOL, A): True, ("other", A): True})

    async def test_ranks_that_the_engine_chooses_share_what_is_known(self) -> None:
        async with bench() as b, publishing() as one, publishing() as other:
            b.pages.answers[A, sources.PATH] = of_ranks(one, other)
            b.following.follow(joined(A))
            await until(lambda: b.following.known() == {(POOL, A): True} and one.subscribers() and other.subscribers())
            one.publish([stored(1)])
            other.publish([stored(1)])
            await until(lambda: b.learner.held == [1, (1 << 64) + 1])

    async def test_ranks_that_are_replicas_have_each_their_own(self) -> None:
        async with bench(data_parallel=2) as b, publishing() as one, publishing() as other:
            b.pages.answers[A, sources.PATH] = of_ranks(one, other)
            b.following.follow(joined(A))
            await b.known(f"{A}/0", f"{A}/1")
            await until(lambda: one.subscribers() and other.subscribers())
            one.publish([stored(1)])
            other.publish([stored(1), stored(2)])
            await b.knows(f"{A}/0", 1)
            await b.knows(f"{A}/1", 1, 2)
            assert b.by_address[f"{A}/0"].whole
            one.publish([{"type": "AllBlocksCleared"}])
            await b.knows(f"{A}/0")
            assert b.by_address[f"{A}/1"].held == [1, 2]
            assert other.replays == 1
            b.following.retarget(POOL, None, [])
            assert [b.by_address[name].unknowns for name in (f"{A}/0", f"{A}/1", A)] == [1, 1, 0]

    async def test_configured_ports_of_ranks(self) -> None:
        first = two_ports()
        async with (
            publishing(port=first) as one,
            publishing(port=first + 1) as other,
            bench(data_parallel=2, mode="connect", endpoint=one.endpoint) as b,
        ):
            b.following.follow(joined(A))
            await until(lambda: one.subscribers() and other.subscribers())
            one.publish([stored(1)])
            other.publish([stored(2)])
            await b.knows(f"{A}/0", 1)
            await b.knows(f"{A}/1", 2)


def two_ports() -> int:
    """The first of two in a row on which nothing listens."""
    for _ in range(100):
        first = free_port()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return first
    raise RuntimeError("no two free ports in a row; set EXTPROC_TEST_PORTS=first-last")


def of_ranks(*publishers: KvPublisher) -> bytes:
    """The answer of a replica whose ranks publish so."""
    each = ({"endpoint": p.endpoint, "replay_endpoint": p.replay_endpoint} for p in publishers)
    return orjson.dumps({str(rank): source for rank, source in enumerate(each)})


class TestMembership:
    async def test_one_that_leaves_is_followed_no_more(self) -> None:
        async with bench() as b, publishing() as one, publishing() as other:
            b.publishes(A, one)
            b.publishes(B, other)
            b.following.follow(joined(A, B))
            await b.known(A, B)
            b.following.follow(Remove(POOL, A))
            await b.known(B)
            facts = len(b.by_address[A].facts)
            one.publish([stored(1)])
            other.publish([stored(2)])
            await b.knows(B, 2)
            assert len(b.by_address[A].facts) == facts

    async def test_one_that_stays_goes_on_undisturbed(self) -> None:
        async with bench() as b, publishing() as publisher:
            b.publishes(A, publisher)
            b.following.follow(joined(A))
            await b.known(A)
            b.following.follow(joined(A, B))
            b.following.follow(Add(POOL, Replica(A, {"gpu": "h100"})))
            await until(lambda: len([a for a, _ in b.pages.asked if a == A]) == 2)
            assert publisher.replays == 1

    async def test_other_pools_are_ignored(self) -> None:
        async with bench() as b:
            b.following.follow(Reset("other", (Replica(A),)))
            await asyncio.sleep(0)
            assert b.pages.asked == []

    async def test_a_mistake_of_ours_begins_again_with_nothing_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following, "RETRY_S", 0.01)
        async with bench() as b, publishing() as publisher:
            b.publishes(A, publisher)
            b.following.follow(joined(A))
            await b.known(A)
            publisher.publish([stored(1)])
            await b.knows(A, 1)
            b.learner.trouble = RuntimeError("of ours")
            publisher.publish([stored(2)])
            await b.knows(A, 1, 2)
            assert b.learner.unknowns == 1

    async def test_after_a_mistake_the_other_ranks_tell_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following, "RETRY_S", 0.01)
        async with bench() as b, publishing() as one, publishing() as other:
            b.pages.answers[A, sources.PATH] = of_ranks(one, other)
            b.following.follow(joined(A))
            await until(lambda: b.following.known() == {(POOL, A): True} and one.subscribers() and other.subscribers())
            other.publish([stored(1)])
            await until(lambda: b.learner.held == [(1 << 64) + 1])
            b.learner.trouble = RuntimeError("of ours")
            one.publish([stored(2)])
            await b.knows(A, 2)
            other.publish([stored(3)])
            await b.knows(A, 2, (1 << 64) + 1, (1 << 64) + 3)
            assert b.learner.whole


class TestReload:
    async def test_off_and_on(self) -> None:
        async with bench() as b, publishing() as publisher:
            b.publishes(A, publisher)
            b.following.follow(joined(A))
            await b.known(A)
            publisher.publish([stored(1)])
            await b.knows(A, 1)
            b.following.retarget(POOL, None, [])
            assert b.learner.unknowns == 1
            assert b.following.known() == {}
            b.following.retarget(POOL, KvEvents(), [Replica(A)])
            await b.knows(A, 1)

    async def test_the_same_settings_disturb_nobody(self) -> None:
        async with bench() as b, publishing() as publisher:
            b.publishes(A, publisher)
            b.following.follow(joined(A))
            await b.known(A)
            b.following.retarget(POOL, KvEvents(), [])
            assert publisher.replays == 1
            await b.known(A)

    async def test_others_are_taken_over(self) -> None:
        async with bench() as b, publishing() as publisher:
            b.publishes(A, publisher)
            b.following.follow(joined(A))
            await b.known(A)
            publisher.publish([stored(1)])
            b.following.retarget(POOL, KvEvents(mode="connect", endpoint=publisher.endpoint), [Replica(A)])
            await until(lambda: b.counts.replays["nowhere"])  # type: ignore[index]  # the new ones name no replays
            await until(publisher.subscribers)
            publisher.publish([stored(2)])
            await b.knows(A, 2)
            assert b.learner.whole is False


class TestBind:
    """Engines connect to us."""

    @staticmethod
    def engine(context: zmq.Context[zmq.Socket[bytes]], port: int) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.PUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://127.0.0.1:{port}")
        return socket

    async def test_the_topic_tells_who_it_is(self) -> None:
        port = free_port()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            async with bench(mode="bind", bind=f"tcp://127.0.0.1:{port}") as b, publishing() as writer:
                b.following.follow(joined(A, B))
                await until(lambda: b.following._bound and len(b.following._bound[POOL].inboxes[0]) == 2)
                one, other = self.engine(context, port), self.engine(context, port)
                sent = 0
                while b.by_address[A].held != [1] or b.by_address[B].held != [2]:
                    for socket, address, block in ((one, A, 1), (other, B, 2)):
                        writer._buffer.clear()
                        writer.publish([stored(block)])
                        topic = f"kv@{address}@tiny".encode()
                        socket.send_multipart([topic, sent.to_bytes(8, "big"), writer._buffer[-1][1]])
                    sent += 1
                    await asyncio.sleep(0.01)
                    assert sent < 300
                one.send_multipart([b"kv@10.9.9.9:1@tiny", bytes(8), b""])
                await until(lambda: b.following.strangers(POOL) == 1)
        finally:
            context.destroy(linger=0)

    async def test_replays_are_asked_of_the_replica(self) -> None:
        async with publishing() as publisher:
            publisher.publish([stored(1)])
            bind = f"tcp://127.0.0.1:{free_port()}"
            async with bench(mode="bind", bind=bind, replay_endpoint=publisher.replay_endpoint) as b:
                b.following.follow(joined(A))
                await b.knows(A, 1)
                assert b.learner.whole is True

    async def test_a_port_that_is_taken_is_said_and_tried_again(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(following, "RETRY_S", 0.02)
        async with publishing() as taken:
            bind = f"tcp://127.0.0.1:{port_of(taken.endpoint)}"
            async with bench(mode="bind", bind=bind) as b:
                b.following.follow(joined(A))
                await until(lambda: f"cannot listen on {bind}" in caplog.text)
                await taken.stop()
                await until(lambda: b.following._bound)

    async def test_what_was_bound_is_given_back_where_not_all_can_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following, "RETRY_S", 0.02)
        first = two_ports()
        async with (
            publishing(port=first + 1) as taken,
            bench(mode="bind", bind=f"tcp://127.0.0.1:{first}", ranks=2) as b,
        ):
            b.following.follow(joined(A))
            await until(lambda: (POOL, A) in b.following._tasks and b.following._tasks[POOL, A][0].answer)
            await taken.stop()
            await until(lambda: b.following._bound and len(b.following._bound[POOL].inboxes) == 2)

    async def test_a_port_that_is_wanted_no_more_is_given_back(self) -> None:
        port = free_port()
        async with bench(mode="bind", bind=f"tcp://127.0.0.1:{port}") as b:
            b.following.follow(joined(A))
            await until(lambda: b.following._bound)
            b.following.retarget(POOL, KvEvents(mode="connect"), [Replica(A)])
            assert not b.following._bound
            await until(lambda: not b.following._ending)
            async with publishing(port=port):
                pass

    async def test_inboxes_go_with_their_replicas(self) -> None:
        async with bench(mode="bind", bind=f"tcp://127.0.0.1:{free_port()}") as b:
            b.following.follow(joined(A, B))
            await until(lambda: b.following._bound and len(b.following._bound[POOL].inboxes[0]) == 2)
            b.following.follow(Remove(POOL, A))
            await until(lambda: list(b.following._bound[POOL].inboxes[0]) == [B])
