"""What checks ask, what they make of the answers, and when they come; on a fake of the network."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random

import orjson
import pytest

from extproc.adapters.engines import CHOICES, HealthPaths, health_paths
from extproc.adapters.pages import FakePages, HttpPages, Page
from extproc.adapters.probing import COMPLETIONS_PATH, Checks, Prober
from extproc.adapters.scraping import MODELS_PATH
from extproc.config import Health
from extproc.core.types import Add, Fact, Probe, Probed, Remove, Replica, Reset, ScrapeFailure
from tests.e2e.stack import replica
from tests.support.backend import Backend
from tests.support.ports import free_port
from tests.support.waiting import until

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
HEALTH = "/health"
MODELS = b'{"data":[{"id":"tiny"},{"id":"adapter-a"}]}'
TOKEN = b'{"choices":[{"index":0,"text":" a","finish_reason":"length"}],"usage":{"completion_tokens":1}}'
ABORTED = b'{"choices":[{"index":0,"text":"","finish_reason":"abort"}]}'
FOREVER_S = 1000.0
SOON_S = 0.01

LIVE, READY, DEEP = Probe.LIVE, Probe.READY, Probe.DEEP


def pace(
    interval_s: float = FOREVER_S, doubt_interval_s: float = SOON_S, deep_interval_s: float | None = None
) -> Health:
    return Health(interval_s=interval_s, doubt_interval_s=doubt_interval_s, deep_interval_s=deep_interval_s)


class Bench:
    """A prober of pool `p` with everything around it in reach."""

    def __init__(
        self,
        health: Health,
        models: tuple[str, ...] = (),
        paths: tuple[HealthPaths, ...] = health_paths(CHOICES["vllm"]),
    ) -> None:
        self.pages = FakePages()
        self.facts: list[Fact] = []
        self.times: list[float] = []
        self.trouble: Exception | None = None
        self.doubted: set[str] = set()
        self.idle: Callable[[str], bool] = lambda _: True
        self.prober = Prober(
            {"p": Checks(health, models, paths)},
            self._learn,
            rng=Random(1),
            doubtful=self.doubted.__contains__,
            idle=lambda address: self.idle(address),
            pages=self.pages,
        )

    def _learn(self, fact: Fact) -> None:
        if self.trouble:
            raise self.trouble
        self.facts.append(fact)
        self.times.append(asyncio.get_running_loop().time())

    def serve(
        self,
        address: str = A,
        health: bytes | Page | ScrapeFailure = b"",
        models: bytes | Page | ScrapeFailure = MODELS,
        token: bytes | Page | ScrapeFailure = TOKEN,
    ) -> None:
        for path, answer in ((HEALTH, health), (MODELS_PATH, models), (COMPLETIONS_PATH, token)):
            self.pages.answers[address, path] = answer

    def asked(self, path: str = HEALTH, address: str = A) -> int:
        return self.pages.asked.count((address, path))

    async def checked(self, times: int = 1, address: str = A) -> None:
        """So many more visits than now have begun."""
        goal = self.asked(address=address) + times
        await until(lambda: self.asked(address=address) >= goal, every_s=0.002)

    async def first(self, *addresses: str) -> list[tuple[Probe, bool]]:
        """What the first visits of these (by default A) find, all of it."""
        self.doubted.clear()
        self.prober.follow(joined(*(addresses or (A,))))
        await until(lambda: self.facts)
        await settled(self)
        return [(f.probe, f.ok) for f in self.facts if isinstance(f, Probed)]


@asynccontextmanager
async def bench(
    health: Health, models: tuple[str, ...] = (), paths: tuple[HealthPaths, ...] = health_paths(CHOICES["vllm"])
) -> AsyncIterator[Bench]:
    made = Bench(health, models, paths)
    try:
        yield made
    finally:
        await made.prober.stop()


def joined(*addresses: str) -> Reset:
    return Reset("p", tuple(Replica(a) for a in addresses))


async def settled(b: Bench, for_s: float = 0.1) -> None:
    """Nothing more is asked: ten times the shortest interval of these tests without a question."""
    before = len(b.pages.asked)
    await asyncio.sleep(for_s)
    assert len(b.pages.asked) == before


class TestAnswers:
    async def test_a_well_replica_is_alive_and_ready(self) -> None:
        async with bench(pace()) as b:
            b.serve()
            assert await b.first() == [(LIVE, True), (READY, True)]
            assert b.facts[0] == Probed("p", A, LIVE, ok=True)
            assert repr(b.prober) == "<Prober 1 well>"

    async def test_a_refused_connection_fails_both_and_is_asked_once(self) -> None:
        async with bench(pace()) as b:
            assert await b.first() == [(LIVE, False), (READY, False)]
            assert b.pages.asked == [(A, HEALTH)]
            assert repr(b.prober) == "<Prober 1 not live>"

    @pytest.mark.parametrize(
        "answer", [Page(503), Page(500), Page(404), Page(204), ScrapeFailure.LATE, ScrapeFailure.UNREADABLE], ids=repr
    )
    async def test_whatever_is_not_200_in_time_is_not_alive_and_not_asked_on(
        self, answer: Page | ScrapeFailure
    ) -> None:
        async with bench(pace(deep_interval_s=FOREVER_S)) as b:
            b.serve(health=answer)
            assert await b.first() == [(LIVE, False)]

    async def test_404_sends_on_to_the_path_of_another_engine_which_is_asked_first_from_then_on(self) -> None:
        paths = health_paths(CHOICES["auto"])
        async with bench(pace(interval_s=SOON_S), paths=paths) as b:
            b.serve(health=Page(404), models=Page(404))
            b.pages.answers |= {(A, path): Page(404) for path in ("/-/healthz", "/v2/health/live", "/health/ready")}
            b.pages.answers[A, "/v2/health/live"] = b.pages.answers[A, "/v2/health/ready"] = Page(200)
            b.prober.follow(joined(A))
            await until(lambda: b.asked("/v2/health/ready") >= 4)
            assert b.asked() == 1
            assert b.asked("/health/ready") == 0
            assert {(f.probe, f.ok) for f in b.facts if isinstance(f, Probed)} == {(LIVE, True), (READY, True)}

    async def test_where_no_list_of_models_is_the_engines_own_word_makes_it_ready_or_not(self) -> None:
        """tritonserver answers 400 on its ready path while it loads or ends."""
        async with bench(pace(), paths=(HealthPaths("/v2/health/live", "/v2/health/ready"),)) as b:
            b.pages.answers |= {
                (A, "/v2/health/live"): b"",
                (A, MODELS_PATH): Page(404),
                (A, "/v2/health/ready"): Page(400),
            }
            assert await b.first() == [(LIVE, True), (READY, False)]

    async def test_where_no_path_is_known_the_answer_of_the_first_counts(self) -> None:
        async with bench(pace(), paths=(HealthPaths("/health"), HealthPaths("/b"))) as b:
            b.serve(health=Page(404))
            b.pages.answers[A, "/b"] = Page(404)
            assert await b.first() == [(LIVE, False)]
            assert repr(b.prober) == "<Prober 1 not live>"

    async def test_only_404_sends_on(self) -> None:
        async with bench(pace(), paths=(HealthPaths("/health"), HealthPaths("/b"))) as b:
            b.serve(health=Page(503))
            assert await b.first() == [(LIVE, False)]
            assert b.asked("/b") == 0

    async def test_the_path_of_the_configuration_is_the_only_one(self) -> None:
        async with bench(Health(path="/ping", interval_s=FOREVER_S), paths=health_paths(CHOICES["auto"])) as b:
            b.serve()
            b.pages.answers[A, "/ping"] = Page(404)
            assert await b.first() == [(LIVE, False)]
            assert b.asked() == 0

    async def test_the_path_of_the_configuration_is_asked(self) -> None:
        async with bench(Health(path="/ping", interval_s=FOREVER_S)) as b:
            b.serve()
            b.pages.answers[A, "/ping"] = b""
            b.prober.follow(joined(A))
            await until(lambda: len(b.facts) == 2)
            assert b.pages.asked == [(A, "/ping"), (A, MODELS_PATH)]

    @pytest.mark.parametrize(
        ("models", "page", "ready"),
        [
            ((), MODELS, True),
            (("adapter-a",), MODELS, True),
            (("other", "tiny"), MODELS, True),
            (("other",), MODELS, False),
            ((), b'{"data":[]}', False),
            ((), b"<html>", False),
            ((), ScrapeFailure.LATE, False),
            ((), ScrapeFailure.REFUSED, False),
            ((), Page(500), False),
            (("other",), Page(401), True),
            (("other",), Page(404), True),
        ],
    )
    async def test_ready_is_a_wanted_model_in_the_list_unless_there_is_none_for_us(
        self, models: tuple[str, ...], page: bytes | Page | ScrapeFailure, ready: bool
    ) -> None:
        async with bench(pace(), models) as b:
            b.serve(models=page)
            assert await b.first() == [(LIVE, True), (READY, ready)]

    async def test_a_change_is_logged_once_with_its_reason(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "extproc.adapters.probing")
        async with bench(pace(interval_s=SOON_S)) as b:
            b.serve(health=Page(503))
            b.prober.follow(joined(A))
            await b.checked(3)
            b.serve()
            await b.checked(3)
        assert [record.getMessage() for record in caplog.records if record.name.startswith("extproc")] == [
            f"replica {A} of pool p: live check: status 503",
            f"replica {A} of pool p: live check: well again",
        ]


class TestDeep:
    async def test_one_token_of_the_wanted_model_is_asked_for(self) -> None:
        async with bench(pace(deep_interval_s=FOREVER_S), ("adapter-a",)) as b:
            b.serve()
            assert await b.first() == [(LIVE, True), (READY, True), (DEEP, True)]
            (sent,) = map(orjson.loads, b.pages.sent)
            assert (sent["model"], sent["max_tokens"]) == ("adapter-a", 1)

    @pytest.mark.parametrize(
        "answer",
        [
            Page(500),
            Page(503),
            ScrapeFailure.LATE,
            ScrapeFailure.REFUSED,
            ABORTED,
            b"<html>",
            b"7",
            b'{"choices":[]}',
            b"",
        ],
        ids=repr,
    )
    async def test_no_token_is_a_failure(self, answer: bytes | Page | ScrapeFailure) -> None:
        async with bench(pace(deep_interval_s=FOREVER_S)) as b:
            b.serve(token=answer)
            assert await b.first() == [(LIVE, True), (READY, True), (DEEP, False)]
            assert repr(b.prober) == "<Prober 1 not deep>"

    async def test_a_model_that_cannot_be_asked_so_says_nothing(self) -> None:
        async with bench(pace(deep_interval_s=FOREVER_S)) as b:
            b.serve(token=Page(404))
            assert await b.first() == [(LIVE, True), (READY, True)]

    async def test_a_replica_with_work_is_not_asked(self) -> None:
        async with bench(pace(interval_s=SOON_S, deep_interval_s=SOON_S)) as b:
            b.serve()
            b.idle = lambda _: False
            b.prober.follow(joined(A))
            await b.checked(5)
            assert not b.asked(COMPLETIONS_PATH)
            b.idle = lambda _: True
            await until(lambda: b.asked(COMPLETIONS_PATH))

    async def test_late_does_not_count_where_work_came_meanwhile(self) -> None:
        async with bench(pace(deep_interval_s=FOREVER_S)) as b:
            b.idle = lambda _: not b.pages.sent  # until the question is on its way
            b.serve(token=ScrapeFailure.LATE)
            assert await b.first() == [(LIVE, True), (READY, True)]
            assert b.asked(COMPLETIONS_PATH) == 1

    async def test_it_comes_at_its_own_interval_and_in_doubt_with_every_check(self) -> None:
        async with bench(pace(interval_s=SOON_S, deep_interval_s=FOREVER_S)) as b:
            b.serve()
            b.prober.follow(joined(A))
            await b.checked(5)
            assert b.asked(COMPLETIONS_PATH) == 1
            b.doubted.add(A)
            await until(lambda: b.asked(COMPLETIONS_PATH) >= 3)

    async def test_it_comes_in_time_where_its_interval_is_the_shorter(self) -> None:
        async with bench(pace(deep_interval_s=0.05)) as b:
            b.serve()
            b.prober.follow(joined(A))
            await until(lambda: b.asked(COMPLETIONS_PATH) >= 3)

    async def test_none_is_asked_without_an_interval(self) -> None:
        async with bench(pace(interval_s=SOON_S)) as b:
            b.serve()
            b.doubted.add(A)
            b.prober.follow(joined(A))
            await b.checked(5)
            assert not b.asked(COMPLETIONS_PATH)


class TestPace:
    async def test_a_well_replica_is_checked_each_interval(self) -> None:
        async with bench(pace(interval_s=0.05)) as b:
            b.serve()
            b.prober.follow(joined(A))
            await b.checked(4)
        visits = [t for f, t in zip(b.facts, b.times, strict=True) if isinstance(f, Probed) and f.probe is LIVE]
        assert all(later - earlier >= 0.9 * 0.05 - 0.002 for earlier, later in pairwise(visits))

    async def test_in_doubt_it_is_checked_at_the_shorter_interval(self) -> None:
        async with bench(pace()) as b:
            b.serve()
            b.doubted.add(A)
            b.prober.follow(joined(A))
            await b.checked(5)

    async def test_wake_brings_the_next_check_forward_once(self) -> None:
        async with bench(pace()) as b:
            b.serve()
            await b.first()
            b.prober.wake(A)
            b.prober.wake(A)
            await b.checked()
            await settled(b)

    async def test_wakes_do_not_bring_checks_closer_than_the_shorter_interval(self) -> None:
        async with bench(pace(doubt_interval_s=0.1)) as b:
            b.serve()
            b.prober.follow(joined(A))
            for _ in range(100):
                b.prober.wake(A)
                await asyncio.sleep(0.005)
        visits = [t for f, t in zip(b.facts, b.times, strict=True) if isinstance(f, Probed) and f.probe is LIVE]
        assert len(visits) > 2
        assert all(later - earlier >= 0.1 - 0.002 for earlier, later in pairwise(visits))

    async def test_replicas_that_join_at_once_are_not_checked_in_one_instant(self) -> None:
        async with bench(pace(doubt_interval_s=10.0)) as b:
            b.prober.follow(joined(*(f"10.0.1.{i}:1" for i in range(20))))
            await until(lambda: b.facts)
            assert len(b.facts) < 20


class TestMembership:
    async def test_those_who_left_are_not_checked_and_the_others_are(self) -> None:
        async with bench(pace(interval_s=SOON_S)) as b:
            b.serve()
            b.serve(B)
            b.prober.follow(joined(A))
            b.prober.follow(Add("p", Replica(B)))
            await b.checked(address=B)
            b.prober.follow(Remove("p", B))
            asked = b.asked(address=B)
            await b.checked(10)
            assert b.asked(address=B) == asked

    async def test_pools_that_it_does_not_know_are_ignored(self) -> None:
        async with bench(pace()) as b:
            b.prober.follow(Reset("q", (Replica(A),)))
            assert repr(b.prober) == "<Prober no replicas>"

    async def test_stop_ends_every_task_and_closes_the_pages(self) -> None:
        async with bench(pace(interval_s=SOON_S)) as b:
            b.prober.follow(joined(A, B))
            await b.checked()
            await b.prober.stop()
            assert b.pages.closed
            assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("probe ")]

    async def test_a_mistake_in_what_takes_the_facts_does_not_end_the_checks(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with bench(pace(interval_s=SOON_S)) as b:
            b.serve()
            b.trouble = ZeroDivisionError()
            b.prober.follow(joined(A))
            await b.checked(3)
        assert f"probe of {A} in pool p failed" in caplog.messages


class TestOverHttp:
    """Against the simulated vLLM, which answers as the recorded one does."""

    async def test_the_life_of_a_replica_from_health_to_a_hang_to_death(self) -> None:
        health = Health.model_construct(
            interval_s=0.02, doubt_interval_s=0.02, timeout_s=0.3, path="/health", deep_interval_s=0.02
        )
        facts: list[Fact] = []

        def last(probe: Probe) -> bool | None:
            return next((f.ok for f in reversed(facts) if isinstance(f, Probed) and f.probe is probe), None)

        async with replica() as one:
            prober = Prober(
                {"p": Checks(health, ("sim",))},
                facts.append,
                rng=Random(1),
                doubtful=lambda _: False,
                idle=lambda _: True,
            )
            prober.follow(joined(one.address))
            try:
                await until(lambda: last(DEEP))
                assert (last(LIVE), last(READY)) == (True, True)
                one.hang = True
                await until(lambda: last(DEEP) is False)
                assert (last(LIVE), last(READY)) == (True, True)
                one.hang = False
                await until(lambda: last(DEEP))
                await one.stop()
                await until(lambda: last(LIVE) is False and last(READY) is False)
            finally:
                await prober.stop()


async def test_a_page_of_any_status_and_a_post_come_over_http() -> None:
    pages = HttpPages()
    async with Backend() as backend:
        assert await pages.ask(backend.address, "/a", 5) == Page(200, backend.address.encode())
        assert (await pages.ask(backend.address, "/b", 5, b"{}")) == Page(200, backend.address.encode())
        first, second = backend.received
        assert (first.method, second.method, second.body) == ("GET", "POST", b"{}")
        assert second.headers["content-type"] == "application/json"
    assert await pages.ask(f"127.0.0.1:{free_port()}", "/a", 5, b"{}") is ScrapeFailure.REFUSED
    await pages.close()
