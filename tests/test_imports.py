"""The shape of the package, read from its imports: who may know of whom, and which module owns which library."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "extproc"

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "core": ("core",),
    "openai": ("openai", "core"),
    "redis_url": (),
    "config": ("config", "core.policies", "core.roles", "redis_url"),
    "envoy": ("envoy", "openai", "core", "config", "pb"),
    "adapters": ("adapters", "openai", "core", "config", "redis_url"),
    "sim": ("sim", "openai", "core", "config"),
    "settings": ("adapters", "core", "config"),
    "app": ("adapters", "envoy", "openai", "core", "config", "redis_url", "settings"),
    "demo": ("demo", "sim", "envoy", "config"),
    "explain": (),
    "reference": ("adapters", "envoy", "core", "config"),
    "cli": ("app", "demo", "explain", "envoy", "adapters", "sim", "config", "__version__"),
}
"""Part of the package -> what of ours it may import. What is not listed here does not exist."""

OWNERS = {
    "extproc.pb": ("extproc.envoy.codec", "extproc.envoy.scaler_codec"),
    "envoy_data_plane": ("extproc.envoy.rendering",),
    "betterproto2": ("extproc.envoy.rendering",),
    "grpc": ("extproc.envoy.rpc",),
    "click": ("extproc.cli",),
    "matplotlib": ("extproc.sim.plot",),
    "lightkube": ("extproc.adapters.discovery.kube_client",),
    "httpx2": ("extproc.adapters.discovery.kube_client",),
    "dns": ("extproc.adapters.discovery.dns_client",),
    "redis": ("extproc.adapters.shared",),
    "msgspec": ("extproc.adapters.shared.wire", "extproc.adapters.kv_events.wire", "extproc.sim.kv_publisher"),
    "zmq": ("extproc.adapters.kv_events.sockets", "extproc.sim.kv_publisher"),
    "jinja2": ("extproc.openai.chat_template", "extproc.adapters.tokenizing"),
    "tokenizers": ("extproc.adapters.tokenizing",),
    "uvloop": ("extproc.cli",),
    "pynvml": ("extproc.adapters.gpu_sources",),
    "prometheus_client": ("extproc.adapters", "extproc.app", "extproc.reference", "extproc.sim.vllm_metrics"),
    "xxhash": ("extproc.core", "extproc.openai.prompt", "extproc.openai.simulated_prompt", "extproc.sim.text"),
}
"""Library -> the only modules (and those below them) that import it."""

IMPURE = {
    "asyncio",
    "concurrent",
    "datetime",
    "io",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "secrets",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "urllib",
    "uuid",
}
"""Clocks, I/O and the process: a core that knew of them could not be replayed."""


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name; `name` is the full path of what is imported."""

    by: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.name}"


def modules() -> Iterator[tuple[str, str]]:
    """Dotted name and source of every module of ours, generated code aside."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "pb" not in parts:
            yield ".".join(parts).removesuffix(".__init__"), path.read_text()


def imports(module: str, source: str) -> Iterator[Import]:
    """Every import, those inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} has a relative import"
            for alias in node.names:
                yield Import(module, f"{node.module}.{alias.name}", node.lineno)


def within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def wrong_direction(each: Import) -> bool:
    if not within(each.name, (PACKAGE,)):
        return False
    part = each.by.removeprefix(f"{PACKAGE}.").split(".")[0]
    return not within(each.name.removeprefix(f"{PACKAGE}."), MAY_IMPORT[part])


def not_the_owner(each: Import) -> bool:
    return any(within(each.name, (library,)) and not within(each.by, owners) for library, owners in OWNERS.items())


def impure(each: Import) -> bool:
    """In the core: anything but ours, pure parts of the standard library, xxhash, and `Random` as a type."""
    if not within(each.by, (f"{PACKAGE}.core",)):
        return False
    top = each.name.split(".")[0]
    if top == "random":
        return each.name != "random.Random"
    return top in IMPURE or (top not in sys.stdlib_module_names and top not in (PACKAGE, "xxhash"))


def found() -> list[Import]:
    return [each for module, source in modules() for each in imports(module, source)]


def test_every_part_of_the_package_has_its_place() -> None:
    parts = {module.split(".")[1] for module, _ in modules() if "." in module}
    assert parts == set(MAY_IMPORT)


def test_imports_point_one_way() -> None:
    assert [str(each) for each in found() if wrong_direction(each)] == []


def test_each_library_has_its_owner() -> None:
    assert [str(each) for each in found() if not_the_owner(each)] == []


def test_the_core_is_pure() -> None:
    assert [str(each) for each in found() if impure(each)] == []


def test_the_core_opens_nothing_prints_nothing_and_awaits_nothing() -> None:
    wrong = []
    for module, source in modules():
        if not within(module, (f"{PACKAGE}.core",)):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print"):
                wrong.append(f"{module}:{node.lineno} calls {node.func.id}")
            if isinstance(node, ast.Global | ast.Nonlocal | ast.AsyncFunctionDef | ast.Await):
                wrong.append(f"{module}:{node.lineno} has {type(node).__name__}")
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("extproc.core.router", "from extproc.openai import errors", wrong_direction),
        ("extproc.core.router", "def f():\n    import extproc.config", wrong_direction),
        ("extproc.openai.errors", "from extproc.envoy.names import SERVED", wrong_direction),
        ("extproc.adapters.metrics", "from extproc.envoy import server", wrong_direction),
        ("extproc.config", "from extproc.core.router import Router", wrong_direction),
        ("extproc.envoy.server", "from extproc.pb.envoy.config.core.v3 import base_pb2", not_the_owner),
        ("extproc.app", "import click", not_the_owner),
        ("extproc.envoy.bootstrap", "import envoy_data_plane.envoy", not_the_owner),
        ("extproc.core.router", "import time", impure),
        ("extproc.core.router", "from random import choice", impure),
        ("extproc.core.router", "import random", impure),
        ("extproc.core.prefix.index", "import numpy", impure),
        ("extproc.core.policies.base", "from os import path", impure),
    ],
)
def test_the_rules_find_what_they_forbid(module: str, source: str, rule: object) -> None:
    assert callable(rule)
    assert [rule(each) for each in imports(module, source)] == [True]
