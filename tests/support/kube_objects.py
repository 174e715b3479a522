"""EndpointSlices, pods and InferencePools as the API shows them, and what may happen to them and to a server that has them."""

from __future__ import annotations

from typing import Any

from extproc.adapters.discovery.kube_api import ENDPOINT_SLICES, PODS, FakeKube, Resource
from extproc.adapters.discovery.kube_objects import slice_endpoints, slice_members
from extproc.core.types import Replica

POOLS = Resource("inferencepools", "v1", "inference.networking.k8s.io")
OLD_POOLS = Resource("inferencepools", "v1alpha2", "inference.networking.x-k8s.io")

READY = {"ready": True, "serving": True, "terminating": False}
UNREADY = {"ready": False, "serving": False, "terminating": False}
LEAVING = {"ready": False, "serving": True, "terminating": True}
CLOSED = {"ready": False, "serving": False, "terminating": True}
STATES = (READY, UNREADY, LEAVING, CLOSED)


def endpoint(ip: str, conditions: dict[str, Any] | None = READY, pod: str | None = None) -> dict[str, Any]:
    said: dict[str, Any] = {"addresses": [ip], "conditions": conditions}
    if pod:
        said["targetRef"] = {"kind": "Pod", "name": pod, "namespace": "prod"}
    return said


def endpoint_slice(
    name: str, *endpoints: dict[str, Any], port: int | None = 8000, family: str = "IPv4", service: str = "vllm"
) -> dict[str, Any]:
    return {
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "prod", "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "endpoints": list(endpoints) or None,
        "ports": [{"name": "http", "protocol": "TCP", "port": port}] if port else None,
    }


def pod(
    name: str,
    labels: dict[str, str] | None = None,
    *,
    ip: str | None = None,
    ready: bool = True,
    leaving: bool = False,
    phase: str = "Running",
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": "prod", "labels": labels}
    if leaving:
        metadata["deletionTimestamp"] = "2026-11-21T07:00:00Z"
    conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": str(ready)}]
    return {"kind": "Pod", "metadata": metadata, "status": {"phase": phase, "podIP": ip, "conditions": conditions}}


def inference_pool(name: str, labels: dict[str, str], *ports: int) -> dict[str, Any]:
    spec = {"selector": {"matchLabels": labels}, "targetPorts": [{"number": port} for port in ports]}
    return {"kind": "InferencePool", "metadata": {"name": name, "namespace": "prod"}, "spec": spec}


def act(kube: FakeKube, step: Any) -> None:
    """Do one step of a story."""
    match step:
        case ("put", number, endpoints):
            said = (endpoint(f"10.0.0.{n}", STATES[state], f"pod-{n}") for n, state in endpoints)
            kube.put(ENDPOINT_SLICES, endpoint_slice(f"vllm-{number}", *said))
        case ("delete", number) if (ENDPOINT_SLICES, f"vllm-{number}") in kube.objects:
            kube.delete(ENDPOINT_SLICES, f"vllm-{number}")
        case ("label", number, gpu):
            kube.put(PODS, pod(f"pod-{number}", {"gpu": gpu}))
        case ("unlabel", number) if (PODS, f"pod-{number}") in kube.objects:
            kube.delete(PODS, f"pod-{number}")
        case ("break",):
            kube.break_watches()
        case ("forget",):
            kube.forget()
        case ("bookmark",):
            kube.bookmark(ENDPOINT_SLICES)
        case ("down",):
            kube.down = "Connection refused"
            kube.break_watches()
        case ("up",):
            kube.down = None


def on_the_server(kube: FakeKube) -> dict[str, Replica]:
    """The members by what the server has, without any watch."""
    slices = {key[1]: item for key, item in kube.objects.items() if key[0] == ENDPOINT_SLICES}
    pods = {key[1]: item["metadata"]["labels"] for key, item in kube.objects.items() if key[0] == PODS}
    return slice_members([slice_endpoints(item, None) for item in slices.values()], pods, {})
