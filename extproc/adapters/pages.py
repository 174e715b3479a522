"""Fetches pages from replicas over HTTP, bounded in time, size and number, and says in one word why there is none."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass
from typing import Final, Protocol

import aiohttp
from yarl import URL

from extproc.core.types import ScrapeFailure

MAX_PAGE_BYTES: Final = 4 * 1024 * 1024
"""Largest page that is read; vLLM's has 60 KB, and 64 data parallel ranks would make it 3 MB."""
MAX_AT_ONCE: Final = 256
"""Fetches in progress over all replicas; well below the usual limit of 1024 open files."""
KEEP_ALIVE_S: Final = 3.0
"""Idle connections are closed before the replica does it (uvicorn: after 5 s), or each scrape of an idle replica would meet a closed one."""
USER_AGENT: Final = "extproc"
"""So that the logs of replicas tell our questions from those of clients."""

_GONE: Final = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ECONNRESET})
"""Why a connection fails when nothing listens. Others (no file descriptor left, say) are our own trouble and must not condemn the replica."""


@dataclass(frozen=True, slots=True)
class Page:
    """An answer; of one that is not 200 the body is not read."""

    status: int
    body: bytes = b""


class Pages(Protocol):
    """Where pages come from."""

    async def get(self, address: str, path: str, timeout_s: float) -> bytes | ScrapeFailure:
        """The body of `http://address/path`, or why there is none."""

    async def ask(self, address: str, path: str, timeout_s: float, sent: bytes | None = None) -> Page | ScrapeFailure:
        """The same with any status; what is `sent` (JSON) makes it a POST. Never `ScrapeFailure.STATUS`."""

    async def close(self) -> None:
        """Let go of all connections. No `get` may follow."""


class HttpPages:
    """Pages over one session of aiohttp, connections kept open. Opens at the first `get`, which needs a running loop."""

    def __init__(self, max_bytes: int = MAX_PAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def get(self, address: str, path: str, timeout_s: float) -> bytes | ScrapeFailure:
        return _body(await self.ask(address, path, timeout_s))

    async def ask(self, address: str, path: str, timeout_s: float, sent: bytes | None = None) -> Page | ScrapeFailure:
        """The deadline does not run while we wait for our own turn: that the replica is late must be the replica's doing."""
        url = URL(f"http://{address}{path}", encoded=True)
        async with self._slots:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._fetch(self._opened(), url, sent)
            except TimeoutError:
                return ScrapeFailure.LATE
            except aiohttp.ClientConnectorError as e:
                return ScrapeFailure.REFUSED if e.os_error.errno in _GONE else ScrapeFailure.LATE
            except (aiohttp.ClientError, OSError):
                return ScrapeFailure.UNREADABLE  # broke off, or speaks no HTTP

    async def close(self) -> None:
        self._closed = True
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._closed:
            raise RuntimeError("pages are closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=MAX_AT_ONCE, keepalive_timeout=KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # one deadline, ours, around the whole
                cookie_jar=aiohttp.DummyCookieJar(),
                # Not compressed: that would cost the replica's event loop and ours, and let a small page inflate to a large one.
                headers={
                    "accept": "text/plain, application/json",
                    "accept-encoding": "identity",
                    "user-agent": USER_AGENT,
                },
            )
        return self._session

    async def _fetch(self, session: aiohttp.ClientSession, url: URL, sent: bytes | None) -> Page | ScrapeFailure:
        method, headers = ("GET", {}) if sent is None else ("POST", {"content-type": "application/json"})
        # No redirects: a replica must not send us to hosts that discovery did not name.
        async with session.request(method, url, data=sent, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                return Page(response.status)
            page = bytearray()
            async for chunk in response.content.iter_any():
                page += chunk
                if len(page) > self._max_bytes:
                    response.close()  # the rest is not read, as it would be to keep the connection
                    return ScrapeFailure.TOO_LARGE
            return Page(200, bytes(page))


def _body(page: Page | ScrapeFailure) -> bytes | ScrapeFailure:
    if isinstance(page, ScrapeFailure):
        return page
    return page.body if page.status == 200 else ScrapeFailure.STATUS


class FakePages:
    """Answers set by hand, by (address, path); what was asked for is kept. An address without an answer refuses."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], bytes | Page | ScrapeFailure] = {}
        """Bytes are a page of status 200."""
        self.asked: list[tuple[str, str]] = []
        self.sent: list[bytes] = []
        """Bodies of POSTs."""
        self.closed = False

    async def get(self, address: str, path: str, timeout_s: float) -> bytes | ScrapeFailure:
        return _body(await self.ask(address, path, timeout_s))

    async def ask(self, address: str, path: str, timeout_s: float, sent: bytes | None = None) -> Page | ScrapeFailure:  # noqa: ARG002 - a Protocol's
        await asyncio.sleep(0)
        self.asked.append((address, path))
        if sent is not None:
            self.sent.append(sent)
        answer = self.answers.get((address, path), ScrapeFailure.REFUSED)
        if answer is ScrapeFailure.STATUS:
            return Page(500)
        return Page(200, answer) if isinstance(answer, bytes) else answer

    async def close(self) -> None:
        self.closed = True
