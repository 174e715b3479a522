"""The demo from end to end, small: real Envoy, extproc and replicas as processes."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
from pathlib import Path

import aiohttp
import pytest
import yaml

from extproc.demo.children import beside
from tests.test_demo import free_base

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(120)]

SMALL = {
    "fleet": [{"gpu": "h100", "tp": 4}, {"gpu": "a100"}],
    "workload": {
        "sessions": 4, "sessions_per_s": 20.0, "turns": 3, "think_s": 0.1, "groups": 1, "system_tokens": [600, 600],
        "user_tokens": {"median": 50, "max": 100}, "output_tokens": 10, "max_tokens": 20,
    },
}  # fmt: skip


def file(directory: Path) -> Path:
    path = directory / "demo.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "ports": free_base()}))
    return path


async def command(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        beside("extproc"), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def until_curl(process: asyncio.subprocess.Process) -> list[str]:
    """What it said up to the line to paste."""
    assert process.stdout is not None
    lines: list[str] = []
    while "curl" not in "".join(lines):
        line = await process.stdout.readline()
        assert line, f"ended early: {lines}"
        lines.append(line.decode())
    return lines


async def pasted(curl: str) -> None:
    """The line works as it stands."""
    _, _, url, _, _, _, body = shlex.split(curl)
    async with aiohttp.ClientSession() as http, http.post(url, data=body) as response:
        text = await response.text()
    assert response.status == 200
    assert text.endswith("data: [DONE]\n\n")


async def test_the_demo_compares_extproc_with_round_robin(tmp_path: Path) -> None:
    figures = tmp_path / "demo.json"
    process = await command("demo", "--config", str(file(tmp_path)), "--output", str(figures))
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    found = json.loads(figures.read_text())
    for name in ("extproc", "round_robin"):
        run = found[name]
        assert (run["requests"], run["errors"]) == (12, 0)
        assert sum(replica["requests"] for replica in run["replicas"].values()) == 12
        assert 0 < run["ttft_p50_s"] <= run["e2e_p50_s"]
        assert run["prefix_hit_actual"] > 0.3
    assert found["extproc"]["prefix_hit_predicted"] > 0.3
    assert found["round_robin"]["prefix_hit_predicted"] is None
    assert {replica["requests"] for replica in found["round_robin"]["replicas"].values()} == {6}
    assert "TTFT p95" in out.decode()


async def test_run_says_where_it_is_and_ends_well_on_ctrl_c(tmp_path: Path) -> None:
    process = await command("run", "--config", str(file(tmp_path)))
    lines = await asyncio.wait_for(until_curl(process), 60)
    try:
        await pasted(lines[-1])
    finally:
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 0
