"""Where a Redis is, read from a URL: alone, behind Sentinels, or as a Cluster.

    redis://[user:password@]host[:6379][/database]
    unix:///run/redis/redis.sock[?db=0]
    redis+sentinel://[user:password@]host[:26379],host,.../service[/database]
    redis+cluster://[user:password@]host[:6379],host,...

`rediss` in the place of `redis` is TLS. User and password are percent-encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import parse_qs, unquote, urlsplit

SCHEMES = (
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)


class Kind(StrEnum):
    """How the server is found."""

    ALONE = "alone"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A URL in its parts. What it prints has neither user nor password."""

    kind: Kind
    tls: bool
    hosts: tuple[tuple[str, int], ...]
    """Host and port of the server, of the Sentinels, or of some nodes; none for a socket."""
    path: str | None = None
    """Of a socket."""
    service: str | None = None
    """The name by which Sentinels know the server."""
    database: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        where = self.path or ",".join(f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in self.hosts)
        return f"{self.kind} {where}" if self.service is None else f"{self.kind} {where} {self.service}"


def parse(url: str) -> RedisUrl:
    """Take a URL apart. Raises ValueError with the mistake and the remedy, never with what may be a password."""
    scheme, found, rest = url.partition("://")
    if not found or scheme not in SCHEMES:
        raise ValueError(f"is no Redis URL; write one of {', '.join(f'{s}://' for s in SCHEMES)}")
    if scheme == "unix":
        return _socket(url)
    protocol, _, kind = scheme.partition("+")
    login, at, rest = rest.rpartition("@")
    hosts, _, path = rest.partition("/")
    user, _, password = login.partition(":")
    parts = path.split("/") if path else []
    service = _service(parts) if kind == "sentinel" else None
    if kind == "cluster" and parts:
        raise ValueError("has a path; a Cluster has one database, and no path")
    return RedisUrl(
        kind=Kind(kind or "alone"),
        tls=protocol == "rediss",
        hosts=_hosts(hosts, Kind(kind or "alone")),
        service=service,
        database=_database(parts),
        username=unquote(user) or None if at else None,
        password=unquote(password) or None if at else None,
    )


def _socket(url: str) -> RedisUrl:
    parts = urlsplit(url)
    if parts.netloc.rpartition("@")[2] or not parts.path.startswith("/"):
        raise ValueError("needs an absolute path; write unix:///run/redis/redis.sock")
    database = _database(parse_qs(parts.query).get("db", []))
    login = parts.netloc.rpartition("@")[0]
    user, _, password = login.partition(":")
    return RedisUrl(
        Kind.ALONE,
        tls=False,
        hosts=(),
        path=parts.path,
        database=database,
        username=unquote(user) or None,
        password=unquote(password) or None,
    )


def _service(parts: list[str]) -> str:
    """Taken from the front of the path."""
    if not parts or not parts[0]:
        raise ValueError("names no service; write redis+sentinel://host:26379/mymaster")
    return parts.pop(0)


def _database(parts: list[str]) -> int:
    if not parts or parts == [""]:
        return 0
    if len(parts) > 1 or not parts[0].isdecimal():
        raise ValueError("has a database that is no number; write /0 at its end, or nothing")
    return int(parts[0])


def _hosts(text: str, kind: Kind) -> tuple[tuple[str, int], ...]:
    hosts = tuple(_host(each, 26379 if kind is Kind.SENTINEL else 6379) for each in text.split(","))
    if kind is Kind.ALONE and len(hosts) > 1:
        raise ValueError("names several hosts; write redis+sentinel:// or redis+cluster:// for that")
    return hosts


def _host(text: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    try:
        given = parts.port
    except ValueError:
        raise ValueError("has a port that is no number between 1 and 65535") from None
    if not parts.hostname or parts.query or parts.fragment:
        raise ValueError("has no host; write redis://host:6379")
    return parts.hostname, given or port
