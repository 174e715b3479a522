"""Traffic from a seed: chat sessions with shared system prompts, bursts of siblings, tenants by Zipf. Tokens only, no text.

The sizes follow `sim/workload.py`; here a session is only block ids, so hours of a large fleet fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Final

from pydantic import Field, ValidationError

from extproc.config import Section, mistakes
from extproc.sim.traces.base import Run, Trace, TraceError, Turn, joined

_IDS: Final = 1 << 20
"""Block ids kept for one session or system prompt: 64 million tokens at the default block size."""


class Generate(Section):
    """What to generate."""

    sessions: int = Field(default=500, ge=1, le=1_000_000)
    """How many."""
    sessions_per_s: float = Field(default=5.0, gt=0)
    """Mean arrivals a second (Poisson); a burst counts as one."""
    turns: float = Field(default=4.0, ge=1)
    """Mean requests of a session (geometric)."""
    think_s: float = Field(default=5.0, ge=0)
    """Mean pause between an answer and the next turn, seconds (exponential)."""
    tenants: int = Field(default=20, ge=1, le=100_000)
    """Customers; they share nothing, as with `cache_salt`."""
    tenant_skew: float = Field(default=1.0, ge=0)
    """Zipf exponent of their popularity."""
    groups: int = Field(default=2, ge=1, le=10_000)
    """System prompts of each tenant."""
    group_skew: float = Field(default=1.0, ge=0)
    """Zipf exponent of their popularity within the tenant."""
    system_tokens: int = Field(default=2000, ge=0)
    """Median length of system prompts (log-normal, sigma 0.5)."""
    user_tokens: int = Field(default=400, ge=1)
    """Median length of what is said in one turn (log-normal)."""
    user_sigma: float = Field(default=1.0, ge=0, le=3)
    """Its spread."""
    output_tokens: int = Field(default=200, ge=1)
    """Median length of answers (log-normal)."""
    output_sigma: float = Field(default=0.8, ge=0, le=3)
    """Its spread."""
    max_tokens: int = Field(default=100_000, ge=100)
    """Longest prompt; a session ends before it would pass that."""
    burst_share: float = Field(default=0.1, ge=0, le=1)
    """Share of arrivals that are a burst: sessions that begin together, with all of the first prompt in common but its end."""
    siblings: int = Field(default=8, ge=2, le=1000)
    """Sessions of a burst."""
    burst_s: float = Field(default=0.2, ge=0)
    """Time over which a burst is spread, seconds."""
    block_size: int = Field(default=64, ge=1)
    """Tokens."""

    @classmethod
    def from_text(cls, text: str) -> Generate:
        """From `key=value,key=value`. Raises TraceError with one line for each mistake."""
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        try:
            return cls.model_validate({key.strip(): value.strip() for key, _, value in pairs})
        except ValidationError as e:
            raise TraceError("\n".join(f"--generate: {mistake}" for mistake in mistakes(e, cls))) from None


def generate(spec: Generate, seed: int) -> Trace:
    """Same spec and seed, same trace."""
    making = _Making(spec, seed)
    starts, kind = Random(f"{seed}/starts"), Random(f"{seed}/bursts")
    at = 0.0
    while making.sessions < spec.sessions:
        burst = kind.random() < spec.burst_share
        making.arrive(at, spec.siblings if burst else 1, starts)
        at += starts.expovariate(spec.sessions_per_s)
    return Trace("generated", spec.block_size, tuple(making.turns))


@dataclass(slots=True)
class _Making:
    spec: Generate
    seed: int
    turns: list[Turn] = field(default_factory=list)
    sessions: int = 0
    _systems: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """(tenant, group) -> first block id and tokens of its system prompt"""
    _ids: int = 0
    _choice: Random = field(init=False)

    def __post_init__(self) -> None:
        self._choice = Random(f"{self.seed}/tenants")

    def arrive(self, at: float, siblings: int, starts: Random) -> None:
        """One session, or several that share their first prompt but its end."""
        spec = self.spec
        tenant = _zipf(self._choice, spec.tenants, spec.tenant_skew)
        group = _zipf(self._choice, spec.groups, spec.group_skew)
        first, tokens = self._system(tenant, group)
        head: list[Run] = [(first, tokens // spec.block_size)]
        tokens = head[0][1] * spec.block_size
        if siblings > 1:
            blocks = _length(self._choice, spec.user_tokens, spec.user_sigma) // spec.block_size
            head.append((self._new_ids(), blocks))
            tokens += blocks * spec.block_size
        for _ in range(min(siblings, spec.sessions - self.sessions)):
            begins = at + (starts.random() * spec.burst_s if siblings > 1 else 0.0)
            self._session(begins, f"t{tenant}", head, tokens)

    def _session(self, at: float, tenant: str, head: list[Run], shared_tokens: int) -> None:
        """Turns whose prompts grow by what was said and answered."""
        rng, size = Random(f"{self.seed}/session/{self.sessions}"), self.spec.block_size
        name, own = f"s{self.sessions}", self._new_ids()
        self.sessions += 1
        tokens, after, delay_s = shared_tokens, None, at
        for said, answered in self._lengths(rng):
            tokens += said
            if after is not None and tokens > self.spec.max_tokens:
                return
            blocks = (tokens + answered - shared_tokens) // size
            runs = joined([*head, (own, blocks)])
            self.turns.append(Turn(tokens, answered, delay_s, after, runs, name, tenant))
            tokens += answered
            after = len(self.turns) - 1
            delay_s = rng.expovariate(1.0) * self.spec.think_s

    def _lengths(self, rng: Random) -> Iterator[tuple[int, int]]:
        """Tokens said and answered, turn by turn."""
        spec = self.spec
        while True:
            yield (
                _length(rng, spec.user_tokens, spec.user_sigma),
                _length(rng, spec.output_tokens, spec.output_sigma),
            )
            if rng.random() * spec.turns < 1.0:
                return

    def _system(self, tenant: int, group: int) -> tuple[int, int]:
        key = (tenant, group)
        if key not in self._systems:
            length = _length(Random(f"{self.seed}/system/{key}"), max(self.spec.system_tokens, 1), 0.5)
            self._systems[key] = self._new_ids(), length if self.spec.system_tokens else 0
        return self._systems[key]

    def _new_ids(self) -> int:
        self._ids += 1
        return self._ids * _IDS


def _zipf(rng: Random, n: int, skew: float) -> int:
    """0 to n-1, k in proportion to 1 / (k + 1)**skew: by inversion of the continuous form, so that n may be large."""
    u = rng.random()
    if abs(skew - 1.0) < 1e-9:
        value = (n + 1.0) ** u
    else:
        value = ((((n + 1.0) ** (1.0 - skew) - 1.0) * u) + 1.0) ** (1.0 / (1.0 - skew))
    return min(int(value) - 1, n - 1)


def _length(rng: Random, median: int, sigma: float) -> int:
    return max(1, min(round(rng.lognormvariate(math.log(median), sigma)), 50 * median))
