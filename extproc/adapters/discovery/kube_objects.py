"""EndpointSlices, pods and InferencePools: what they say of replicas. Pure.

Ready and terminating become member and draining so:

| Kubernetes says                  | member | drain | why |
|----------------------------------|--------|-------|-----|
| ready                            | yes    | no    | |
| not ready, not terminating       | yes    | yes   | It gets nothing new, as readiness means. It stays a member, for a busy engine answers kubelet's one-second probe late: were it dropped, its prefixes, its speed and its flights would be forgotten with each flap, and with all of them busy the pool would be empty. Draining ones are chosen only where nobody else is left. One that still loads its model is found out by the scrape: nothing listens. |
| terminating, still serving       | yes    | yes   | It finishes what it has; Envoy lets streams there go on. |
| terminating, no longer serving   | no     |       | Its server has closed. Streams that are left go on in Envoy without it. |
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from extproc.adapters.discovery.base import replica
from extproc.adapters.discovery.kube_api import Object
from extproc.adapters.discovery.mirror import ObjectError
from extproc.config import ReplicaConfig
from extproc.core.types import Replica

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address that is to be a member."""

    address: str
    """`ip:port`, an IPv6 address in brackets."""
    drain: bool = False
    pod: str | None = None
    """Name of the pod behind it; None where there is none."""


# --- the parts of the API that are read -------------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Metadata(_Part):
    labels: dict[str, str] | None = None
    deletion: str | None = Field(default=None, alias="deletionTimestamp")


class _Conditions(_Part):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Reference(_Part):
    kind: str | None = None
    name: str | None = None


class _SliceEndpoint(_Part):
    addresses: tuple[str, ...]
    conditions: _Conditions | None = None
    target: _Reference | None = Field(default=None, alias="targetRef")

    @property
    def pod(self) -> str | None:
        return self.target.name if self.target and self.target.kind == "Pod" else None


class _SlicePort(_Part):
    name: str | None = None
    port: int | None = None


class _Slice(_Part):
    family: str = Field(alias="addressType")
    endpoints: tuple[_SliceEndpoint, ...] | None = None
    ports: tuple[_SlicePort, ...] | None = None


class _Condition(_Part):
    type: str
    status: str


class _PodStatus(_Part):
    phase: str | None = None
    ip: str | None = Field(default=None, alias="podIP")
    conditions: tuple[_Condition, ...] | None = None


class _Pod(_Part):
    metadata: _Metadata = _Metadata()
    status: _PodStatus = _PodStatus()


class _Selector(_Part):
    match_labels: dict[str, str] = Field(alias="matchLabels")


class _TargetPort(_Part):
    number: int


class _PoolSpec(_Part):
    """v1 has a selector with `matchLabels` and several ports; v1alpha2 had the labels alone, and one port."""

    selector: _Selector | dict[str, str]
    ports: tuple[_TargetPort, ...] = Field(default=(), alias="targetPorts")
    port: int | None = Field(default=None, alias="targetPortNumber")


class _Pool(_Part):
    spec: _PoolSpec


P = TypeVar("P", bound=_Part)


def _read(model: type[P], item: Object) -> P:
    try:
        return model.model_validate(item)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ObjectError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


# --- EndpointSlices ---------------------------------------------------------------------------------------------------


def slice_endpoints(item: Object, port: int | str | None) -> tuple[Endpoint, ...]:
    """The members that one EndpointSlice names. `port`: number, or name in the slice; None for its only port or `http`.

    Raises ObjectError.
    """
    part = _read(_Slice, item)
    if not part.endpoints:
        return ()
    if part.family not in ("IPv4", "IPv6"):
        raise ObjectError(f"addressType {part.family} has no IP addresses; use a Service that selects pods")
    number = _port(part.ports or (), port)
    members = ((e, standing) for e in part.endpoints if e.addresses and (standing := _standing(e.conditions)))
    # Of several addresses of one endpoint all are the same; the API promises nothing beyond the first.
    return tuple(Endpoint(_address(e.addresses[0], number), drain == "drain", e.pod) for e, drain in members)


def _port(ports: tuple[_SlicePort, ...], wanted: int | str | None) -> int:
    if isinstance(wanted, int):
        return wanted
    found = {p.name or "": p.port for p in ports if p.port is not None}
    if wanted is None and len(found) == 1:
        return next(iter(found.values()))
    number = found.get("http" if wanted is None else wanted)
    if number is None:
        names = ", ".join(name or "one without a name" for name in found) or "none"
        remedy = "set port" if wanted is None else f"none is called {wanted}"
        raise ObjectError(f"its ports are {names}; {remedy}")
    return number


def _standing(conditions: _Conditions | None) -> str | None:
    """`ready`, `drain`, or None for one that is no member. Unknown conditions are read as the API says (discovery/v1)."""
    said = conditions or _Conditions()
    ready = said.ready is not False
    serving = ready if said.serving is None else said.serving
    if said.terminating:
        return "drain" if serving else None
    return "ready" if ready else "drain"


def slice_members(
    slices: Iterable[tuple[Endpoint, ...]], pods: Mapping[str, Labels], pool_labels: Labels
) -> dict[str, Replica]:
    """Replicas by address, from all slices together, with the labels of their pods.

    1. An endpoint may be in two slices while it is moved from one to the other: it drains only if both say so.
    2. A pod with addresses of both families is one replica, by its IPv4 address.
    """
    found: dict[str, Endpoint] = {}
    for endpoint in (e for endpoints in slices for e in endpoints):
        known = found.get(endpoint.address)
        if known is None or known.drain:
            found[endpoint.address] = endpoint
    has_v4 = {e.pod for e in found.values() if e.pod and not e.address.startswith("[")}
    return {
        e.address: _replica(e, pods.get(e.pod or "", {}), pool_labels)
        for e in found.values()
        if e.pod not in has_v4 or not e.address.startswith("[")
    }


def pod_labels(item: Object, names: Labels) -> Labels:
    """Of the labels of a pod those that are wanted. `names`: label of the replica -> key of the pod's. Raises ObjectError."""
    labels = _labels(item)
    return {name: labels[key] for name, key in names.items() if key in labels}


def _labels(item: Object) -> Labels:
    return _read(_Pod, {"metadata": item.get("metadata", {})}).metadata.labels or {}


# --- InferencePools ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What an InferencePool selects."""

    selector: str
    """Label selector, as the API takes it."""
    ports: tuple[int, ...]
    """Each is a replica of its own on every pod."""


@dataclass(frozen=True, slots=True)
class PodSeen:
    """A pod that is to be a member."""

    ip: str
    drain: bool
    labels: Labels


def pool_spec(item: Object) -> PoolSpec:
    """Selector and ports of an InferencePool, v1 or v1alpha2. Raises ObjectError."""
    spec = _read(_Pool, item).spec
    labels = spec.selector.match_labels if isinstance(spec.selector, _Selector) else spec.selector
    ports = tuple(port.number for port in spec.ports) or ((spec.port,) if spec.port else ())
    if not labels or not ports:
        raise ObjectError("spec needs a selector and targetPorts")
    return PoolSpec(",".join(f"{key}={value}" for key, value in sorted(labels.items())), ports)


def pod_seen(item: Object, names: Labels) -> PodSeen | None:
    """A pod as a member; None while it is none. `names` as in `pod_labels`. Raises ObjectError."""
    pod = _read(_Pod, item)
    if not pod.status.ip or pod.status.phase in ("Succeeded", "Failed"):
        return None
    ready = any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or ())
    standing = _standing(_Conditions(ready=ready, terminating=pod.metadata.deletion is not None))
    if standing is None:
        return None
    return PodSeen(pod.status.ip, standing == "drain", pod_labels(item, names))


def pool_members(spec: PoolSpec, pods: Iterable[PodSeen | None], pool_labels: Labels) -> dict[str, Replica]:
    """Replicas by address: every port of every pod.

    An address may be another pod's already while the one before is still listed as leaving: the one that does not drain counts.
    """
    endpoints = (
        (Endpoint(_address(pod.ip, port), pod.drain), pod.labels)
        for pod in pods
        if pod is not None
        for port in spec.ports
    )
    found: dict[str, Replica] = {}
    for endpoint, labels in endpoints:
        known = found.get(endpoint.address)
        if known is None or known.drain:
            found[endpoint.address] = _replica(endpoint, labels, pool_labels)
    return found


# --- both -------------------------------------------------------------------------------------------------------------


def _address(ip: str, port: int) -> str:
    """As Envoy names it. Raises ObjectError."""
    try:
        found = ipaddress.ip_address(ip)
    except ValueError:
        raise ObjectError(f"{ip!r} is not an IP address") from None
    if not 0 < port < 65536:
        raise ObjectError(f"port {port} is not between 1 and 65535")
    return f"[{found}]:{port}" if found.version == 6 else f"{found}:{port}"


def _replica(endpoint: Endpoint, labels: Labels, pool_labels: Labels) -> Replica:
    fields: dict[str, Any] = {"address": endpoint.address, "labels": dict(labels), "drain": endpoint.drain}
    return replica(ReplicaConfig.model_construct(weight=1.0, **fields), pool_labels)
