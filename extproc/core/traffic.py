"""What a pool is asked to do, and what a second of each kind is therefore worth.

A placement changes the waits for first tokens and the durations of answers, of this request and of others. To compare
candidates these need one unit: seconds until a first token. The exchange rates are not chosen; they are measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_RATE_S: Final = 30.0
"""Arrivals are counted over about so many seconds."""
_GAIN: Final = 0.02
"""Of a new value in a mean: about the last fifty count."""
_BUSY: Final = 0.8
"""Above this share of time in prefill a queue is no longer stationary, and 1 / (1 - share) no measure of it."""
_LATER: Final = 5.0
"""At most so many later requests are counted on. In an overload they would be without number, and a cached prefix
would then be worth any queue."""


@dataclass(slots=True)
class Prices:
    """Exchange rates into seconds until a first token."""

    decode: float = 0.1
    """A second of decode, one's own or added to others.

    TTFT / (TTFT + E2E), of their present means: then one per cent of mean TTFT is worth one per cent of mean duration, and
    least cost lowers the product of both. Counted in full, decode costs 15 to 40 % of mean TTFT below saturation for 1 to
    2 % of duration; in an overload, where first tokens wait for decode to free places, the rate rises by itself.
    """
    later: float = 0.0
    """Requests that will still come while the replica is busy, each delayed by a second of prefill put there now.

    Those in line on a replica by Little's law (arrivals x mean TTFT), over the share of time without prefill; times the share
    with, for that is how often a newcomer finds other replicas busy as well and does not go there instead.
    """
    unseen_s: float = 0.0
    """Prefill that one request of others on a replica stands for: it is there, and what of it is left nobody tells.

    The share of its life before its first token, times the mean prefill that an arrival finds (the second moment over the
    first). Routers that do not talk thereby come to prefer different replicas, and each knows what waits on its own.
    """
    unseen_rate: float = 0.0
    """Arrivals a second that one request of others on a replica stands for, by Little's law."""


class Traffic:
    """Rates and means of one pool."""

    __slots__ = (
        "_answers",
        "_arrivals",
        "_began_at",
        "_decode_s",
        "_prefill_s",
        "_recent",
        "_seen_at",
        "_square_s2",
        "_ttft_s",
    )

    def __init__(self) -> None:
        # Before anything is seen: chat on one GPU, with the weight of four requests.
        self._ttft_s, self._decode_s, self._answers = 0.3, 3.0, 4
        self._prefill_s, self._square_s2, self._arrivals = 0.1, 0.02, 4
        self._recent, self._began_at, self._seen_at = 0.0, 0.0, 0.0

    def __repr__(self) -> str:
        return f"<traffic {self._arrivals - 4} arrivals, mean TTFT {self._ttft_s:.3f} s, decode {self._decode_s:.3f} s>"

    def arrived(self, prefill_s: float, now: float) -> None:
        """A request was sent to a replica that will prefill it in so many seconds."""
        if not self._recent:
            self._began_at = self._seen_at = now
        self._recent, self._seen_at = self._recent_at(now) + 1.0, now
        self._arrivals += 1
        gain = max(1.0 / self._arrivals, _GAIN)
        self._prefill_s += gain * (prefill_s - self._prefill_s)
        self._square_s2 += gain * (prefill_s * prefill_s - self._square_s2)

    def answered(self, ttft_s: float, decode_s: float) -> None:
        """A request was answered in full: seconds until its first token, and from there to its last."""
        self._answers += 1
        gain = max(1.0 / self._answers, _GAIN)
        self._ttft_s += gain * (ttft_s - self._ttft_s)
        self._decode_s += gain * (decode_s - self._decode_s)

    def prices(self, replicas: int, strangers_each: float, now: float) -> Prices:
        """At present. `strangers_each`: requests of others for each of ours, who come beside ours."""
        ttft_s, life_s = self._ttft_s, self._ttft_s + self._decode_s
        rate = self._rate(now) / max(replicas, 1) * (1.0 + strangers_each)
        busy = min(rate * self._prefill_s, _BUSY)
        return Prices(
            decode=ttft_s / (ttft_s + life_s),
            later=min(busy * rate * ttft_s / (1.0 - busy), _LATER),
            unseen_s=ttft_s / life_s * self._square_s2 / self._prefill_s,
            unseen_rate=1.0 / life_s,
        )

    def _rate(self, now: float) -> float:
        """Arrivals a second. In the first seconds they are counted over the time since they began, but at least one."""
        if not self._recent:
            return 0.0
        covered_s = _RATE_S * -math.expm1(-max(now - self._began_at, 1.0) / _RATE_S)
        return self._recent_at(now) / covered_s

    def _recent_at(self, now: float) -> float:
        """Arrivals, each counting less the longer ago it was."""
        return self._recent * math.exp(min(self._seen_at - now, 0.0) / _RATE_S)
