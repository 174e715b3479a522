"""Where a pool finds its replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from extproc.config.base import (
    Address,
    Name,
    Seconds,
    Section,
)


class FileDiscovery(Section):
    """Replicas listed in a file that may change while extproc runs."""

    path: Path
    """YAML or JSON: a list like `replicas`, or an object with that key. Replace it by rename; a file that does not parse changes nothing and is counted."""


LabelNames = dict[str, str]
"""Label of the replica -> key of the pod label that it is taken from."""


POD_LABELS: LabelNames = {name: name for name in ("gpu", "tp", "pp", "model_size", "max_tokens_per_s", "role", "drain")}


class Cluster(Section):
    """What all that asks a Kubernetes API server has in common. Needs `pip install 'extproc[kubernetes]'`."""

    namespace: Name | None = None
    """Namespace of the pods; null for that of the service account, or of the kubeconfig's context."""
    pod_labels: LabelNames = POD_LABELS
    """Label of the replica: key of the pod label that it is taken from (`gpu: nvidia.com/gpu.product`). With `drain`, `kubectl label pod NAME drain=true` lets a replica finish what it has. Empty: none."""
    kubeconfig: Path | None = None
    """For use outside the cluster; its current context counts. null: the service account, else `$KUBECONFIG`, else `~/.kube/config`."""
    resync_s: Seconds = 300.0
    """Seconds after which everything is listed again, whatever the watch told."""


class KubernetesDiscovery(Cluster):
    """The pods behind a Kubernetes Service, from its EndpointSlices."""

    service: Name | None = None
    """Name of the Service."""
    selector: str | None = None
    """Label selector of EndpointSlices, instead of `service` or in addition to it. Slices bear the labels of their Service."""
    port: Annotated[int, Field(ge=1, le=65535)] | str | None = None
    """Name of the slices' port, or a number. null: their only port, or the one called `http`."""
    pod_selector: str | None = None
    """Label selector of the pods whose labels are read; null for all of the namespace. The same as the Service's spares memory where others run there too."""

    @model_validator(mode="after")
    def _selects(self) -> Self:
        if not self.service and not self.selector:
            raise ValueError("selects nothing; add service: NAME or selector: key=value")
        return self


class InferencePoolDiscovery(Cluster):
    """The pods and ports that an InferencePool of the Gateway API inference extension selects."""

    name: Name
    """Name of the InferencePool."""
    group: Literal["inference.networking.k8s.io", "inference.networking.x-k8s.io"] = "inference.networking.k8s.io"
    """API group: v1 of the first, v1alpha2 of the second."""


class DnsDiscovery(Section):
    """The addresses that a DNS name has: of a headless Service, say. Needs `pip install 'extproc[dns]'`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})$")
    """A or AAAA records are asked for where `port` is given, else SRV records. Of a name with both kinds of addresses the A records count."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of every replica; null to learn it from SRV records."""
    interval_s: Seconds = 30.0
    """Most seconds between two questions. The TTL of the answer counts where it is shorter, down to one second."""
    servers: tuple[Address, ...] = ()
    """Name servers to ask, `ip:port`; none for those of `/etc/resolv.conf`."""


class Discovery(Section):
    """Where the members of a pool come from, instead of `replicas`. Exactly one source."""

    file: FileDiscovery | None = None
    """Watch a file."""
    kubernetes: KubernetesDiscovery | None = None
    """Watch EndpointSlices."""
    inference_pool: InferencePoolDiscovery | None = None
    """Watch an InferencePool and its pods."""
    dns: DnsDiscovery | None = None
    """Ask for a name again and again."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        named = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if not named:
            raise ValueError(f"names no source; add one of {', '.join(type(self).model_fields)}")
        if len(named) > 1:
            raise ValueError(f"names {' and '.join(named)}; keep one")
        return self
