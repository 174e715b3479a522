"""Membership and health for Envoy: a file with a ClusterLoadAssignment that Envoy watches and extproc replaces by rename.

A file and not an xDS stream, so that each of the two can restart alone: Envoy keeps what it read last, and reads it again at its own start.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
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

Host = dict[str, Any]
"""A member in Envoy's JSON (LbEndpoint)."""


def file_of(endpoints_file: Path, pool: str, pools: Collection[str]) -> Path:
    """Where the members of a pool are: `endpoints.json` for the only one, `endpoints.<pool>.json` for one of several.

    A file each, because Envoy takes exactly one cluster from a file that it watches, and rejects one that holds more.
    """
    if len(pools) == 1:
        return endpoints_file
    return endpoints_file.with_name(f"{endpoints_file.stem}.{pool}{endpoints_file.suffix}")


def render(pool: str, members: Sequence[Member], *, version: int = 1) -> bytes:
    """A DiscoveryResponse in JSON with the one cluster of the pool, one member a line, whatever the order of `members`."""
    return _text(pool, _hosts(members), version)


class EndpointsFile:
    """The file that Envoy watches, or one for each of several pools. One writer; the directory must exist, because Envoy watches that."""

    def __init__(self, path: Path, pools: Collection[str]) -> None:
        """`path` is `envoy.endpoints_file`; `pools` names every pool, for several have a file each."""
        self.path = path
        self._files = {pool: _PoolFile(pool, file_of(path, pool, pools)) for pool in pools}

    def __repr__(self) -> str:
        return f"<EndpointsFile {self.path}: {', '.join(map(repr, self._files.values()))}>"

    def write(self, known: Members) -> bool:
        """Replace the files whose members differ from what they say; whether any was replaced.

        `known` has the pools whose members are known, also those that have none; the files of the others stay. Blocks for an fsync a
        file (milliseconds), and only when something changed. Raises EndpointsError, and then the old file still stands and the next
        call tries again.
        """
        replaced = [self._files[pool].write(members) for pool, members in known.items()]
        return any(replaced)

    def read(self) -> dict[str, tuple[Member, ...]]:
        """The members last written, also by an earlier process; a pool without a readable file is left out."""
        return {p: tuple(map(_member, file.hosts)) for p, file in self._files.items() if file.hosts is not None}


class _PoolFile:
    """What the file of one pool says."""

    def __init__(self, pool: str, path: Path) -> None:
        self.pool = pool
        self.path = path
        # Continue where the last process stopped: a version shall never run backwards.
        self.version, self.hosts = _stored(path)

    def __repr__(self) -> str:
        return f"{self.pool} version {self.version}, {len(self.hosts or ())} members"

    def write(self, members: Sequence[Member]) -> bool:
        hosts = _hosts(members)
        if hosts == self.hosts:
            return False
        try:
            replace_file(self.path, _text(self.pool, hosts, self.version + 1))
        except OSError as e:
            raise EndpointsError(remedy(self.path, e)) from e
        self.version += 1
        self.hosts = hosts
        return True


def fixed_members(config: Config) -> dict[str, tuple[Member, ...]]:
    """The replicas that the configuration lists itself, taken for healthy; none for a pool with discovery."""
    return {p.name: tuple(Member(r.address, weight=r.weight) for r in p.replicas) for p in config.pools}


def create_if_missing(config: Config) -> bool:
    """Write the files that are missing from the fixed replicas; whether there was one to write.

    Envoy refuses to start without them. An existing one is kept: it may know more than the configuration does. Raises EndpointsError.
    """
    members = fixed_members(config)
    paths = {pool: file_of(config.envoy.endpoints_file, pool, members) for pool in members}
    missing = [pool for pool, path in paths.items() if not path.exists()]
    written = [_PoolFile(pool, paths[pool]).write(members[pool]) for pool in missing]
    return any(written)


def _text(pool: str, hosts: list[Host], version: int) -> bytes:
    """By hand around `json`, so that a person can read it and `diff` shows members."""
    head = f'"@type": "{ASSIGNMENT}", "cluster_name": {json.dumps(names.cluster_name(pool))}'
    listed = ",\n".join(f"    {json.dumps(host)}" for host in hosts)
    resource = f'{{{head}, "endpoints": [{{"lb_endpoints": [\n{listed}\n  ]}}]}}'
    return f'{{"version_info": "{version}", "resources": [\n  {resource}\n]}}\n'.encode()


def _hosts(members: Sequence[Member]) -> list[Host]:
    return [_host(m) for m in sorted(members, key=lambda m: m.address)]


def _host(member: Member) -> Host:
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


def _member(host: Host) -> Member:
    at = host["endpoint"]["address"]["socket_address"]
    ip = f"[{at['address']}]" if ":" in at["address"] else at["address"]
    return Member(f"{ip}:{at['port_value']}", Health(host["health_status"]), host["load_balancing_weight"] / 100)


def _stored(path: Path) -> tuple[int, list[Host] | None]:
    """Version and members that an earlier process wrote; (0, None) for no file, or one that we did not write."""
    try:
        stored = json.loads(path.read_bytes())
        hosts: list[Host] = stored["resources"][0]["endpoints"][0]["lb_endpoints"]
        version = int(stored["version_info"])
        for host in hosts:
            _member(host)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return 0, None
    return version, hosts


def replace_file(path: Path, text: bytes) -> None:
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


def remedy(path: Path, error: OSError) -> str:
    """Why a file beside `envoy.endpoints_file` cannot be written, and what to do."""
    if not path.parent.is_dir():
        return f"envoy.endpoints_file: directory {path.parent} does not exist; create it, or name another path"
    if isinstance(error, PermissionError):
        return f"envoy.endpoints_file: directory {path.parent} is not writable; change its owner, or name another path"
    return f"envoy.endpoints_file: cannot write {path}: {error.strerror}"
