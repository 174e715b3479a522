"""How a pod takes its leave: the preStop scripts of Envoy and of a replica, against the real ones."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from extproc.core.health.states import State
from extproc.envoy import bootstrap, endpoints
from tests.deploy.support import KUBERNETES, tool
from tests.e2e.stack import chat, configured, replica, stack
from tests.support.backend import Backend, stream
from tests.support.envoy import EnvoyProcess
from tests.support.ports import free_port
from tests.support.waiting import until

BASE = KUBERNETES / "base"


async def run(*command: str, **variables: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *command, env={"PATH": os.environ["PATH"], **variables}, stdout=PIPE, stderr=PIPE
    )


async def ended(process: Process) -> int:
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, errors.decode()
    return process.returncode


async def opens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@pytest.mark.envoy
async def test_envoy_is_held_back_while_an_answer_is_under_way(tmp_path: Path) -> None:
    """No extproc runs here: requests pass unrouted, which is all the same to the script."""
    bash = tool("bash", "preStop of Envoy is a script of it")
    more = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first ")
        await more.wait()
        await response.write(b"last")
        return response

    async with Backend(slow) as backend:
        config = configured(tmp_path, {"replicas": [backend.address], "engine": "none"})
        endpoints.create_if_missing(config)
        assert config.envoy.admin is not None
        admin, port = config.envoy.admin.rpartition(":")[2], int(config.envoy.listen.rpartition(":")[2])
        limits = {"ADMIN_PORT": admin, "DRAIN_S": "1", "LIMIT_S": "30"}
        async with (
            EnvoyProcess(bootstrap.render(config), args=("--drain-time-s", "1", "--drain-strategy", "immediate")),
            aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http,
            http.post("/v1/completions", json={"prompt": "x"}) as response,
        ):
            assert await response.content.read(6) == b"first "
            script = await run(bash, str(BASE / "drain.sh"), **limits)
            await until(lambda: closed(port), timeout_s=15)
            assert script.returncode is None, "the answer is not out yet"
            more.set()
            assert await response.content.read() == b"last"
            assert await ended(script) == 0


async def closed(port: int) -> bool:
    return not await opens(port)


@pytest.mark.envoy
async def test_an_envoy_that_is_gone_holds_nothing_back() -> None:
    bash = tool("bash", "preStop of Envoy is a script of it")
    script = await run(bash, str(BASE / "drain.sh"), ADMIN_PORT=str(free_port()), DRAIN_S="20", LIMIT_S="30")
    assert await ended(script) == 0


@pytest.mark.envoy
async def test_a_replica_is_drained_and_held_until_its_last_answer(tmp_path: Path) -> None:
    async with replica() as a, replica() as b, stack(tmp_path, {"replicas": [a.address, b.address]}) as running:
        members = running.app.router.pools["default"].fleet
        async with running.post(chat("Tell me more", stream=True, max_tokens=600, ignore_eos=True)) as response:
            await response.content.readline()
            served = await until(lambda: next((m.address for m in members.members if len(m.load)), None))
            port = running.config.listen.http.rpartition(":")[2]
            ip, _, own = served.rpartition(":")
            options = ("--within=60", "--routers=localhost", f"--routers-port={port}", f"--port={own}")
            script = await run(sys.executable, str(BASE / "drain.py"), *options, POD_IP=ip)
            await until(lambda: (m := members.get(served)) and m.state(time.monotonic()) is State.DRAINING)
            assert script.returncode is None, "the answer is not out yet"
            await response.read()
        assert await ended(script) == 0


async def test_a_replica_of_which_no_extproc_knows_ends_when_its_engine_is_idle() -> None:
    waiting = 2

    async def page(_: web.Request) -> web.Response:
        return web.Response(
            text=f'vllm:num_requests_running{{engine="0"}} 0.0\nvllm:num_requests_waiting{{engine="0"}} {waiting}.0\n'
        )

    async with Backend(page) as engine:
        options = ("--within=60", "--routers=localhost", f"--routers-port={free_port()}", f"--port={engine.port}")
        script = await run(sys.executable, str(BASE / "drain.py"), *options, POD_IP="127.0.0.1")
        await until(lambda: len(engine.received) >= 2, timeout_s=15)
        assert script.returncode is None
        waiting = 0
        assert await ended(script) == 0


async def test_nothing_is_waited_for_beyond_the_time_given() -> None:
    async def stuck(request: web.Request) -> web.StreamResponse:
        return await stream(request, [b'vllm:num_requests_running{engine="0"} 1.0\n'])

    async with Backend(stuck) as engine:
        options = ("--within=4", "--routers=localhost", f"--routers-port={free_port()}", f"--port={engine.port}")
        assert await ended(await run(sys.executable, str(BASE / "drain.py"), *options, POD_IP="127.0.0.1")) == 0


async def test_every_extproc_is_told_until_none_has_a_request_there() -> None:
    """An engine may be idle while a request is still on its way to it."""
    on_its_way = 1

    async def told(_: web.Request) -> web.Response:
        return web.json_response([{"pool": "default", "in_flight": on_its_way}, {"pool": "other", "in_flight": 0}])

    async def idle(_: web.Request) -> web.Response:
        text = 'vllm:num_requests_running{engine="0"} 0.0\nvllm:num_requests_waiting{engine="0"} 0.0\n'
        return web.Response(text=text)

    async with Backend(told) as router, Backend(idle) as engine:
        options = ("--within=60", "--routers=localhost", f"--routers-port={router.port}", f"--port={engine.port}")
        proxy = f"http://127.0.0.1:{free_port()}"  # for the download of weights, say: not for this
        script = await run(sys.executable, str(BASE / "drain.py"), *options, POD_IP="10.0.0.7", http_proxy=proxy)
        await until(lambda: len(engine.received) >= 2, timeout_s=15)
        assert script.returncode is None
        on_its_way = 0
        assert await ended(script) == 0
    asked = [(r.method, r.path.partition("&")[0]) for r in router.received]
    assert set(asked) == {("POST", f"/replicas/drain?replica=10.0.0.7:{engine.port}")}
    left = [float(r.path.rpartition("=")[2]) for r in router.received]
    assert left == sorted(left, reverse=True), "the deadline stays where it is"
