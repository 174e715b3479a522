"""Sources whose libraries are extras: made by the configuration, imported only then, missed with a clear word."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from extproc.adapters.discovery import from_config
from extproc.config import PoolConfig

SOURCES: list[tuple[dict[str, Any], str]] = [
    ({"kubernetes": {"service": "vllm"}}, "<SliceSource p: unread from <Mirror endpointslices.discovery.k8s.io with "),
    ({"inference_pool": {"name": "vllm"}}, "<InferencePoolSource p: unread from <Mirror inferencepools.inference."),
    ({"dns": {"name": "vllm.prod.svc", "port": 8000}}, "<DnsSource p: unread from vllm.prod.svc, good>"),
]


@pytest.mark.parametrize(("discovery", "shown"), SOURCES)
def test_the_configuration_makes_each_source(discovery: dict[str, Any], shown: str) -> None:
    source = from_config(PoolConfig.model_validate({"name": "p", "discovery": discovery}))
    assert repr(source).startswith(shown)
    assert source.pool == "p"


WITHOUT = """
import sys
for name in ("lightkube", "dns"):
    sys.modules[name] = None
from extproc.adapters.discovery import from_config
from extproc.config import ConfigError, PoolConfig
try:
    from_config(PoolConfig.model_validate({"name": "p", "discovery": %r}))
except ConfigError as e:
    print(e)
"""


@pytest.mark.parametrize(
    ("discovery", "said"),
    [
        (
            {"kubernetes": {"service": "vllm"}},
            "pool p: discovery from Kubernetes needs the package lightkube; pip install 'extproc[kubernetes]'",
        ),
        (
            {"inference_pool": {"name": "vllm"}},
            "pool p: discovery from Kubernetes needs the package lightkube; pip install 'extproc[kubernetes]'",
        ),
        (
            {"dns": {"name": "vllm.prod.svc"}},
            "pool p: discovery from DNS needs the package dnspython; pip install 'extproc[dns]'",
        ),
        ({"file": {"path": "members.yaml"}}, ""),
    ],
)
def test_without_its_package_a_source_says_what_to_install(discovery: dict[str, Any], said: str) -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT % discovery], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == said
