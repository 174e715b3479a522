"""How a source says what is wrong: when it is new, and again now and then for as long as it lasts."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from extproc.adapters.discovery.base import OnError

log = logging.getLogger(__name__)

REPEAT_S: Final = 120.0
"""An alert on the count of errors looks back five minutes: said once, trouble that lasts for hours would look like trouble that is over."""


@dataclass(slots=True)
class _Said:
    text: str
    consequence: str
    again_at: float


class Complaints:
    """What is wrong now, and of what. Each time that it is said is a line in the log and an error counted."""

    def __init__(self, on_error: OnError, repeat_s: float = REPEAT_S) -> None:
        self._on_error = on_error
        self._repeat_s = repeat_s
        self._said: dict[str, _Said] = {}

    def __repr__(self) -> str:
        return "; ".join(said.text for said in self._said.values()) or "good"

    def say(self, about: str, text: str, consequence: str) -> None:
        """That `text` is wrong with `about` now; nothing where that was said a moment ago."""
        before = self._said.get(about)
        now = asyncio.get_running_loop().time()
        if before is not None and before.text == text and now < before.again_at:
            return
        self._said[about] = _Said(text, consequence, now + self._repeat_s)
        log.warning("%s; %s", text, consequence)
        self._on_error(text)

    def settle(self, about: str) -> bool:
        """All is well with `about`; whether anything was wrong with it."""
        return self._said.pop(about, None) is not None

    def remind(self) -> None:
        """Say again what is due. To be called now and then where nothing else would find it anew."""
        for about, said in list(self._said.items()):
            self.say(about, said.text, said.consequence)
