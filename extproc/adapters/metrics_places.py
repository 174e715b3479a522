"""Where the metrics of a replica are: on its own port, on another, or on those of several nodes. Pure."""

from __future__ import annotations

import logging
from typing import Final

from pydantic import TypeAdapter, ValidationError

from extproc.config import Address
from extproc.core.types import Replica

log = logging.getLogger(__name__)

LABEL: Final = "metrics"
"""Of a replica: `ip:port` of its metrics, or several with commas between them where each tells of a part of it."""
_ADDRESSES: Final = TypeAdapter(tuple[Address, ...])


def places(replica: Replica, port: int | None) -> tuple[str, ...]:
    """`ip:port` of each page. `port`: on the replica's own host, where its label says nothing; None for the replica's own port."""
    told = replica.labels.get(LABEL)
    if told is not None:
        try:
            return _ADDRESSES.validate_python([place.strip() for place in told.split(",")])
        except ValidationError:
            log.warning(
                "replica %s: label %s is %r, not ip:port,ip:port; left out of account", replica.address, LABEL, told
            )
    if port is None:
        return (replica.address,)
    return (f"{replica.address.rpartition(':')[0]}:{port}",)
