"""The members that a source has told of."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from extproc.adapters.discovery.base import Emit, difference, reset
from extproc.core.types import Replica

log = logging.getLogger(__name__)


class Membership:
    """Turns one membership after another into a Reset, and then into the fewest changes."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self._members: dict[str, Replica] | None = None

    def __repr__(self) -> str:
        return "unread" if self._members is None else f"{len(self._members)} replicas"

    def became(self, members: Mapping[str, Replica], emit: Emit) -> None:
        """Tell what differs from the last time; `members` by address."""
        before, self._members = self._members, dict(members)
        if before is None:
            log.info("pool %s: %d members", self.pool, len(members))
            emit(reset(self.pool, members))
            return
        for change in difference(self.pool, before, members):
            log.info("pool %s: %s", self.pool, change)
            emit(change)
