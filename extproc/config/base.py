"""What all sections of the configuration have in common, and how they write addresses."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]


class Section(BaseModel):
    """What every part of the file has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ConfigError(Exception):
    """The configuration cannot be used; the text names each place by its dotted path, and the remedy."""


def _address(value: str) -> str:
    """`ip:port`, as Envoy will name it: a host name would never equal the endpoint that Envoy reports."""
    host, _, port = value.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        hint = "127.0.0.1" if host == "localhost" else "the IP address"
        raise ValueError(f"{value!r} is not ip:port; write {hint} instead of {host!r}") from None
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{value!r} has no port between 1 and 65535; write ip:port")
    return f"[{ip}]:{int(port)}" if ip.version == 6 else f"{ip}:{int(port)}"


def _listener(value: str) -> str:
    """`ip:port` or `unix:/path`."""
    if value.startswith("unix:"):
        if not value.removeprefix("unix:").startswith("/"):
            raise ValueError(f"{value!r} needs an absolute path; write unix:/run/extproc/grpc.sock")
        return value
    return _address(value)


def zmq_endpoint(value: str) -> str:
    """`tcp://host:port` of ZMQ, with `{host}` or `*` in the place of the host where that is a replica's, or any of ours."""
    found = re.fullmatch(r"tcp://(\{host\}|\*|[0-9A-Za-z_.-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", value)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(f"{value!r} is not tcp://host:port; write tcp://{{host}}:5557 for port 5557 of each replica")
    return value


Address = Annotated[str, AfterValidator(_address)]


Endpoint = Annotated[str, AfterValidator(zmq_endpoint)]


Listener = Annotated[str, AfterValidator(_listener)]


def first_doubled(values: Any) -> str | None:
    """The first value that was there before, as text."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return str(value)
        seen.add(value)
    return None
