"""The parts of the tokenizing benchmark, on one short prompt."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from rich.console import Console

from extproc.adapters.tokenizing.folder import load
from extproc.config import TokenizerConfig
from tests.adapters.tokenizing.models import TEMPLATE, folder
from tests.bench.tokenizing import TURN_TOKENS, cost, table


def test_a_prompt_is_as_long_as_asked_for_and_every_part_took_time(tmp_path: Path) -> None:
    settings = TokenizerConfig(path=folder(tmp_path, chat_template=TEMPLATE))
    found = cost(lambda: load(settings, datetime.now), 4 * TURN_TOKENS)
    assert 2 * TURN_TOKENS < found.tokens < 8 * TURN_TOKENS
    assert min(found.first, found.turn, found.render, found.hashes, found.read) > 0
    console = Console(width=200, record=True)
    console.print(table([found]))
    assert f"{found.tokens:,}" in console.export_text()
