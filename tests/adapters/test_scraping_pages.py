"""Pages over real sockets on loopback: what each kind of trouble is called, and the scraper on top of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random

import pytest
from aiohttp import web

from extproc.adapters.engines import ENGINES
from extproc.adapters.pages import HttpPages
from extproc.adapters.scraping import Scraper, Target
from extproc.config import Scrape
from extproc.core.types import Fact, Identified, NotSampled, Replica, Reset, Sampled, ScrapeFailure, Serves
from tests.adapters.engines.pages import RECORDED, recorded
from tests.support.ports import free_port
from tests.support.waiting import until

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """One replica's HTTP server, whose answer a test changes while it runs."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.page: Handler = text(recorded("metrics_idle_fresh.txt"))
        self.requests: list[web.Request] = []
        self.at_once = 0
        self.most_at_once = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", text(b'{"data":[{"id":"tiny"},{"id":"adapter-a"}]}'))
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        host, port = self.address.split(":")
        await web.TCPSite(self._runner, host, int(port), reuse_address=True).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.page(request)
        finally:
            self.at_once -= 1


def text(body: bytes, status: int = 200) -> Handler:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status)

    return handler


async def hang(_request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError("nobody waits so long")


async def trickle(request: web.Request) -> web.StreamResponse:
    """Headers and some bytes at once, the end never."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"vllm:num_requests_running 1\n")
    return await hang(request)


async def endless(request: web.Request) -> web.StreamResponse:
    """As many bytes as are taken."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"x" * 65536)


async def break_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"vllm:num_requests_running 1\n")
    assert request.transport is not None
    request.transport.abort()
    return response


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def pages() -> AsyncIterator[HttpPages]:
    made = HttpPages(max_bytes=256 * 1024)
    yield made
    await made.close()


class TestGet:
    @pytest.mark.parametrize("name", RECORDED)
    async def test_a_page_comes_whole(self, server: Server, pages: HttpPages, name: str) -> None:
        server.page = text(recorded(name))
        assert await pages.get(server.address, "/metrics", 5) == recorded(name)

    @pytest.mark.parametrize(
        ("page", "why"),
        [
            (hang, ScrapeFailure.LATE),
            (trickle, ScrapeFailure.LATE),
            (text(b"", 500), ScrapeFailure.STATUS),
            (text(b"vllm:num_requests_running 1", 503), ScrapeFailure.STATUS),
            (endless, ScrapeFailure.TOO_LARGE),
            (break_off, ScrapeFailure.UNREADABLE),
        ],
    )
    async def test_trouble_has_a_name(
        self, server: Server, pages: HttpPages, page: Handler, why: ScrapeFailure
    ) -> None:
        server.page = page
        assert await pages.get(server.address, "/metrics", 0.3) is why

    async def test_a_redirect_is_not_followed(self, server: Server, pages: HttpPages) -> None:
        async def elsewhere(_request: web.Request) -> web.StreamResponse:
            return web.Response(status=302, headers={"location": "/v1/models"})

        server.page = elsewhere
        assert await pages.get(server.address, "/metrics", 5) is ScrapeFailure.STATUS

    async def test_where_nothing_listens_it_is_refused(self, pages: HttpPages) -> None:
        assert await pages.get(f"127.0.0.1:{free_port()}", "/metrics", 5) is ScrapeFailure.REFUSED

    async def test_what_speaks_no_http_is_unreadable(self, pages: HttpPages) -> None:
        async def shout(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-x\r\n")
            writer.close()

        port = free_port()
        async with await asyncio.start_server(shout, "127.0.0.1", port):
            assert await pages.get(f"127.0.0.1:{port}", "/metrics", 5) is ScrapeFailure.UNREADABLE

    async def test_the_connection_is_kept_and_nothing_compressed_is_asked_for(
        self, server: Server, pages: HttpPages
    ) -> None:
        for _ in range(3):
            await pages.get(server.address, "/metrics", 5)
        assert len({r.transport for r in server.requests}) == 1
        assert {r.headers["accept-encoding"] for r in server.requests} == {"identity"}


@asynccontextmanager
async def scraping(address: str, scrape: Scrape) -> AsyncIterator[list[Fact]]:
    facts: list[Fact] = []
    scraper = Scraper({"p": Target((ENGINES["vllm"],), scrape)}, facts.append, rng=Random(1))
    scraper.follow(Reset("p", (Replica(address),)))
    try:
        yield facts
    finally:
        await scraper.stop()


class TestScraperOverHttp:
    async def test_the_life_of_a_replica_from_start_to_overload_to_death_and_back(self, server: Server) -> None:
        scrape = Scrape.model_construct(interval_s=0.01, idle_interval_s=0.05, timeout_s=0.2, models_interval_s=60.0)
        async with scraping(server.address, scrape) as facts:
            await until(lambda: any(isinstance(f, Serves) for f in facts))
            assert facts[0] == Identified("p", server.address, "vllm")
            first = facts[1]
            assert isinstance(first, Sampled)
            assert (first.sample.running, first.sample.waiting) == (0, 0)
            server.page = text(recorded("metrics_loaded_30req.txt"))
            await until(lambda: isinstance(facts[-1], Sampled) and facts[-1].sample.waiting == 22)
            server.page = hang
            await until(lambda: facts[-1] == NotSampled("p", server.address, ScrapeFailure.LATE))
            await server.stop()
            await until(lambda: facts[-1] == NotSampled("p", server.address, ScrapeFailure.REFUSED))
            server.page = text(recorded("metrics_idle_fresh.txt"))
            await server.start()
            await until(lambda: facts[-1] == Serves("p", server.address, ("tiny", "adapter-a")))
            assert server.most_at_once == 1

    async def test_stop_does_not_wait_for_a_page_that_hangs(self, server: Server) -> None:
        server.page = hang
        clock = asyncio.get_running_loop().time
        async with scraping(server.address, Scrape(interval_s=0.001, timeout_s=30)) as facts:
            await until(lambda: server.at_once)
            begun = clock()
        assert clock() - begun < 2
        assert facts == []
