"""Tokenizing beside the event loop: in threads, within a time, a bounded number at once.

The library lets go of the interpreter while it works (0.1 s for 90,000 tokens), templates do not (0.3 ms for 100 messages). Whoever is
later than `timeout_s` goes by the approximate index; what its thread finds then is kept, so that the next turn is in time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from extproc.adapters.tokenizing.folder import Model, load
from extproc.adapters.tokenizing.prompts import tokenized
from extproc.config import TokenizerConfig
from extproc.core.types import Api
from extproc.openai.tokens import CannotTokenize, Place, Question, Tokenized, Untokenized

log = logging.getLogger(__name__)

WAITING_PER_THREAD: Final = 16
"""Prompts that wait for a thread, or are given up and still in one; beyond, further ones are not tokenized."""
TRIED: Final = 20
"""Last requests by which a tokenizer is judged, and"""
WRONG: Final = 10
"""so many among them whose prompts the engine counts otherwise make it a wrong one."""
TOKENIZED: Final = "tokenized"


@dataclass(slots=True)
class Counts:
    """Of one pool."""

    prompts: Counter[str] = field(default_factory=lambda: Counter({TOKENIZED: 0}))
    """By what became of them: tokenized, or why not."""
    told: Counter[bool] = field(default_factory=lambda: Counter({True: 0, False: 0}))
    """Prompts whose tokens the engine counted: whether as many as were found here."""


class Judge:
    """Whether a tokenizer is the engine's, by the sizes of prompts that the engine reports."""

    def __init__(self) -> None:
        self._last: deque[bool] = deque(maxlen=TRIED)
        self.distrusted = False

    def told(self, right: bool) -> bool:
        """Whether this is what makes it a wrong one, which it stays."""
        self._last.append(right)
        before, self.distrusted = self.distrusted, self.distrusted or self._last.count(False) >= WRONG
        return self.distrusted and not before


class Engine:
    """One tokenizer with its threads; pools with the same settings share it."""

    def __init__(self, settings: TokenizerConfig, model: Model) -> None:
        self.settings = settings
        self.model = model
        self.judge = Judge()
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="tokenizer")
        self._room = settings.threads * (1 + WAITING_PER_THREAD)
        self.waiting = 0

    async def ask(self, question: Question, body: bytes | memoryview) -> Tokenized | Untokenized:
        """The prompt, or why not, within `timeout_s`."""
        if self.judge.distrusted:
            return Untokenized.DISTRUSTED
        if self.waiting >= self._room:
            return Untokenized.BUSY
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, _answer, self.model, question, bytes(body))
        self.waiting += 1
        work.add_done_callback(self._done)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return await asyncio.shield(work)
        except TimeoutError:
            return Untokenized.LATE

    def close(self) -> None:
        """Wait for nothing."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self, _work: object) -> None:
        self.waiting -= 1


def _answer(model: Model, question: Question, body: bytes) -> Tokenized | Untokenized:
    try:
        return tokenized(model, question, body)
    except CannotTokenize as e:
        return e.why
    except Exception:
        log.exception("a prompt could not be tokenized")
        return Untokenized.FAILED


class Tokenizing:
    """The tokenizers of all pools that have one."""

    def __init__(
        self,
        settings: Mapping[str, TokenizerConfig],
        now: Callable[[], datetime] = datetime.now,
        clock: Callable[[], float] = time.monotonic,
        took: Callable[[str, float], None] = lambda _pool, _seconds: None,
    ) -> None:
        """`settings` by pool. `now` is the local time that engines would write into prompts; `took` gets the seconds that each request waited.

        Reads the models' folders, a second or two for large vocabularies. Raises ConfigError.
        """
        self._clock, self._took = clock, took
        self._engines: dict[str, Engine] = {}
        for pool, each in settings.items():
            same = next((engine for engine in self._engines.values() if engine.settings == each), None)
            self._engines[pool] = same or Engine(each, load(each, now))
        self.counts = {pool: Counts() for pool in settings}

    def __repr__(self) -> str:
        return f"<tokenizing for {', '.join(self._engines)}>"

    @property
    def engines(self) -> Mapping[str, Engine]:
        """By pool."""
        return self._engines

    async def tokens(self, places: Sequence[Place], question: Question, body: bytes | memoryview) -> Tokenized | None:
        """The prompt as engines there will have it; None where that is not known, or not in time.

        `places`: where the request may go. `question` is without the adapter.
        """
        pool = next((place.pool for place in places if place.pool in self._engines), None)
        if pool is None:
            return None
        began = self._clock()
        found = await self._asked(pool, places, question, body)
        self._took(pool, self._clock() - began)
        if isinstance(found, Tokenized):
            self.counts[pool].prompts[TOKENIZED] += 1
            return found
        self.counts[pool].prompts[found.value] += 1
        return None

    async def _asked(
        self, pool: str, places: Sequence[Place], question: Question, body: bytes | memoryview
    ) -> Tokenized | Untokenized:
        if question.api not in (Api.CHAT, Api.COMPLETIONS):
            return Untokenized.API
        engine = self._engines[pool]
        adapters = {place.lora for place in places}
        if len(adapters) > 1 or any(self._engines.get(place.pool) is not engine for place in places):
            return Untokenized.AMBIGUOUS
        return await engine.ask(Question(question.api, adapters.pop(), question.salt), body)

    def told(self, pool: str, found: int, reported: int) -> None:
        """The engine counted so many tokens in a prompt that has `found` by its tokenizer here."""
        engine = self._engines.get(pool)
        if engine is None:  # the catalog changed while the request waited
            return
        self.counts[pool].told[found == reported] += 1
        if engine.judge.told(found == reported):
            log.error(
                "pool %s: the engine counts other prompt tokens than tokenizer.path %s (last: %d, here %d), so it is not used any more; "
                "name the folder of the model that is served, and its chat template where the engine was given one",
                pool,
                engine.settings.path,
                reported,
                found,
            )

    def close(self) -> None:
        """Begin nothing more."""
        for engine in self._engines.values():
            engine.close()
