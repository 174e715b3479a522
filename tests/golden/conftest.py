from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-update", action="store_true", help="write the golden files again instead of comparing")


@pytest.fixture
def golden_update(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written; False too where the option is unknown, as when the whole tree runs."""
    return bool(request.config.getoption("--golden-update", default=False))
