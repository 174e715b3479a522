"""What the tests of deploy/ share: the built Kubernetes objects, and the places of the files."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.render import DEPLOY, KUBERNETES, ROOT

__all__ = ["DEPLOY", "KUBERNETES", "ROOT", "Built", "built", "config_maps", "containers", "objects", "tool"]

OVERLAYS = ("sidecar", "endpoint-picker")
COMPONENTS = ("monitoring", "hpa", "keda-prometheus", "keda-external", "spot")

Json = dict[str, Any]


def tool(name: str, why: str) -> str:
    """Path of a program; the test is skipped where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: {why}")
    return found


@dataclass(frozen=True)
class Built:
    """All objects of one way of deploying."""

    name: str
    objects: tuple[Json, ...]

    def of(self, *kinds: str) -> list[Json]:
        return [o for o in self.objects if o["kind"] in kinds]

    def one(self, kind: str, name: str) -> Json:
        """The object of that name; a hash that kustomize appends to it does not count. LookupError when there is not just one."""
        found = [o for o in self.of(kind) if o["metadata"]["name"] in (name, f"{name}-{_hash(o)}")]
        if len(found) != 1:
            raise LookupError(f"{len(found)} of {kind} {name}")
        return found[0]

    def pods(self) -> Iterator[tuple[str, Json]]:
        """Name and pod template of each workload."""
        for workload in self.of("Deployment", "StatefulSet", "DaemonSet"):
            yield workload["metadata"]["name"], workload["spec"]["template"]


def _hash(object_: Json) -> str:
    return str(object_["metadata"]["name"]).rpartition("-")[2]


def containers(template: Json) -> list[Json]:
    """Init containers too, sidecars among them."""
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]


def config_maps(way: Built) -> dict[str, Json]:
    """ConfigMap -> its files."""
    return {o["metadata"]["name"]: o.get("data", {}) for o in way.of("ConfigMap")}


@cache
def objects(directory: str) -> tuple[Json, ...]:
    """What kustomize makes of a directory."""
    kubectl = tool("kubectl", "it builds the overlays (`kubectl kustomize`)")
    done = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(o for o in yaml.safe_load_all(done.stdout) if o)


def built(overlay: str, *components: str, at: Path | None = None) -> Built:
    """An overlay, with components as a user would add them; those are built in `at`, an empty directory."""
    directory = KUBERNETES / "overlays" / overlay
    if components:
        assert at is not None
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "llm",
            "resources": [os.path.relpath(directory, at)],
            "components": [os.path.relpath(KUBERNETES / "components" / c, at) for c in components],
        }
        (at / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        directory = at
    return Built(" + ".join([overlay, *components]), objects(str(directory)))
