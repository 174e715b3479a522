"""The vLLM production stack: extproc finds the engines of its Helm chart (0.1.9), by the manifest that is shipped, and sends requests there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.adapters.discovery.kube_api import ENDPOINT_SLICES, PODS, FakeKube
from extproc.app import App
from tests.e2e.stack import configured, replica, stack
from tests.support.kube_api import KubeServer
from tests.support.kube_objects import LEAVING, READY, endpoint, pod
from tests.support.waiting import until

SHIPPED = Path(__file__).parents[2] / "deploy" / "interplay" / "production-stack" / "extproc.yaml"
RELEASE, MODEL = "vllm", "llama3"
PORTS = {"service-port": 8000, "zmq-port": 55555, "ucx-port": 9999, "pd-port-1": 7100}
"""Of the chart's engine Service: a slice has a port by its name in the Service, with the number of the container's."""


def engine_slice(model: str, port: int, *endpoints: dict[str, Any]) -> dict[str, Any]:
    """The EndpointSlice of `<release>-<model>-engine-service`, with every port that the chart gives it and the pods have."""
    service = f"{RELEASE}-{model}-engine-service"
    ports = {**PORTS, "service-port": port}
    return {
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service}-x7k2p",
            "namespace": "prod",
            "labels": {"kubernetes.io/service-name": service, "environment": "test", "release": "test"},
        },
        "addressType": "IPv4",
        "endpoints": [*endpoints],
        "ports": [{"name": name, "protocol": "TCP", "port": number} for name, number in ports.items()],
    }


def engine_pod(model: str, suffix: str) -> dict[str, Any]:
    return pod(f"{RELEASE}-{model}-deployment-vllm-{suffix}", {"model": model, "helm-release-name": RELEASE})


def shipped_pool(kubeconfig: Path, **more: Any) -> dict[str, Any]:
    """The pool of the manifest, asked from outside of the cluster."""
    found: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())["pools"][0]
    found["discovery"]["kubernetes"] |= {"kubeconfig": str(kubeconfig), "namespace": "prod"}
    return {**found, **more}


def kube_with(port: int, *endpoints: dict[str, Any]) -> FakeKube:
    kube = FakeKube()
    kube.put(ENDPOINT_SLICES, engine_slice(MODEL, port, *endpoints))
    kube.put(ENDPOINT_SLICES, engine_slice("qwen", 8000, endpoint("10.0.0.9", pod="vllm-qwen-deployment-vllm-z")))
    kube.put(PODS, engine_pod(MODEL, "a"))
    kube.put(PODS, pod("vllm-deployment-router-r", {"helm-release-name": RELEASE}, ip="10.0.0.8"))
    return kube


@pytest.mark.envoy
async def test_requests_reach_an_engine_that_the_chart_deployed(tmp_path: Path) -> None:
    async with replica() as engine:
        kube = kube_with(engine.spec.port, endpoint("127.0.0.1", READY, f"{RELEASE}-{MODEL}-deployment-vllm-a"))
        async with KubeServer(kube) as server:
            pool = shipped_pool(server.kubeconfig(tmp_path / "kubeconfig"), scaling=None, models=["sim"])
            async with stack(tmp_path, pool) as running:
                assert await running.served() == engine.address


async def test_an_engine_that_ends_drains(tmp_path: Path) -> None:
    """The chart's pods have no hook of extproc's: that they end shows in their slice."""
    name = f"{RELEASE}-{MODEL}-deployment-vllm-a"
    async with KubeServer(kube_with(8000, endpoint("127.0.0.2", READY, name))) as server:
        pool = shipped_pool(server.kubeconfig(tmp_path / "kubeconfig"), models=["sim"])
        app = App(configured(tmp_path, pool))
        await app.start()
        try:
            await until(lambda: [m.address for _, m in app.router.members()] == ["127.0.0.2:8000"])
            server.kube.put(ENDPOINT_SLICES, engine_slice(MODEL, 8000, endpoint("127.0.0.2", LEAVING, name)))
            await until(lambda: [m.replica.drain for _, m in app.router.members()] == [True])
        finally:
            await app.stop(grace_s=0.1)
