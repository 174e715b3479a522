"""The pace and the membership of scrapes, on a fake of the network. The network itself: test_scraping_pages.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from random import Random

import pytest

from extproc.adapters.engines import CHOICES
from extproc.adapters.pages import FakePages, Page
from extproc.adapters.scraping import MODELS_PATH, Scraper, Target
from extproc.config import Scrape
from extproc.core.types import (
    Add,
    Fact,
    Identified,
    NotSampled,
    Remove,
    Replica,
    Reset,
    Sample,
    Sampled,
    ScrapeFailure,
    Serves,
)
from tests.adapters.engines.pages import documented
from tests.support.waiting import until

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
IDLE = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
WORKING = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 3\n"
MODELS = b'{"data":[{"id":"tiny"},{"id":"adapter-a"}]}'
FOREVER_S = 1000.0


def pace(interval_s: float = 0.01, idle_interval_s: float = FOREVER_S, models_interval_s: float = FOREVER_S) -> Scrape:
    return Scrape(interval_s=interval_s, idle_interval_s=idle_interval_s, models_interval_s=models_interval_s)


class Bench:
    """A scraper of pool `p` with everything around it in reach."""

    def __init__(self, scrape: Scrape, engine: str = "vllm") -> None:
        self.pages = FakePages()
        self.facts: list[Fact] = []
        self.times: list[float] = []
        self.trouble: Exception | None = None
        self.busy: set[str] = set()
        self.scraper = Scraper(
            {"p": Target(CHOICES[engine], scrape)},
            self._learn,
            rng=Random(1),
            busy=self.busy.__contains__,
            pages=self.pages,
        )

    def _learn(self, fact: Fact) -> None:
        if self.trouble:
            raise self.trouble
        self.facts.append(fact)
        self.times.append(asyncio.get_running_loop().time())

    def serve(self, address: str, page: bytes | ScrapeFailure, models: bytes | ScrapeFailure = MODELS) -> None:
        self.pages.answers[address, "/metrics"] = page
        self.pages.answers[address, MODELS_PATH] = models

    def scrapes(self, address: str) -> int:
        return self.pages.asked.count((address, "/metrics"))

    def served(self) -> int:
        return sum(isinstance(f, Serves) for f in self.facts)

    async def scraped(self, address: str, times: int) -> None:
        """So many more scrapes of it than now."""
        goal = self.scrapes(address) + times
        await until(lambda: self.scrapes(address) >= goal, every_s=0.002)


def told_last(b: Bench, fact: Fact) -> bool:
    return b.facts[-1] == fact


@asynccontextmanager
async def bench(scrape: Scrape, engine: str = "vllm") -> AsyncIterator[Bench]:
    made = Bench(scrape, engine)
    try:
        yield made
    finally:
        await made.scraper.stop()


def joined(*addresses: str) -> Reset:
    return Reset("p", tuple(Replica(a) for a in addresses))


async def settled(check: Callable[[], int], for_s: float = 0.1) -> None:
    """It does not grow any more: ten times the shortest interval of these tests without a change."""
    before = check()
    await asyncio.sleep(for_s)
    assert check() == before


class TestFacts:
    async def test_a_replica_is_sampled_and_its_models_are_read_when_it_joins(self) -> None:
        async with bench(pace()) as b:
            b.serve(A, IDLE)
            b.scraper.follow(joined(A))
            await until(b.served)
            assert b.facts == [
                Identified("p", A, "vllm"),
                Sampled("p", A, Sample(running=0, waiting=0)),
                Serves("p", A, ("tiny", "adapter-a")),
            ]
            assert repr(b.scraper) == "<Scraper 1 sampled>"

    @pytest.mark.parametrize("why", list(ScrapeFailure))
    async def test_a_failure_is_handed_on_as_it_came(self, why: ScrapeFailure) -> None:
        async with bench(pace()) as b:
            b.serve(A, why, models=why)
            b.scraper.follow(joined(A))
            await until(lambda: b.facts)
            assert b.facts[0] == NotSampled("p", A, why)
            assert repr(b.scraper) == f"<Scraper 1 {why}>"

    @pytest.mark.parametrize("page", [b"<html>", b"vllm:num_requests_running NaN\n"])
    async def test_a_page_that_says_nothing_of_use_is_unreadable(self, page: bytes) -> None:
        async with bench(pace()) as b:
            b.serve(A, page)
            b.scraper.follow(joined(A))
            await until(lambda: b.facts)
            assert b.facts[0] == NotSampled("p", A, ScrapeFailure.UNREADABLE)

    async def test_without_an_engine_only_the_models_are_read(self) -> None:
        async with bench(pace(idle_interval_s=0.01, models_interval_s=0.01), engine="none") as b:
            b.serve(A, IDLE)
            b.scraper.follow(joined(A))
            await until(lambda: b.served() >= 3)
            assert b.scrapes(A) == 0

    async def test_a_change_of_state_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "extproc.adapters.scraping")
        async with bench(pace()) as b:
            b.serve(A, WORKING)
            b.scraper.follow(joined(A))
            await b.scraped(A, 3)
            b.serve(A, ScrapeFailure.LATE)
            await b.scraped(A, 3)
        assert [r.getMessage() for r in caplog.records] == [
            f"replica {A} of pool p: sampled, was unseen",
            f"replica {A} of pool p is vllm by its metrics",
            f"replica {A} of pool p: late, was sampled",
        ]


class TestPace:
    @pytest.mark.parametrize("page", [WORKING, ScrapeFailure.LATE], ids=["work", "late"])
    async def test_a_replica_that_has_work_or_is_late_is_scraped_each_interval(
        self, page: bytes | ScrapeFailure
    ) -> None:
        async with bench(pace()) as b:
            b.serve(A, page)
            b.scraper.follow(joined(A))
            await b.scraped(A, 5)

    @pytest.mark.parametrize(
        "page", [IDLE, ScrapeFailure.STATUS, ScrapeFailure.UNREADABLE], ids=["idle", "status", "unreadable"]
    )
    async def test_any_other_waits_for_the_idle_interval(self, page: bytes | ScrapeFailure) -> None:
        async with bench(pace()) as b:
            b.serve(A, page)
            b.scraper.follow(joined(A))
            await b.scraped(A, 1)
            await settled(lambda: b.scrapes(A))

    async def test_the_idle_interval_ends_too(self) -> None:
        async with bench(pace(interval_s=0.005, idle_interval_s=0.02)) as b:
            b.serve(A, IDLE)
            b.scraper.follow(joined(A))
            await b.scraped(A, 4)

    async def test_our_own_flights_count_as_work_whatever_the_engine_says(self) -> None:
        async with bench(pace()) as b:
            b.serve(A, IDLE)
            b.busy.add(A)
            b.scraper.follow(joined(A))
            await b.scraped(A, 5)

    async def test_wake_brings_the_next_scrape_forward_once(self) -> None:
        async with bench(pace()) as b:
            b.serve(A, IDLE)
            b.scraper.follow(joined(A))
            await until(b.served)
            b.scraper.wake(A)
            b.scraper.wake(A)
            await b.scraped(A, 1)
            await settled(lambda: b.scrapes(A))

    async def test_wake_waits_one_interval_so_that_the_engine_has_taken_the_work_up(self) -> None:
        async with bench(pace(interval_s=0.1)) as b:
            b.serve(A, IDLE)
            b.scraper.follow(joined(A))
            await until(b.served)
            clock = asyncio.get_running_loop().time
            woken = clock()
            b.scraper.wake(A)
            await b.scraped(A, 1)
            assert clock() - woken >= 0.09

    async def test_wake_of_an_unknown_address_does_nothing(self) -> None:
        async with bench(pace()) as b:
            b.scraper.wake(A)
            assert b.pages.asked == []

    async def test_a_refusing_replica_is_asked_ever_more_rarely_up_to_the_idle_interval(self) -> None:
        async with bench(pace(interval_s=0.01, idle_interval_s=0.08)) as b:
            b.scraper.follow(joined(A))
            await until(lambda: len(b.times) >= 7)
        gaps = [later - earlier for earlier, later in pairwise(b.times)]
        # Each wait is at least 0.9 of what is planned; a loaded machine only makes it longer.
        for gap, planned in zip(gaps, [0.01, 0.02, 0.04, 0.08, 0.08, 0.08], strict=False):
            assert gap >= 0.9 * planned - 0.002

    async def test_replicas_that_join_at_once_are_not_scraped_in_one_instant(self) -> None:
        async with bench(pace(interval_s=10.0)) as b:
            addresses = [f"10.0.1.{i}:1" for i in range(20)]
            for address in addresses:
                b.serve(address, IDLE)
            b.scraper.follow(joined(*addresses))
            await until(lambda: b.facts)
            assert b.served() < 10


class TestModels:
    async def test_they_are_read_again_each_models_interval(self) -> None:
        async with bench(pace(models_interval_s=0.03)) as b:
            b.serve(A, WORKING)
            b.scraper.follow(joined(A))
            await until(lambda: b.served() >= 3)
            assert b.scrapes(A) > b.served()

    async def test_they_are_read_at_once_when_a_replica_comes_back(self) -> None:
        async with bench(pace(idle_interval_s=0.02)) as b:
            b.serve(A, WORKING)
            b.scraper.follow(joined(A))
            await until(lambda: b.served() == 1)
            b.serve(A, ScrapeFailure.REFUSED)
            await until(lambda: isinstance(b.facts[-1], NotSampled))
            b.serve(A, WORKING, models=b'{"data":[{"id":"other"}]}')
            await until(lambda: b.served() == 2)
            assert [f.models for f in b.facts if isinstance(f, Serves)] == [("tiny", "adapter-a"), ("other",)]

    async def test_they_are_read_soon_where_they_may_have_changed(self) -> None:
        async with bench(pace(idle_interval_s=60.0)) as b:
            b.serve(A, WORKING)
            b.scraper.follow(joined(A))
            await until(lambda: b.served() == 1)
            b.serve(A, WORKING, models=b'{"data":[{"id":"tiny"}]}')
            b.scraper.list_soon(A)
            await until(lambda: b.served() == 2)
            assert [f.models for f in b.facts if isinstance(f, Serves)] == [("tiny", "adapter-a"), ("tiny",)]

    @pytest.mark.parametrize("answer", [b"<html>", ScrapeFailure.STATUS])
    async def test_no_list_is_quiet_and_tried_again_at_the_idle_pace(self, answer: bytes | ScrapeFailure) -> None:
        async with bench(pace(interval_s=0.005, idle_interval_s=0.05)) as b:
            b.serve(A, WORKING, models=answer)
            b.scraper.follow(joined(A))
            await until(lambda: b.pages.asked.count((A, MODELS_PATH)) >= 2)
            assert b.scrapes(A) > 2
            assert all(isinstance(f, Sampled | Identified) for f in b.facts)

    async def test_a_replica_that_does_not_answer_is_not_asked_for_models(self) -> None:
        async with bench(pace()) as b:
            b.serve(A, ScrapeFailure.LATE)
            b.scraper.follow(joined(A))
            await b.scraped(A, 3)
            assert (A, MODELS_PATH) not in b.pages.asked


class TestEngines:
    """`engine: auto`: each replica by its own page."""

    async def test_replicas_of_one_pool_may_be_different_engines(self) -> None:
        async with bench(pace(), "auto") as b:
            b.serve(A, WORKING)
            b.serve(B, documented("sglang_0.5.txt"))
            b.scraper.follow(joined(A, B))
            await until(lambda: len({f.address for f in b.facts if isinstance(f, Sampled)}) == 2)
            assert {f.address: f.engine for f in b.facts if isinstance(f, Identified)} == {A: "vllm", B: "sglang"}
            told = {f.address: (f.sample.running, f.sample.waiting) for f in b.facts if isinstance(f, Sampled)}
            assert told == {A: (0, 3), B: (5, 4)}
            assert (B, "/prometheus/metrics") not in b.pages.asked

    async def test_another_engine_at_the_same_address_is_noticed(self) -> None:
        async with bench(pace(), "auto") as b:
            b.serve(A, WORKING)
            b.scraper.follow(joined(A))
            await until(b.served)
            b.serve(A, documented("tgi_3.txt"))
            await until(lambda: Identified("p", A, "tgi") in b.facts)
            after = b.facts[b.facts.index(Identified("p", A, "tgi")) + 1]
            assert isinstance(after, Sampled)
            assert after.sample.running == 4

    async def test_a_page_that_tells_less_than_before_goes_to_who_reads_most_of_it(self) -> None:
        """Triton's first model was of another backend."""
        async with bench(pace(), "auto") as b:
            b.serve(A, documented("triton.txt"))
            b.scraper.follow(joined(A))
            await until(b.served)
            b.serve(A, documented("triton_trtllm.txt"))
            await until(lambda: Identified("p", A, "triton_trtllm") in b.facts)
            assert b.facts[0] == Identified("p", A, "triton")

    async def test_where_one_path_has_no_metrics_the_next_is_asked_and_then_first(self) -> None:
        async with bench(pace(), "auto") as b:
            b.serve(A, documented("trtllm_iterations.json"))
            b.pages.answers[A, "/prometheus/metrics"] = documented("trtllm_1.2.txt")
            b.scraper.follow(joined(A))
            await until(lambda: b.pages.asked.count((A, "/prometheus/metrics")) >= 4)
            assert b.facts[0] == Identified("p", A, "trtllm")
            assert b.scrapes(A) == 1

    @pytest.mark.parametrize("answer", [ScrapeFailure.REFUSED, Page(503)], ids=repr)
    async def test_only_a_page_without_metrics_sends_on_to_another_path(self, answer: Page | ScrapeFailure) -> None:
        async with bench(pace(), "auto") as b:
            b.pages.answers[A, "/metrics"] = answer
            b.scraper.follow(joined(A))
            await until(lambda: b.facts)
            assert (A, "/prometheus/metrics") not in b.pages.asked

    async def test_a_page_that_never_ends_does_not_hide_the_one_on_another_path(self) -> None:
        async with bench(pace(), "auto") as b:
            b.pages.answers |= {
                (A, "/metrics"): ScrapeFailure.LATE,
                (A, "/prometheus/metrics"): documented("trtllm_1.2.txt"),
                (A, MODELS_PATH): MODELS,
            }
            b.scraper.follow(joined(A))
            await until(lambda: Identified("p", A, "trtllm") in b.facts)
            assert b.facts[0] == NotSampled("p", A, ScrapeFailure.LATE)

    async def test_one_that_is_late_once_is_looked_for_where_it_was(self) -> None:
        async with bench(pace(), "auto") as b:
            b.serve(A, WORKING)
            b.scraper.follow(joined(A))
            await until(b.served)
            b.serve(A, ScrapeFailure.LATE)
            await b.scraped(A, 4)
            assert (A, "/prometheus/metrics") not in b.pages.asked

    @pytest.mark.parametrize(
        ("page", "why", "what"),
        [
            (Page(404), ScrapeFailure.STATUS, "status 404"),
            (Page(401), ScrapeFailure.STATUS, "status 401"),
            (Page(307), ScrapeFailure.STATUS, "status 307"),
            (b"up 1\n", ScrapeFailure.UNREADABLE, "no figures that are known"),
            (ScrapeFailure.TOO_LARGE, ScrapeFailure.TOO_LARGE, "too_large"),
        ],
        ids=repr,
    )
    async def test_one_that_tells_nothing_is_said_so_once_with_the_remedy(
        self, page: Page | bytes | ScrapeFailure, why: ScrapeFailure, what: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """SGLang without --enable-metrics answers 404."""
        async with bench(pace(idle_interval_s=0.01), "auto") as b:
            b.pages.answers |= {(A, "/metrics"): page, (A, "/prometheus/metrics"): Page(404), (A, MODELS_PATH): MODELS}
            b.scraper.follow(joined(A))
            await b.scraped(A, 4)
            assert b.facts.count(NotSampled("p", A, why)) >= 3
            assert not [f for f in b.facts if isinstance(f, Sampled | Identified)]
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == 1
        told = f"tells nothing of its load on /metrics ({what}) or /prometheus/metrics (status 404): only"
        assert f"replica {A} of pool p {told}" in warned[0]
        assert "sglang needs --enable-metrics" in warned[0]

    async def test_one_that_told_and_no_longer_does_is_no_longer_known_and_it_is_said_each_time(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with bench(pace(idle_interval_s=0.01), "auto") as b:
            b.serve(A, WORKING)
            b.pages.answers[A, "/prometheus/metrics"] = Page(404)
            b.scraper.follow(joined(A))
            await until(b.served)
            b.pages.answers[A, "/metrics"] = Page(404)
            await until(lambda: Identified("p", A, None) in b.facts)
            b.serve(A, WORKING)
            await until(lambda: b.facts.count(Identified("p", A, "vllm")) == 2)
            b.pages.answers[A, "/metrics"] = Page(404)
            await until(lambda: b.facts.count(Identified("p", A, None)) == 2)
        assert caplog.text.count("tells nothing of its load") == 2

    async def test_an_engine_that_is_named_is_the_only_one_looked_for(self) -> None:
        async with bench(pace(), "sglang") as b:
            b.serve(A, WORKING)
            b.scraper.follow(joined(A))
            await until(lambda: b.facts)
            assert b.facts[0] == NotSampled("p", A, ScrapeFailure.UNREADABLE)


class TestPlaces:
    """Where the metrics are, when not on the replica's own port."""

    OWN = "10.0.0.1:8002"

    async def test_on_another_port_of_its_host(self) -> None:
        scrape = pace().model_copy(update={"port": 8002})
        async with bench(scrape, "triton") as b:
            b.serve(A, b"")
            b.pages.answers[self.OWN, "/metrics"] = documented("triton_trtllm.txt")
            b.scraper.follow(joined(A))
            await until(b.served)
            assert b.facts[0] == Identified("p", A, "triton_trtllm")
            assert b.scrapes(A) == 0

    async def test_that_this_port_refuses_is_said_and_does_not_condemn_the_replica(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with bench(pace().model_copy(update={"port": 8002}), "triton") as b:
            b.serve(A, b"")
            b.scraper.follow(joined(A))
            await until(b.served)
            assert b.facts[0] == NotSampled("p", A, ScrapeFailure.UNREADABLE)
        assert f"tells nothing of its load at {self.OWN} on /metrics (unreadable): only" in caplog.text

    async def test_on_several_nodes_that_make_up_one_replica(self) -> None:
        nodes = ("10.0.0.8:8080", "10.0.0.9:8080")
        async with bench(pace(idle_interval_s=0.01), "ray") as b:
            b.serve(A, b"")
            for node, page in zip(nodes, ("ray_node_a.txt", "ray_node_b.txt"), strict=True):
                b.pages.answers[node, "/metrics"] = documented(page)
            b.scraper.follow(Reset("p", (Replica(A, {"metrics": ", ".join(nodes)}),)))
            await until(b.served)
            sample = next(f.sample for f in b.facts if isinstance(f, Sampled))
            assert (sample.running, sample.waiting, sample.num_blocks) == (8, 1, 2000)
            for answer, why in (
                (ScrapeFailure.REFUSED, ScrapeFailure.UNREADABLE),
                (ScrapeFailure.LATE, ScrapeFailure.LATE),
                (Page(503), ScrapeFailure.STATUS),
            ):
                b.pages.answers[nodes[1], "/metrics"] = answer
                await until(partial(told_last, b, NotSampled("p", A, why)))

    async def test_a_label_that_names_no_address_is_said_so_and_left_out(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with bench(pace()) as b:
            b.serve(A, IDLE)
            b.scraper.follow(Reset("p", (Replica(A, {"metrics": "node-1:8080"}),)))
            await until(b.served)
            assert b.scrapes(A) == 1
        assert f"replica {A}: label metrics is 'node-1:8080'" in caplog.text

    async def test_a_changed_label_and_a_changed_port_count_from_the_next_scrape_on(self) -> None:
        async with bench(pace()) as b:
            b.serve(A, WORKING)
            b.pages.answers[self.OWN, "/metrics"] = WORKING
            b.scraper.follow(joined(A))
            await until(b.served)
            b.scraper.retarget("p", Target(CHOICES["vllm"], pace().model_copy(update={"port": 8002})))
            await b.scraped(self.OWN, 2)
            b.scraper.follow(Add("p", Replica(A, {"metrics": A})))
            await b.scraped(A, 2)


class TestRanks:
    """Several engines behind one address, told apart by a label."""

    PAGE = documented("sglang_0.5_ranks.txt")

    @staticmethod
    def target(ranks: int) -> Target:
        return Target(CHOICES["auto"], pace(), ranks)

    async def test_each_is_sampled_under_its_own_name(self) -> None:
        async with bench(pace(), "auto") as b:
            b.scraper.retarget("p", self.target(2))
            b.serve(A, self.PAGE)
            b.scraper.follow(joined(A))
            await until(b.served)
            told = {f.address: (f.sample.running, f.sample.waiting) for f in b.facts if isinstance(f, Sampled)}
            assert told == {f"{A}/0": (4, 2), f"{A}/1": (1, 0)}
            assert b.facts[0] == Identified("p", A, "sglang")

    async def test_one_of_which_the_page_tells_nothing_is_not_known_and_it_is_said(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with bench(pace(), "auto") as b:
            b.scraper.retarget("p", self.target(3))
            b.serve(A, self.PAGE)
            b.scraper.follow(joined(A))
            await b.scraped(A, 4)
            assert NotSampled("p", f"{A}/2", ScrapeFailure.UNREADABLE) in b.facts
        said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(said) == 1
        assert (
            f"replica {A} of pool p tells of data parallel ranks [0, 1], but data_parallel is 3: of the rest" in said[0]
        )

    async def test_more_than_were_said_to_be_there_are_left_alone_and_it_is_said(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        page = b"".join(b'vllm:num_requests_running{engine="%d"} 1\n' % rank for rank in range(3))
        async with bench(pace(), "vllm") as b:
            b.scraper.retarget("p", self.target(2))
            b.serve(A, page)
            b.scraper.follow(joined(A))
            await until(b.served)
            assert {f.address for f in b.facts if isinstance(f, Sampled)} == {f"{A}/0", f"{A}/1"}
        assert "ranks [0, 1, 2], but data_parallel is 2: the rest gets nothing from here" in caplog.text

    async def test_a_page_that_does_not_tell_them_apart_tells_nothing_of_any(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with bench(pace(), "auto") as b:
            b.scraper.retarget("p", self.target(2))
            b.serve(A, WORKING)
            b.scraper.follow(joined(A))
            await until(b.served)
            assert not [f for f in b.facts if isinstance(f, Sampled)]
        assert "tells of data parallel ranks not at all, but data_parallel is 2" in caplog.text


class TestMembership:
    async def test_a_removed_replica_is_no_longer_scraped_and_the_others_are(self) -> None:
        async with bench(pace()) as b:
            b.serve(A, WORKING)
            b.serve(B, WORKING)
            b.scraper.follow(joined(A))
            b.scraper.follow(Add("p", Replica(B)))
            await b.scraped(B, 1)
            b.scraper.follow(Remove("p", B))
            told = sum(getattr(f, "address", None) == B for f in b.facts)
            asked = b.scrapes(B)
            await b.scraped(A, 10)
            assert b.scrapes(B) == asked
            assert sum(getattr(f, "address", None) == B for f in b.facts) == told

    async def test_a_reset_ends_those_not_listed_and_leaves_the_others_undisturbed(self) -> None:
        async with bench(pace()) as b:
            b.serve(A, IDLE)
            b.serve(B, IDLE)
            b.scraper.follow(joined(A))
            await until(lambda: b.served() == 1)
            b.scraper.follow(joined(A, B))
            await until(lambda: b.served() == 2)
            assert b.scrapes(A) == 1
            b.scraper.follow(joined(B))
            assert repr(b.scraper) == "<Scraper 1 sampled>"

    async def test_a_replica_added_again_with_other_labels_keeps_its_task(self) -> None:
        async with bench(pace()) as b:
            b.serve(A, IDLE)
            b.scraper.follow(joined(A))
            await until(b.served)
            b.scraper.follow(Add("p", Replica(A, {"gpu": "h100"})))
            await settled(lambda: b.scrapes(A))
            assert b.scrapes(A) == 1

    async def test_pools_that_it_does_not_know_and_removals_of_strangers_are_ignored(self) -> None:
        async with bench(pace()) as b:
            b.scraper.follow(Reset("q", (Replica(A),)))
            b.scraper.follow(Remove("p", A))
            assert repr(b.scraper) == "<Scraper no replicas>"


class TestEnd:
    async def test_stop_ends_every_task_closes_the_pages_and_ignores_later_changes(self) -> None:
        async with bench(pace()) as b:
            b.serve(A, WORKING)
            b.scraper.follow(joined(A, B))
            await b.scraped(A, 1)
            await b.scraper.stop()
            assert b.pages.closed
            assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("scrape ")]
            b.scraper.follow(joined(A))
            assert repr(b.scraper) == "<Scraper no replicas>"

    async def test_a_mistake_in_what_takes_the_facts_does_not_end_the_scrapes(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with bench(pace(idle_interval_s=0.01)) as b:
            b.serve(A, WORKING)
            b.trouble = ZeroDivisionError()
            b.scraper.follow(joined(A))
            await b.scraped(A, 3)
        assert f"scrape of {A} in pool p failed" in caplog.messages
