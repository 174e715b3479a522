"""Two routers as processes of their own, each with its Envoy, that share by a real Redis: one dies, and Redis hangs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.fleet_processes import FAULTS, SETTINGS, death, fleet, one_fault


@pytest.mark.envoy
async def test_router_killed_is_forgotten_and_no_client_sees_redis_hang(tmp_path: Path) -> None:
    async with fleet(tmp_path / "fleet", 2, replace(SETTINGS, replicas=2, rate=4.0)) as running:
        told = await death(running)
        assert told["errors"] == []
        hung = await one_fault(running, next(f for f in FAULTS if f.name == "SIGSTOP"))
        assert hung["errors"] == 0
        assert hung["requests"] > 0
