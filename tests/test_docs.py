"""What the code offers is documented: docstrings, every setting, policy, option, metric, command and path."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import click
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from extproc.adapters.admin import Admin
from extproc.adapters.recorder import Recorder
from extproc.app import App
from extproc.cli import main
from extproc.config import Config, Section, parse
from extproc.core.policies import REGISTRY, options
from extproc.core.router import PoolSettings, Router

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
POLICIES = ROOT / "docs" / "policies.md"
METRICS = ROOT / "docs" / "metrics.md"


def missing(names: Iterator[str], page: Path) -> list[str]:
    """Those of the names that the page does not have in `code` or in a block of it."""
    text = page.read_text()
    code = " ".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    headings = " ".join(re.findall(r"^#+ (.+)$", text, re.MULTILINE))
    return [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", f"{code} {headings}")]


# --- docstrings -------------------------------------------------------------------------------------------------------


def undocumented() -> Iterator[str]:
    """Modules, public classes and public functions without a docstring."""
    for path in sorted((ROOT / "extproc").rglob("*.py")):
        where = path.relative_to(ROOT)
        if "pb" in where.parts:
            continue
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            yield str(where)
        for node in tree.body:
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                yield f"{where}:{node.lineno} {node.name}"


def test_everything_public_has_a_docstring() -> None:
    assert "\n".join(undocumented()) == ""


# --- configuration ----------------------------------------------------------------------------------------------------


def fields(section: type[Section], path: str = "") -> Iterator[tuple[str, str, str | None]]:
    """Dotted path, name and description of every setting; a section's own docstring describes the field that holds it."""
    for name, field in section.model_fields.items():
        dotted = f"{path}.{name}".lstrip(".")
        inner = section_in(field.annotation)
        yield dotted, name, field.description or (inner.__doc__ if inner else None)
        if inner:
            yield from fields(inner, dotted)


def section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((s for inner in getattr(annotation, "__args__", ()) if (s := section_in(inner))), None)


def test_every_setting_says_what_it_does() -> None:
    assert [dotted for dotted, _, text in fields(Config) if not text] == []
    assert len(list(fields(Config))) > 40


def test_times_and_sizes_say_their_unit_in_their_name() -> None:
    units = re.compile(r"_s$|_bytes$|_header$|_header_|_tokens$")
    numbers = {
        dotted
        for dotted, _, text in fields(Config)
        if text and re.search(r"\b(seconds|bytes)\b", text, re.IGNORECASE) and not units.search(dotted)
    }
    assert numbers == set()


def test_the_configuration_page_has_every_setting() -> None:
    assert missing((name for _, name, _ in fields(Config)), CONFIGURATION) == []


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [README, POLICIES], ids=lambda p: p.name)
def test_every_policy_is_on_the_page(page: Path) -> None:
    assert missing(iter(REGISTRY), page) == []


def test_every_option_of_a_policy_is_on_its_page() -> None:
    assert missing((name for cls in REGISTRY.values() for name in options(cls)), POLICIES) == []


def test_every_option_says_what_it_does() -> None:
    """A row of the page whose meaning is empty is a field without a docstring."""
    assert re.findall(r"^\| `(\w+)` \|.*\|\s*\|$", POLICIES.read_text(), re.MULTILINE) == []


def test_what_nginx_calls_otherwise_exists_here() -> None:
    """The second column: policies by name, other keys as the last part of a dotted one."""
    rows = re.findall(r"^\|[^|]+\|([^|]+)\|", (ROOT / "docs" / "nginx.md").read_text(), re.MULTILINE)
    code = [found for row in rows for found in re.findall(r"`([^`]+)`", row)]
    assert {m[1] for text in code if (m := re.match(r"policy: (\w+)", text))} - set(REGISTRY) == set()
    keys = {m[1] for text in code if (m := re.fullmatch(r"(?:\w+(?:\[\])?\.)*([a-z]\w*)(?:: \d+)?", text))}
    assert len(keys) > 10
    assert keys - {name.removesuffix("[]") for _, name, _ in fields(Config)} == set()


# --- metrics ----------------------------------------------------------------------------------------------------------


def series() -> Iterator[str]:
    """Names as Prometheus sees them, of everything that the service registers."""
    config = parse("pools: [{replicas: ['127.0.0.1:1']}]")
    for family in App(config, rng=Random(1)).registry.collect():
        yield f"{family.name}_total" if family.type == "counter" else family.name


def test_every_metric_is_on_the_page() -> None:
    names = list(series())
    assert len(names) > 20
    assert all(name.startswith("extproc_") for name in names)
    assert missing(iter(names), METRICS) == []


def test_the_page_has_no_metric_that_does_not_exist() -> None:
    listed = set(re.findall(r"^\| `(extproc_\w+)`", METRICS.read_text(), re.MULTILINE))
    assert listed - set(series()) == set()


# --- commands and paths -----------------------------------------------------------------------------------------------


def test_every_command_is_in_the_readme() -> None:
    assert isinstance(main, click.Group)
    assert len(main.commands) >= 6
    assert missing((f"extproc {name}" for name in main.commands), README) == []


def test_every_command_and_option_has_a_help_text() -> None:
    for name, command in main.commands.items():
        assert command.help, name


def test_every_path_of_the_http_port_is_in_the_readme() -> None:
    pool = PoolSettings("p")
    admin = Admin(
        Router([pool], Random(1)), Recorder(1), CollectorRegistry(), lambda: 0.0, lambda: None, 1, lambda _: None
    )
    paths = {r.resource.canonical for r in admin.application().router.routes() if isinstance(r.resource, web.Resource)}
    text = README.read_text()
    assert sorted(path for path in paths - {"/"} if path not in text) == []


def test_every_make_target_has_a_line_of_help() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE)
    assert targets
    assert [t for t in targets if not re.search(rf"^{t}:.*## ", text, re.MULTILINE)] == []
