"""Connections to Redis as the configuration says: alone, behind Sentinels, or a Cluster. Nothing connects before the first use."""

from __future__ import annotations

import asyncio
import os
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError

from extproc.config import Shared
from extproc.redis_url import Kind, RedisUrl, parse

Client: TypeAlias = Redis | RedisCluster


class Credentials(CredentialProvider):
    """User and password as they are when a connection is made: a file or variable may change meanwhile."""

    def __init__(self, shared: Shared, url: RedisUrl) -> None:
        self._user = url.username or shared.username
        self._password, self._file, self._env = url.password, shared.password_file, shared.password_env

    def __repr__(self) -> str:
        return "<Credentials>"

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """As redis-py wants them; raises AuthenticationError where the password cannot be had."""
        password = self._read()
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """The same, the file read off the event loop."""
        return await asyncio.to_thread(self.get_credentials)

    def _read(self) -> str:
        if self._file is not None:
            try:
                return self._file.read_text().strip()
            except (OSError, UnicodeDecodeError) as e:
                raise AuthenticationError(
                    f"shared.password_file: {getattr(e, 'strerror', None) or 'not UTF-8'}"
                ) from None
        if self._env is not None and self._env not in os.environ:
            raise AuthenticationError("shared.password_env: no such environment variable")
        return os.environ[self._env] if self._env is not None else self._password or ""


def connect(shared: Shared, name: str) -> Client:
    """A client for this configuration that tries once: how often, and for how long (`asyncio.timeout`), is for the caller to say.

    `name` shows in CLIENT LIST, after `extproc-`. To be closed by `disconnect`.
    """
    url = parse(shared.url)
    options = _options(shared, url, name)
    if url.kind is Kind.CLUSTER:
        nodes = [ClusterNode(host, port) for host, port in url.hosts]
        return RedisCluster(startup_nodes=nodes, max_connections=2, **options)
    options |= {"db": url.database, "max_connections": 2}
    if url.kind is Kind.SENTINEL:
        login = options["credential_provider"] if shared.sentinel_auth else None
        asking = {**options, "credential_provider": login, "db": 0}
        sentinels = Sentinel(url.hosts, sentinel_kwargs=asking, **options)  # type: ignore[no-untyped-call]
        master: Redis = sentinels.master_for(url.service or "")
        return master
    if url.path is not None:
        return Redis(unix_socket_path=url.path, **options)
    [(host, port)] = url.hosts
    return Redis(host=host, port=port, **options)


def connect_for_channels(shared: Shared, name: str, turn: int) -> Redis:
    """A client for PUBLISH and SUBSCRIBE, otherwise like that of `connect`.

    In a Cluster any node will do: it is one of those that the URL names, another for each `turn`.
    """
    url = parse(shared.url)
    if url.kind is not Kind.CLUSTER:
        client = connect(shared, name)
        assert isinstance(client, Redis)
        return client
    host, port = url.hosts[turn % len(url.hosts)]
    return Redis(host=host, port=port, max_connections=2, **_options(shared, url, name))


async def disconnect(client: Client) -> None:
    """Close its connections, those to Sentinels too."""
    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _options(shared: Shared, url: RedisUrl, name: str) -> dict[str, Any]:
    """What every connection has in common."""
    login = url.password or shared.password_file or shared.password_env
    options: dict[str, Any] = {
        "client_name": f"extproc-{name}",
        # With a timeout of its own it sends by asyncio.wait_for, which in Python 3.11 may swallow a cancellation.
        "socket_timeout": None,
        "socket_connect_timeout": shared.timeout_s,
        "retry": Retry(NoBackoff(), 0),  # by default it tries for half a minute within one call
        "protocol": 2,  # needs no HELLO, which an ACL would have to allow
        "credential_provider": Credentials(shared, url) if login else None,
    }
    if url.tls:
        tls = shared.tls
        options |= {
            "ssl": True,
            "ssl_ca_certs": tls.ca_file and str(tls.ca_file),
            "ssl_certfile": tls.cert_file and str(tls.cert_file),
            "ssl_keyfile": tls.key_file and str(tls.key_file),
            "ssl_check_hostname": tls.check_hostname,
        }
    return options
