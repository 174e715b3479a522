"""Where the members of a pool come from: each source turns into a stream of `Reset | Add | Remove`."""

from __future__ import annotations

from pathlib import Path

from extproc.adapters.discovery.base import FakeSource, OnError, Source, ignore_errors
from extproc.adapters.discovery.dns import DnsSource
from extproc.adapters.discovery.file import FileSource
from extproc.adapters.discovery.kube_api import Connect
from extproc.adapters.discovery.kubernetes import InferencePoolSource, SliceSource
from extproc.adapters.discovery.resolver import Resolver
from extproc.adapters.discovery.static import StaticSource
from extproc.config import ConfigError, DnsDiscovery, PoolConfig

__all__ = [
    "DnsSource",
    "FakeSource",
    "FileSource",
    "InferencePoolSource",
    "OnError",
    "SliceSource",
    "Source",
    "StaticSource",
    "from_config",
]


def from_config(pool: PoolConfig, on_error: OnError = ignore_errors) -> Source:
    """The source that the configuration of a pool asks for. `on_error` gets the text of each mistake that it meets later.

    Raises ConfigError where a package is missing.
    """
    wanted = pool.discovery
    if wanted is None:
        return StaticSource.from_config(pool)
    if wanted.kubernetes:
        connect = _kubernetes(pool.name, wanted.kubernetes.kubeconfig)
        return SliceSource(pool.name, wanted.kubernetes, pool.labels, connect, on_error=on_error)
    if wanted.inference_pool:
        connect = _kubernetes(pool.name, wanted.inference_pool.kubeconfig)
        return InferencePoolSource(pool.name, wanted.inference_pool, pool.labels, connect, on_error=on_error)
    if wanted.dns:
        return DnsSource(pool.name, wanted.dns, pool.labels, _resolver(pool.name, wanted.dns), on_error=on_error)
    assert wanted.file is not None
    return FileSource(pool.name, wanted.file.path, pool.labels, on_error=on_error)


def _kubernetes(pool: str, kubeconfig: Path | None) -> Connect:
    """Imported here: 5 MiB and 30 ms that only those pay who ask for it."""
    try:
        from extproc.adapters.discovery.kube_client import connector
    except ModuleNotFoundError:
        raise ConfigError(_missing(pool, "Kubernetes", "lightkube", "kubernetes")) from None
    return connector(kubeconfig)


def _resolver(pool: str, settings: DnsDiscovery) -> Resolver:
    """Imported here, as above: 7 MiB."""
    try:
        from extproc.adapters.discovery.dns_client import DnsClient
    except ModuleNotFoundError:
        raise ConfigError(_missing(pool, "DNS", "dnspython", "dns")) from None
    return DnsClient(settings.servers)


def _missing(pool: str, what: str, package: str, extra: str) -> str:
    return f"pool {pool}: discovery from {what} needs the package {package}; pip install 'extproc[{extra}]'"
