from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from extproc.envoy import bootstrap, endpoints, names
from extproc.envoy.bootstrap import BootstrapError
from tests.envoy import steering
from tests.envoy.steering import http_filters, manager


def changed(directory: Path, **sections: dict[str, Any]) -> Any:
    """The plain configuration with fields of its sections set past their validation."""
    config = steering.config(directory)
    update = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=update)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"requests": {"session_header": "x_session"}}, "requests.session_header: 'x_session' has an underscore"),
        (
            {"requests": {"session_header": "x session"}},
            "requests.session_header: 'x session' is not the name of an HTTP",
        ),
        ({"requests": {"tenant_header": ":path"}}, "requests.tenant_header: ':path' is not the name of an HTTP header"),
        ({"requests": {"session_header": "Host"}}, "requests.session_header: 'Host' belongs to HTTP itself"),
        ({"requests": {"max_body_bytes": 2**32}}, "requests.max_body_bytes: Envoy counts up to 4294901759"),
        (
            {"envoy": {"disabled_paths": ("/health", "/")}},
            "envoy.disabled_paths[1]: '/' would keep every request from extproc",
        ),
        ({"envoy": {"disabled_paths": ("ping",)}}, "envoy.disabled_paths[0]: 'ping' never matches a path"),
        ({"envoy": {"connect_timeout_s": 1e-5}}, "envoy.connect_timeout_s: Envoy counts whole milliseconds"),
        (
            {"envoy": {"admin": "127.0.0.1:9002"}, "listen": {"grpc": "127.0.0.1:9002"}},
            "envoy.admin: 127.0.0.1:9002 is taken by listen.grpc",
        ),
    ],
)
def test_values_that_only_envoy_would_notice_are_named(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(BootstrapError) as error:
        bootstrap.render(changed(tmp_path, **sections))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(BootstrapError) as error:
        bootstrap.render(changed(tmp_path, requests={"session_header": "a_b", "tenant_header": "c_d"}))
    assert len(str(error.value).splitlines()) == 2


def test_an_unknown_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BootstrapError, match=r"^baseline .maglev. is not one of round_robin, least_request, random$"):
        bootstrap.render(steering.config(tmp_path), baseline="maglev")


def test_rendering_twice_gives_the_same(tmp_path: Path) -> None:
    config = steering.config(tmp_path)
    assert bootstrap.text(bootstrap.render(config)) == bootstrap.text(bootstrap.render(config))


def test_a_baseline_has_nothing_of_extproc(tmp_path: Path) -> None:
    rendered = bootstrap.render(steering.config(tmp_path), baseline="random")
    assert [f["name"] for f in http_filters(rendered)] == ["envoy.filters.http.router"]
    assert "access_log" not in manager(rendered)
    assert [c["name"] for c in rendered["static_resources"]["clusters"]] == [names.cluster_name("default")]


def test_the_script_has_all_names_put_in(tmp_path: Path) -> None:
    [script] = [f for f in http_filters(bootstrap.render(steering.config(tmp_path))) if f["name"].endswith("lua")]
    source = script["typed_config"]["default_source_code"]["inline_string"]
    assert "@" not in source
    assert f'"{names.USAGE_NAMESPACE}"' in source


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_write_replaces_the_file_and_returns_its_path(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"envoy{suffix}"
    path.write_text("old")
    config = steering.config(tmp_path, bootstrap_file=str(path))
    assert bootstrap.write(config) == path
    assert path.read_text() == bootstrap.text(bootstrap.render(config), as_yaml=suffix == ".yaml")
    assert list(tmp_path.iterdir()) == [path]


def test_write_names_a_directory_that_is_not_there(tmp_path: Path) -> None:
    config = steering.config(tmp_path, bootstrap_file=str(tmp_path / "no" / "envoy.json"))
    with pytest.raises(BootstrapError, match=r"^envoy.bootstrap_file: cannot write .*/no/envoy.json: No such file"):
        bootstrap.write(config)


def test_importing_the_module_loads_no_messages() -> None:
    code = "import sys, extproc.envoy.bootstrap; print('envoy_data_plane' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"


@pytest.mark.envoy
@pytest.mark.parametrize("baseline", [None, *bootstrap.BASELINES])
def test_envoy_takes_what_is_written(tmp_path: Path, baseline: str | None) -> None:
    config = steering.config(tmp_path)
    endpoints.create_if_missing(config)
    bootstrap.validate(bootstrap.write(config, baseline=baseline))


@pytest.mark.envoy
def test_envoys_own_reason_is_passed_on(tmp_path: Path) -> None:
    config = steering.config(tmp_path)
    endpoints.create_if_missing(config)
    rendered = bootstrap.render(config)
    rendered["static_resources"]["clusters"][0]["connect_timeout"] = "soon"
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(rendered))
    with pytest.raises(BootstrapError, match=r"envoy.json: Envoy refuses it: .*connect_?[tT]imeout") as error:
        bootstrap.validate(path)
    assert "\n" not in str(error.value)


@pytest.mark.envoy
def test_the_missing_file_of_members_is_named(tmp_path: Path) -> None:
    with pytest.raises(BootstrapError, match=r"endpoints.json' does not exist$"):
        bootstrap.validate(bootstrap.write(steering.config(tmp_path)))
