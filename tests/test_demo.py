"""The demo's file and what follows from it; its processes, with commands of our own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import yaml

from extproc.config import ConfigError
from extproc.demo.children import Child, Children, DemoError, cpu_s
from extproc.demo.settings import DEFAULT, DemoSettings, Ports, backends, checked, extproc_config, load_settings
from extproc.demo.stack import Stack, require_free, usage
from extproc.sim.spec import load_specs
from tests.support.ports import free_port
from tests.support.waiting import until

ROOT = Path(__file__).parents[1]
SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")


def settings(**changes: object) -> DemoSettings:
    return DemoSettings.model_validate(changes)


# --- the file -------------------------------------------------------------------------------------------------------------


def test_the_file_that_ships_is_good_and_gives_a_good_configuration() -> None:
    shipped = load_settings(ROOT / DEFAULT)
    config = checked(extproc_config(shipped), Path("/x"))
    assert len(config.pools[0].replicas) == shipped.replicas == len(backends(shipped))


def test_everything_follows_from_the_fleet() -> None:
    fleet = [{"gpu": "a100", "count": 2}, {"gpu": "h100", "tp": 4, "num_blocks": 77, "weight": 3}]
    mine = settings(fleet=fleet, model="m", model_size="70b", time_scale=2, ports=23000)
    pool = checked(extproc_config(mine), Path("/x")).pools[0]
    assert [(r.address, r.labels["gpu"], r.labels["tp"], r.weight) for r in pool.replicas] == [
        ("127.0.0.1:23010", "a100", "1", 1.0),
        ("127.0.0.1:23011", "a100", "1", 1.0),
        ("127.0.0.1:23012", "h100", "4", 3.0),
    ]
    specs = backends(mine)
    assert [spec.port for spec in specs] == [23010, 23011, 23012]
    assert (specs[2].num_blocks, specs[2].model, specs[2].time_scale) == (77, "m", 2)
    assert specs[0].labels == pool.replicas[0].labels


def test_extproc_and_pool_are_merged_over_what_is_generated() -> None:
    mine = settings(pool={"policy": "least_request"}, extproc={"inspect": {"decisions": 5}, "envoy": {"retries": 1}})
    config = checked(extproc_config(mine), Path("/x"))
    assert config.pools[0].policy == "least_request"
    assert config.inspect.decisions == 5
    assert (config.envoy.retries, config.envoy.listen) == (1, "127.0.0.1:10000")


def test_a_mistake_in_the_merged_part_is_named_by_its_path() -> None:
    with pytest.raises(ConfigError, match=r"pools\[0\]\.polcy: no such key; did you mean policy\?"):
        checked(extproc_config(settings(pool={"polcy": "x"})), Path("/x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flet: []", "flet: no such key"),
        ("fleet: [{gpu: h100, cout: 2}]", "fleet[0].cout: no such key; did you mean count?"),
        ("workload: {system_tokens: [9, 1]}", "workload: system_tokens: 9 to 1 is no range"),
        ("fleet: [", "not YAML"),
        ("fleet: []", "fleet: needs at least 1 item"),
    ],
)
def test_mistakes_in_the_file_are_named_by_their_path(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(tmp_path / "nowhere.yaml")


def test_no_two_processes_share_a_port() -> None:
    ports = Ports(23000, 5)
    taken = ports.all()
    assert len(taken) == len(set(taken)) == 4 + 5


def test_a_port_in_use_is_named_with_the_remedy() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(DemoError, match=rf"port {port} on 127.0.0.1 is in use; .* `ports:`"):
            require_free([free_port(), port])


def free_base() -> int:
    """First port of a small stack that is free as a whole now."""
    for _ in range(50):
        base = free_port() // 20 * 20
        try:
            require_free(Ports(base, 3).all())
        except DemoError:
            continue
        return base
    raise RuntimeError("no free block of ports")


def test_the_files_of_a_stack_can_be_read_by_those_for_whom_they_are(tmp_path: Path) -> None:
    mine = settings(ports=free_base(), fleet=[{"gpu": "a100"}])
    stack = Stack(mine, tmp_path)
    assert load_specs(tmp_path / "backends.yaml") == backends(mine)
    raw = yaml.safe_load((tmp_path / "extproc.yaml").read_text())
    assert checked(raw, tmp_path) == stack.config
    assert f"curl -N http://127.0.0.1:{mine.ports}/v1/chat/completions" in usage(stack)


# --- processes ------------------------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_children_end_with_their_block(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        started = [await children.start(name, *SLEEP) for name in ("a", "b")]
        assert not any(gone(child.pid) for child in started)
    assert all(gone(child.pid) for child in started)


async def test_children_end_when_the_block_raises(tmp_path: Path) -> None:
    started: list[Child] = []

    async def work() -> None:
        async with Children(tmp_path) as children:
            started.append(await children.start("a", *SLEEP))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    assert gone(started[0].pid)


async def test_children_end_when_the_task_is_cancelled(tmp_path: Path) -> None:
    pids: list[int] = []

    async def work() -> None:
        async with Children(tmp_path) as children:
            pids.append((await children.start("a", *SLEEP)).pid)
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await until(lambda: pids)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(pids[0])


async def test_a_child_that_dies_ends_the_work_and_shows_its_log(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        await children.start("well", *SLEEP)
        await children.start("ill", sys.executable, "-c", "raise SystemExit('port taken, say')")
        with pytest.raises(DemoError) as caught:
            await children.during(asyncio.sleep(60))
    assert "ill ended with status 1" in str(caught.value)
    assert "port taken, say" in str(caught.value)


async def test_the_signal_that_ended_a_child_is_named(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start("a", *SLEEP)
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(DemoError, match="a ended with signal SIGKILL"):
            await children.during(asyncio.sleep(60))


async def test_work_that_ends_first_gives_its_result_and_leaves_the_children(tmp_path: Path) -> None:
    async def work() -> int:
        return 7

    async with Children(tmp_path) as children:
        child = await children.start("a", *SLEEP)
        assert await children.during(work()) == 7
        assert not gone(child.pid)


async def test_waiting_for_readiness_has_an_end(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    async with Children(tmp_path) as children:
        await children.start("a", *SLEEP)
        with pytest.raises(DemoError, match=r"Envoy: not ready after 0.2 s; see .*a\.log"):
            await children.until("Envoy", never, 0.2)


async def test_a_command_that_fails_shows_its_log(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        with pytest.raises(DemoError, match="render: no good"):
            await children.run("render", sys.executable, "-c", "raise SystemExit('no good')", timeout_s=30)


async def test_an_unknown_program_is_named(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        with pytest.raises(DemoError, match="no such program; run `make setup`"):
            await children.start("a", "surely-no-such-program")


async def test_a_child_leads_its_own_process_group(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start("a", *SLEEP)
        assert os.getpgid(child.pid) == child.pid


async def test_the_cpu_of_a_child_grows_as_it_works(tmp_path: Path) -> None:
    async with Children(tmp_path) as children:
        child = await children.start("a", sys.executable, "-c", "while True: pass")
        await until(lambda: cpu_s(child.pid) > 0.1)
