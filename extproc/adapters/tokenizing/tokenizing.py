"""Tokenizing beside the event loop: in threads, within a time, a bounded number at once.

The library lets go of the interpreter while it works (0.1 s for 90,000 tokens), templates do not (0.3 ms for 100 messages). Whoever is
later than `timeout_s` goes by the approximate index. What a thread has begun it ends, and what it finds is kept, so that the next turn is
in time. What would hardly be in time, behind those that wait already, is not even tried: under more requests than the threads can serve a
queue would make every one late.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from extproc.adapters.tokenizing.folder import Model, load
from extproc.adapters.tokenizing.pieces import PieceCache
from extproc.adapters.tokenizing.prompts import MAX_BODY_BYTES, tokenized
from extproc.config import TokenizerConfig
from extproc.core.types import Api
from extproc.openai.tokens import TOKENIZED, CannotTokenize, Place, Question, Tokenized, Untokenized

log = logging.getLogger(__name__)

WAITING_PER_THREAD: Final = 16
"""Prompts that wait for a thread, or are given up and still in one; beyond, further ones are not tokenized."""
MEMORY: Final = 0.1
"""Of the mean time that a prompt takes: the share of the last one."""
TRIED: Final = 20
"""Last requests by which a tokenizer is judged, and"""
WRONG: Final = 10
"""so many among them whose prompts the engine counts otherwise make it a wrong one."""
COMPLAINT_INTERVAL_S: Final = 10.0
"""Between two lines on mistakes of ours."""


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

    def __init__(self, settings: TokenizerConfig, model: Model | None) -> None:
        """`model` is None for simulated replicas."""
        self.settings = settings
        self.model = model
        self.judge = Judge()
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="tokenizer")
        self._room = settings.threads * (1 + WAITING_PER_THREAD)
        self._quiet_until = 0.0
        self.mean_s = 0.0
        """That a prompt takes in its thread, by the last of them."""
        self.waiting = 0
        """Prompts in a thread, or before one; those that are given up included."""

    @property
    def cache(self) -> PieceCache | None:
        """What is kept of prompts; None for nothing."""
        return None if self.model is None else self.model.pieces.cache

    async def ask(self, question: Question, body: bytes | memoryview) -> Tokenized | Untokenized:
        """The prompt, or why not, within `timeout_s`."""
        if self.judge.distrusted:
            return Untokenized.DISTRUSTED
        if self._is_busy():
            return Untokenized.BUSY
        if len(body) > MAX_BODY_BYTES:
            return Untokenized.LARGE
        until = time.monotonic() + self.settings.timeout_s
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._answer, question, bytes(body), until)
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

    def _is_busy(self) -> bool:
        """Whether there is no room, or none that would be reached in time. A thread that has nothing to do always takes one."""
        threads = self.settings.threads
        if self.waiting < threads:
            return False
        return self.waiting >= self._room or (self.waiting / threads + 1) * self.mean_s >= self.settings.timeout_s

    def _done(self, _work: object) -> None:
        self.waiting -= 1

    def _answer(self, question: Question, body: bytes, until: float) -> Tokenized | Untokenized:
        """What a thread does."""
        began = time.monotonic()
        if began >= until:
            return Untokenized.LATE
        found = self._found(question, body)
        self.mean_s += MEMORY * (time.monotonic() - began - self.mean_s)
        return found

    def _found(self, question: Question, body: bytes) -> Tokenized | Untokenized:
        try:
            return tokenized(self.model, question, body)
        except CannotTokenize as e:
            return e.why
        except BaseException as e:  # a panic of the library is no Exception
            self._complain(e)
            return Untokenized.FAILED

    def _complain(self, error: BaseException) -> None:
        """With the place and the kind alone: what an exception says may be out of a prompt."""
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + COMPLAINT_INTERVAL_S
            place = "".join(traceback.format_tb(error.__traceback__))
            log.error("a prompt could not be tokenized: %s at\n%s", type(error).__name__, place)


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
            self._engines[pool] = same or Engine(each, None if each.simulated else load(each, now))
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
        pool = self._pool(places)
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

    async def explained(
        self, places: Sequence[Place], question: Question, body: bytes
    ) -> Tokenized | Untokenized | None:
        """As `tokens`, with the reason where there are none, and not counted; None where no pool there has a tokenizer."""
        pool = self._pool(places)
        return None if pool is None else await self._asked(pool, places, question, body)

    def _pool(self, places: Sequence[Place]) -> str | None:
        """The first that has a tokenizer."""
        return next((place.pool for place in places if place.pool in self._engines), None)

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
