"""KV caches on their way between simulated replicas: from the one that computed a prompt to the one that answers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from extproc.core.settings import DisaggregationSettings


@dataclass(frozen=True, slots=True)
class Link:
    """What leads out of each replica."""

    bytes_per_token: float = DisaggregationSettings().kv_bytes_per_token
    """Of KV cache."""
    bandwidth_bytes_per_s: float = DisaggregationSettings().bandwidth_bytes_per_s
    latency_s: float = DisaggregationSettings().latency_s
    """Of one transfer: the side-car's second request, and the handshake."""

    def seconds(self, tokens: int) -> float:
        """For so many tokens, without others; none need no transfer."""
        return self.latency_s + tokens * self.bytes_per_token / self.bandwidth_bytes_per_s if tokens > 0 else 0.0


@dataclass(slots=True)
class Links:
    """The links of a fleet. One transfer after the other leaves a replica, each at full speed."""

    link: Link
    _free_at: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By replica."""

    def __repr__(self) -> str:
        return f"<links {self.link!r}, {len(self._free_at)} used>"

    def arrives_at(self, address: str, tokens: int, now: float) -> float:
        """When the KV cache of so many tokens, computed there by now, is where it is wanted."""
        if tokens <= 0:
            return now
        link, begins = self.link, max(self._free_at[address], now)
        self._free_at[address] = begins + tokens * link.bytes_per_token / link.bandwidth_bytes_per_s
        return self._free_at[address] + link.latency_s
