"""Which changes of the configuration a running process takes over, and how it follows the file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.adapters import config_watch
from extproc.adapters.config_watch import ConfigWatch
from extproc.config import Config, load, parse
from tests.support.waiting import until

A, B, C = "10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"
POOL = {"name": "p", "replicas": [A]}


def text(*pools: Any, **sections: Any) -> str:
    return yaml.safe_dump({"pools": pools or [POOL], **sections})


def config(*pools: Any, **sections: Any) -> Config:
    return parse(text(*pools, **sections))


def merged(running: Config, wanted: Config) -> tuple[Config, list[str]]:
    return config_watch.merged(running, wanted, running.hold_limit_s)


@pytest.mark.parametrize(
    "change",
    [
        {"replicas": [A, B]},
        {"replicas": [{"address": A, "drain": True}]},
        {"labels": {"gpu": "h100"}},
        {"models": ["m"]},
        {"policy": "least_request"},
        {"policy_options": {"load_factor": 2.0}, "policy": "prefix_affinity"},
        {"scrape": {"interval_s": 2}},
        {"health": {"failures": 5}},
        {"queue": {"max_requests": 5}},
        {"queue": {"max_wait_s": 5}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_of_a_pool_are_taken_over(change: dict[str, Any]) -> None:
    wanted = config({**POOL, **change})
    assert merged(config(), wanted) == (wanted, [])


TARGETS = {"name": "m", "targets": [{"pool": "p"}, {"provider": "c"}]}
CLOUD = {"name": "c", "host": "api.example.com"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"models": [{"name": "m", "targets": [{"pool": "p"}]}]}),
        ({"models": [TARGETS], "providers": [CLOUD]}, {"providers": [CLOUD]}),
        (
            {"models": [TARGETS], "providers": [CLOUD]},
            {
                "models": [{**TARGETS, "aliases": ["n"]}],
                "providers": [{**CLOUD, "budget": {"dollars": 5}, "model": "x"}],
            },
        ),
    ],
)
def test_models_prices_and_budgets_are_taken_over(before: dict[str, Any], after: dict[str, Any]) -> None:
    wanted = config(**after)
    assert merged(config(**before), wanted) == (wanted, [])


def test_where_a_provider_is_is_envoys_and_waits() -> None:
    running = config(models=[TARGETS], providers=[CLOUD])
    effective, waiting = merged(running, config(models=[TARGETS], providers=[{**CLOUD, "port": 8443}]))
    assert (effective, waiting) == (running, ["providers[0].port"])


@pytest.mark.parametrize("new", [{"providers": [CLOUD]}, {"pools": [POOL, {"name": "c", "replicas": [B]}]}])
def test_models_wait_for_providers_and_pools_that_are_not_there_yet(new: dict[str, Any]) -> None:
    models = [{"name": "m", "targets": [{"pool": "p"}, {"provider" if "providers" in new else "pool": "c"}]}]
    pools = new.pop("pools", [POOL])
    effective, waiting = merged(config(), config(*pools, models=models, **new))
    assert effective == config()
    assert "models" in waiting


def test_the_log_level_and_the_grace_period_are_taken_over() -> None:
    wanted = config(inspect={"log_level": "debug"}, shutdown_grace_s=5)
    assert merged(config(), wanted) == (wanted, [])


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"listen": {"grpc": "127.0.0.1:1"}}, ["listen.grpc"]),
        ({"envoy": {"retries": 1, "fail_open": False}}, ["envoy.fail_open", "envoy.retries"]),
        ({"requests": {"flight_ttl_s": 100}}, ["requests.flight_ttl_s"]),
        ({"inspect": {"decisions": 5, "log_level": "debug"}}, ["inspect.decisions"]),
    ],
)
def test_what_needs_a_restart_is_named(sections: dict[str, Any], named: list[str]) -> None:
    effective, waiting = merged(config(), config(**sections))
    assert waiting == named
    assert effective.model_copy(update={"inspect": Config.model_fields["inspect"].default}) == config()


def test_prefill_and_decode_apart_may_change_but_not_begin_or_end() -> None:
    before, after = {**POOL, "disaggregation": {}}, {**POOL, "disaggregation": {"local_prefill": False}}
    assert merged(config(before), config(after)) == (config(after), [])
    paired = {**POOL, "disaggregation": {"local_prefill": False, "protocol": "sglang"}}
    moved = {**POOL, "disaggregation": {"local_prefill": False, "protocol": "sglang", "bootstrap_port": 9}}
    assert merged(config(paired), config(moved)) == (config(moved), [])
    assert merged(config(after), config(paired)) == (config(after), ["pools[0].disaggregation.protocol"])
    for one, other in ((POOL, before), (before, POOL)):
        assert merged(config(one), config(other)) == (config(one), ["pools[0].disaggregation"])


def test_of_one_pool_the_part_that_can_be_taken_over_is() -> None:
    effective, waiting = merged(config(), config({**POOL, "engine": "none", "replicas": [B]}))
    assert waiting == ["pools[0].engine"]
    assert effective == config({**POOL, "replicas": [B]})


def test_another_set_of_pools_is_taken_over_as_a_whole_or_not_at_all() -> None:
    running = config({**POOL, "models": ["m", "n"]})
    moved = config({**POOL, "models": ["m"]}, {"name": "q", "models": ["n"], "replicas": [B]})
    assert merged(running, moved) == (running, ["pools"])


def test_a_wait_longer_than_the_proxy_was_told_of_needs_a_restart() -> None:
    longer = config({**POOL, "queue": {"max_wait_s": 60, "max_requests": 5}, "replicas": [B]})
    effective, waiting = merged(config(), longer)
    assert waiting == ["pools[0].queue.max_requests", "pools[0].queue.max_wait_s"]
    assert effective == config({**POOL, "replicas": [B]})


# --- the file ---------------------------------------------------------------------------------------------------------


class Followed:
    """A file that is followed, and what was applied of it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "extproc.yaml"
        self.path.write_text(text())
        self.applied: list[Config] = []
        self.watch = ConfigWatch(self.path, load(self.path), self.applied.append, recheck_s=0.2)

    def becomes(self, content: str) -> None:
        """By rename, as editors and controllers do."""
        other = self.path.with_suffix(".new")
        other.write_text(content)
        other.replace(self.path)


@pytest.fixture
async def followed(tmp_path: Path) -> AsyncIterator[Followed]:
    one = Followed(tmp_path)
    async with running(one):
        yield one


@asynccontextmanager
async def running(one: Followed) -> AsyncIterator[None]:
    task = asyncio.create_task(one.watch.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def lines(caplog: pytest.LogCaptureFixture, least: int = logging.WARNING) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= least and r.name.startswith("extproc")]


async def test_a_new_file_is_applied_once(followed: Followed) -> None:
    followed.becomes(text({**POOL, "replicas": [A, B]}))
    await until(lambda: followed.applied)
    followed.becomes(text({**POOL, "replicas": [A, B], "labels": {}}))
    followed.becomes(text({**POOL, "replicas": [C]}))
    await until(lambda: len(followed.applied) == 2)
    assert [[r.address for r in c.pools[0].replicas] for c in followed.applied] == [[A, B], [C]]
    assert followed.watch.state.applied == 2


async def test_a_wait_may_be_shortened_and_be_as_long_as_before_again(followed: Followed) -> None:
    followed.becomes(text({**POOL, "queue": {"max_wait_s": 5}}))
    await until(lambda: len(followed.applied) == 1)
    followed.becomes(text())
    await until(lambda: len(followed.applied) == 2)
    assert followed.watch.state.restart_needed == ()


async def test_an_invalid_file_changes_nothing_and_heals(followed: Followed, caplog: pytest.LogCaptureFixture) -> None:
    state = followed.watch.state
    followed.becomes("pools: [{replicas: ['10.0.0.1:1'], polcy: x}]\nlisten: {grpc: nowhere}")
    await until(lambda: not state.valid)
    assert state.errors == 1
    assert followed.applied == []
    (line,) = lines(caplog)
    assert "pools[0].polcy: no such key; did you mean policy?" in line
    assert "listen.grpc: " in line
    followed.becomes(text({**POOL, "replicas": [B]}))
    await until(lambda: state.valid)
    assert len(followed.applied) == 1
    assert state.errors == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"pools: [", b"[1, 2]"], ids=repr)
async def test_no_content_is_too_odd(followed: Followed, content: bytes) -> None:
    followed.path.write_bytes(content)
    await until(lambda: not followed.watch.state.valid)
    followed.becomes(text())
    await until(lambda: followed.watch.state.valid)
    assert followed.applied == []


async def test_a_file_that_is_gone_is_an_error_until_it_is_back(followed: Followed) -> None:
    followed.path.unlink()
    await until(lambda: not followed.watch.state.valid)
    followed.becomes(text())
    await until(lambda: followed.watch.state.valid)


async def test_a_restart_is_said_once_and_no_longer_needed_when_the_file_is_as_before(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    followed.becomes(text(envoy={"retries": 1}))
    await until(lambda: followed.watch.state.restart_needed == ("envoy.retries",))
    followed.becomes(text({**POOL, "replicas": [B]}, envoy={"retries": 1}))
    await until(lambda: followed.applied)
    followed.becomes(text({**POOL, "replicas": [B]}))
    await until(lambda: followed.watch.state.restart_needed == ())
    assert [line.partition(": ")[2] for line in lines(caplog)] == [
        "needs a restart: envoy.retries",
        "no restart needed",
    ]


async def test_a_nudge_reads_at_once(tmp_path: Path) -> None:
    """The change is made in a directory above, of which no event tells, and the recheck is an hour away."""
    real, link = tmp_path / "1", tmp_path / "now"
    real.mkdir()
    link.symlink_to(real)
    one = Followed(link)
    one.watch = ConfigWatch(one.path, load(one.path), one.applied.append, recheck_s=3600)
    looks: list[None] = []
    look = one.watch.look

    async def counted() -> None:
        await look()
        looks.append(None)

    one.watch.look = counted  # type: ignore[method-assign]
    async with running(one):
        await until(lambda: looks)
        other = tmp_path / "2"
        other.mkdir()
        (other / one.path.name).write_text(text({**POOL, "replicas": [B]}))
        (tmp_path / "next").symlink_to(other)
        (tmp_path / "next").replace(link)
        one.watch.nudge()
        await until(lambda: one.applied)
