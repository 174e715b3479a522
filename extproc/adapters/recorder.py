"""The last decisions with their ends, kept in memory for inspection."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from extproc.core.observers import Ended, Quiet
from extproc.core.types import Decision, Outcome


@dataclass(slots=True)
class Record:
    """One decision and, once known, how it ended."""

    decision: Decision
    ended: Ended | None = None

    def view(self) -> dict[str, Any]:
        """As JSON; see docs/operations.md."""
        return {**decision_view(self.decision), "outcome": _outcome_view(self.ended) if self.ended else None}


class Recorder(Quiet):
    """Observer that keeps the newest `limit` decisions."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._records: OrderedDict[str, Record] = OrderedDict()

    def decided(self, decision: Decision) -> None:
        if not self._limit:
            return
        self._records[decision.flight] = Record(decision)
        if len(self._records) > self._limit:
            self._records.popitem(last=False)

    def ended(self, ended: Ended) -> None:
        if record := self._records.get(ended.flight.id):
            record.ended = ended

    def last(self, n: int) -> list[Record]:
        """The newest `n`, newest first."""
        records = list(self._records.values())[-n:] if n > 0 else []
        return records[::-1]


def decision_view(decision: Decision) -> dict[str, Any]:
    """A decision as JSON: seconds and tokens, no part of the prompt."""
    prediction = decision.prediction
    return {
        "flight": decision.flight or None,
        "at_s": round(decision.at, 6),
        "pool": decision.pool,
        "model": decision.model,
        "target": _target_view(decision),
        "api": decision.api.value,
        "policy": decision.policy,
        "reason": decision.reason,
        "endpoints": list(decision.endpoints),
        "prefiller": decision.prefiller,
        "prompt_tokens": decision.prompt_tokens,
        "output_tokens": round(decision.output_tokens, 1),
        "output_p90_tokens": decision.output_p90_tokens,
        "predicted": {
            "cached_tokens": prediction.cached_tokens,
            "prefix_source": decision.prefix_source.value,
            "queue_s": round(prediction.queue_s, 6),
            "prefill_s": round(prediction.prefill_s, 6),
            "ttft_s": round(prediction.ttft_s, 6),
            "decode_s": round(prediction.decode_s, 6),
            "delay_s": round(prediction.delay_s, 6),
            "crowding_s": round(prediction.crowding_s, 6),
            "cost_s": round(prediction.cost_s, 6),
        },
        "candidates": [
            {
                "replica": scored.address,
                "score": round(scored.score, 6),
                "terms": {k: None if v is None else round(v, 6) for k, v in scored.terms.items()},
            }
            for scored in decision.candidates
        ],
    }


def _target_view(decision: Decision) -> dict[str, str] | None:
    """Which target of a configured model it is; None for models that the catalog does not have."""
    target = decision.target
    return None if target is None else {"model": target.model, "to": target.to, "version": target.version}


def _outcome_view(ended: Ended) -> dict[str, Any]:
    outcome: Outcome = ended.outcome
    usage = outcome.usage
    return {
        "end": outcome.end.value,
        "status": outcome.status,
        "served": outcome.served,
        "attempts": outcome.attempts,
        "ttft_s": outcome.ttft_s,
        "replica_ttft_s": outcome.replica_ttft_s,
        "duration_s": outcome.duration_s,
        "response_bytes": outcome.response_bytes,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "cached_tokens": usage.cached_tokens if usage else None,
        "output_tokens": ended.output_tokens,
    }
