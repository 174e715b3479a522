"""Membership and health for Envoy: a file of ClusterLoadAssignments that Envoy watches and extproc replaces by rename.

A file and not an xDS stream, so that each of the two can restart alone: Envoy keeps what it read last, and reads it again at its own start.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from extproc.config import Config
from extproc.envoy import names

ASSIGNMENT = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


class Health(StrEnum):
    """What Envoy is told of a member. Only Envoy's fallback policy looks at it: a pick names healthy replicas by itself."""

    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"
    DRAINING = "DRAINING"


class EndpointsError(Exception):
    """The file of members cannot be written; the text names the path and the remedy."""


@dataclass(frozen=True, slots=True)
class Member:
    """One replica as Envoy shall see it."""

    address: str
    """`ip:port`"""
    health: Health = Health.HEALTHY
    weight: float = 1.0
    """Share of what the fallback policy sends, relative to the other members; steps of a hundredth, 0.01 at least."""


Members = Mapping[str, Sequence[Member]]
"""Pool name -> its members. A pool without members is listed too: left out, it would keep those it had."""


def render(pools: Members, *, version: int = 1) -> bytes:
    """A DiscoveryResponse in JSON, one member a line. The order of pools and members does not matter to the result."""
    return _text(_resources(pools), version)


class EndpointsFile:
    """The file that Envoy watches. One writer; its directory must exist, because Envoy watches that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = _parsed(path)
        # Continue where the last process stopped: Envoy's `version_text` shall never run backwards.
        self.version = int(stored["version_info"]) if stored else 0
        self._resources: list[dict[str, Any]] | None = stored["resources"] if stored else None

    def __repr__(self) -> str:
        count = sum(len(members) for members in self.read().values())
        return f"<EndpointsFile {self.path} version {self.version}, {count} members>"

    def write(self, pools: Members) -> bool:
        """Replace the file if the members differ from what it says; whether it was replaced.

        Blocks for one fsync (milliseconds): call it in a thread where an event loop must not wait. Raises EndpointsError, and then
        the old file still stands and the next call tries again.
        """
        resources = _resources(pools)
        if resources == self._resources:
            return False
        try:
            _replace(self.path, _text(resources, self.version + 1))
        except OSError as e:
            raise EndpointsError(_remedy(self.path, e)) from e
        self.version += 1
        self._resources = resources
        return True

    def read(self) -> dict[str, tuple[Member, ...]]:
        """The members last written, also by an earlier process; empty when there is no readable file."""
        return {_pool(r["cluster_name"]): tuple(map(_member, _hosts(r))) for r in self._resources or ()}


def fixed_members(config: Config) -> dict[str, tuple[Member, ...]]:
    """The replicas that the configuration lists itself, taken for healthy; none for a pool with discovery."""
    return {p.name: tuple(Member(r.address, weight=r.weight) for r in p.replicas) for p in config.pools}


def create_if_missing(config: Config) -> bool:
    """Write the file from the fixed replicas unless there is one; whether it was written.

    Envoy refuses to start without the file. An existing one is kept: it may know more than the configuration does. Raises EndpointsError.
    """
    path = config.envoy.endpoints_file
    return not path.exists() and EndpointsFile(path).write(fixed_members(config))


def _text(resources: list[dict[str, Any]], version: int) -> bytes:
    """By hand around `json`, so that a person can read it and `diff` shows members."""
    blocks = []
    for r in resources:
        hosts = ",\n".join(f"      {json.dumps(host)}" for host in _hosts(r))
        head = f'"@type": "{r["@type"]}", "cluster_name": {json.dumps(r["cluster_name"])}'
        blocks.append(f'    {{{head}, "endpoints": [{{"lb_endpoints": [\n{hosts}\n    ]}}]}}')
    listed = ",\n".join(blocks)
    return f'{{\n  "version_info": "{version}",\n  "resources": [\n{listed}\n  ]\n}}\n'.encode()


def _resources(pools: Members) -> list[dict[str, Any]]:
    return [
        {
            "@type": ASSIGNMENT,
            "cluster_name": names.cluster_name(pool),
            "endpoints": [{"lb_endpoints": [_host(m) for m in sorted(members, key=lambda m: m.address)]}],
        }
        for pool, members in sorted(pools.items())
    ]


def _host(member: Member) -> dict[str, Any]:
    ip, _, port = member.address.rpartition(":")
    at = {"address": ip.removeprefix("[").removesuffix("]"), "port_value": int(port)}
    return {
        "endpoint": {"address": {"socket_address": at}},
        "health_status": member.health.value,
        "load_balancing_weight": _whole(member.weight),
    }


def _whole(weight: float) -> int:
    """Envoy wants whole numbers from 1, and their sum below 2**32: a thousand members at the cap stay under it."""
    return min(max(1, round(weight * 100)), 4_000_000)


def _hosts(resource: dict[str, Any]) -> list[dict[str, Any]]:
    return [host for group in resource["endpoints"] for host in group["lb_endpoints"]]


def _member(host: dict[str, Any]) -> Member:
    at = host["endpoint"]["address"]["socket_address"]
    ip = f"[{at['address']}]" if ":" in at["address"] else at["address"]
    return Member(f"{ip}:{at['port_value']}", Health(host["health_status"]), host["load_balancing_weight"] / 100)


def _pool(cluster: str) -> str:
    return cluster.removeprefix(names.cluster_name(""))


def _parsed(path: Path) -> dict[str, Any] | None:
    """What an earlier process wrote; None for no file, or one that we did not write."""
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        int(stored["version_info"])
        for resource in stored["resources"]:
            _pool(resource["cluster_name"])
            list(map(_member, _hosts(resource)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return stored


def _replace(path: Path, text: bytes) -> None:
    """Atomic: a reader sees the old file or the new one, and after a crash of the machine one of the two is there whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp gives 0600; Envoy often runs as another user
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _remedy(path: Path, error: OSError) -> str:
    if not path.parent.is_dir():
        return f"envoy.endpoints_file: directory {path.parent} does not exist; create it, or name another path"
    if isinstance(error, PermissionError):
        return f"envoy.endpoints_file: directory {path.parent} is not writable; change its owner, or name another path"
    return f"envoy.endpoints_file: cannot write {path}: {error.strerror}"
