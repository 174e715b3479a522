"""Who tokenizes prompts: a seam, for it takes longer than the event loop may stand still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from extproc.openai.tokens import Place, Question, Tokenized


class Tokenizing(Protocol):
    """Tells how the engine will have a prompt."""

    async def tokens(self, places: Sequence[Place], question: Question, body: bytes | memoryview) -> Tokenized | None:
        """The prompt of this body at any of these places; None where that is not known, or not in time. Never raises."""


@dataclass
class FakeTokenizing:
    """Gives one answer, and remembers what it was asked."""

    answer: Tokenized | None = None
    asked: list[tuple[tuple[Place, ...], Question, bytes]] = field(default_factory=list)

    async def tokens(self, places: Sequence[Place], question: Question, body: bytes | memoryview) -> Tokenized | None:
        self.asked.append((tuple(places), question, bytes(body)))
        return self.answer
