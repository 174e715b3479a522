from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Awaitable
from pathlib import Path

import aiohttp
import pytest

from extproc.envoy import bootstrap, endpoints
from extproc.envoy.endpoints import EndpointsError, EndpointsFile, Health, Member, file_of, render
from tests.envoy import steering
from tests.envoy.steering import PICK
from tests.support.backend import Backend
from tests.support.envoy import EnvoyError, EnvoyProcess
from tests.support.waiting import until

A = Member("10.0.0.1:8000")
B = Member("10.0.0.2:8000", Health.UNHEALTHY, 2.5)
V6 = Member("[::1]:8000", Health.DRAINING)


def test_render_is_a_discovery_response_of_one_cluster() -> None:
    response = json.loads(render("chat", [B, A], version=7))
    assert response["version_info"] == "7"
    [resource] = response["resources"]
    assert (resource["@type"].rpartition(".")[2], resource["cluster_name"]) == ("ClusterLoadAssignment", "pool_chat")
    [group] = resource["endpoints"]
    assert group["lb_endpoints"] == [
        {
            "endpoint": {"address": {"socket_address": {"address": "10.0.0.1", "port_value": 8000}}},
            "health_status": "HEALTHY",
            "load_balancing_weight": 100,
        },
        {
            "endpoint": {"address": {"socket_address": {"address": "10.0.0.2", "port_value": 8000}}},
            "health_status": "UNHEALTHY",
            "load_balancing_weight": 250,
        },
    ]


def test_the_order_of_members_does_not_matter() -> None:
    assert render("p", [A, B, V6]) == render("p", [V6, B, A])


@pytest.mark.parametrize(("weight", "whole"), [(1e-9, 1), (0.5, 50), (1e12, 4_000_000)])
def test_weights_become_whole_numbers_that_envoy_takes(weight: float, whole: int) -> None:
    resource = json.loads(render("p", [Member("10.0.0.1:1", weight=weight)]))["resources"][0]
    assert resource["endpoints"][0]["lb_endpoints"][0]["load_balancing_weight"] == whole


def test_an_only_pool_has_the_file_as_configured_and_several_one_each() -> None:
    path = Path("/x/endpoints.json")
    assert file_of(path, "a", ["a"]) == path
    assert [file_of(path, p, ["a", "b.c"]).name for p in ("a", "b.c")] == ["endpoints.a.json", "endpoints.b.c.json"]


def test_what_was_written_is_read_again_by_the_next_process(tmp_path: Path) -> None:
    pools = {"one": [A, V6, B], "two": []}
    EndpointsFile(tmp_path / "e.json", pools).write(pools)
    assert EndpointsFile(tmp_path / "e.json", pools).read() == {"one": (A, B, V6), "two": ()}


def test_only_changes_are_written(tmp_path: Path) -> None:
    file = EndpointsFile(tmp_path / "e.json", ["p"])
    assert [file.write({"p": m}) for m in ([A, B], [B, A], [A], [A])] == [True, False, True, False]
    assert json.loads(file.path.read_bytes())["version_info"] == "2"


def test_versions_go_on_after_a_restart(tmp_path: Path) -> None:
    EndpointsFile(tmp_path / "e.json", ["p"]).write({"p": [A]})
    restarted = EndpointsFile(tmp_path / "e.json", ["p"])
    assert [restarted.write({"p": m}) for m in ([A], [B])] == [False, True]
    assert repr(restarted) == f"<EndpointsFile {tmp_path}/e.json: p version 2, 1 members>"


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b'{"version_info": "x"}', b'{"version_info": "1", "resources": [{}]}']
)
def test_a_file_of_another_making_is_replaced(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "e.json").write_bytes(garbage)
    file = EndpointsFile(tmp_path / "e.json", ["p"])
    assert file.read() == {}
    assert file.write({"p": [A]})
    assert file.read() == {"p": (A,)}


def test_the_file_is_readable_by_an_envoy_of_another_user_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = EndpointsFile(tmp_path / "e.json", ["p"])
    file.write({"p": [A]})
    file.write({"p": [B]})
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["e.json"]


def test_a_missing_directory_is_named_and_the_next_write_succeeds(tmp_path: Path) -> None:
    file = EndpointsFile(tmp_path / "sub" / "e.json", ["p"])
    with pytest.raises(EndpointsError, match=r"^envoy.endpoints_file: directory .*/sub does not exist; create it"):
        file.write({"p": [A]})
    (tmp_path / "sub").mkdir()
    assert file.write({"p": [A]})


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "e.json").mkdir()
    with pytest.raises(EndpointsError, match=r"^envoy.endpoints_file: cannot write .*/e.json: Is a directory"):
        EndpointsFile(tmp_path / "e.json", ["p"]).write({"p": [A]})
    assert [p.name for p in tmp_path.iterdir()] == ["e.json"]


def test_create_if_missing_writes_the_fixed_replicas_and_keeps_what_is_there(tmp_path: Path) -> None:
    config = steering.config(tmp_path, "10.0.0.1:8000")
    assert endpoints.create_if_missing(config)
    file = EndpointsFile(config.envoy.endpoints_file, ["default"])
    assert file.read() == {"default": (A,)}
    file.write({"default": [B]})
    assert not endpoints.create_if_missing(config)
    assert EndpointsFile(config.envoy.endpoints_file, ["default"]).read() == {"default": (B,)}


# --- with Envoy: nothing listens where extproc should, so the last members serve --------------------------------------


@pytest.mark.envoy
async def test_members_come_and_go_without_a_restart(tmp_path: Path) -> None:
    async with Backend() as a, Backend() as b:
        config = steering.config(tmp_path, a.address)
        url = f"http://{config.envoy.listen}/"
        file = EndpointsFile(config.envoy.endpoints_file, ["default"])
        async with EnvoyProcess(steering.steered(config)) as envoy, aiohttp.ClientSession() as client:

            async def answers() -> set[str]:
                picks = [await (await client.get(url, headers={PICK: b.address})).text() for _ in range(4)]
                return set(picks)

            async def members() -> list[str]:
                return sorted((await envoy.clusters())["pool_default"])

            assert await answers() == {a.address}  # b is no member: the fallback
            file.write({"default": [Member(a.address), Member(b.address)]})
            await until(lambda: _equal(members(), sorted([a.address, b.address])))
            assert await answers() == {b.address}
            file.write({"default": [Member(a.address)]})
            await until(lambda: _equal(members(), [a.address]))
            assert await answers() == {a.address}


@pytest.mark.envoy
async def test_the_fallback_avoids_the_unhealthy_unless_all_are(tmp_path: Path) -> None:
    async with Backend() as a, Backend() as b:
        config = steering.config(tmp_path, a.address, b.address)
        url = f"http://{config.envoy.listen}/"
        file = EndpointsFile(config.envoy.endpoints_file, ["default"])
        sick, well = Member(a.address, Health.UNHEALTHY), Member(b.address)
        file.write({"default": [sick, well]})
        async with EnvoyProcess(steering.steered(config)) as envoy, aiohttp.ClientSession() as client:

            async def healthy() -> int:
                return (await envoy.stats("cluster.pool_default.membership_healthy")).popitem()[1]

            assert {await (await client.get(url)).text() for _ in range(10)} == {b.address}
            file.write({"default": [sick, Member(b.address, Health.DRAINING)]})
            await until(lambda: _equal(healthy(), 0))
            assert (await client.get(url)).status == 200


@pytest.mark.envoy
async def test_a_broken_file_keeps_the_last_members(tmp_path: Path) -> None:
    async with Backend() as a:
        config = steering.config(tmp_path, a.address)
        path = config.envoy.endpoints_file
        async with EnvoyProcess(steering.steered(config)) as envoy, aiohttp.ClientSession() as client:
            (tmp_path / "broken").write_text('{"resources": [')
            (tmp_path / "broken").replace(path)

            async def failures() -> int:
                return sum((await envoy.stats("cluster.pool_default.update_failure")).values())

            await until(failures)
            assert await (await client.get(f"http://{config.envoy.listen}/")).text() == a.address


@pytest.mark.envoy
async def test_an_envoy_started_alone_serves_the_last_members(tmp_path: Path) -> None:
    async with Backend() as a:
        config = steering.config(tmp_path)
        EndpointsFile(config.envoy.endpoints_file, ["default"]).write({"default": [Member(a.address)]})
        async with EnvoyProcess(bootstrap.render(config)), aiohttp.ClientSession() as client:
            assert await (await client.get(f"http://{config.envoy.listen}/")).text() == a.address


@pytest.mark.envoy
async def test_envoy_does_not_start_without_the_file(tmp_path: Path) -> None:
    """Why `create_if_missing` is there."""
    config = steering.config(tmp_path)
    with pytest.raises(EnvoyError, match=r"endpoints.json' does not exist"):
        async with EnvoyProcess(bootstrap.render(config)):
            pass


@pytest.mark.envoy
async def test_envoy_starts_within_seconds_with_a_broken_file_and_takes_a_good_one(tmp_path: Path) -> None:
    async with Backend() as a:
        config = steering.config(tmp_path)
        config.envoy.endpoints_file.write_text("{")
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with EnvoyProcess(bootstrap.render(config)), aiohttp.ClientSession() as client:
            assert loop.time() - began < 8

            async def status() -> int:
                return (await client.get(f"http://{config.envoy.listen}/")).status

            assert await status() == 503
            EndpointsFile(config.envoy.endpoints_file, ["default"]).write({"default": [Member(a.address)]})
            await until(lambda: _equal(status(), 200))


async def _equal(found: Awaitable[object], wanted: object) -> bool:
    return bool(await found == wanted)
