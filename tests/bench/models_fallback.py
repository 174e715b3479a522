"""Errors that clients see while a whole pool dies and a provider takes over, and while the pool comes back: through the real Envoy.

.venv/bin/python -m tests.bench.models_fallback

Envoy, extproc and the replicas are processes of their own, with default settings; replicas are ended by kill -9, both in the same moment. The
provider speaks TLS and wants its key. Half of the requests are streams.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml

from extproc.config import Config, parse
from extproc.envoy import bootstrap, endpoints
from tests.e2e.stack import CHAT, chat, client
from tests.support import provider as fake
from tests.support.envoy import EnvoyProcess
from tests.support.ports import free_port
from tests.support.process import COMMAND, Served
from tests.support.provider import Provider
from tests.support.waiting import until

RATE: Final = 20.0
"""Requests a second, evenly; each takes about 0.2 s, so that some four are under way."""
PHASE_S: Final = 5.0
"""With the pool, without it, and with it again."""
OUTPUT_TOKENS: Final = 32
MODEL: Final = "large"
KEY: Final = "sk-bench"
RESTART_S: Final = 60.0


@dataclass(slots=True)
class Asked:
    """One request. Times are seconds of one clock."""

    at: float
    ended: float | None = None
    served: str | None = None
    """The model that answered to the end; None for an error."""


@dataclass(slots=True)
class Fleet:
    """The replicas' processes."""

    ports: list[int] = field(default_factory=lambda: [free_port(), free_port()])
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def start(self) -> None:
        """Start all; they listen a moment later."""
        options = ("backend", "--model", MODEL, "--gpu", "h200", "--model-size", "8b")
        quiet = asyncio.subprocess.DEVNULL
        self.processes = [
            await asyncio.create_subprocess_exec(*COMMAND, *options, "--port", str(port), stdout=quiet, stderr=quiet)
            for port in self.ports
        ]

    async def kill(self) -> None:
        """kill -9, all at once."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*(process.wait() for process in self.processes))


def run(_traces: Path | None = None, *, phase_s: float = PHASE_S) -> dict[str, Any]:
    """No traces are needed. `errors`: requests that did not end well, of `requests`. `broken`: those of them that the replicas had when they died;
    nobody else is there who could have them tried again. `takeover_s`: from the kill until no request fails that is sent. `served`: requests by who answered.
    """
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_measured(Path(directory), phase_s))


async def _measured(directory: Path, phase_s: float) -> dict[str, Any]:
    async with AsyncExitStack() as exits:
        fleet = Fleet()
        exits.push_async_callback(fleet.kill)
        await fleet.start()
        provider = await exits.enter_async_context(Provider(directory, KEY))
        config = _config(directory, fleet, provider)
        endpoints.create_if_missing(config)
        await exits.enter_async_context(Served(config))
        await exits.enter_async_context(EnvoyProcess(bootstrap.render(config)))
        http = await exits.enter_async_context(client())
        await until(lambda: _answers(http, config, MODEL), timeout_s=RESTART_S)
        return await _phases(http, config, fleet, phase_s)


def _config(directory: Path, fleet: Fleet, provider: Provider) -> Config:
    (directory / "key").write_text(KEY)
    raw = {
        "listen": {"grpc": f"127.0.0.1:{free_port()}", "http": f"127.0.0.1:{free_port()}"},
        "envoy": {
            "listen": f"127.0.0.1:{free_port()}",
            "admin": f"127.0.0.1:{free_port()}",
            "endpoints_file": "endpoints.json",
            "bootstrap_file": "envoy.json",
        },
        "pools": [
            {
                "name": "large",
                "replicas": [f"127.0.0.1:{port}" for port in fleet.ports],
                "labels": {"gpu": "h200", "model_size": "8b"},
            }
        ],
        "models": [
            {"name": "chat", "targets": [{"pool": "large", "model": MODEL}], "fallback": [{"provider": "elsewhere"}]}
        ],
        "providers": [provider.section("elsewhere", api_key_file="key")],
    }
    return parse(yaml.safe_dump(raw), base=directory)


async def _phases(http: aiohttp.ClientSession, config: Config, fleet: Fleet, phase_s: float) -> dict[str, Any]:
    asked: list[Asked] = []
    load = asyncio.create_task(_load(http, config, asked))
    await asyncio.sleep(phase_s)
    killed = time.monotonic()
    await fleet.kill()
    await asyncio.sleep(phase_s)
    await fleet.start()
    await until(lambda: _back(asked), timeout_s=RESTART_S)
    await asyncio.sleep(phase_s)
    load.cancel()
    with suppress(asyncio.CancelledError):
        await load
    await until(lambda: all(one.ended is not None for one in asked), timeout_s=RESTART_S)
    return _figures(asked, killed)


def _back(asked: list[Asked]) -> bool:
    """Whether the last to be answered was served by the pool."""
    last = max((one for one in asked if one.ended is not None), key=lambda one: one.ended or 0.0)
    return last.served == MODEL


async def _load(http: aiohttp.ClientSession, config: Config, asked: list[Asked]) -> None:
    """Evenly, whatever becomes of those before, until cancelled."""
    tasks: set[asyncio.Task[None]] = set()
    began = time.monotonic()
    while True:
        await asyncio.sleep(began + len(asked) / RATE - time.monotonic())
        one = Asked(time.monotonic())
        asked.append(one)
        task = asyncio.create_task(_ask(http, config, one, stream=len(asked) % 2 == 0))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _ask(http: aiohttp.ClientSession, config: Config, one: Asked, stream: bool) -> None:
    try:
        one.served = await _served(http, config, stream)
    except aiohttp.ClientError:
        one.served = None  # cut off
    finally:
        one.ended = time.monotonic()


async def _served(http: aiohttp.ClientSession, config: Config, stream: bool = False) -> str | None:
    """The model that answered, to the end."""
    body = {**chat(max_tokens=OUTPUT_TOKENS, stream=stream), "model": "chat"}
    async with http.post(f"http://{config.envoy.listen}{CHAT}", json=body) as response:
        text = await response.text()
        if response.status != 200 or (stream and not text.rstrip().endswith("data: [DONE]")):
            return None
        return fake.MODEL if fake.MODEL in text else MODEL


async def _answers(http: aiohttp.ClientSession, config: Config, model: str) -> bool:
    return await _served(http, config) == model


def _figures(asked: list[Asked], killed: float) -> dict[str, Any]:
    failed = [one for one in asked if one.served is None]
    broken = [one for one in failed if one.at < killed]
    last = max((one.at for one in failed), default=killed)
    return {
        "errors": len(failed),
        "broken": len(broken),
        "requests": len(asked),
        "takeover_s": round(max(last - killed, 0.0), 3),
        "served": dict(Counter(one.served or "error" for one in asked)),
    }


if __name__ == "__main__":
    sys.exit(print(json.dumps(run(), indent=2)))
