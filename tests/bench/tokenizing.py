"""What tokenizing costs: microseconds of CPU of one request by the length of its prompt, the first time and with all but the last turn kept.

    python -m tests.bench.tokenizing [--model FOLDER]

Without a folder, with a tokenizer of 400 tokens trained here. The times are those of one thread; only `decide` is on the event loop anyway.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random
from statistics import median
from time import process_time
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from extproc.adapters.tokenizing.folder import Model, load
from extproc.adapters.tokenizing.prompts import tokenized
from extproc.config import TokenizerConfig
from extproc.core.prefix.exact import token_chain
from extproc.core.types import Api
from extproc.openai import requests
from extproc.openai.engine_prompt import of_chat
from extproc.openai.tokens import Question
from tests.adapters.tokenizing.models import CORPUS, TEMPLATE, folder

LENGTHS: Final = (500, 2_000, 8_000, 32_000, 100_000)
TURN_TOKENS: Final = 250
"""Of one message; a conversation is as many as it takes, and the last is new."""
REPEATS: Final = 7
QUESTION: Final = Question(Api.CHAT)


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of CPU of one request."""

    tokens: int
    first: float
    """Nothing is kept."""
    turn: float
    """All but the last message is."""
    render: float
    """Of either: JSON and the chat template, which hold the interpreter,"""
    hashes: float
    """and the chain of hashes, which does as well."""
    read: float
    """What the event loop does with the body in any case: reading it, and the approximate index's hashes."""


def costs(model: Callable[[], Model]) -> list[Cost]:
    """By prompt length."""
    return [cost(model, length) for length in LENGTHS]


def cost(model: Callable[[], Model], length: int) -> Cost:
    """Of a conversation of about so many tokens."""
    made = model()
    words = " ".join(CORPUS).split()
    per_word = len(made.pieces.ids(" ".join(words))) / len(words)
    rng = Random(length)

    def said() -> dict[str, str]:
        return {"role": "user", "content": " ".join(rng.choices(words, k=max(round(TURN_TOKENS / per_word), 1)))}

    before = [said() for _ in range(max(length // TURN_TOKENS - 1, 1))]
    bodies = [_body([*before, said()]) for _ in range(REPEATS)]
    found = tokenized(made, QUESTION, bodies[0])
    ids = list(range(found.prompt_tokens))
    cold = iter([model() for _ in range(REPEATS)])
    warm = iter(bodies[1:] * 2)
    return Cost(
        found.prompt_tokens,
        _us(lambda: tokenized(next(cold), QUESTION, bodies[0])),
        _us(lambda: tokenized(made, QUESTION, next(warm)), REPEATS - 1),
        _us(lambda: of_chat(json.loads(bodies[0]), made.templates)),
        _us(lambda: token_chain(ids)),
        _us(lambda: requests.read("POST", "/v1/chat/completions", bodies[0])),
    )


def _body(messages: list[dict[str, str]]) -> bytes:
    return json.dumps({"model": "m", "messages": messages}).encode()


def _us(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    took = []
    for _ in range(repeats):
        began = process_time()
        work()
        took.append(process_time() - began)
    return median(took) * 1e6


def table(found: list[Cost]) -> Table:
    made = Table(
        "prompt tokens", "first, µs", "turn, µs", "first / turn", "of it template", "hashes", "reading the body"
    )
    for each in found:
        ratio = f"{each.first / each.turn:.1f}"
        cells = (each.tokens, each.first, each.turn, ratio, each.render, each.hashes, each.read)
        made.add_row(*(cell if isinstance(cell, str) else f"{cell:,.0f}" for cell in cells))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model's folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = given.model or folder(Path(directory), chat_template=TEMPLATE)
        settings = TokenizerConfig(path=path)
        Console().print(table(costs(lambda: load(settings, datetime.now))))


if __name__ == "__main__":
    main()
