"""llm-d: its model servers are found by the InferencePool with the labels that llm-d gives them, by the manifest that is shipped."""

from __future__ import annotations

from pathlib import Path

import yaml

from extproc.adapters.discovery.kube_api import PODS, FakeKube
from extproc.app import App
from tests.e2e.stack import Json, configured
from tests.support.kube_api import KubeServer
from tests.support.kube_objects import POOLS, inference_pool, pod
from tests.support.waiting import until

SHIPPED = Path(__file__).parents[2] / "deploy" / "interplay" / "llm-d"
SELECTED = {"llm-d.ai/inference-serving": "true", "llm-d.ai/model": "qwen3-32b"}


def server_pod(name: str, ip: str, **labels: str) -> Json:
    own = {f"llm-d.ai/{key.replace('_', '-')}": value for key, value in labels.items()}
    return pod(name, {**SELECTED, **own}, ip=ip)


async def test_members_and_their_roles_come_from_the_pool_and_its_pods(tmp_path: Path) -> None:
    kube = FakeKube()
    kube.put(POOLS, inference_pool("llm", SELECTED, 8000))
    kube.put(PODS, server_pod("decode-a", "127.0.0.2", role="decode", engine_type="vllm"))
    kube.put(PODS, server_pod("prefill-a", "127.0.0.3", role="prefill", engine_type="vllm"))
    kube.put(PODS, server_pod("both-a", "127.0.0.4", role="both", accelerator_variant="h100"))
    kube.put(PODS, pod("other", {"llm-d.ai/model": "another"}, ip="127.0.0.5"))
    shipped = yaml.safe_load((SHIPPED / "extproc.yaml").read_text())
    async with KubeServer(kube) as server:
        found = shipped["pools"][0]
        found["discovery"]["inference_pool"] |= {
            "kubeconfig": str(server.kubeconfig(tmp_path / "kubeconfig")),
            "namespace": "prod",
        }
        app = App(configured(tmp_path, {**found, "labels": {}}, requests=shipped["requests"]))
        await app.start()
        try:
            labels = {
                "127.0.0.2:8000": {"role": "decode"},
                "127.0.0.3:8000": {"role": "prefill"},
                "127.0.0.4:8000": {"role": "both", "gpu": "h100"},
            }
            await until(lambda: {m.address: dict(m.replica.labels) for _, m in app.router.members()} == labels)
        finally:
            await app.stop(grace_s=0.1)
