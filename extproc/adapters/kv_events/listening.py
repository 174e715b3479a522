"""KV events of all pools, where they are configured. ZMQ is imported then and not before: 3 MiB that only those pay who listen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING

from extproc.config import ConfigError, PoolConfig
from extproc.core.types import CacheChanged, CacheUnknown, Change, Replica

if TYPE_CHECKING:
    from extproc.adapters.kv_events.following import Following


class Listening:
    """On from the first `configure` with a pool that wants it."""

    def __init__(
        self,
        learn: Callable[[CacheChanged | CacheUnknown], None],
        rng: Random,
        lag: Callable[[str, float], None] = lambda _pool, _seconds: None,
    ) -> None:
        """`learn` gets the facts; `lag` a pool, and the seconds that one of its messages was under way."""
        self._learn, self._rng, self._lag = learn, rng, lag
        self.following: Following | None = None

    def __repr__(self) -> str:
        return f"<Listening {self.following or 'to nobody'}>"

    def configure(self, pools: Sequence[PoolConfig], members: Callable[[str], Collection[Replica]]) -> None:
        """Listen as these pools want from now on; `members` of a pool so far. Raises ConfigError where pyzmq is missing."""
        wanted = [pool for pool in pools if pool.kv_events is not None]
        if self.following is None:
            if not wanted:
                return
            self.following = self._begun(wanted[0].name, {pool.name: pool.data_parallel for pool in pools})
        for pool in pools:
            self.following.retarget(pool.name, pool.kv_events, members(pool.name))

    def follow(self, change: Change) -> None:
        """Members came, changed or left. Needs a running loop."""
        if self.following is not None:
            self.following.follow(change)

    async def stop(self) -> None:
        """Listen no more."""
        if self.following is not None:
            await self.following.stop()

    def _begun(self, pool: str, data_parallel: Mapping[str, int]) -> Following:
        try:
            from extproc.adapters.kv_events.following import Following
        except ModuleNotFoundError:
            raise ConfigError(
                f"pool {pool}: kv_events needs the package pyzmq; pip install 'extproc[events]'"
            ) from None
        return Following({}, self._learn, rng=self._rng, lag=self._lag, data_parallel=data_parallel)
