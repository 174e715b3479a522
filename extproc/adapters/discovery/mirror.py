"""Keeps what matches a query as the API server has it, through everything that a watch may meet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import Final, Generic, TypeVar

from extproc.adapters.discovery.base import OnError
from extproc.adapters.discovery.kube_api import (
    BrokenError,
    Connect,
    Event,
    GoneError,
    KubeApi,
    KubeError,
    Listed,
    Object,
    Query,
    key_of,
    version_of,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

EXPECTED_IN_A_ROW: Final = 2
"""A connection that breaks, and a version that is gone when the next is opened, are what a restart of the API server looks like."""

_NOTHING: Final = object()


class ObjectError(ValueError):
    """An object cannot be used; the text says what is wrong in it, in one line."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a mirror asks. Seconds, each varied by up to a tenth, so that many sidecars do not ask in step."""

    resync_s: float = 300.0
    """From one list to the next."""
    watch_s: float = 60.0
    """Length of one watch. So long a connection that died without a word may go unnoticed; a new watch goes on where the last ended and costs the server next to nothing."""
    first_pause_s: float = 0.2
    longest_pause_s: float = 30.0
    """After a failure, doubled with each that follows."""
    steady_s: float = 1.0
    """A watch that ends sooner without having told anything counts as a failure, or the server would be asked without a pause."""


class Mirror(Generic[T]):
    """Lists, then watches from the version of the list; each end of a watch is followed by one from the last version told.

    1. 410 Gone: the list again.
    2. The connection breaks, or the server ends the watch: another watch, from where the last one was.
    3. Anything else, an outage say: what was known stays. One log line and one `on_error` for each new text, none for 1 and 2
       unless they come three times in a row.
    4. An object that cannot be read stays as it was last read.
    """

    def __init__(
        self,
        query: Query,
        connect: Connect,
        parse: Callable[[Object], T],
        changed: Callable[[], None],
        *,
        on_error: OnError,
        rng: Random,
        pace: Pace = Pace(),  # nobody changes it
    ) -> None:
        """`parse` raises ObjectError. `changed` is called whenever `items` may be others than before, and when the first try has failed."""
        self.query = query
        self.items: dict[str, T] | None = None
        """By name; None before the first list."""
        self.tried = False
        """Whether the first list has come or failed."""
        self.mistake: str | None = None
        """Why the last question was not answered; None when it was."""
        self._connect = connect
        self._parse = parse
        self._changed = changed
        self._on_error = on_error
        self._rng = rng
        self._pace = pace
        self._version: str | None = None
        self._resync_at = 0.0
        self._failures = 0
        self._unreadable: dict[str, str] = {}
        """Name of an object -> what is wrong in it."""

    def __repr__(self) -> str:
        known = "unread" if self.items is None else f"{len(self.items)} objects"
        return f"<Mirror {self.query}: {known} at {self._version}, {self.mistake or 'good'}>"

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                async with self._connect() as api:
                    await self._follow(api)
            except KubeError as e:
                self._failed(e)
            await asyncio.sleep(self._pause_s())

    async def _follow(self, api: KubeApi) -> None:
        """Until something fails, or the server ends a watch too soon."""
        steady = True
        while steady:
            if self._version is None or _now() >= self._resync_at:
                self._listed(await api.list(self.query))
            steady = await self._watch(api)

    # --- questions ----------------------------------------------------------------------------------------------------

    async def _watch(self, api: KubeApi) -> bool:
        """Whether it told anything, or lasted."""
        began, told = _now(), False
        try:
            async with aclosing(api.watch(self.query, self._version or "", self._varied(self._pace.watch_s))) as events:
                async for event in events:
                    told = True
                    self._told(event)
        finally:
            steady = told or _now() - began >= self._pace.steady_s
            if steady:
                self._failures = 0
        if steady:
            self._answered()
        else:
            self._failures += 1
        return steady

    def _listed(self, found: Listed) -> None:
        before, self.items = self.items or {}, {}
        there = {key_of(item) for item in found.items}
        self._unreadable = {name: text for name, text in self._unreadable.items() if name in there}
        for item in found.items:
            self._take(item, before)
        self._version = found.version
        self._resync_at = _now() + self._varied(self._pace.resync_s)
        self.tried = True
        self._answered()
        self._changed()

    def _told(self, event: Event) -> None:
        assert self.items is not None
        self._failures = 0
        self._answered()
        self._version = version_of(event.item) or self._version
        name = key_of(event.item)
        before = self.items.get(name, _NOTHING)
        match event.kind:
            case "ADDED" | "MODIFIED":
                self._take(event.item, self.items)
            case "DELETED":
                self.items.pop(name, None)
                self._unreadable.pop(name, None)
        if self.items.get(name, _NOTHING) != before:  # most events are of what is not read: heartbeats, status
            self._changed()

    def _take(self, item: Object, before: dict[str, T]) -> None:
        assert self.items is not None
        name = key_of(item)
        try:
            self.items[name] = self._parse(item)
        except ObjectError as e:
            if name in before:
                self.items[name] = before[name]
            self._cannot_read(name, str(e))
        else:
            self._unreadable.pop(name, None)

    # --- trouble ------------------------------------------------------------------------------------------------------

    def _answered(self) -> None:
        if self.mistake is not None:
            log.info("%s: answered again", self.query)
        self.mistake = None

    def _failed(self, error: KubeError) -> None:
        self._failures += 1
        if isinstance(error, GoneError):
            self._version = None
        if isinstance(error, GoneError | BrokenError) and self._failures <= EXPECTED_IN_A_ROW:
            log.debug("%s: %s", self.query, error)
            return
        if not self.tried:
            self.tried = True
            self._changed()
        if str(error) != self.mistake:
            self.mistake = str(error)
            self.complain(self.mistake, "what was known stays")

    def _cannot_read(self, name: str, text: str) -> None:
        if self._unreadable.get(name) != text:
            self._unreadable[name] = text
            self.complain(f"{name}: {text}", "it stays as it was")

    def complain(self, text: str, consequence: str) -> None:
        """One line in the log, and one error counted."""
        log.warning("%s: %s; %s", self.query, text, consequence)
        self._on_error(f"{self.query}: {text}")

    def _pause_s(self) -> float:
        pause_s = self._pace.first_pause_s * 2.0 ** min(max(self._failures - 1, 0), 30)
        return self._varied(min(pause_s, self._pace.longest_pause_s))

    def _varied(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.9, 1.0)


def _now() -> float:
    return asyncio.get_running_loop().time()
