"""Tests with real vLLM replicas run only when asked for by `-m vllm`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "vllm" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="needs real vLLM replicas: make test-vllm VLLM=... MODEL=...")
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(skip)
