from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config import Config, parse
from extproc.envoy import credentials
from extproc.envoy.endpoints import EndpointsError


def config(directory: Path, *providers: dict[str, Any]) -> Config:
    raw = {"pools": [{"replicas": ["127.0.0.1:1"]}], "providers": list(providers)}
    raw["envoy"] = {"endpoints_file": str(directory / "endpoints.json")}  # type: ignore[assignment]
    return parse(yaml.safe_dump(raw), base=directory)


def test_a_file_for_each_key_names_where_it_is_and_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.key").write_text("sk-secret")
    credentials.write(
        config(
            tmp_path, {"name": "a", "host": "a.example", "api_key_file": "a.key"}, {"name": "b", "host": "b.example"}
        )
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "provider_a_key.json"]
    written = json.loads((tmp_path / "provider_a_key.json").read_text())
    [secret] = written["resources"]
    assert secret["name"] == "provider_a_key"
    assert secret["generic_secret"] == {"secret": {"filename": str(tmp_path / "a.key")}}


def test_it_is_written_again_only_where_it_says_something_else(tmp_path: Path) -> None:
    section = {"name": "a", "host": "a.example", "api_key_file": "a.key"}
    path = tmp_path / "provider_a_key.json"
    credentials.write(config(tmp_path, section))
    first = path.stat().st_ino
    credentials.write(config(tmp_path, section))
    assert path.stat().st_ino == first
    credentials.write(config(tmp_path, {**section, "api_key_file": "/elsewhere/b.key"}))
    assert "/elsewhere/b.key" in path.read_text()


def test_the_key_itself_need_not_be_there(tmp_path: Path) -> None:
    credentials.write(config(tmp_path, {"name": "a", "host": "a.example", "api_key_file": "/not/there"}))
    assert (tmp_path / "provider_a_key.json").exists()


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    away = tmp_path / "no"
    with pytest.raises(EndpointsError, match=rf"^envoy.endpoints_file: directory {away} does not exist; create it"):
        credentials.write(config(away, {"name": "a", "host": "a.example", "api_key_file": "a.key"}))
