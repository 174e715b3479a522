"""What befalls a simulated fleet, written as `T:replica:what`: `60:3:dies`, `90:3:joins`, `30:1:slows=2.5`, `45:2:hangs`.

`T` is seconds, `replica` its place in the fleet from 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class IncidentError(Exception):
    """An incident cannot be read, or cannot happen."""


class Kind(StrEnum):
    """What happens."""

    DRAINS = "drains"  # somebody asks that it get nothing new; what runs there goes on
    DIES = "dies"  # its process ends: what runs there breaks off, and connections are refused
    ERRORS = "errors"  # it answers each new request with 500; its checks and metrics stay as they are
    HANGS = "hangs"  # its process lives and accepts requests, but computes nothing
    JOINS = "joins"  # a fresh process listens: a new member if this is its first incident, else a restart
    SLOWS = "slows"  # steps take `factor` times what they did at first


@dataclass(frozen=True, slots=True)
class Incident:
    """One thing that happens to one replica."""

    at_s: float
    replica: int
    """Its place in the fleet, from 1."""
    kind: Kind
    factor: float = 1.0


_SHAPE = re.compile(r"(?P<at>\d+(?:\.\d+)?):(?P<replica>\d+):(?P<kind>[a-z]+)(?:=(?P<factor>\d+(?:\.\d+)?))?")


def incident(text: str) -> Incident:
    """Read one. Raises IncidentError."""
    found = _SHAPE.fullmatch(text.strip())
    if not found or found["kind"] not in Kind.__members__.values():
        raise IncidentError(
            f"{text!r} is not T:replica:what with what one of dies, drains, errors, hangs, joins, slows=FACTOR"
        )
    kind = Kind(found["kind"])
    if (kind is Kind.SLOWS) is not (found["factor"] is not None):
        raise IncidentError(f"{text!r}: slows needs a factor, as in slows=2; the others have none")
    factor = float(found["factor"] or 1.0)
    if not factor > 0:
        raise IncidentError(f"{text!r}: the factor must be above 0")
    return Incident(float(found["at"]), int(found["replica"]), kind, factor)


def checked(incidents: Iterable[Incident], replicas: int) -> tuple[Incident, ...]:
    """In the order of time. Raises IncidentError for one that befalls a replica that is not there."""
    ordered = tuple(sorted(incidents, key=lambda i: i.at_s))
    for each in ordered:
        if not 1 <= each.replica <= replicas:
            raise IncidentError(f"replica {each.replica} is not there; the fleet has 1 to {replicas}")
    if len(newcomers(ordered)) == replicas:
        raise IncidentError("every replica joins later, so nobody is there at the start; leave one out")
    return ordered


def newcomers(incidents: Iterable[Incident]) -> frozenset[int]:
    """Replicas that are not there at the start: those whose first incident is to join."""
    first: dict[int, Kind] = {}
    for each in incidents:
        first.setdefault(each.replica, each.kind)
    return frozenset(replica for replica, kind in first.items() if kind is Kind.JOINS)
