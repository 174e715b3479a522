"""docker-compose.yaml: by the schema of the Compose Specification where a copy is at hand, and that its parts fit together."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from aiohttp import web

from extproc.config import load
from extproc.envoy import bootstrap, endpoints
from tests.deploy.support import DEPLOY, KUBERNETES
from tests.support.backend import Backend
from tests.support.ports import free_port

Json = dict[str, Any]

COMPOSE: Json = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())
SERVICES: Json = COMPOSE["services"]


def test_it_is_what_the_compose_specification_says() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="no jsonschema here")
    spec = find_spec("check_jsonschema")
    if spec is None or spec.origin is None:
        pytest.skip("no check-jsonschema here, which has a copy of the schema")
    schema = Path(spec.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(COMPOSE, json.loads(schema.read_text()))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_checked_and_started_again(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+\.\d+", service["image"])
    assert service["restart"] == "unless-stopped"
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert "healthcheck" in service or (name == "extproc" and "HEALTHCHECK" in dockerfile)


def mounts(service: Json) -> Iterator[tuple[str, str]]:
    for mount in service.get("volumes", ()):
        source, target = mount.split(":")[:2]
        yield source, target


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_mounts_is_there(name: str) -> None:
    for source, _ in mounts(SERVICES[name]):
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]


def test_a_file_that_is_followed_is_mounted_with_its_directory() -> None:
    """A file that is mounted alone stays the one that it was, whatever an editor puts in its place."""
    directory = dict(mounts(SERVICES["extproc"]))["./compose"]
    command = re.findall(r"^CMD \[(.*)\]", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)[-1]
    assert f'"{directory}/extproc.yaml"' in command
    assert (DEPLOY / "compose" / "extproc.yaml").is_file()


def test_replicas_have_addresses_that_nobody_else_is_given() -> None:
    (config,) = COMPOSE["networks"]["fleet"]["ipam"]["config"]
    fixed = [s["networks"]["fleet"]["ipv4_address"] for s in SERVICES.values() if isinstance(s["networks"], dict)]
    assert fixed
    for address in map(ip_address, fixed):
        assert address in ip_network(config["subnet"])
        assert address not in ip_network(config["ip_range"])


async def test_checks_ask_the_process_itself_and_no_proxy() -> None:
    """Docker gives HTTP_PROXY to every container of a host behind one."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (own,) = re.findall(r"^  CMD (\[.*\])$", dockerfile, re.MULTILINE)
    checks = [(json.loads(own), "9003", "/livez"), (SERVICES["vllm-0"]["healthcheck"]["test"][1:], "8000", "/health")]

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with Backend(answer) as backend:
        for command, port, path in checks:
            code = command[-1].replace(port, str(backend.port))
            for status in (200, 503):
                check = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", code, env={"http_proxy": f"http://127.0.0.1:{free_port()}"}
                )
                assert (await asyncio.wait_for(check.wait(), 30) == 0) == (status == 200)
                assert backend.received[-1].path == path


def test_envoy_and_extproc_share_socket_and_members_as_one_user() -> None:
    config = load(DEPLOY / "compose" / "extproc.yaml")
    shared = {target for _, target in mounts(SERVICES["envoy"])} & {target for _, target in mounts(SERVICES["extproc"])}
    assert shared == {"/run/extproc", "/var/lib/extproc"}
    assert Path(config.listen.grpc.removeprefix("unix:")).parent == Path("/run/extproc")
    assert config.envoy.endpoints_file.parent == Path("/var/lib/extproc")
    assert f"USER {SERVICES['envoy']['user']}\n" in (DEPLOY / "Dockerfile").read_text()


def test_the_replicas_of_extproc_are_those_that_run() -> None:
    config = load(DEPLOY / "compose" / "extproc.yaml")
    addresses = [s["networks"]["fleet"]["ipv4_address"] for s in SERVICES.values() if isinstance(s["networks"], dict)]
    assert [r.address for r in config.pools[0].replicas] == [f"{address}:8000" for address in addresses]


def test_extproc_shares_a_redis_that_is_there() -> None:
    shared = load(DEPLOY / "compose" / "extproc.yaml").shared
    assert shared is not None
    assert urlsplit(shared.url).hostname in SERVICES


def test_no_two_replicas_share_a_gpu() -> None:
    taken = [
        device
        for service in SERVICES.values()
        if "deploy" in service
        for reserved in service["deploy"]["resources"]["reservations"]["devices"]
        for device in reserved["device_ids"]
    ]
    assert len(taken) == len(set(taken)) == 2


def test_what_has_no_authentication_is_published_on_loopback_only() -> None:
    published = {name: port for name, s in SERVICES.items() for port in s.get("ports", ())}
    assert published.pop("envoy") == "10000:10000"
    assert [name for name, port in published.items() if not port.startswith("127.0.0.1:")] == []


def test_a_service_may_finish_before_it_is_killed() -> None:
    config = load(DEPLOY / "compose" / "extproc.yaml")
    assert config.shutdown_grace_s < seconds(SERVICES["extproc"]["stop_grace_period"])
    for name in ("vllm-0", "vllm-1"):
        given = next(a for a in SERVICES[name]["command"] if a.startswith("--shutdown-timeout="))
        assert int(given.partition("=")[2]) < seconds(SERVICES[name]["stop_grace_period"])


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


@pytest.mark.envoy
def test_envoy_takes_its_files(tmp_path: Path) -> None:
    config = load(DEPLOY / "compose" / "extproc.yaml")
    moved = config.envoy.model_copy(update={"endpoints_file": tmp_path / "endpoints.json"})
    endpoints.create_if_missing(config.model_copy(update={"envoy": moved}))
    text = (DEPLOY / "compose" / "envoy.yaml").read_text()
    (tmp_path / "envoy.yaml").write_text(text.replace("/var/lib/extproc", str(tmp_path)))
    status = (KUBERNETES / "base" / "status.yaml").read_text()
    bootstrap_and_status(tmp_path / "envoy.yaml", status)


def bootstrap_and_status(path: Path, status: str) -> None:
    """Both as one, as `--config-yaml` merges them: lists are appended."""
    both = yaml.safe_load(path.read_text())
    for key, more in yaml.safe_load(status)["static_resources"].items():
        both["static_resources"][key] += more
    path.write_text(yaml.safe_dump(both))
    bootstrap.validate(path)


def test_the_shell_reads_the_status_file_and_not_compose() -> None:
    """`$$` is a dollar sign to the shell; a single one would be a variable of compose."""
    assert "$$(cat /etc/envoy/status.yaml)" in SERVICES["envoy"]["command"][0]
    assert "/etc/envoy/status.yaml" in {target for _, target in mounts(SERVICES["envoy"])}


def test_prometheus_and_grafana_read_what_is_mounted() -> None:
    prometheus = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text())
    targets = {
        t.partition(":")[0] for job in prometheus["scrape_configs"] for s in job["static_configs"] for t in s["targets"]
    }
    assert targets <= set(SERVICES)
    assert "/etc/prometheus/alerts.yaml" in {target for _, target in mounts(SERVICES["prometheus"])}
    assert prometheus["rule_files"] == ["alerts.yaml"]
    folder = yaml.safe_load((DEPLOY / "compose" / "grafana" / "dashboards.yaml").read_text())["providers"][0][
        "options"
    ]["path"]
    assert f"{folder}/extproc.json" in {target for _, target in mounts(SERVICES["grafana"])}
