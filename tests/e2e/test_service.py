"""The life of the process itself, through the real Envoy: it ends, restarts, stands still, and is told other things."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.e2e.apart import Scene, apart
from tests.e2e.stack import CHAT, chat
from tests.support.envoy import EnvoyError
from tests.support.waiting import until

pytestmark = pytest.mark.envoy

SLOW = {"gpu": "a100", "model_size": "70b"}
"""A prompt of ten thousand tokens takes seconds there, so that the next ones are held."""


@asynccontextmanager
async def asking(scene: Scene, clients: int = 4) -> AsyncIterator[list[int]]:
    """Clients that send one request after the other; gives the statuses so far."""
    statuses: list[int] = []
    done = asyncio.Event()

    async def one() -> None:
        while not done.is_set():
            statuses.append(await scene.request(len(statuses)))

    tasks = [asyncio.create_task(one()) for _ in range(clients)]
    try:
        yield statuses
    finally:
        done.set()
        await asyncio.gather(*tasks)


async def more(statuses: list[int], count: int = 20) -> None:
    before = len(statuses)
    await until(lambda: len(statuses) >= before + count, timeout_s=20)


def listeners(directory: Path, kind: str) -> dict[str, Any]:
    if kind == "tcp":
        return {}
    return {"listen": {"grpc": f"unix:{directory}/grpc.sock"}}


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_restarts_under_load_cost_no_request(tmp_path: Path, kind: str, number: signal.Signals) -> None:
    async with apart(tmp_path, **listeners(tmp_path, kind)) as scene, scene.envoy():
        await scene.decides_all()
        async with asking(scene) as statuses:
            for _ in range(2):
                await scene.served.signal(number)
                await scene.served.start()
                await more(statuses)
        assert set(statuses) == {200}
        await scene.decides_all()


@pytest.mark.parametrize("fail_open", [True, False])
async def test_requests_that_are_held_at_sigterm_are_served(tmp_path: Path, fail_open: bool) -> None:
    """Envoy drops the host that says NOT_SERVING, and must not drop what is under way there."""
    pool, envoy = {"labels": SLOW}, {"fail_open": fail_open, "message_timeout_s": 0.5}
    async with apart(tmp_path, pool=pool, spec={"labels": SLOW}, envoy=envoy) as scene, scene.envoy():
        await scene.decides_all()
        asked = [asyncio.create_task(status(scene, long_chat(i))) for i in range(6)]
        await until(lambda: held(scene), timeout_s=10)
        code = await scene.served.signal(signal.SIGTERM)
        assert await asyncio.gather(*asked) == [200] * 6
        assert code == 0
    assert "stopped: <router" in scene.served.log()


def long_chat(i: int) -> Any:
    return chat(f"{i} " * 10_000, max_tokens=1)


async def status(scene: Scene, body: Any) -> int:
    async with scene.http.post(f"http://{scene.config.envoy.listen}{CHAT}", json=body) as response:
        await response.read()
        return response.status


async def held(scene: Scene) -> bool:
    return sum((await scene.served.metrics("extproc_queue_requests")).values()) > 0


async def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    """A stream that is kept open would else take the whole grace period of half a minute."""
    async with apart(tmp_path) as scene, scene.envoy():
        await scene.decides_all()
        host, _, port = scene.config.envoy.listen.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\n{{".encode())
        await until(lambda: opened_more_than(scene, 10))
        ended = asyncio.create_task(scene.served.signal(signal.SIGTERM))
        await until(lambda: "finishing what is held" in scene.served.log())
        await asyncio.sleep(1.5)  # the time to be noticed, after which it waits for the stream alone
        assert not ended.done()
        assert await scene.served.signal(signal.SIGTERM) == 0
        await ended
        writer.close()


async def opened_more_than(scene: Scene, count: int) -> bool:
    return (await scene.served.metrics('extproc_streams_total{kind="opened"}')).popitem()[1] > count


async def test_it_ends_within_its_grace_period_whatever_a_client_does(tmp_path: Path) -> None:
    async with apart(tmp_path) as scene, scene.envoy():
        await scene.decides_all()
        rewrite(scene, shutdown_grace_s=3)
        await until(lambda: applied(scene, 1))
        host, _, port = scene.config.envoy.listen.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\n{{".encode())
        await until(lambda: opened_more_than(scene, 10))
        async with asyncio.timeout(10):
            assert await scene.served.signal(signal.SIGTERM) == 0
        writer.close()


def rewrite(scene: Scene, **changes: Any) -> None:
    """Replace settings at the top of its configuration file."""
    path = scene.config.envoy.bootstrap_file.parent / "extproc.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


async def applied(scene: Scene, count: int) -> bool:
    return await scene.served.metrics("extproc_config_applied_total") == {"extproc_config_applied_total": count}


async def test_sighup_reads_the_configuration_under_load(tmp_path: Path) -> None:
    async with apart(tmp_path) as scene, scene.envoy():
        await scene.decides_all()
        pool = yaml.safe_load((tmp_path / "extproc.yaml").read_text())["pools"][0]
        one = pool["replicas"][0]
        async with asking(scene) as statuses:
            rewrite(scene, pools=[{**pool, "replicas": [one], "policy": "least_request"}])
            os.kill(scene.served.pid, signal.SIGHUP)
            await until(lambda: applied(scene, 1))
            rewrite(scene, pools="none")
            await until(lambda: "the configuration stays as it is" in scene.served.log())
            await more(statuses)
            rewrite(scene, pools=[{**pool, "policy": "least_request"}])
            await until(lambda: applied(scene, 2))
            await more(statuses)
        assert set(statuses) == {200}
        decided = await scene.served.metrics("extproc_decisions_total")
        assert any('policy="least_request"' in name for name in decided)
        assert await scene.served.metrics("extproc_config_valid") == {"extproc_config_valid": 1}
    assert "read again, as asked" in scene.served.log()


async def test_flights_outlive_a_pause_longer_than_their_time_to_live(tmp_path: Path) -> None:
    """Their reports waited in a socket, or came to nobody: that is our doing. Nor has any replica failed a check."""
    requests = {"flight_ttl_s": 3}
    pool = {"health": {"interval_s": 0.5, "timeout_s": 1.5}}
    async with apart(tmp_path, requests=requests, pool=pool) as scene, scene.envoy(message_timeout_s=0.5):
        await scene.decides_all()
        body = chat("Tell me all.", stream=True, max_tokens=1500, ignore_eos=True)
        async with scene.http.post(f"http://{scene.config.envoy.listen}{CHAT}", json=body) as stream:
            await stream.content.readany()
            scene.served.pause()
            await asyncio.sleep(5)  # what the pause lasts is what is tested
            scene.served.resume()
            await until(lambda: "stood still for" in scene.served.log())
            await asyncio.sleep(1.5)  # in which it would be swept
            in_flight = await scene.served.metrics("extproc_in_flight ")
            rest = await stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert in_flight == {"extproc_in_flight": 1.0}
        assert not lost(await scene.served.metrics("extproc_outcomes_total"))
        states = await scene.served.metrics("extproc_replica_state")
        assert sum(count for name, count in states.items() if 'state="ready"' in name) == 2
        await scene.decides_all()


def lost(outcomes: dict[str, float]) -> dict[str, float]:
    return {name: count for name, count in outcomes.items() if 'outcome="lost"' in name}


async def test_flights_of_an_envoy_that_died_end_by_the_sweep(tmp_path: Path) -> None:
    async with apart(tmp_path, requests={"flight_ttl_s": 2}) as scene:
        with pytest.raises(EnvoyError):
            await envoy_dies(scene, flights=5)
        async with scene.envoy():
            await scene.decides_all()
            assert sum(lost(await scene.served.metrics("extproc_outcomes_total")).values()) == 5
            assert await scene.served.metrics("extproc_ledger_imbalance") == {"extproc_ledger_imbalance": 0}


async def envoy_dies(scene: Scene, flights: int) -> None:
    async with scene.envoy() as envoy:
        await scene.decides_all()
        body = chat("Tell me all.", stream=True, max_tokens=3000, ignore_eos=True)
        asked = [asyncio.create_task(status(scene, body)) for _ in range(flights)]
        await until(lambda: in_flight_is(scene, flights))
        os.kill(envoy.pid, signal.SIGKILL)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(answer, aiohttp.ClientError) for answer in answers)
        await until(lambda: not envoy.running)


async def in_flight_is(scene: Scene, count: int) -> bool:
    return await scene.served.metrics("extproc_in_flight ") == {"extproc_in_flight": float(count)}
