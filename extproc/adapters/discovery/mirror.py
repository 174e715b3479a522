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
from extproc.adapters.discovery.complaints import REPEAT_S, Complaints
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
_QUESTION: Final = "(question)"
_ABSENCE: Final = "(absence)"
"""What complaints are about, beside the names of objects, which have no parentheses."""


class ObjectError(ValueError):
    """An object cannot be used; the text says what is wrong in it, in one line."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a mirror asks. Seconds, each varied by up to a tenth, pauses by up to a half, so that many sidecars do not ask in step."""

    resync_s: float = 300.0
    """From one list to the next."""
    watch_s: float = 60.0
    """Length of one watch. So long a connection that died without a word may go unnoticed; a new watch goes on where the last ended and costs the server next to nothing."""
    first_pause_s: float = 0.2
    longest_pause_s: float = 30.0
    """After a failure, doubled with each that follows."""
    steady_s: float = 1.0
    """A watch that ends sooner counts as a failure, whatever it told, or a proxy that cuts each one short would be asked without a pause."""
    repeat_s: float = REPEAT_S
    """Before what is wrong is said again."""


class Mirror(Generic[T]):
    """Lists, then watches from the version of the list; each end of a watch is followed by one from the last version told.

    1. 410 Gone: the list again.
    2. The connection breaks, or the server ends the watch: another watch, from where the last one was.
    3. Anything else, an outage say: what was known stays. That is said (see Complaints); not of 1 and 2, unless they come three
       times in a row, with no watch that lasted in between.
    4. An object that cannot be read stays as it was last read, and that is said, too.
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
        absence: tuple[str, str] | None = None,
    ) -> None:
        """`absence`: what is wrong where there is no object at all, and what follows from it; None where nothing is. `parse` raises ObjectError. `changed` is called whenever `items` may be others than before, and when `tried` becomes true."""
        self.query = query
        self.items: dict[str, T] | None = None
        """By name; None before the first list."""
        self.tried = False
        """Whether the first list has come, or failed so often that those who wait for it should go on without: one failure may be chance."""
        self.mistake: str | None = None
        """Why the last question was not answered; None when it was."""
        self._connect = connect
        self._parse = parse
        self._changed = changed
        self._absence = absence
        self._complaints = Complaints(on_error, pace.repeat_s)
        self._rng = rng
        self._pace = pace
        self._version: str | None = None
        self._resync_at = 0.0
        self._failures = 0
        self._breaking = False
        """Whether what was said last is that watches break: that one tells something is no sign that the next will last."""
        self._unreadable: set[str] = set()
        """Names of objects."""

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
        """Until something fails."""
        while True:
            if self._version is None or _now() >= self._resync_at:
                self._listed(await api.list(self.query))
            await self._watch(api)

    # --- questions ----------------------------------------------------------------------------------------------------

    async def _watch(self, api: KubeApi) -> None:
        """Until it ends. Raises BrokenError where that is too soon."""
        began = _now()
        try:
            async with aclosing(api.watch(self.query, self._version or "", self._varied(self._pace.watch_s))) as events:
                async for event in events:
                    self._told(event)
        finally:
            steady = _now() - began >= self._pace.steady_s
            if steady:
                self._failures, self._breaking = 0, False
            self._complaints.remind()
        if not steady:
            raise BrokenError(f"watches end sooner than after {self._pace.steady_s:g} s")
        self._answered()

    def _listed(self, found: Listed) -> None:
        before, self.items = self.items or {}, {}
        there = {key_of(item) for item in found.items}
        for name in self._unreadable - there:
            self._readable(name)
        for item in found.items:
            self._take(item, before)
        self._version = found.version
        self._resync_at = _now() + self._varied(self._pace.resync_s)
        self.tried = True
        self._answered()
        self._note_absence()
        self._changed()

    def _told(self, event: Event) -> None:
        assert self.items is not None
        if not self._breaking:
            self._answered()
        self._version = version_of(event.item) or self._version
        name = key_of(event.item)
        before = self.items.get(name, _NOTHING)
        match event.kind:
            case "ADDED" | "MODIFIED":
                self._take(event.item, self.items)
            case "DELETED":
                self.items.pop(name, None)
                self._readable(name)
        self._note_absence()
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
            self._unreadable.add(name)
            self._complain(name, f"{name}: {e}", "it stays as it was")
        else:
            self._readable(name)

    # --- trouble ------------------------------------------------------------------------------------------------------

    def _answered(self) -> None:
        self.mistake = None
        if self._complaints.settle(_QUESTION):
            log.info("%s: answered again", self.query)

    def _failed(self, error: KubeError) -> None:
        self._failures += 1
        if isinstance(error, GoneError):
            self._version = None
        if isinstance(error, GoneError | BrokenError) and self._failures <= EXPECTED_IN_A_ROW:
            log.debug("%s: %s", self.query, error)
            return
        if not self.tried and self._failures > EXPECTED_IN_A_ROW:
            self.tried = True
            self._changed()
        self.mistake, self._breaking = str(error), isinstance(error, BrokenError)
        self._complain(_QUESTION, self.mistake, "what was known stays")

    def _readable(self, name: str) -> None:
        self._unreadable.discard(name)
        self._complaints.settle(name)

    def _note_absence(self) -> None:
        if self.items or self._unreadable:
            self._complaints.settle(_ABSENCE)
        elif self._absence is not None:
            self._complain(_ABSENCE, *self._absence)

    def _complain(self, about: str, text: str, consequence: str) -> None:
        self._complaints.say(about, f"{self.query}: {text}", consequence)

    def _pause_s(self) -> float:
        pause_s = self._pace.first_pause_s * 2.0 ** min(max(self._failures - 1, 0), 30)
        # Where the API server was restarted all sidecars begin to pause in the same moment.
        return min(pause_s, self._pace.longest_pause_s) * self._rng.uniform(0.5, 1.0)

    def _varied(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.9, 1.0)


def _now() -> float:
    return asyncio.get_running_loop().time()
