"""One file of figures from several parts."""

from __future__ import annotations

import json
from pathlib import Path

from tests.bench import models
from tests.bench.gathering import gather


def test_a_part_that_cannot_be_run_is_null_and_said(tmp_path: Path) -> None:
    def broken(traces: Path | None) -> dict[str, float]:
        raise RuntimeError("no such thing")

    parts = {"limits": lambda _: {"overshoot": 0.01}, "simulator": broken, "scaling": lambda _: {}}
    output = tmp_path / "new" / "x.json"
    assert gather(output, ("overshoot", "hits"), parts, "Doc.", ["--only", "limits", "simulator"]) == 1
    assert json.loads(output.read_text()) == {
        "overshoot": 0.01,
        "hits": None,
        "missing": {"simulator": "RuntimeError: no such thing"},
    }


def test_the_other_parts_keep_what_an_earlier_run_has_found(tmp_path: Path) -> None:
    parts = {"one": lambda _: {"a": 1}, "other": lambda _: {"b": 2}}
    output = tmp_path / "x.json"
    output.write_text(json.dumps({"a": 5, "b": 6}))
    assert gather(output, ("a", "b"), parts, "Doc.", ["--only", "other"]) == 0
    assert json.loads(output.read_text()) == {"a": 5, "b": 2, "missing": {}}
    assert gather(output, ("a", "b"), parts, "Doc.", []) == 0
    assert json.loads(output.read_text()) == {"a": 1, "b": 2, "missing": {}}


def test_a_part_gets_the_traces(tmp_path: Path) -> None:
    given: list[Path | None] = []

    def part(traces: Path | None) -> dict[str, float]:
        given.append(traces)
        return {}

    assert gather(tmp_path / "x.json", (), {"one": part}, "Doc.", ["--traces", "there"]) == 0
    assert given == [Path("there")]


def test_each_key_has_its_part() -> None:
    assert set(models.KEYS) == set(models.PARTS)
