"""All that decides runs on the monotonic clock: the wall clock may jump at any time, and nothing may come of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_imports import modules, within

WALL = {
    "time.time",
    "time.time_ns",
    "time.localtime",
    "time.gmtime",
    "time.ctime",
    "time.strftime",
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
    "date.today",
    "datetime.datetime.now",
    "datetime.datetime.utcnow",
    "datetime.date.today",
}
MAY = ("extproc.sim", "extproc.demo")
"""Not part of the service: vLLM's answers and metrics have times of day in them."""
FOR_OTHERS = {
    "extproc.adapters.kv_events.follower": "engines stamp their events with it; the difference is a metric and nothing else",
    "extproc.adapters.tokenizing.tokenizing": "chat templates write the date into prompts, as the engine's do",
}
"""Who may ask because others use it, as an argument that has it for its default; and that nothing is timed by it."""


def wall_clocks(module: str, source: str) -> Iterator[str]:
    """Places that ask for the time of day, by attribute or by import."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL:
            yield f"{module}:{node.lineno} uses {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in WALL:
                    yield f"{module}:{node.lineno} imports {node.module}.{alias.name}"


def test_the_service_never_asks_for_the_time_of_day() -> None:
    by_module = {module: list(wall_clocks(module, source)) for module, source in modules() if not within(module, MAY)}
    assert [w for module, found in by_module.items() if module not in FOR_OTHERS for w in found] == []
    assert [len(by_module[module]) for module in FOR_OTHERS] == [1] * len(FOR_OTHERS)


@pytest.mark.parametrize(
    "source",
    ["import time\nx = time.time()", "from time import time", "from datetime import datetime\nx = datetime.now()"],
)
def test_the_rule_finds_what_it_forbids(source: str) -> None:
    assert len(list(wall_clocks("m", source))) == 1
