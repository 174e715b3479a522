"""Redis by TLS, a socket, Sentinels, and as a Cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.adapters.shared.support import Teller, pair, placed, quick, sharing
from tests.support.ports import free_port
from tests.support.redis import RedisServer
from tests.support.waiting import until


def certificate(directory: Path, name: str, *more: str) -> None:
    """`name`.crt and .key for 127.0.0.1, signed by itself or as `more` says."""
    command = (
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    )
    files = ("-keyout", str(directory / f"{name}.key"), "-out", str(directory / f"{name}.crt"))
    subject = ("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run([*command, *files, *subject, *more], check=True, capture_output=True)


def tls_options(directory: Path) -> tuple[str, ...]:
    def path(name: str) -> str:
        return str(directory / name)

    return (
        *("--tls-cert-file", path("server.crt"), "--tls-key-file", path("server.key")),
        *("--tls-ca-cert-file", path("client.crt"), "--tls-auth-clients", "yes"),
    )


async def test_tls_with_certificates_on_both_sides_and_an_acl_user(tmp_path: Path) -> None:
    for name in ("server", "client", "other"):
        certificate(tmp_path, name)
    async with RedisServer(*tls_options(tmp_path), tls=True) as redis:
        await redis.command("ACL", "SETUSER", "router", "on", ">p@ss/w:rd", "~{extproc}:*", "&{extproc}:*", "+@all")
        await redis.command("ACL", "SETUSER", "default", "off")
        url = f"rediss://router:p%40ss%2Fw%3Ard@127.0.0.1:{redis.port}"
        ours = {"cert_file": tmp_path / "client.crt", "key_file": tmp_path / "client.key"}
        async with pair(quick(url, tls={"ca_file": tmp_path / "server.crt", **ours})) as (one, _):
            async with sharing(Teller(3), quick(url, tls={"ca_file": tmp_path / "other.crt", **ours})) as stranger:
                await until(lambda: stranger.errors().get("tls"))
                assert not stranger.up
            assert one.up
        async with pair(quick(url, tls={"ca_file": tmp_path / "server.crt", **ours})) as (one, two):
            await pushed(one, two)


async def pushed(one: Teller, two: Teller) -> None:
    """What one places the other hears at once, and not by a beat."""
    await until(lambda: one.sharing.state.pushing and two.sharing.state.pushing, timeout_s=20)
    received = two.sharing.state.pushes_received
    one.place(1, placed(77))
    await until(lambda: two.sharing.state.pushes_received > received and placed(77) in two.placed)


async def test_unix_socket() -> None:
    async with RedisServer() as redis, pair(quick(f"unix://{redis.socket}")) as (one, two):
        await pushed(one, two)
        assert not one.errors()


async def test_failover_by_sentinel() -> None:
    async with (
        RedisServer() as first,
        RedisServer("--replicaof", "127.0.0.1", str(first.port)) as second,
        RedisServer(sentinel=True) as sentinel,
    ):
        await watched(sentinel, first)
        url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/fleet"
        async with pair(quick(url)) as (one, two):
            await until(lambda: knows_a_replica(sentinel), timeout_s=20)
            await first.kill()
            await until(lambda: not one.up and not two.up)
            await sentinel.command("SENTINEL", "FAILOVER", "fleet")
            await until(lambda: one.requests == [2] and two.requests == [1] and one.up, timeout_s=20)
            assert await has_states(second)
            await pushed(one, two)


async def watched(sentinel: RedisServer, master: RedisServer) -> None:
    await sentinel.command("SENTINEL", "MONITOR", "fleet", "127.0.0.1", master.port, 1)
    await sentinel.command("SENTINEL", "SET", "fleet", "down-after-milliseconds", 60_000)


async def knows_a_replica(sentinel: RedisServer) -> bool:
    return any(
        "master-link-status" in str(each) and "ok" in str(each)
        for each in await sentinel.command("SENTINEL", "REPLICAS", "fleet")
    )


async def test_cluster_also_when_the_keys_move_to_another_node() -> None:
    options = (
        "--cluster-enabled",
        "yes",
        "--cluster-config-file",
        "nodes.conf",
        "--cluster-require-full-coverage",
        "no",
    )
    async with RedisServer(*options) as one_node, RedisServer(*options) as other:
        await one_node.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        await one_node.command("CLUSTER", "MEET", "127.0.0.1", other.port, other.bus_port)
        await until(lambda: sees(one_node, 2), timeout_s=20)
        await until(lambda: sees(other, 2), timeout_s=20)
        url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{other.port},127.0.0.1:{one_node.port}"
        async with pair(quick(url)) as (one, two):
            await pushed(one, two)
            slot = await one_node.command("CLUSTER", "KEYSLOT", "{extproc}:1:routers")
            await one_node.command("FLUSHALL")
            name = await other.command("CLUSTER", "MYID")
            for node in (other, one_node):
                await node.command("FLUSHALL")
                await node.command("CLUSTER", "SETSLOT", slot, "NODE", name.decode())
            await until(lambda: has_states(other), timeout_s=20)
            await until(lambda: one.requests == [2] and two.requests == [1] and one.up and two.up, timeout_s=20)
            one.to_place = [placed(9)]
            await until(lambda: placed(9) in two.placed)
            await pushed(one, two)


async def has_states(redis: RedisServer) -> bool:
    return len(await redis.command("KEYS", "{extproc}:1:state:*")) == 2


async def sees(redis: RedisServer, nodes: int) -> bool:
    info = str(await redis.command("CLUSTER", "INFO"))
    return f"cluster_known_nodes:{nodes}" in info and "cluster_state:ok" in info
