"""Members listed in the configuration."""

from __future__ import annotations

from typing import Self

from extproc.adapters.discovery.base import Emit, replica
from extproc.config import PoolConfig
from extproc.core.types import Replica, Reset


class StaticSource:
    """One Reset, and no change ever."""

    def __init__(self, pool: str, replicas: tuple[Replica, ...]) -> None:
        self.pool = pool
        self._replicas = replicas

    @classmethod
    def from_config(cls, pool: PoolConfig) -> Self:
        return cls(pool.name, tuple(replica(r, pool.labels) for r in pool.replicas))

    def __repr__(self) -> str:
        return f"<StaticSource {self.pool}: {len(self._replicas)} replicas>"

    async def run(self, emit: Emit) -> None:
        emit(Reset(self.pool, self._replicas))
