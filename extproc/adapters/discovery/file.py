"""Members listed in a file that may change while extproc runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Final

from extproc.adapters.discovery.base import Emit, OnError, difference, ignore_errors, reset
from extproc.adapters.discovery.complaints import REPEAT_S, Complaints
from extproc.adapters.discovery.listing import ListingError, parse
from extproc.adapters.watching import RECHECK_S, moments
from extproc.core.types import Replica

log = logging.getLogger(__name__)

_FILE: Final = "file"
MAX_BYTES: Final = 8 * 1024 * 1024
"""Largest file that is read; ten thousand replicas with labels take about 2 MiB."""


class FileSource:
    """A Reset when the file was first read, then the fewest changes each time that its content differs.

    A file that is missing or wrong changes nothing, at the start as later: the members stay as they were last read.
    Each mistake is said when it is new, and again for as long as it lasts (see Complaints).
    """

    def __init__(
        self,
        pool: str,
        path: Path,
        labels: Mapping[str, str],
        *,
        on_error: OnError = ignore_errors,
        recheck_s: float = RECHECK_S,
        repeat_s: float = REPEAT_S,
    ) -> None:
        """`recheck_s`: the file is read again after so long without an event; `repeat_s` for tests."""
        self.pool = pool
        self.path = path
        self.errors = 0
        self.mistake: str | None = None
        """What is wrong with the file now; None when it was good at the last look."""
        self._labels = labels
        self._complaints = Complaints(on_error, repeat_s)
        self._recheck_s = recheck_s
        self._members: dict[str, Replica] | None = None
        self._content: bytes | None = None
        """As last read, good or bad: bad content is parsed once, not every `recheck_s`."""

    def __repr__(self) -> str:
        members = "unread" if self._members is None else f"{len(self._members)} replicas"
        return f"<FileSource {self.pool}: {members} from {self.path}, {self.mistake or 'good'}>"

    async def run(self, emit: Emit) -> None:
        async with aclosing(moments(self.path, self._recheck_s)) as due:
            async for _ in due:
                await self._look(emit)

    async def _look(self, emit: Emit) -> None:
        """Read the file, and tell of what changed."""
        try:
            content = await asyncio.to_thread(_read, self.path)
        except ListingError as e:
            self._content = None  # should the last content come back, it is read again, which clears the mistake
            self._failed(e)
            return
        if content == self._content:
            self._complaints.remind()
            return
        self._content = content
        try:
            members = await asyncio.to_thread(parse, content, self._labels)
        except ListingError as e:
            self._failed(e)
        else:
            self.mistake = None
            self._complaints.settle(_FILE)
            self._became(members, emit)

    def _became(self, members: dict[str, Replica], emit: Emit) -> None:
        before, self._members = self._members, members
        if before is None:
            emit(reset(self.pool, members))
            return
        for change in difference(self.pool, before, members):
            log.info("pool %s: %s", self.pool, change)
            emit(change)

    def _failed(self, error: ListingError) -> None:
        mistake = str(error)
        if mistake != self.mistake:
            self.errors += 1
        self.mistake = mistake
        self._complaints.say(_FILE, f"{self.path}: {mistake}", f"the members of pool {self.pool} stay as they are")


def _read(path: Path) -> bytes:
    """The whole file. Raises ListingError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise ListingError(e.strerror or str(e)) from None
    if len(content) > MAX_BYTES:
        raise ListingError(f"larger than {MAX_BYTES} bytes")
    return content
