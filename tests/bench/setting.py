"""Files and ports of the overhead benchmark: one extproc, and Envoys that differ in one thing each.

extproc   the bootstrap as `extproc envoy` renders it
null      the same with the null server instead, and without the access log that only extproc takes
none      the same listener and members without ext_proc
quiet     like `extproc`, without the periodic access log entries
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from extproc.config import Config, parse
from extproc.envoy import bootstrap, names
from extproc.envoy.endpoints import create_if_missing
from tests.support.ports import free_port

KINDS = ("extproc", "null", "none", "quiet")


@dataclass(frozen=True, slots=True)
class EnvoyPorts:
    listen: int = field(default_factory=free_port)
    admin: int = field(default_factory=free_port)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is."""

    directory: Path
    backend: int = field(default_factory=free_port)
    null: int = field(default_factory=free_port)
    grpc: int = field(default_factory=free_port)
    http: int = field(default_factory=free_port)
    envoys: dict[str, EnvoyPorts] = field(default_factory=lambda: {kind: EnvoyPorts() for kind in KINDS})

    @property
    def config(self) -> Path:
        return self.directory / "extproc.yaml"

    def bootstrap(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def write_files(directory: Path) -> Layout:
    """Configuration, members and the four bootstraps."""
    layout = Layout(directory)
    layout.config.write_text(yaml.safe_dump(_raw(layout, "extproc")))
    create_if_missing(_config(layout, "extproc"))
    for kind in KINDS:
        config = _config(layout, kind)
        rendered = bootstrap.render(config, baseline="least_request" if kind == "none" else None)
        if kind == "null":
            rendered = without_access_log(rendered)
        layout.bootstrap(kind).write_text(json.dumps(rendered))
    return layout


def _raw(layout: Layout, kind: str) -> dict[str, Any]:
    ports = layout.envoys[kind]
    grpc = layout.null if kind == "null" else layout.grpc
    return {
        "listen": {"grpc": f"127.0.0.1:{grpc}", "http": f"127.0.0.1:{layout.http}"},
        # Without scrapes: they cost by time and not by request, and the canned replica has no metrics.
        # Nothing is held: answers here come at once, while the access log tells of them a tenth of a second later, so that the queue
        # would be what is measured.
        "pools": [
            {
                "models": ["bench"],
                "engine": "none",
                "queue": {"enabled": False},
                "replicas": [f"127.0.0.1:{layout.backend}"],
            }
        ],
        "requests": {"flight_ttl_s": 600},
        "envoy": {
            "listen": f"127.0.0.1:{ports.listen}",
            "admin": f"127.0.0.1:{ports.admin}",
            "endpoints_file": "endpoints.json",
            **({"progress_interval_s": None} if kind == "quiet" else {}),
        },
    }


def _config(layout: Layout, kind: str) -> Config:
    return parse(yaml.safe_dump(_raw(layout, kind)), source=kind, base=layout.directory)


def without_access_log(rendered: dict[str, Any]) -> dict[str, Any]:
    """The bootstrap without the access log that goes to extproc. Raises ValueError when there is none to leave out."""
    result = copy.deepcopy(rendered)
    left_out = 0
    for listener in result["static_resources"]["listeners"]:
        for chain in listener["filter_chains"]:
            for manager in (f["typed_config"] for f in chain["filters"]):
                logs = manager.get("access_log", [])
                kept = [log for log in logs if log["name"] != "envoy.access_loggers.http_grpc"]
                left_out += len(logs) - len(kept)
                manager["access_log"] = kept
                manager.pop("access_log_options", None)
    if not left_out:
        raise ValueError(f"the bootstrap has no gRPC access log for {names.LOG_NAME}; has the rendering changed?")
    return result
