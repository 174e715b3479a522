"""The tokenizers of the configuration. The libraries are imported where a pool has one, and not before: 20 MB that only those pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from extproc.config import ConfigError, PoolConfig

if TYPE_CHECKING:
    from extproc.adapters.tokenizing.tokenizing import Tokenizing


def tokenizing(pools: Sequence[PoolConfig], took: Callable[[str, float], None]) -> Tokenizing | None:
    """None where no pool has one; `took` gets a pool, and the seconds that a request waited. Raises ConfigError."""
    settings = {pool.name: pool.tokenizer for pool in pools if pool.tokenizer is not None}
    if not settings:
        return None
    try:
        from extproc.adapters.tokenizing.tokenizing import Tokenizing
    except ModuleNotFoundError as e:
        first = next(iter(settings))
        raise ConfigError(
            f"pool {first}: tokenizer needs the package {e.name}; pip install 'extproc[tokenizers]'"
        ) from None
    return Tokenizing(settings, took=took)
