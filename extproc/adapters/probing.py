"""Checks replicas actively, sooner while there is doubt, and hands on the results as facts.

One visit asks up to three questions, each only where the one before was answered:

1. LIVE: does the process answer on its health path with 200? A dead vLLM engine answers 503, a dead process refuses. Engines differ
   in that path: 404 says that it is another's, and the next is asked, until one answers otherwise.
2. READY: is a wanted model in the list of `/v1/models`? Where there is no such list: does the engine say so on a path of its own?
3. DEEP, where configured and due: does it generate a token? Only this notices an engine that hangs behind an HTTP server that
   does not (vLLM 0.32 goes on to answer both of the others, and its gauges say idle), so only a replica without work is asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Final

import orjson

from extproc.adapters.engines import HealthPaths, listed_models
from extproc.adapters.pages import Page, Pages
from extproc.adapters.rounds import Rounds, Visited, now
from extproc.adapters.scraping import MODELS_PATH
from extproc.config import Health
from extproc.core.types import Fact, Probe, Probed, ScrapeFailure

log = logging.getLogger(__name__)

COMPLETIONS_PATH: Final = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Checks:
    """How the replicas of one pool are checked."""

    health: Health
    models: tuple[str, ...] = ()
    """One of these listed makes a replica ready; empty: any."""
    paths: tuple[HealthPaths, ...] = (HealthPaths("/health"),)
    """Where a replica may tell how it is, in the order in which to ask; what `health` says goes before."""

    @property
    def asked(self) -> tuple[HealthPaths, ...]:
        """The same, with what `health` says."""
        return self.paths if self.health.path is None else (HealthPaths(self.health.path),)


@dataclass(slots=True, eq=False)
class _Checked(Visited):
    """One replica and what its checks found."""

    checks: Checks
    trouble: dict[Probe, str | None] = field(default_factory=dict)
    """Why the last check of each kind failed; None where it succeeded."""
    deep_due: float = 0.0
    """Loop time of the next deep check."""
    paths: HealthPaths | None = None
    """Where it answered last."""

    def candidates(self) -> tuple[HealthPaths, ...]:
        """Where to ask, first where it answered."""
        asked = self.checks.asked
        return asked if self.paths not in asked else (self.paths, *(paths for paths in asked if paths != self.paths))

    @property
    def state(self) -> str:
        if not self.trouble:
            return "unseen"
        return next((f"not {probe}" for probe in Probe if self.trouble.get(probe)), "well")


class Prober(Rounds[_Checked]):
    """Checks every replica of which `follow` told, until `stop`.

    `learn` gets the facts, within the task of the replica. `doubtful` says of an address whether it is to be checked at the
    shorter interval, `idle` whether nothing runs there, by our flights and its last sample.

    `wake`: doubt arose. The replica is checked at once, or one `doubt_interval_s` after its last check.
    """

    verb = "probe"

    def __init__(
        self,
        checks: Mapping[str, Checks],
        learn: Callable[[Fact], None],
        *,
        rng: Random,
        doubtful: Callable[[str], bool],
        idle: Callable[[str], bool],
        pages: Pages | None = None,
    ) -> None:
        """`checks`: by name of the pool; changes of other pools are ignored. `pages` is closed by `stop`."""
        super().__init__(checks, rng, pages)
        self._checks = dict(checks)
        self._learn = learn
        self._doubtful = doubtful
        self._idle = idle

    def retarget(self, pool: str, checks: Checks) -> None:
        """Check the replicas of a pool in another way from their next visit on."""
        self._checks[pool] = checks
        for checked in self._of(pool):
            checked.checks = checks

    def _enter(self, pool: str, address: str) -> _Checked:
        return _Checked(pool, address, self._checks[pool])

    def _first_s(self, checked: _Checked) -> float:
        return checked.checks.health.doubt_interval_s

    async def _visit(self, checked: _Checked) -> None:
        trouble = _trouble(await self._live(checked))
        self._tell(checked, Probe.LIVE, trouble)
        if trouble == ScrapeFailure.REFUSED:
            self._tell(checked, Probe.READY, trouble)
        if trouble is not None:
            return
        model = await self._ready(checked)
        if model is not None and self._deep_is_due(checked):
            await self._deep(checked, model)

    async def _live(self, checked: _Checked) -> Page | ScrapeFailure:
        """What the first path answers that the replica knows; where it knows none, what the first of all answered."""
        first: Page | ScrapeFailure | None = None
        for paths in checked.candidates():
            page = await self._ask(checked, paths.live)
            if not isinstance(page, Page):
                return page
            if page.status != 404:
                checked.paths = paths
                return page
            first = first or page
        checked.paths = None
        return first or Page(404)

    async def _ready(self, checked: _Checked) -> str | None:
        """The model to ask for in a deep check; None where it is not ready, or does not say what it has."""
        page = await self._ask(checked, MODELS_PATH)
        if _will_not_say(page):
            # It wants a key, or has no list: its own word counts, and where it has none being alive must do.
            path = checked.paths.ready if checked.paths is not None else None
            self._tell(checked, Probe.READY, None if path is None else _trouble(await self._ask(checked, path)))
            return None
        trouble = _trouble(page)
        listed = listed_models(page.body) if isinstance(page, Page) and trouble is None else None
        model = _wanted(checked.checks.models, listed or ())
        self._tell(checked, Probe.READY, trouble or (None if model else "model not listed"))
        return model

    def _deep_is_due(self, checked: _Checked) -> bool:
        """In doubt it is always due: it is the one check that a hung engine fails."""
        if checked.checks.health.deep_interval_s is None or not self._idle(checked.address):
            return False
        return now() >= checked.deep_due or self._doubtful(checked.address)

    async def _deep(self, checked: _Checked, model: str) -> None:
        """Have one token generated.

        Two answers say nothing: 4xx, as of a model that only embeds, and a late one where work came meanwhile.
        """
        assert checked.checks.health.deep_interval_s is not None
        checked.deep_due = now() + checked.checks.health.deep_interval_s * self._jitter()
        page = await self._ask(checked, COMPLETIONS_PATH, _one_token(model))
        if _will_not_say(page) or (page is ScrapeFailure.LATE and not self._idle(checked.address)):
            return
        self._tell(checked, Probe.DEEP, _trouble(page) or _no_token(page))

    async def _ask(self, checked: _Checked, path: str, sent: bytes | None = None) -> Page | ScrapeFailure:
        return await self._pages.ask(checked.address, path, checked.checks.health.timeout_s, sent)

    def _tell(self, checked: _Checked, probe: Probe, trouble: str | None) -> None:
        if trouble != checked.trouble.get(probe):
            log.info(
                "replica %s of pool %s: %s check: %s", checked.address, checked.pool, probe, trouble or "well again"
            )
        checked.trouble[probe] = trouble
        refused = trouble == ScrapeFailure.REFUSED
        self._learn(Probed(checked.pool, checked.address, probe, trouble is None, refused))

    async def _rest(self, checked: _Checked) -> None:
        """Wait until the next visit; `wake` cuts the wait short, but visits stay a `doubt_interval_s` apart."""
        health = checked.checks.health
        pause = self._pause_s(checked) * self._jitter()
        first = min(pause, health.doubt_interval_s)
        await asyncio.sleep(first)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause - first):
                await checked.woken.wait()

    def _pause_s(self, checked: _Checked) -> float:
        health = checked.checks.health
        if self._doubtful(checked.address):
            return health.doubt_interval_s
        return min(health.interval_s, health.deep_interval_s or health.interval_s)


def _trouble(page: Page | ScrapeFailure) -> str | None:
    """Why an answer is none that a well replica gives; None where it is 200."""
    if isinstance(page, ScrapeFailure):
        return page.value
    return None if page.status == 200 else f"status {page.status}"


def _will_not_say(page: Page | ScrapeFailure) -> bool:
    """4xx: it is we who ask for what it does not have, or without its key."""
    return isinstance(page, Page) and 400 <= page.status < 500


def _wanted(wanted: Sequence[str], listed: Sequence[str]) -> str | None:
    """The first wanted model that is listed; the first of all where any will do."""
    return next((model for model in wanted or listed if model in listed), None)


def _one_token(model: str) -> bytes:
    return orjson.dumps({"model": model, "prompt": "Hi", "max_tokens": 1, "temperature": 0})


def _no_token(page: Page | ScrapeFailure) -> str | None:
    """What a completion under status 200 lacks: an engine that is told to stop answers it with the finish reason `abort`."""
    try:
        answer = orjson.loads(page.body) if isinstance(page, Page) else None
        reason = answer["choices"][0]["finish_reason"] if answer else None
    except (orjson.JSONDecodeError, LookupError, TypeError):
        reason = None
    return None if reason in ("length", "stop") else "no token"
