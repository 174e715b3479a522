"""One publisher, and every fault of its stream, over real sockets on loopback."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Self

import pytest
import zmq

from extproc.adapters.kv_events import follower as following_one
from extproc.adapters.kv_events.follower import (
    RESTARTS,
    RESTARTS_WITHIN_S,
    ROUNDS,
    SLICE_BLOCKS,
    Follower,
    Knowledge,
    ManyPublishersError,
    Place,
    Replayed,
)
from extproc.adapters.kv_events.sockets import CONNECTED, Connected, Replay, Sockets
from extproc.adapters.kv_events.wire import END
from extproc.core.types import CacheChanged, CacheUnknown
from extproc.sim.kv_publisher import KvPublisher
from tests.adapters.kv_events.support import (
    ADDRESS,
    CLEARED,
    POOL,
    Learner,
    payload,
    port_of,
    publish_each,
    publishing,
    recorded,
    removed,
    stored,
)
from tests.support.relay import Relay
from tests.support.waiting import until


class Bench:
    """A follower at work, and who learns from it."""

    def __init__(
        self,
        publisher: KvPublisher,
        sockets: Sockets,
        endpoint: str,
        replay: str | None,
        most: int,
        replay_timeout_s: float,
    ) -> None:
        self.publisher = publisher
        self.learner = Learner()
        self.lags: list[float] = []
        self.follower = Follower(
            Place(POOL, ADDRESS),
            sockets.subscriber(endpoint, "", most),
            partial(sockets.replay, replay) if replay else None,
            self.learner.learn,
            replay_timeout_s=replay_timeout_s,
            lag=self.lags.append,
        )
        self.counts = self.follower.counts

    async def knows(self, *blocks: int) -> None:
        await until(lambda: self.learner.held == sorted(blocks), every_s=0.005)

    async def connected(self) -> None:
        """Its subscription arrived and its first question was answered, so whatever is published from now on comes by itself."""
        await until(lambda: self.counts.replays.total() and self.publisher.subscribers() == 1, every_s=0.005)


@asynccontextmanager
async def following(
    publisher: KvPublisher,
    *,
    replay: bool = True,
    through: int | None = None,
    most: int = 1000,
    replay_timeout_s: float = 5.0,
) -> AsyncIterator[Bench]:
    """`through`: a port on which a relay to the publisher listens."""
    sockets = Sockets()
    endpoint = publisher.endpoint if through is None else f"tcp://127.0.0.1:{through}"
    bench = Bench(publisher, sockets, endpoint, publisher.replay_endpoint if replay else None, most, replay_timeout_s)
    task = asyncio.create_task(bench.follower.run())
    try:
        yield bench
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        sockets.close()


class Lossy(KvPublisher):
    """Its messages get lost while `mute`."""

    mute = False

    def send(self, sequence: int, payload: bytes) -> None:
        if not self.mute:
            super().send(sequence, payload)


@asynccontextmanager
async def lossy(buffer_steps: int = 10_000) -> AsyncIterator[Lossy]:
    publisher = Lossy("127.0.0.1", 0, 0, buffer_steps=buffer_steps)
    publisher.start()
    try:
        yield publisher
    finally:
        await publisher.stop()


class TestFromTheBeginning:
    async def test_what_is_stored_and_removed(self) -> None:
        async with publishing() as publisher, following(publisher) as bench:
            await bench.connected()
            publisher.publish([stored(1, 2), stored(3, parent=2)])
            publisher.publish([removed(2)])
            await bench.knows(1, 3)
            assert bench.learner.whole is True
            assert bench.counts.messages == 2
            assert len(bench.lags) == 2
            assert all(0 <= lag < 60 for lag in bench.lags)

    async def test_an_engine_that_told_nothing_yet_is_known_to_hold_nothing(self) -> None:
        async with publishing() as publisher, following(publisher) as bench:
            await until(lambda: bench.learner.facts)
            assert (bench.learner.held, bench.learner.whole) == ([], True)
            assert bench.follower.knows is Knowledge.WHOLE

    async def test_the_first_message_of_an_engine_without_replay_is_enough(self) -> None:
        async with publishing() as publisher, following(publisher, replay=False) as bench:
            await bench.connected()
            publish_each(publisher, [1, 2])
            await bench.knows(1, 2)
            assert bench.learner.whole is True

    async def test_a_clear(self) -> None:
        async with publishing() as publisher, following(publisher) as bench:
            await bench.connected()
            publisher.publish([stored(1), CLEARED, stored(2)])
            await bench.knows(2)
            assert bench.learner.unknowns == 0

    async def test_the_recorded_stream(self) -> None:
        async with publishing() as publisher, following(publisher) as bench:
            await bench.connected()
            for number, frames in enumerate(recorded()):
                publisher.send(number, frames[2])
            await until(lambda: bench.counts.messages == 81)
            assert bench.counts.events.taken.total() == 288
            assert (bench.counts.gaps, bench.counts.losses, bench.counts.undecodable) == (0, 0, 0)
            assert min(bench.learner.blocks.values()) >= 0  # each copy of a block is stored once and removed once
            assert bench.learner.whole is True


class TestLateJoin:
    async def test_a_replay_tells_all(self) -> None:
        async with publishing() as publisher:
            publish_each(publisher, [1, 2, 3])
            async with following(publisher) as bench:
                await bench.knows(1, 2, 3)
                assert bench.learner.whole is True
                publisher.publish([removed(2)])
                await bench.knows(1, 3)
                assert bench.counts.gaps == 0
                assert bench.counts.replays[Replayed.FILLED] == 1
                assert len(bench.lags) == 1  # what is old does not count as late

    async def test_more_than_the_engine_keeps(self) -> None:
        async with publishing(buffer_steps=3) as publisher:
            publish_each(publisher, range(1, 7))
            async with following(publisher) as bench:
                await bench.knows(4, 5, 6)
                publisher.publish([stored(7)])
                await bench.knows(4, 5, 6, 7)
                assert (bench.learner.whole, bench.learner.unknowns, bench.counts.losses) == (False, 1, 1)

    async def test_a_clear_makes_it_whole(self) -> None:
        async with publishing(buffer_steps=3) as publisher:
            publish_each(publisher, range(1, 7))
            async with following(publisher) as bench:
                await bench.knows(4, 5, 6)
                publisher.publish([CLEARED])
                publisher.publish([stored(8)])
                await bench.knows(8)
                assert bench.learner.whole is True

    async def test_without_replay(self) -> None:
        async with publishing() as publisher:
            publish_each(publisher, [1, 2])
            async with following(publisher, replay=False) as bench:
                await bench.connected()
                publisher.publish([stored(3)])
                await bench.knows(3)
                assert (bench.learner.whole, bench.learner.unknowns) == (False, 1)
                assert isinstance(bench.learner.facts[0], CacheUnknown)
                assert bench.counts.gaps == 0  # nobody was there to miss anything


class TestGaps:
    async def test_a_replay_fills_it_in_order(self) -> None:
        async with lossy() as publisher, following(publisher) as bench:
            await bench.connected()
            publisher.publish([stored(1)])
            await bench.knows(1)
            publisher.mute = True
            publish_each(publisher, [2, 3])
            publisher.publish([removed(2)])
            publisher.mute = False
            publisher.publish([stored(4)])
            await bench.knows(1, 3, 4)
            assert (bench.counts.gaps, bench.counts.losses) == (1, 0)
            assert bench.learner.whole is True
            assert min(bench.learner.blocks.values()) == 0

    async def test_the_next_messages_are_not_learned_twice(self) -> None:
        """Those that came by themselves while the replay brought them as well."""
        async with lossy() as publisher, following(publisher) as bench:
            await bench.connected()
            publisher.mute = True
            publisher.publish([stored(1)])
            publisher.mute = False
            publish_each(publisher, [2, 3, 4])
            await until(lambda: bench.counts.messages == 3)
            publisher.publish([stored(5)])
            await bench.knows(1, 2, 3, 4, 5)
            assert set(bench.learner.blocks.values()) == {1}
            assert (bench.counts.gaps, bench.counts.restarts) == (1, 0)

    async def test_without_replay_what_was_known_is_void(self) -> None:
        async with lossy() as publisher, following(publisher, replay=False) as bench:
            await bench.connected()
            publisher.publish([stored(1)])
            await bench.knows(1)
            publisher.mute = True
            publisher.publish([removed(1)])
            publisher.mute = False
            publish_each(publisher, [2, 3])
            await bench.knows(2, 3)
            assert (bench.counts.gaps, bench.counts.losses, bench.learner.whole) == (1, 1, False)

    async def test_more_than_the_engine_keeps(self) -> None:
        async with lossy(buffer_steps=2) as publisher, following(publisher) as bench:
            await bench.connected()
            publisher.publish([stored(1)])
            await bench.knows(1)
            publisher.mute = True
            publish_each(publisher, [2, 3, 4])
            publisher.mute = False
            publisher.publish([stored(5)])
            await bench.knows(4, 5)
            assert (bench.counts.losses, bench.learner.whole) == (1, False)

    async def test_a_replay_that_nobody_answers_is_given_up(self) -> None:
        async with lossy() as publisher:
            publisher.replay_endpoint = "tcp://127.0.0.1:9"  # the discard port, on which nothing listens
            async with following(publisher, replay_timeout_s=0.05) as bench:
                await until(lambda: bench.counts.replays[Replayed.LATE])
                await bench.connected()
                publish_each(publisher, [1, 2])
                await bench.knows(1, 2)
                publisher.mute = True
                publisher.publish([stored(3)])
                publisher.mute = False
                publisher.publish([stored(4)])
                await bench.knows(4)
                assert bench.counts.losses == 1


class TestRestarts:
    async def test_of_an_idle_engine_is_noticed_before_its_first_event(self) -> None:
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(publishing())
            bench = await stack.enter_async_context(following(first))
            await bench.connected()
            publish_each(first, [1, 2])
            await bench.knows(1, 2)
            await first.stop()
            second = await stack.enter_async_context(
                publishing(port=port_of(first.endpoint), replay_port=port_of(first.replay_endpoint))
            )
            await bench.knows()
            assert (bench.counts.restarts, bench.learner.whole) == (1, True)
            second.publish([stored(7)])
            await bench.knows(7)

    async def test_of_one_that_has_told_more_than_the_last(self) -> None:
        """Its numbers go on where the other's ended, but the last message of that is another now."""
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(publishing())
            bench = await stack.enter_async_context(following(first))
            await bench.connected()
            publish_each(first, [1, 2])
            await bench.knows(1, 2)
            await first.stop()
            second = KvPublisher("127.0.0.1", port_of(first.endpoint), port_of(first.replay_endpoint))
            second.start()
            stack.push_async_callback(second.stop)
            publish_each(second, [5, 6, 7, 8])
            await bench.knows(5, 6, 7, 8)
            assert (bench.counts.restarts, bench.learner.whole, bench.learner.unknowns) == (1, True, 0)

    async def test_without_replay_the_first_event_tells(self) -> None:
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(publishing())
            bench = await stack.enter_async_context(following(first, replay=False))
            await bench.connected()
            publish_each(first, [1, 2])
            await bench.knows(1, 2)
            await first.stop()
            second = await stack.enter_async_context(publishing(port=port_of(first.endpoint)))
            await until(second.subscribers)
            second.publish([stored(9)])
            await bench.knows(9)
            assert (bench.counts.restarts, bench.learner.whole) == (1, True)


class TestConnection:
    async def test_what_happened_while_it_was_cut_is_asked_for(self) -> None:
        async with (
            publishing() as publisher,
            Relay(publisher.endpoint.removeprefix("tcp://")) as relay,
            following(publisher, through=relay.port) as bench,
        ):
            await bench.connected()
            publisher.publish([stored(1)])
            await bench.knows(1)
            await relay.cut()
            publisher.publish([stored(2)])
            await relay.mend()
            await bench.knows(1, 2)
            assert (bench.counts.restarts, bench.counts.losses, bench.learner.whole) == (0, 0, True)


class TestGarbage:
    @pytest.mark.parametrize("raw", [b"garbage", b"", b"\x93"])
    async def test_a_message_that_cannot_be_read_is_one_that_is_missing(self, raw: bytes) -> None:
        async with publishing() as publisher, following(publisher) as bench:
            await bench.connected()
            publisher.publish([stored(1)])
            await bench.knows(1)
            publisher.send(1, raw)
            publisher.send(2, payload(stored(2)))
            await bench.knows(2)
            assert (bench.counts.undecodable, bench.counts.losses, bench.learner.whole) == (1, 1, False)

    async def test_frames_of_something_else_are_counted(self) -> None:
        async with publishing() as publisher, following(publisher) as bench:
            await bench.connected()
            assert publisher._pub is not None
            for frames in ([b"a"], [b"a", b"b"], [b"a", b"b", b"c"], [b"", b"", b"", b""]):
                zmq.Socket.send_multipart(publisher._pub, frames)
            publisher.publish([stored(1)])
            await bench.knows(1)
            assert (bench.counts.undecodable, bench.learner.whole) == (4, True)

    async def test_bad_events_are_counted(self) -> None:
        async with publishing() as publisher, following(publisher) as bench:
            await bench.connected()
            publisher.publish([{"type": "BlockPinned"}, {"type": "BlockStored"}, stored(1)])
            await bench.knows(1)
            passed = {why.value: n for why, n in bench.counts.events.passed.items() if n}
            assert passed == {"unknown": 1, "malformed": 1}


class TestPace:
    async def test_a_slow_follower_catches_up(self) -> None:
        """The publisher drops what it cannot send; what was dropped is asked for."""
        large = [stored(*range(1000, 2000), size=16), removed(*range(1000, 2000))]
        async with publishing(hwm=5) as publisher, following(publisher, most=16) as bench:
            await bench.connected()
            for _ in range(600):  # 12 MB, without a turn for the follower
                publisher.publish(large)
            for block in range(1, 50):  # until one comes through
                publisher.publish([stored(block)])
                if await soon(partial(bench.learner.blocks.__contains__, block)):
                    break
            await until(lambda: bench.follower._position.due == publisher.sequence)
            assert bench.learner.held == list(range(1, block + 1))
            assert bench.counts.gaps >= 1
            assert bench.learner.whole is True

    @pytest.mark.parametrize("followers", [1, 6])
    async def test_the_event_loop_has_its_turn_between_slices(self, followers: int) -> None:
        """Also where all have much to learn at the same time; only their first slices may meet."""
        messages = [frames(0, stored(*range(3000), size=16)), *(frames(n, stored(n)) for n in range(1, 500))]
        learner, shared = Learner(), asyncio.Lock()
        by_turn: Counter[int] = Counter()
        turns = 0
        learner.seen = lambda fact: by_turn.update({turns: size(fact)})
        tasks = []
        for _ in range(followers):
            each = Follower(
                Place(POOL, ADDRESS), Given(*messages), None, learner.learn, turns=shared, replay_timeout_s=1.0
            )
            tasks.append(asyncio.create_task(each.run()))
        while by_turn.total() < followers * 3499:
            turns += 1
            await asyncio.sleep(0)
        assert max(list(by_turn.values())[1:]) <= 2 * SLICE_BLOCKS
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def size(fact: CacheChanged | CacheUnknown) -> int:
    return 0 if isinstance(fact, CacheUnknown) else sum(len(getattr(change, "ids", ())) for change in fact.changes)


async def soon(check: Callable[[], bool]) -> bool:
    try:
        await until(check, timeout_s=0.3, every_s=0.005)
    except AssertionError:
        return False
    return True


# --- replays word by word ---------------------------------------------------------------------------------------------


def frames(sequence: int, *events: Any, at: float | None = None) -> list[bytes]:
    return [b"t", sequence.to_bytes(8, "big"), payload(*events, at=float(sequence) if at is None else at)]


Answer = list[list[bytes] | None]
ENDED = [b"", END, b""]


class Script:
    """A replay that answers what a test says; None for nothing in time."""

    def __init__(self, *answers: Answer) -> None:
        self.asked: list[int] = []
        self._answers = list(answers)
        self._now: Answer = []

    async def __aenter__(self) -> Self:
        self._now = self._answers.pop(0) if self._answers else [None]
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def ask(self, first: int) -> None:
        self.asked.append(first)

    async def next(self, within_s: float) -> list[bytes] | None:
        return self._now.pop(0) if self._now else None


class Given:
    """Messages that come one by one; then silence."""

    def __init__(self, *messages: list[bytes] | Connected) -> None:
        self._messages = list(messages)
        self.closed = False

    async def next(self) -> list[bytes] | Connected:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)

    def close(self) -> None:
        self.closed = True


async def run(script: Script | None, *messages: list[bytes] | Connected) -> tuple[Follower, Learner]:
    learner, given = Learner(), Given(*messages)

    def opened() -> Replay:
        return script  # type: ignore[return-value]

    follower = Follower(Place(POOL, ADDRESS), given, opened if script else None, learner.learn, replay_timeout_s=1.0)
    task = asyncio.create_task(follower.run())
    await until(lambda: not given._messages, every_s=0.001)
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert given.closed
    return follower, learner


class TestReplays:
    async def test_a_hole_is_asked_for_once_more(self) -> None:
        script = Script([frames(0, stored(1)), frames(2, stored(3)), ENDED], [frames(0, stored(1)), frames(1, stored(2)), frames(2, stored(3)), ENDED])  # fmt: skip
        follower, learner = await run(script, CONNECTED)
        assert script.asked == [0, 0]
        assert (learner.held, learner.whole, follower.counts.losses) == ([1, 2, 3], True, 0)

    async def test_a_hole_that_stays_is_lost(self) -> None:
        answer: Answer = [frames(0, stored(1)), frames(2, stored(3)), ENDED]
        follower, learner = await run(Script(*(answer.copy() for _ in range(6))), CONNECTED, frames(3, stored(4)))
        assert (learner.held, learner.whole, follower.counts.losses) == ([4], False, 1)

    async def test_an_end_that_got_lost_is_no_loss(self) -> None:
        script = Script([frames(0, stored(1)), None], [frames(0, stored(1)), ENDED])
        _, learner = await run(script, CONNECTED, frames(1, stored(2)))
        assert script.asked == [0, 0]
        assert (learner.held, learner.whole) == ([1, 2], True)

    async def test_the_last_message_is_asked_for_to_see_who_answers(self) -> None:
        script = Script([frames(0, stored(1)), ENDED], [frames(0, stored(5), at=9.0), frames(1, stored(6)), ENDED])
        follower, learner = await run(script, CONNECTED, CONNECTED)
        assert script.asked == [0, 0]
        assert (learner.held, follower.counts.restarts, learner.whole) == ([5, 6], 1, True)

    async def test_one_that_began_anew_is_asked_from_its_beginning(self) -> None:
        script = Script(
            [frames(0, stored(1)), frames(1, stored(2)), ENDED],
            [frames(1, stored(6), at=9.0), ENDED],
            [frames(0, stored(5)), frames(1, stored(6)), ENDED],
        )
        follower, learner = await run(script, CONNECTED, CONNECTED)
        assert script.asked == [0, 1, 0]
        assert (learner.held, follower.counts.restarts, learner.whole) == ([5, 6], 1, True)

    async def test_one_that_began_anew_and_told_less_is_asked_from_its_beginning(self) -> None:
        script = Script(
            [frames(0, stored(1)), frames(1, stored(2)), ENDED], [ENDED], [frames(0, stored(5), at=9.0), ENDED]
        )
        follower, learner = await run(script, CONNECTED, CONNECTED)
        assert script.asked == [0, 1, 0]
        assert (learner.held, follower.counts.restarts, learner.whole) == ([5], 1, True)

    async def test_a_younger_message_under_a_number_that_was_had_is_of_another_process(self) -> None:
        """Its first messages were missed, and its connection was not seen: engines that connect to us."""
        first = [frames(n, stored(n)) for n in range(4)]
        second = [frames(n, stored(10 + n), at=50.0 + n) for n in range(4)]
        script = Script([*first, ENDED], [*second, ENDED])
        follower, learner = await run(script, first[2], second[3])
        assert script.asked == [0, 0]
        assert (learner.held, follower.counts.restarts, learner.whole) == ([10, 11, 12, 13], 1, True)

    async def test_another_process_may_serve_another_model(self) -> None:
        """The cache that counts has another number there."""
        first, second = (dict[str, Any](group_idx=n, kv_cache_spec_kind="full_attention") for n in (1, 0))
        follower, learner = await run(None, frames(0, stored(1, **first)), frames(0, stored(2, **second)))
        assert (learner.held, follower.counts.restarts) == ([2], 1)

    async def test_garbage_in_a_replay_is_lost(self) -> None:
        answer: Answer = [frames(0, stored(1)), [b"t", (1).to_bytes(8, "big"), b"garbage"], ENDED]
        script = Script(*(answer.copy() for _ in range(6)))
        follower, learner = await run(script, CONNECTED, frames(2, stored(3)))
        assert (learner.held, follower.counts.losses) == ([3], 1)
        assert follower.counts.undecodable >= 1

    async def test_an_endless_search_ends(self) -> None:
        """Each replay brings one message more and ends with a hole."""
        answers: list[Answer] = [[frames(n, stored(n)), frames(n + 2, stored(n + 2))] for n in range(50)]
        script = Script(*answers)
        await run(script, CONNECTED)
        assert len(script.asked) == ROUNDS

    async def test_a_replay_without_end_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(following_one, "LONGEST_REPLAY_S", 0.0)
        endless: list[Answer] = [[frames(n, stored(n)) for n in range(100)] for _ in range(ROUNDS)]
        follower, _ = await run(Script(*endless), CONNECTED)
        assert follower.counts.replays[Replayed.LATE] == 1

    @pytest.mark.parametrize(("every_s", "ends"), [(1.0, True), (RESTARTS_WITHIN_S, False)])
    async def test_two_that_publish_in_one_place_are_not_followed(self, every_s: float, ends: bool) -> None:
        """Each message seems to be of another process, and would have all asked for again."""
        learner = Learner()
        one, other = ([frames(base + n, stored(n)) for n in range(RESTARTS)] for base in (100, 0))
        now = iter(range(1000))
        follower = Follower(
            Place(POOL, ADDRESS),
            Given(*(message for pair in zip(one, other, strict=True) for message in pair)),
            None,
            learner.learn,
            replay_timeout_s=1.0,
            wall=lambda: next(now) * every_s,
        )
        task = asyncio.create_task(follower.run())
        await until(lambda: task.done() or follower.counts.messages == 2 * RESTARTS, every_s=0.001)
        assert follower.counts.restarts == RESTARTS
        if ends:
            with pytest.raises(ManyPublishersError, match="began anew 5 times within 60 s"):
                task.result()
        else:
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class TestRanks:
    async def test_a_clear_of_one_rank_has_the_others_tell_again(self) -> None:
        learner = Learner()
        both: list[Follower] = []
        scripts = [Script([frames(0, stored(1)), ENDED]), Script([frames(0, stored(2)), ENDED], [frames(0, stored(2)), frames(1, stored(3)), ENDED])]  # fmt: skip
        givens = [Given(CONNECTED, frames(1, CLEARED)), Given(CONNECTED)]
        for rank in (0, 1):
            place = Place(POOL, ADDRESS, rank)
            both.append(
                Follower(
                    place,
                    givens[rank],
                    partial(_script, scripts[rank]),
                    learner.learn,
                    siblings=both,
                    replay_timeout_s=1.0,
                )
            )
        other = asyncio.create_task(both[1].run())
        await until(lambda: both[1].knows is Knowledge.WHOLE)
        # Of the first rank nothing is known yet.
        assert [fact for fact in learner.facts if isinstance(fact, CacheChanged) and fact.whole] == []
        one = asyncio.create_task(both[0].run())
        await until(lambda: learner.held == [])
        givens[1]._messages.append(frames(1, stored(3)))
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        again = asyncio.create_task(both[1].run())
        await until(lambda: len(learner.held) == 2)
        assert learner.held == [(1 << 64) + 2, (1 << 64) + 3]
        assert learner.whole
        assert sum("CacheCleared()" in repr(fact) for fact in learner.facts) == 2
        for task in (one, again):
            task.cancel()
        await asyncio.gather(one, again, return_exceptions=True)


def _script(script: Script) -> Replay:
    return script  # type: ignore[return-value]
