"""Models and providers in the composition root: what the core is told, at the start and by the file, and when the process is ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from extproc.app import App
from extproc.config import Config, load
from extproc.core.types import Request
from tests.e2e.stack import configured, replica
from tests.support.ports import free_port
from tests.support.waiting import until


def written(path: Path, config: Config, **changes: Any) -> Path:
    """The configuration as a file, with other sections."""
    raw = {**config.model_dump(mode="json", exclude_unset=True), **changes}
    path.write_text(yaml.safe_dump(raw))
    return path


def names(app: App) -> list[str]:
    return [model.name for model in app.router.listed(Request(), 0.0)]


async def test_models_follow_the_configuration_file(tmp_path: Path) -> None:
    pools = [{"name": "a", "replicas": [f"127.0.0.1:{free_port()}"], "engine": "none"}]
    config = configured(tmp_path, *pools)
    path = written(tmp_path / "extproc.yaml", config, models=[{"name": "m", "targets": [{"pool": "a"}]}])
    app = App(load(path), path=path)
    await app.start()
    try:
        assert names(app) == ["m"]
        written(path, config, models=[{"name": "m", "aliases": ["n"], "targets": [{"pool": "a"}]}])
        await until(lambda: names(app) == ["m", "n"], timeout_s=20)
        written(path, config)
        await until(lambda: not len(app.router.steering.catalog), timeout_s=20)
    finally:
        await app.stop(grace_s=0)


async def test_with_models_one_pool_that_answers_is_enough_to_be_ready(tmp_path: Path) -> None:
    async with replica() as there:
        pools: list[dict[str, Any]] = [
            {"name": "a", "replicas": [there.address]},
            {"name": "b", "replicas": [f"127.0.0.1:{free_port()}"]},
        ]
        models = [{"name": "m", "targets": [{"pool": "a"}], "fallback": [{"pool": "b"}]}]
        app = App(configured(tmp_path, *pools, models=models))
        await app.start()
        try:
            await until(lambda: app.not_ready() is None)
        finally:
            await app.stop(grace_s=0)


async def test_without_models_every_pool_has_to_answer(tmp_path: Path) -> None:
    async with replica() as there:
        pools: list[dict[str, Any]] = [
            {"name": "a", "models": ["x"], "replicas": [there.address]},
            {"name": "b", "models": ["y"], "replicas": [f"127.0.0.1:{free_port()}"]},
        ]
        app = App(configured(tmp_path, *pools))
        await app.start()
        try:
            await until(lambda: "pool b" in (app.not_ready() or ""))
        finally:
            await app.stop(grace_s=0)
