"""Least token load: what is queued and what is being generated, over what the replica can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranking, Stateless, Terms, register
from extproc.core.prediction import Ask


@register
@dataclass(slots=True)
class TokenAware(Stateless):
    """load = (prompt_weight x prompt tokens queued + decode_weight x output tokens in flight) / tokens per second.

    The least load after adding the request wins, the first of equals; a replica at `limit` or above before it is passed
    over while another is below.
    """

    name = "token_aware"
    prompt_weight: float = 0.1
    """A prompt token against an output token: prefill is about ten times cheaper."""
    decode_weight: float = 1.0
    """An output token: each takes a step of its own."""
    limit: float = 0.95
    """Load at which a replica takes no more while another is below."""
    tokens_per_s: float = 1000.0
    """Capacity of a replica without the label `max_tokens_per_s`."""

    def __post_init__(self) -> None:
        if not self.tokens_per_s > 0:
            raise ValueError(f"tokens_per_s must be above 0, not {self.tokens_per_s!r}")

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        generated = ask.output_tokens * ask.request.samples
        added = self.prompt_weight * ask.prompt_tokens + self.decode_weight * generated
        scored = [(self._load(m, now), added / self._capacity(m), m) for m in members]
        # Sorting is stable: members come in the order of discovery, so the first of equals stays first. Rounded, because
        # sums of the same loads in another order differ in the last digits.
        scored.sort(key=lambda s: (s[0] >= self.limit, round(s[0] + s[1], 9)))
        reason = "least" if scored[0][0] < self.limit else "saturated"
        return Ranking([(load + more, m) for load, more, m in scored], reason)

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {
            "prompt_tokens_queued": float(member.load.queued_tokens(now)),
            "decode_tokens": member.load.decoding_tokens(now),
            "tokens_per_s": self._capacity(member),
            "load": self._load(member, now),
        }

    def _load(self, member: Member, now: float) -> float:
        queued = member.load.queued_tokens(now)
        decoding = member.load.decoding_tokens(now)
        return (self.prompt_weight * queued + self.decode_weight * decoding) / self._capacity(member)

    def _capacity(self, member: Member) -> float:
        """A label that is no positive number counts as none."""
        try:
            capacity = float(member.replica.labels.get("max_tokens_per_s", 0))
        except ValueError:
            return self.tokens_per_s
        return capacity if capacity > 0 else self.tokens_per_s
