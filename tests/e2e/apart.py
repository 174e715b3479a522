"""Extproc as a process of its own, to be killed, stopped and started again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from extproc.config import Config
from extproc.envoy import bootstrap, endpoints
from tests.e2e.stack import CHAT, Json, chat, client, configured, gathered, replica
from tests.support.envoy import EnvoyProcess
from tests.support.process import Served
from tests.support.waiting import until


@dataclass
class Scene:
    """Two replicas and extproc as a process of its own; Envoy is for the test to start."""

    config: Config
    served: Served
    http: aiohttp.ClientSession

    @asynccontextmanager
    async def envoy(self, **changes: Any) -> AsyncIterator[EnvoyProcess]:
        """Envoy with other settings in the section `envoy`, once it has met extproc if that runs."""
        section = self.config.envoy.model_copy(update=changes)
        async with EnvoyProcess(bootstrap.render(self.config.model_copy(update={"envoy": section}))) as process:
            yield process

    async def request(self, i: int) -> int:
        """The status of a short chat."""
        async with self.http.post(f"http://{self.config.envoy.listen}{CHAT}", json=chat(f"{i} " * 20)) as response:
            await response.read()
            return response.status

    async def decisions(self) -> float:
        """That the running process took."""
        return sum((await self.served.metrics("extproc_decisions_total")).values())

    async def decides_all(self) -> None:
        """Extproc decides each request, and ends each."""

        async def ten_of_ten() -> bool:
            before = await self.decisions()
            assert await gathered(10, self.request) == [200] * 10
            return await self.decisions() == before + 10

        await until(ten_of_ten)  # not at once: Envoy's worker threads learn of its health one after the other
        await until(self.empty, timeout_s=20)

    async def empty(self) -> bool:
        """No flight is open."""
        return (await self.served.metrics("extproc_in_flight ")) == {"extproc_in_flight": 0.0}


@asynccontextmanager
async def apart(
    directory: Path, *, pool: Json | None = None, spec: Json | None = None, **sections: Any
) -> AsyncIterator[Scene]:
    """Started; at the end its log is checked for mistakes of ours. `pool` adds to the settings of the pool, `spec` to the replicas."""
    async with replica(**(spec or {})) as a, replica(**(spec or {})) as b, client() as http:
        config = configured(directory, {"replicas": [a.address, b.address], **(pool or {})}, **sections)
        endpoints.create_if_missing(config)
        async with Served(config) as served:
            yield Scene(config, served, http)
            assert "Traceback" not in served.log()
