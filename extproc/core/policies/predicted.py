"""Least cost in seconds: what the request will wait there, and the delay that it adds to those already there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranking, Stateless, Terms, order, register
from extproc.core.prediction import Ask, cost_s, predict

TOLERANCE_S = 1e-3
"""Costs closer than a millisecond are equal: the prediction is no better, and equals share work by the prompt's head."""


@register
@dataclass(slots=True)
class Predicted(Stateless):
    """The default. One unit, so nothing to weigh: seconds until a first token, one's own and those of others; decode at its measured rate of exchange."""

    name = "predicted"

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        ranked = order(ask, members, lambda m: cost_s(ask, m, now), rng, max(TOLERANCE_S, ask.slack_s))
        return Ranking(ranked, self._reason(ask, ranked[0][1], members))

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        p = predict(ask, member, now)
        terms: Terms = {
            "queue_s": p.queue_s,
            "prefill_s": p.prefill_s,
            "decode_s": p.decode_s,
            "delay_s": p.delay_s,
            "crowding_s": p.crowding_s,
            "cached_tokens": float(p.cached_tokens),
        }
        if p.load_s is not None:
            terms["load_s"] = p.load_s
        return terms

    def _reason(self, ask: Ask, chosen: Member, members: Sequence[Member]) -> str:
        """`prefix`: it holds the most of the prompt. `spill`: another holds more, and costs more. `cost`: nobody holds any."""
        best = max(ask.cached_tokens(m) for m in members) if ask.hit_tokens else 0
        if best == 0:
            return "cost"
        return "prefix" if ask.cached_tokens(chosen) >= best else "spill"
