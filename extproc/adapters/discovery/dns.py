"""Members by DNS name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from random import Random
from typing import Final

from extproc.adapters.discovery.base import Emit, OnError, ignore_errors, replica
from extproc.adapters.discovery.membership import Membership
from extproc.adapters.discovery.resolver import Answer, ResolveError, Resolver
from extproc.config import DnsDiscovery, ReplicaConfig

log = logging.getLogger(__name__)

LEAST_PAUSE_S: Final = 1.0
"""Between two questions, whatever the TTL; also the first pause after a failure, doubled with each that follows."""


class DnsSource:
    """A Reset when the name was first resolved, then the fewest changes.

    1. An answer without addresses empties the pool: that is how a headless Service without ready pods looks.
    2. No answer, a failing server, or a name that does not exist change nothing: all three also happen to names that are well.
    """

    def __init__(
        self,
        pool: str,
        settings: DnsDiscovery,
        labels: Mapping[str, str],
        resolver: Resolver,
        *,
        on_error: OnError = ignore_errors,
        rng: Random | None = None,
        least_pause_s: float = LEAST_PAUSE_S,
    ) -> None:
        """`labels` of the pool, which all replicas have."""
        self.pool = pool
        self.mistake: str | None = None
        """Why the last question was not answered; None when it was."""
        self._settings = settings
        self._labels = labels
        self._resolver = resolver
        self._on_error = on_error
        self._rng = rng or Random()
        self._least_pause_s = least_pause_s
        self._failures = 0
        self._told = Membership(pool)

    def __repr__(self) -> str:
        return f"<DnsSource {self.pool}: {self._told!r} from {self._settings.name}, {self.mistake or 'good'}>"

    async def run(self, emit: Emit) -> None:
        self._told = Membership(self.pool)
        while True:
            try:
                answer = await self._resolver.resolve(self._settings.name, self._settings.port)
            except ResolveError as e:
                self._failed(str(e))
                pause_s = self._least_pause_s * 2.0 ** min(self._failures - 1, 30)
            else:
                self.mistake, self._failures = None, 0
                self._became(answer, emit)
                pause_s = max(answer.ttl_s, self._least_pause_s)
            # Varied, so that many sidecars do not ask in step; never sooner than the TTL, which would bring nothing new.
            await asyncio.sleep(min(pause_s * self._rng.uniform(1.0, 1.1), self._settings.interval_s))

    def _became(self, answer: Answer, emit: Emit) -> None:
        members = (replica(ReplicaConfig(address=address), self._labels) for address in answer.addresses)
        self._told.became({r.address: r for r in members}, emit)

    def _failed(self, mistake: str) -> None:
        self._failures += 1
        if mistake == self.mistake:
            return
        self.mistake = mistake
        log.warning("%s; the members of pool %s stay as they are", mistake, self.pool)
        self._on_error(mistake)
