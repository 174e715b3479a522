"""A rendered bootstrap in which request headers stand in for extproc: they set the metadata that its answers would set."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from extproc.config import Config, parse
from extproc.envoy import bootstrap, endpoints, names
from tests.support.ports import free_port

PICK = "x-test-pick"
"""Value: the list of endpoints that extproc would name."""
STRIP = "x-test-strip"
STRIP_ON = {STRIP: "IAE="}
"""Header that sets the mark; the value is a google.protobuf.Value of true, in base64."""


def config(directory: Path, *replicas: str, requests: dict[str, Any] | None = None, **envoy: Any) -> Config:
    """One pool behind an Envoy whose files are in `directory`; nothing listens where extproc should."""
    raw = {
        "listen": {"grpc": f"127.0.0.1:{free_port()}"},
        "pools": [{"replicas": list(replicas) or ["127.0.0.1:1"]}],
        "requests": {"flight_ttl_s": 600, **(requests or {})},
        "envoy": {
            "listen": f"127.0.0.1:{free_port()}",
            "admin": f"127.0.0.1:{free_port()}",
            "endpoints_file": str(directory / "endpoints.json"),
            "bootstrap_file": str(directory / "envoy.json"),
            "access_log": str(directory / "access.log"),
            **envoy,
        },
    }
    return parse(yaml.safe_dump(raw))


def steered(config: Config) -> dict[str, Any]:
    """The rendered bootstrap with the stand-in after ext_proc; the file of endpoints is made."""
    endpoints.create_if_missing(config)
    rendered = copy.deepcopy(bootstrap.render(config))
    http_filters(rendered).insert(1, _stand_in())
    return rendered


def manager(rendered: dict[str, Any]) -> dict[str, Any]:
    """The HTTP connection manager."""
    listener = rendered["static_resources"]["listeners"][0]
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def http_filters(rendered: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manager(rendered)["http_filters"]
    return found


def _stand_in() -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.header_to_metadata",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config",
            "request_rules": [
                _rule(PICK, names.LB_NAMESPACE, names.DESTINATION, {}),
                _rule(STRIP, names.NAMESPACE, names.STRIP_USAGE, {"type": "PROTOBUF_VALUE", "encode": "BASE64"}),
            ],
        },
    }


def _rule(header: str, namespace: str, key: str, more: dict[str, str]) -> dict[str, Any]:
    present = {"metadata_namespace": namespace, "key": key, **more}
    return {"header": header, "on_header_present": present, "remove": True}
