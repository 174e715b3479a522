"""Follows the configuration file while extproc runs: what of a new one can be taken over, and what needs a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from extproc.adapters.watching import RECHECK_S, moments
from extproc.config import Config, ConfigError, PoolConfig, ProviderConfig, Section, parse

log = logging.getLogger(__name__)

LIVE_IN_POOLS: Final = frozenset(
    {
        "models",
        "policy",
        "policy_options",
        "replicas",
        "discovery",
        "labels",
        "scrape",
        "health",
        "queue",
        "scaling",
        "kv_events",
    }
)
"""Settings of a pool, with all that is in them, that a running process takes over."""


LIVE_IN_PROVIDERS: Final = frozenset({"model", "price", "budget"})
"""Likewise of a provider. The rest is Envoy's."""


def merged(running: Config, wanted: Config, hold_limit_s: float) -> tuple[Config, list[str]]:
    """`running` with as much of `wanted` as can be had without a restart, and the dotted paths of what cannot.

    That is the grace period, the log level, what is shared, the models, LIVE_IN_POOLS and LIVE_IN_PROVIDERS. `hold_limit_s` is the longest wait that the proxy allows.
    Where the set of pools differs nothing of them is taken: a model or replica that moves to a pool that does not exist yet would
    be nowhere. Nor are models while the set of providers differs, for a target may be one that Envoy does not know.
    """
    changes: dict[str, Any] = {
        "shutdown_grace_s": wanted.shutdown_grace_s,
        "inspect": running.inspect.model_copy(update={"log_level": wanted.inspect.log_level}),
        "shared": wanted.shared,
    }
    if _names(running.pools) == _names(wanted.pools):
        pairs = zip(running.pools, wanted.pools, strict=True)
        changes["pools"] = tuple(_merged_pool(a, b, wanted.hold_limit_s <= hold_limit_s) for a, b in pairs)
        if _names(running.providers) == _names(wanted.providers):
            changes["models"] = wanted.models
            changes["providers"] = tuple(map(_merged_provider, running.providers, wanted.providers))
    effective = running.model_copy(update=changes)
    return effective, list(differences(effective, wanted))


def _names(named: Iterable[PoolConfig | ProviderConfig]) -> list[str]:
    return [each.name for each in named]


def _merged_provider(running: ProviderConfig, wanted: ProviderConfig) -> ProviderConfig:
    return running.model_copy(update={name: getattr(wanted, name) for name in LIVE_IN_PROVIDERS})


def _merged_pool(running: PoolConfig, wanted: PoolConfig, queue_fits: bool) -> PoolConfig:
    taken = LIVE_IN_POOLS if queue_fits else LIVE_IN_POOLS - {"queue", "scaling"}
    before, after = running.disaggregation, wanted.disaggregation
    # Else Envoy's headers and routes differ.
    if before is not None and after is not None and before.mirrors is after.mirrors:
        taken |= {"disaggregation"}
    return running.model_copy(update={name: getattr(wanted, name) for name in taken})


def differences(before: Section, after: Section, path: str = "") -> Iterator[str]:
    """Dotted paths of the settings whose values differ, those of lists as a whole unless they are as long as before."""
    for name in type(before).model_fields:
        yield from _different(getattr(before, name), getattr(after, name), f"{path}.{name}".lstrip("."))


def _different(a: Any, b: Any, path: str) -> Iterator[str]:
    if a == b:
        return
    if isinstance(a, Section) and isinstance(b, Section):
        yield from differences(a, b, path)
    elif path in ("pools", "providers") and _names(a) == _names(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{path}[{i}]")
    else:
        yield path


@dataclass(slots=True)
class ConfigState:
    """What became of the configuration file since the start."""

    valid: bool = True
    """Whether the file, as it was last read, could be used."""
    errors: int = 0
    """Versions of it that could not."""
    applied: int = 0
    """Versions of which something was taken over."""
    restart_needed: tuple[str, ...] = ()
    """Dotted paths of what stands in the file and waits for a restart."""


class ConfigWatch:
    """Reads the file when it changes or `nudge` asks for it, and hands on what of it can be taken over.

    An invalid file changes nothing: it is counted and logged once, and is well again when it is valid.
    """

    def __init__(
        self, path: Path, running: Config, apply: Callable[[Config], None], *, recheck_s: float = RECHECK_S
    ) -> None:
        """`running` is what the process was started with; `apply` gets each new one, once."""
        self.path = path
        self.state = ConfigState()
        self._running = running
        self._hold_limit_s = running.hold_limit_s
        """The bootstrap that the proxy has says so much; a longer wait it would cut short."""
        self._apply = apply
        self._recheck_s = recheck_s
        self._nudged = asyncio.Event()
        self._content: bytes | None = None
        """As last read: the same content is parsed once, not every `recheck_s`."""
        self._mistake: str | None = None

    def __repr__(self) -> str:
        return f"<ConfigWatch {self.path}: {'valid' if self.state.valid else 'invalid'}, {self.state.applied} applied>"

    def nudge(self) -> None:
        """Read the file now (SIGHUP)."""
        log.info("%s: read again, as asked", self.path)
        self._nudged.set()

    async def run(self) -> None:
        """Follow the file until cancelled."""
        async with aclosing(moments(self.path, self._recheck_s, self._nudged)) as due:
            async for _ in due:
                await self.look()

    async def look(self) -> None:
        """Read the file, and take over what is new."""
        try:
            content = await asyncio.to_thread(self.path.read_bytes)
            if content == self._content:
                return
            self._content = content
            wanted = await asyncio.to_thread(_parsed, content, self.path)
        except OSError as e:
            self._content = None  # should the last content come back, it is read again, which clears the mistake
            self._failed(f"{self.path}: {e.strerror}")
        except ConfigError as e:
            self._failed(str(e))
        else:
            if not self.state.valid:
                log.info("%s: valid again", self.path)
            self.state.valid, self._mistake = True, None
            self._take(wanted)

    def _take(self, wanted: Config) -> None:
        effective, waiting = merged(self._running, wanted, self._hold_limit_s)
        if effective != self._running:
            taken = list(differences(self._running, effective))
            self._running = effective
            self._apply(effective)
            self.state.applied += 1
            log.info("%s: applied: %s", self.path, ", ".join(taken))
        if (names := tuple(waiting)) != self.state.restart_needed:
            self.state.restart_needed = names
            log.warning("%s: %s", self.path, f"needs a restart: {', '.join(names)}" if names else "no restart needed")

    def _failed(self, mistake: str) -> None:
        self.state.valid = False
        if mistake == self._mistake:
            return
        self._mistake = mistake
        self.state.errors += 1
        log.error("the configuration stays as it is: %s", "; ".join(mistake.splitlines()))


def _parsed(content: bytes, path: Path) -> Config:
    """As `config.load` reads it. Raises ConfigError."""
    try:
        text = content.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8: {e.reason} at byte {e.start}") from None
    return parse(text, source=str(path), base=path.parent)
