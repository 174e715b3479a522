"""A pool without replicas: requests wait in extproc, behind the real Envoy, until the first one has started."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.e2e.stack import Json, replica, stack
from tests.support.waiting import until

pytestmark = pytest.mark.envoy


def members(directory: Path, *addresses: str) -> None:
    """As whoever discovers them writes them: at once, by rename."""
    (directory / "next.json").write_text(json.dumps(list(addresses)))
    (directory / "next.json").rename(directory / "members.json")


async def test_requests_wait_for_the_first_replica_and_all_are_answered_by_it(tmp_path: Path) -> None:
    members(tmp_path)
    pool: Json = {"discovery": {"file": {"path": "members.json"}}, "scaling": {"min_replicas": 0}}
    async with stack(tmp_path, pool, ready=False) as running, replica() as first:
        waiting = [asyncio.create_task(running.served()) for _ in range(8)]
        router = running.app.router
        await until(lambda: router.holding == 8)
        scaling = router.pools["default"].scaling
        assert scaling is not None
        await until(lambda: scaling.asked == 1)
        members(tmp_path, first.address)
        assert await asyncio.gather(*waiting) == [first.address] * 8


async def test_without_a_replica_in_time_the_answer_is_503(tmp_path: Path) -> None:
    members(tmp_path)
    pool: Json = {
        "discovery": {"file": {"path": "members.json"}},
        "scaling": {"min_replicas": 0, "start_wait_s": 0.3},
        "queue": {"absent_wait_s": 0.3, "max_wait_s": 0.3},
    }
    async with stack(tmp_path, pool, ready=False) as running, running.post() as response:
        assert response.status == 503
        assert "No replica could be reached" in (await response.json())["error"]["message"]
