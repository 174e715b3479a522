"""Where the members of a pool come from: each source turns into a stream of `Reset | Add | Remove`."""

from __future__ import annotations

from extproc.adapters.discovery.base import FakeSource, OnError, Source, ignore_errors
from extproc.adapters.discovery.file import FileSource
from extproc.adapters.discovery.static import StaticSource
from extproc.config import PoolConfig

__all__ = ["FakeSource", "FileSource", "OnError", "Source", "StaticSource", "from_config"]


def from_config(pool: PoolConfig, on_error: OnError = ignore_errors) -> Source:
    """The source that the configuration of a pool asks for. `on_error` gets the text of each mistake that it meets later."""
    if pool.discovery and pool.discovery.file:
        return FileSource(pool.name, pool.discovery.file.path, pool.labels, on_error=on_error)
    return StaticSource.from_config(pool)
