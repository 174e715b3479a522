"""Data parallel ranks: engines behind one address, each with a queue, a KV cache and a speed of its own.

Each is a member like any other, called `ip:port/rank`; who scrapes, checks and sends goes by the address that they share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from extproc.core.types import Replica


def endpoint_of(address: str) -> str:
    """`ip:port` of a member."""
    return address.partition("/")[0]


def rank_of(address: str) -> int | None:
    """Which of the engines behind its endpoint it is; None where it is alone there."""
    rank = address.partition("/")[2]
    return int(rank) if rank else None


def on_rank_of(endpoint: str, address: str) -> str:
    """The member at `endpoint` that a request for `address` gets to: the proxy sends it elsewhere with the same rank in its header."""
    _, slash, rank = address.partition("/")
    return f"{endpoint}{slash}{rank}"


def members_at(endpoint: str, ranks: int) -> tuple[str, ...]:
    """What the engines behind an endpoint are called."""
    return (endpoint,) if ranks == 1 else tuple(f"{endpoint}/{rank}" for rank in range(ranks))


def expanded(replicas: Iterable[Replica], ranks: int) -> tuple[Replica, ...]:
    """A replica for each rank."""
    return tuple(replace(replica, address=name) for replica in replicas for name in members_at(replica.address, ranks))
