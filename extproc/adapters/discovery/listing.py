"""The format of a file of replicas, and what its mistakes are called. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import orjson
import yaml
from pydantic import ValidationError, model_validator

from extproc.adapters.discovery.base import replica
from extproc.config import ReplicaConfig, Section, mistakes
from extproc.core.types import Replica


class ListingError(ValueError):
    """The file cannot be used; the text says what is wrong in it, in one line."""


class _Listing(Section):
    replicas: tuple[ReplicaConfig, ...]

    @model_validator(mode="before")
    @classmethod
    def _bare_list(cls, value: Any) -> Any:
        return {"replicas": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        seen: set[str] = set()
        for r in self.replicas:
            if r.address in seen:
                raise ValueError(f"replica {r.address} is listed twice; remove one")
            seen.add(r.address)
        return self


def parse(content: bytes, pool_labels: Mapping[str, str]) -> dict[str, Replica]:
    """Replicas by address, in the order of the file: a list of `ip:port` or `{address, labels, weight, drain}`, or an object that has it as `replicas`.

    A list without entries empties the pool; a file without a list (cut off while it was written, say) is a mistake. Raises ListingError.
    """
    raw = _decoded(content)
    if not isinstance(raw, dict | list):
        raise ListingError("must be a list of replicas, or an object with the key replicas")
    try:
        listing = _Listing.model_validate(raw)
    except ValidationError as e:
        raise ListingError("; ".join(mistakes(e, _Listing)[:3])) from None
    return {r.address: replica(r, pool_labels) for r in listing.replicas}


def _decoded(content: bytes) -> Any:
    """JSON first: controllers write it, and a thousand replicas take 6 ms, against 200 ms as YAML."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as e:
        raise ListingError(f"neither YAML nor JSON: {' '.join(str(e).split())}") from None
