"""The bootstraps in envoy/ are what `render` gives for tests/golden/configs/; `make golden` writes them again.

They are YAML, though Envoy reads JSON as well: people read these, in the shape of Envoy's own documentation, and a Lua script in JSON is one
long line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config import load
from extproc.envoy import bootstrap, credentials, endpoints

CONFIGS = Path(__file__).parent / "configs"
GOLDEN = Path(__file__).parents[2] / "envoy"
HEAD = "# Rendered from tests/golden/configs/{name}.yaml by `make golden`; do not edit.\n"


def names() -> list[str]:
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", names())
def test_the_bootstrap_is_as_recorded(name: str, golden_update: bool) -> None:
    golden = GOLDEN / f"{name}.yaml"
    rendered = HEAD.format(name=name) + bootstrap.text(bootstrap.render(load(CONFIGS / f"{name}.yaml")), as_yaml=True)
    if golden_update:
        golden.write_text(rendered)
    assert golden.read_text() == rendered, "differs; look at the change, then `make golden`"


def test_no_bootstrap_is_left_over() -> None:
    assert sorted(p.stem for p in GOLDEN.iterdir()) == names()


@pytest.mark.envoy
@pytest.mark.parametrize("name", names())
def test_envoy_takes_the_bootstrap(name: str, tmp_path: Path) -> None:
    """With its files of members moved to where they can be: Envoy wants them there even to validate."""
    config = load(CONFIGS / f"{name}.yaml")
    real, moved = config.envoy.endpoints_file, tmp_path / "endpoints.json"
    envoy = config.envoy.model_copy(update={"endpoints_file": moved})
    moved_config = config.model_copy(update={"envoy": envoy})
    endpoints.create_if_missing(moved_config)
    credentials.write(moved_config)
    recorded = (GOLDEN / f"{name}.yaml").read_text()
    assert str(real.parent) in recorded
    (tmp_path / "envoy.yaml").write_text(recorded.replace(str(real.parent), str(tmp_path)))
    bootstrap.validate(tmp_path / "envoy.yaml")


def test_what_a_person_reads_is_what_envoy_would_get_as_json() -> None:
    rendered: dict[str, Any] = bootstrap.render(load(CONFIGS / "pools.yaml"))
    assert yaml.safe_load(bootstrap.text(rendered, as_yaml=True)) == rendered
    assert yaml.safe_load(bootstrap.text(rendered)) == rendered
