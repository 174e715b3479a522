"""Writes the members file beside the event loop: an fsync takes milliseconds on a good disk, and seconds on a bad one."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from extproc.envoy.endpoints import EndpointsError, Members

log = logging.getLogger(__name__)


class File(Protocol):
    """What is needed of `EndpointsFile`."""

    def write(self, known: Members) -> bool:
        """Replace what differs. Blocks. Raises EndpointsError."""


class MembersWriter:
    """One write at a time; of what was wanted meanwhile only the latest counts. A failed write is tried again when `want` is called."""

    def __init__(self, file: File) -> None:
        self.errors = 0
        """Writes that failed."""
        self._file = file
        self._wanted: Members | None = None
        self._written: Members | None = None
        self._error: str | None = None
        self._asked = asyncio.Event()

    def __repr__(self) -> str:
        return f"<MembersWriter {self._error or 'good'}>"

    def write_now(self, members: Members) -> None:
        """Write and wait for it; for the start, before anybody is served. Raises EndpointsError."""
        self._file.write(members)
        self._written = members

    def want(self, members: Members) -> None:
        """Have the file say so."""
        self._wanted = members
        if members != self._written:
            self._asked.set()

    async def run(self) -> None:
        """Write what is wanted, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            wanted = self._wanted
            if wanted is not None and wanted != self._written:
                await self._write(wanted)

    async def _write(self, wanted: Members) -> None:
        self._written = None  # what stands there is not known until this is done
        try:
            await asyncio.to_thread(self._file.write, wanted)
        except EndpointsError as e:
            self._failed(str(e))
            return
        self._written = wanted
        if self._error is not None:
            log.info("the members file can be written again")
            self._error = None

    def _failed(self, error: str) -> None:
        self.errors += 1
        if error != self._error:
            log.error("%s", error)
        self._error = error
