"""A body made to be slow to parse, beside small ones: through the real Envoy, with extproc as a process of its own."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.apart import Scene, apart
from tests.e2e.stack import CHAT, chat, gathered
from tests.support.waiting import until

pytestmark = pytest.mark.envoy

SIZE = 30_000_000
HOSTILE = b'{"model":"sim","messages":[],"x":[' + b"[]," * (SIZE // 3) + b"[]]}"
OWN_LAG = "extproc_loop_longest_own_lag_seconds"
BOUND_S = 0.1
"""In place the loop would stand still for half a second at least; ten milliseconds are what it takes gRPC to hand such a message over."""


async def posted(scene: Scene, body: bytes) -> tuple[int, Any]:
    url = f"http://{scene.config.envoy.listen}{CHAT}"
    headers = {"content-type": "application/json"}
    async with scene.http.post(url, data=io.BytesIO(body), headers=headers) as response:
        return response.status, await response.json()


async def own_lag_s(scene: Scene) -> float:
    return (await scene.served.metrics(OWN_LAG))[OWN_LAG]


async def test_a_hostile_body_holds_nobody_up(tmp_path: Path) -> None:
    async with apart(tmp_path) as scene, scene.envoy():
        await scene.decides_all()
        slow = asyncio.ensure_future(posted(scene, HOSTILE))
        assert await gathered(50, scene.request) == [200] * 50
        status, answer = await slow
        assert (status, answer["error"]["type"]) == (400, "Bad Request")
        counts = await scene.served.metrics("extproc_large_bodies_total")
        assert counts['extproc_large_bodies_total{kind="too_complex"}'] == 1
        assert await own_lag_s(scene) < BOUND_S
        assert await scene.served.metrics("extproc_buffered_bytes") == {"extproc_buffered_bytes": 0}


async def test_a_long_prompt_is_routed_and_its_usage_asked_for(tmp_path: Path) -> None:
    """The body is changed at one place, wherever it was read."""
    body = json.dumps(chat("word " * 100_000, stream=True)).encode()
    async with apart(tmp_path) as scene, scene.envoy():
        await scene.decides_all()
        url = f"http://{scene.config.envoy.listen}{CHAT}"
        headers = {"content-type": "application/json"}
        async with scene.http.post(url, data=io.BytesIO(body), headers=headers) as response:
            text = await response.read()
        assert (response.status, text.endswith(b"data: [DONE]\n\n"), b"usage" in text) == (200, True, False)
        counts = await scene.served.metrics("extproc_large_bodies_total")
        assert counts['extproc_large_bodies_total{kind="read"}'] == 1
        await until(lambda: usage_is_known(scene))


async def usage_is_known(scene: Scene) -> bool:
    counts = await scene.served.metrics("extproc_prompt_tokens_total")
    return sum(counts.values()) > 100_000
