"""The endpoint picker of llm-d and the Gateway API inference extension, in its default and its recommended configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranked, Ranking, Stateless, Terms
from extproc.core.prediction import Ask
from tests.bench.baselines.ties import least

BLOCK_TOKENS: Final = 64
"""Of the approximate prefix index: 16 by default, and raised to no less than this."""
MAX_PREFIX_TOKENS: Final = 131_072
"""Of a prompt's head that are hashed at all."""


def matched_share(ask: Ask, member: Member) -> float:
    """Blocks of the prompt found there, of all its blocks; the last one counts though it is not full."""
    hit = min(ask.hit_tokens.get(member.replica.address, 0.0), MAX_PREFIX_TOKENS)
    blocks = -(-min(ask.prompt_tokens, MAX_PREFIX_TOKENS) // BLOCK_TOKENS)
    # Tokens come from bytes by a learned ratio: whole blocks are whole but for rounding.
    return int(hit / BLOCK_TOKENS + 1e-6) / blocks if hit else 0.0


@dataclass(slots=True)
class EppDefault(Stateless):
    """The endpoint picker without configuration: queue-scorer 2, kv-cache-utilization-scorer 2, prefix-cache-scorer 3.

    queue = (max - waiting) / (max - min) over the endpoints, 1 where all are equal; kv = 1 - usage; prefix = matched blocks
    of all blocks. The highest weighted sum wins, ties by lot (later versions rotate). The first two are of the last sample
    and know nothing of what was sent since, as in the endpoint picker. An endpoint without a sample gets 0 for both, and
    does not count for max and min.
    """

    name = "epp_default"
    queue_weight: float = 2.0
    kv_weight: float = 2.0
    prefix_weight: float = 3.0

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        samples = [m.fresh(now) for m in members]
        waiting = [s.waiting for s in samples if s is not None and s.waiting is not None]
        low, high = (min(waiting), max(waiting)) if waiting else (0, 0)
        scored: Ranked = []
        for member, sample in zip(members, samples, strict=True):
            score = self.prefix_weight * matched_share(ask, member) if ask.hit_tokens else 0.0
            if sample is not None and sample.waiting is not None:
                score += self.queue_weight * ((high - sample.waiting) / (high - low) if high > low else 1.0)
            if sample is not None and sample.kv_usage is not None:
                score += self.kv_weight * min(max(1.0 - sample.kv_usage, 0.0), 1.0)
            scored.append((-score, member))
        return Ranking(least(scored, rng), "score")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        sample = member.fresh(now)
        return {
            "waiting": None if sample is None or sample.waiting is None else float(sample.waiting),
            "kv_usage": None if sample is None else sample.kv_usage,
            "matched_share": matched_share(ask, member),
        }


@dataclass(slots=True)
class EppPrefixFilter(Stateless):
    """llm-d's optimized baseline: prefix-cache-affinity-filter, then token-load-scorer. Needs no samples.

    1. Endpoints with at least 0.80 of the prompt's blocks are kept, the others dropped; all are kept if there is none.
    2. But all are kept when even the best of those has over 18 s more of prefill in flight than the best of the others.
    3. Score of those kept: 1 - min(1, tokens / 4,194,304), with the uncached prompt tokens that wait there for their first
       token and those of this request. The highest wins, ties by lot (later versions rotate).

    `prefill_tokens_per_s` is the published default, measured with a 32B model on two H100; on other hardware llm-d
    wants it measured again.
    """

    name = "epp_prefix_filter"
    affinity_threshold: float = 0.80
    max_ttft_penalty_s: float = 18.0
    """0 keeps to the filter whatever the load."""
    prefill_tokens_per_s: float = 15_928.0
    queue_threshold_tokens: int = 4_194_304

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        queued = [m.load.queued_tokens(now) for m in members]
        scored: Ranked = [(self._score(ask, m, n), m) for n, m in zip(queued, members, strict=True)]
        threshold = self.affinity_threshold
        sticky = [matched_share(ask, m) >= threshold for m in members] if ask.hit_tokens else []
        if not any(sticky) or all(sticky):
            return Ranking(least(scored, rng), "load")
        best = min(n for n, keep in zip(queued, sticky, strict=True) if keep)
        other = min(n for n, keep in zip(queued, sticky, strict=True) if not keep)
        penalty_s = (best - other) / self.prefill_tokens_per_s
        if self.max_ttft_penalty_s > 0 and penalty_s > self.max_ttft_penalty_s:
            return Ranking(least(scored, rng), "spill")
        kept = [s for s, keep in zip(scored, sticky, strict=True) if keep]
        rest = [s for s, keep in zip(scored, sticky, strict=True) if not keep]
        return Ranking(least(kept, rng) + least(rest, rng), "prefix")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {
            "queued_tokens": float(member.load.queued_tokens(now)),
            "matched_share": matched_share(ask, member),
        }

    def _score(self, ask: Ask, member: Member, queued: int) -> float:
        """The token-load score, negative: lower is better here."""
        uncached = max(ask.prompt_tokens - ask.hit_tokens.get(member.replica.address, 0.0), 0.0)
        return min((queued + uncached) / self.queue_threshold_tokens, 1.0) - 1.0
