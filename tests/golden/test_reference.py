"""The generated pages of docs/ say what the code says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from extproc import reference

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("configuration.md", reference.configuration),
        ("policies.md", reference.policies),
        ("metrics.md", reference.metrics),
    ],
)
def test_page_is_as_generated(name: str, page: Callable[[], str], golden_update: bool) -> None:
    if golden_update:
        (DOCS / name).write_text(page())
    assert (DOCS / name).read_text() == page(), "run make golden"


def test_metrics_page_names_every_series_with_its_labels() -> None:
    assert "`extproc_decisions_total`" in reference.metrics()
    assert "`extproc_replica_backlog_seconds`" in reference.metrics()
