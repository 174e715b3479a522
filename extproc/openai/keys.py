"""API keys as clients send them, and as they are kept: hashed with a secret, so that a copy of the file of keys opens nothing.

A key is looked up by its hash, and so in a time that says nothing of the keys there are. No key is kept or logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from hashlib import blake2b
from typing import Protocol

from extproc.core.record import record

HEADERS = ("authorization", "x-api-key")
"""Request headers in which a key may come; the first that is there counts."""
MIN_SECRET_BYTES = 16
MAX_KEY = 512
"""Longest key, characters."""


@record
class KeyEntry:
    """What is known of one key."""

    tenant: str
    tier: str | None = None


class Keys(Protocol):
    """Whoever knows keys by their hash."""

    def find(self, digest: str) -> KeyEntry | None:
        """The entry with this hash."""


def presented(headers: Mapping[str, str]) -> str | None:
    """The key that a request brings; empty for one in another scheme than Bearer, or too long: a key that nobody has."""
    authorization = headers.get("authorization")
    if authorization is not None:
        scheme, _, key = authorization.strip().partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
    elif (found := headers.get("x-api-key")) is not None:
        key = found.strip()
    else:
        return None
    return key if len(key) <= MAX_KEY else ""


def derived(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose, of a secret of any length."""
    return blake2b(secret, digest_size=32, person=purpose.encode()).digest()


def key_hash(secret: bytes, key: str) -> str:
    """How an API key stands in the file: BLAKE2b, keyed (RFC 7693), 20 bytes in hex."""
    return hashed_with(derived(secret, "extproc api key"), key)


def hasher(secret: bytes) -> Callable[[str], str]:
    """`key_hash` with one secret, for many keys."""
    return partial(hashed_with, derived(secret, "extproc api key"))


def hashed_with(derived_key: bytes, key: str) -> str:
    """The same with the derived key."""
    return blake2b(key.encode("utf-8", "replace"), digest_size=20, key=derived_key).hexdigest()


def tenant_key(secret: bytes) -> bytes:
    """For the hashes of tenants' names."""
    return derived(secret, "extproc tenant")
