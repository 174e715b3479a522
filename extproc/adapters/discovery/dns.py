"""Members by DNS name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from random import Random
from typing import Final

from extproc.adapters.discovery.base import Emit, OnError, ignore_errors, replica
from extproc.adapters.discovery.complaints import REPEAT_S, Complaints
from extproc.adapters.discovery.membership import Membership
from extproc.adapters.discovery.resolver import Answer, NoSuchNameError, ResolveError, Resolver
from extproc.config import DnsDiscovery, ReplicaConfig

LEAST_PAUSE_S: Final = 1.0
"""Between two questions, whatever the TTL; also the first pause after a failure, doubled with each that follows."""
GONE_S: Final = 60.0
"""A name that has not existed for so long, by every answer, has no addresses. Kubernetes says so of a headless Service none of whose pods
is ready (DNS specification 1.1.0, 2.4.1), and their addresses may be another's soon; but for some seconds names that are well look so
too: their Service is replaced, or the name server has just started and knows nothing yet."""


class DnsSource:
    """A Reset when the name was first resolved, then the fewest changes.

    1. An answer without addresses empties the pool.
    2. So does a name that does not exist for `GONE_S`; until then it changes nothing.
    3. No answer, and a failing server, change nothing however long.
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
        gone_s: float = GONE_S,
        repeat_s: float = REPEAT_S,
    ) -> None:
        """`labels` of the pool, which all replicas have; the last three for tests."""
        self.pool = pool
        self.mistake: str | None = None
        """Why the last question was not answered; None when it was."""
        self._settings = settings
        self._labels = labels
        self._resolver = resolver
        self._complaints = Complaints(on_error, repeat_s)
        self._rng = rng or Random()
        self._least_pause_s = least_pause_s
        self._gone_s = gone_s
        self._gone_at: float | None = None
        """When the name will have been missing for too long; None while it is there, or nobody says."""
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
                self._failed(e, emit)
                pause_s = self._least_pause_s * 2.0 ** min(self._failures - 1, 30)
            else:
                self.mistake, self._failures, self._gone_at = None, 0, None
                self._complaints.settle(self._settings.name)
                self._became(answer, emit)
                pause_s = max(answer.ttl_s, self._least_pause_s)
            # Varied, so that many sidecars do not ask in step; never sooner than the TTL, which would bring nothing new.
            await asyncio.sleep(min(pause_s * self._rng.uniform(1.0, 1.1), self._settings.interval_s))

    def _became(self, answer: Answer, emit: Emit) -> None:
        members = (replica(ReplicaConfig(address=address), self._labels) for address in answer.addresses)
        self._told.became({r.address: r for r in members}, emit)

    def _failed(self, error: ResolveError, emit: Emit) -> None:
        self._failures += 1
        self.mistake = str(error)
        if self._gone(error):
            self._complaints.settle(self._settings.name)  # as usual as any answer without addresses
            self._told.became({}, emit)
        else:
            self._complaints.say(self._settings.name, self.mistake, f"the members of pool {self.pool} stay as they are")

    def _gone(self, error: ResolveError) -> bool:
        """Whether the name has been missing for too long."""
        now = asyncio.get_running_loop().time()
        if not isinstance(error, NoSuchNameError):
            self._gone_at = None
        elif self._gone_at is None:
            self._gone_at = now + self._gone_s
        return self._gone_at is not None and now >= self._gone_at
