"""The commands as a user types them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from extproc import __version__
from extproc.cli import main
from extproc.sim.backend import Backend as Replica
from tests.e2e.stack import chat, configured, replica
from tests.support.ports import free_port
from tests.support.process import COMMAND, Served

GOOD = "pools: [{replicas: [127.0.0.1:8000, 127.0.0.1:8001]}]\n"


def run(*arguments: object, given: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=given)


def written(directory: Path, text: str) -> Path:
    path = directory / "extproc.yaml"
    path.write_text(text)
    return path


def test_help_lists_every_command_with_what_it_does() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name, command in main.commands.items():
        assert f"  {name} " in result.output
        assert command.help


@pytest.mark.parametrize("name", sorted(main.commands))
def test_each_command_explains_itself(name: str) -> None:
    result = run(name, "-h")
    assert (result.exit_code, f"Usage: main {name}" in result.output) == (0, True)


def test_the_version_is_told() -> None:
    assert run("--version").output.strip().endswith(__version__)


def test_a_good_configuration_is_called_good(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    result = run("check", "--config", path)
    assert (result.exit_code, result.output) == (0, f"{path}: good: 1 pool(s), 2 fixed replica(s)\n")


def test_each_mistake_is_a_line_with_its_path(tmp_path: Path) -> None:
    result = run("check", "--config", written(tmp_path, "pools: [{replicas: [localhost:1], polcy: x}]\n"))
    assert result.exit_code == 1
    assert "pools[0].replicas[0].address: 'localhost:1' is not ip:port" in result.output
    assert "pools[0].polcy: no such key; did you mean policy?" in result.output


@pytest.mark.parametrize("command", ["check", "serve", "envoy"])
def test_a_missing_configuration_is_said_without_a_traceback(tmp_path: Path, command: str) -> None:
    result = run(command, "--config", tmp_path / "none.yaml")
    assert result.exit_code == 1
    assert "No such file or directory; pass --config" in result.output


@pytest.mark.envoy
def test_envoy_renders_what_envoy_accepts(tmp_path: Path) -> None:
    files = {"endpoints_file": str(tmp_path / "endpoints.json"), "bootstrap_file": str(tmp_path / "envoy.json")}
    path = written(tmp_path, GOOD + yaml.safe_dump({"envoy": files}))
    result = run("envoy", "--config", path)
    assert (result.exit_code, result.output) == (
        0,
        f"{tmp_path}/envoy.json: valid; run: envoy -c {tmp_path}/envoy.json\n",
    )
    assert json.loads((tmp_path / "envoy.json").read_text())["static_resources"]
    assert "8001" in (tmp_path / "endpoints.json").read_text()


@pytest.mark.envoy
def test_envoy_is_told_where_the_keys_of_providers_are(tmp_path: Path) -> None:
    files = {"endpoints_file": str(tmp_path / "endpoints.json"), "bootstrap_file": str(tmp_path / "envoy.json")}
    provider = {"name": "p", "host": "api.example", "api_key_file": "p.key"}
    path = written(tmp_path, GOOD + yaml.safe_dump({"envoy": files, "providers": [provider]}))
    assert run("envoy", "--config", path).exit_code == 0
    assert str(tmp_path / "p.key") in (tmp_path / "provider_p_key.json").read_text()


def test_envoy_writes_a_baseline_elsewhere_and_unchecked(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + yaml.safe_dump({"envoy": {"endpoints_file": str(tmp_path / "endpoints.json")}}))
    output = tmp_path / "baseline.yaml"
    result = run("envoy", "--config", path, "--baseline", "round_robin", "--output", output, "--no-validate")
    assert (result.exit_code, result.output) == (0, f"{output}: written; run: envoy -c {output}\n")
    assert "ext_proc" not in output.read_text()


def test_envoy_says_what_only_envoy_would_notice(tmp_path: Path) -> None:
    wrong = "requests: {session_header: x_session}\n"
    files = {"endpoints_file": str(tmp_path / "endpoints.json"), "bootstrap_file": str(tmp_path / "envoy.json")}
    result = run("envoy", "--config", written(tmp_path, GOOD + wrong + yaml.safe_dump({"envoy": files})))
    assert result.exit_code == 1
    assert "requests.session_header" in result.output


NOBODY = "127.0.0.1:9"
"""The discard port: nothing listens there."""


async def explained(*arguments: str, given: str) -> tuple[int, str]:
    return await commanded("explain", *arguments, given=given)


async def commanded(*arguments: str, given: str = "") -> tuple[int, str]:
    """The command as a process: it waits for a server that runs in this loop."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"COLUMNS": "200"},
    )
    output, _ = await process.communicate(given.encode())
    return process.returncode or 0, output.decode()


async def test_explain_shows_each_replica_and_the_terms_of_its_cost(tmp_path: Path) -> None:
    async with (
        replica() as a,
        replica() as b,
        Served(configured(tmp_path, {"replicas": [a.address, b.address]})) as served,
    ):
        code, text = await explained("--url", served.url, given=json.dumps(chat("Hello " * 100)))
        assert code == 0, text
        for shown in (
            a.address,
            b.address,
            "queue_s",
            "prefill_s",
            "decode_s",
            "delay_s",
            "crowding_s",
            "cached_tokens",
        ):
            assert shown in text
        code, text = await explained("--json", "--url", f"{served.url}/", given=json.dumps(chat()))
        assert (code, len(json.loads(text)["candidates"])) == (0, 2)
        code, text = await explained("--url", served.url, given="{")
        assert (code, text.startswith("Error: 400: ")) == (1, True)
        assert await untouched(served, a, b)


async def test_explain_is_told_whose_the_request_is(tmp_path: Path) -> None:
    sections = {"requests": {"tenant_header": "x-tenant"}, "tenants": {"tiers": {"paid": {"requests_per_minute": 60}}}}
    async with replica() as a, Served(configured(tmp_path, {"replicas": [a.address]}, **sections)) as served:
        code, text = await explained("--url", served.url, "--tenant", "a&b", "--tier", "paid", given=json.dumps(chat()))
        assert (code, "of tier paid: 60 of 60 requests left" in text) == (0, True), text
        code, text = await explained("--url", served.url, given=json.dumps(chat()))
        assert (code, text.startswith("Error: 401: ")) == (1, True), text


async def untouched(served: Served, *replicas: Replica) -> bool:
    """Explaining sends nothing and reserves nothing."""
    decisions = await served.metrics("extproc_decisions_total")
    return not decisions and not any(r.served for r in replicas)


async def test_explain_without_a_server_says_so() -> None:
    code, text = await explained("--url", f"http://127.0.0.1:{free_port()}", given="{}")
    assert (code, "is `extproc serve` running" in text) == (1, True)


async def test_drain_tells_the_server_and_shows_the_new_state(tmp_path: Path) -> None:
    pool = {"replicas": [NOBODY, "127.0.0.1:10"], "engine": "none"}
    async with Served(configured(tmp_path, pool)) as served:
        code, text = await commanded("drain", NOBODY, "--within", "120", "--pool", "default", "--url", served.url)
        assert (code, text.startswith(f"{NOBODY} of pool default: ")) == (0, True), text
        assert f"by call: DrainAsked(pool='default', address='{NOBODY}', within_s=120.0)" in served.log()
        code, text = await commanded("drain", NOBODY, "--undo", "--url", f"{served.url}/")
        assert (code, text.endswith(", 0 in flight\n")) == (0, True), text
        assert f"by call: DrainEnded(pool='default', address='{NOBODY}')" in served.log()
        code, text = await commanded("drain", "127.0.0.1:11", "--url", served.url)
        assert (code, "no replica '127.0.0.1:11' in any pool" in text) == (1, True)


async def test_serve_says_in_one_line_why_it_cannot(tmp_path: Path) -> None:
    config = configured(tmp_path, {"replicas": ["127.0.0.1:9"]}, envoy={"endpoints_file": "nowhere/endpoints.json"})
    served = Served(config)
    await served.start(ready=False)
    assert await served.ended() == 1
    assert served.log().splitlines()[-1] == (
        f"Error: envoy.endpoints_file: directory {tmp_path}/nowhere does not exist; create it, or name another path"
    )
    assert "Traceback" not in served.log()


# --- keys -------------------------------------------------------------------------------------------------------------

TENANTS = GOOD + "tenants: {secret_file: secret, keys_file: keys.yaml}\n"


def test_the_first_key_makes_the_secret_and_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, TENANTS)
    result = CliRunner().invoke(main, ["key", "add", "acme", "--tier", "paid", "--config", str(path)])
    assert result.exit_code == 0, result.output
    made = result.stdout.strip()
    assert made.startswith("sk-")
    [entry] = yaml.safe_load((tmp_path / "keys.yaml").read_text())["keys"]
    assert (entry["tenant"], entry["tier"]) == ("acme", "paid")
    assert made not in (tmp_path / "keys.yaml").read_text()
    assert run("key", "hash", "--config", path, given=f"{made}\n").output.strip() == entry["hash"]


def test_a_key_of_ones_own_is_read_and_not_shown(tmp_path: Path) -> None:
    path = written(tmp_path, TENANTS)
    result = run("key", "add", "acme", "--stdin", "--config", path, given="sk-own\n")
    assert (result.exit_code, "sk-own" in result.output) == (0, False)
    result = run("key", "add", "acme", "--stdin", "--config", path, given="sk-own\n")
    assert (result.exit_code, "has this key already" in result.output) == (1, True)


@pytest.mark.parametrize(
    ("text", "arguments", "mistake"),
    [
        (GOOD, ("acme",), "names no keys_file"),
        (TENANTS, ("acme", "--tier", "gold"), "there is no tier 'gold'; known: free, paid, enterprise"),
        (TENANTS, ("acme", "--stdin"), "standard input has no key"),
    ],
)
def test_what_a_key_lacks_is_told(tmp_path: Path, text: str, arguments: tuple[str, ...], mistake: str) -> None:
    result = run("key", "add", *arguments, "--config", written(tmp_path, text), given="")
    assert (result.exit_code, mistake in result.output) == (1, True)


def test_a_lost_secret_is_not_replaced(tmp_path: Path) -> None:
    """All keys of the file would be worthless, without a word."""
    path = written(tmp_path, TENANTS)
    (tmp_path / "keys.yaml").write_text("keys: []\n")
    result = run("key", "add", "acme", "--config", path)
    assert (result.exit_code, "secret: No such file" in result.output) == (1, True)
