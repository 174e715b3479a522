"""Replicas come and go in the file of members: extproc and Envoy both follow, without a restart."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.e2e.stack import Stack, chat, gathered, replica, stack
from tests.support.waiting import until

pytestmark = pytest.mark.envoy

CLUSTER = "pool_default"


def listed(path: Path, *addresses: str) -> None:
    """Replaced by rename, as a controller does it."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(list(addresses)))
    new.replace(path)


async def known(running: Stack, *addresses: str) -> bool:
    """Whether just these are members for Envoy, and for extproc, which has heard of each."""
    members = running.app.router.pools["default"].fleet.members
    seen = {m.address for m in members if m.sample is not None and m.models}
    return set((await running.envoy.clusters())[CLUSTER]) == set(addresses) == seen


async def spread(running: Stack) -> set[str]:
    """Who answers a dozen requests."""
    return set(await gathered(12, lambda i: running.served(chat(f"{i} " * 50))))


async def test_members_join_and_leave_through_the_file(tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    pool = {"policy": "round_robin", "discovery": {"file": {"path": "members.json"}}}
    async with AsyncExitStack() as exits:
        a, b, c = [await exits.enter_async_context(replica()) for _ in range(3)]
        listed(path, a.address, b.address)
        async with stack(tmp_path, pool) as running:
            await until(lambda: known(running, a.address, b.address))
            assert await spread(running) == {a.address, b.address}
            listed(path, a.address, b.address, c.address)
            await until(lambda: known(running, a.address, b.address, c.address))
            assert await spread(running) == {a.address, b.address, c.address}
            listed(path, c.address)
            await until(lambda: known(running, c.address))
            assert await spread(running) == {c.address}
            path.write_text('["127.0.0.1:')  # cut off in the middle: nothing changes, and it is counted
            await until(lambda: running.app.metrics.discovery_errors.labels("default")._value.get() == 1)
            assert await spread(running) == {c.address}
            listed(path)
            await until(lambda: not len(running.app.router.pools["default"].fleet))
            async with running.post() as response:
                assert (response.status, response.headers["retry-after"]) == (503, "1")
            listed(path, a.address)
            await until(lambda: known(running, a.address))
            assert await spread(running) == {a.address}


async def test_a_replica_that_leaves_finishes_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    async with replica() as a, replica() as b:
        listed(path, a.address, b.address)
        async with stack(tmp_path, {"discovery": {"file": {"path": "members.json"}}}) as running:
            body = chat("Tell me all. ", stream=True, max_tokens=60, ignore_eos=True)
            async with running.post(body) as response:
                first = await response.content.readany()
                home = running.last().decision.endpoints[0]
                other = next(r.address for r in (a, b) if r.address != home)
                listed(path, other)
                await until(lambda: known(running, other))
                rest = await response.read()
            assert (first + rest).endswith(b"data: [DONE]\n\n")
            assert (first + rest).count(b'"content":"') == 61
            assert await spread(running) == {other}
