"""Whether a replica has room: how long a request would wait there before its own prefill begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from extproc.core.fleet import Member
from extproc.core.prediction import Ask, blocks_wait_s, predict, slots_wait_s
from extproc.core.types import Sample

MAX_REPLICAS: Final = 4096
"""Replicas whose places are remembered."""
_STEP_S: Final = 0.001
"""Least time to the next look: the queue of a replica is not known better, and a look that is due at once would be due for ever."""


class Room:
    """Waits on the replicas of one pool.

    Two things hold a request up: prefills that stand before it, and places (KV blocks, sequence slots) that must become free.
    How many slots an engine has it does not tell. It shows when requests wait there though no prefill is in the way: then as
    many as run are its places. Without that, all that wait here would be sent off between two samples that show none waiting.
    """

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<room {self._places}>"

    def wait_s(self, ask: Ask, member: Member, now: float) -> float:
        """Predicted seconds until the replica turns to the request, were it sent there now.

        Infinite where all slots for LoRA adapters are in use by others: whoever waits for one here goes to the first that becomes free,
        wherever that is. Sent to the one that was expected to be first, such requests waited twice as long (docs/lora.md).
        """
        if ask.adapter is not None and not member.has_slot(ask.adapter, now):
            return math.inf
        backlog_s = member.backlog_s(now)
        sample = member.fresh(now)
        if sample is None:
            return backlog_s
        capacity = sample.kv_capacity_tokens
        if capacity and ask.prompt_tokens > capacity:
            return backlog_s  # it will never fit, and gets the engine's refusal at once; nobody shall wait behind it
        waits_s = (
            slots_wait_s(member, sample, now),
            self._blocks_wait_s(ask, member, sample),
            self._slot_wait_s(member, now),
        )
        return max(backlog_s, *waits_s)

    def free(self, ask: Ask, members: Iterable[Member], within_s: float, now: float) -> bool:
        """Whether any of them would let it wait no longer than that."""
        return any(self.wait_s(ask, member, now) <= within_s for member in members)

    def _blocks_wait_s(self, ask: Ask, member: Member, sample: Sample) -> float:
        """By what the replica says of its blocks: our own count has a prefix that several share once for each of them.

        With that count nine in ten looks found no room on shared prompts that filled two thirds of the cache, and mean TTFT at
        saturation rose by a quarter; without it there is less in reserve, and urgent requests wait longer in an overload.
        """
        held = member.load.held_tokens
        if sample.kv_usage is not None and sample.kv_capacity_tokens:
            since = max(held - member.held_at_sample, 0.0)
            held = min(held, sample.kv_usage * sample.kv_capacity_tokens + since)
        return blocks_wait_s(member, sample, ask.prompt_tokens - ask.cached_tokens(member), held)

    def _slot_wait_s(self, member: Member, now: float) -> float:
        sample = member.fresh(now)
        if sample is None or sample.running is None or sample.waiting is None:
            return 0.0
        places, turnover_s = self._places_of(member, now), member.latency_s
        if places is None or turnover_s is None:
            return 0.0
        since = member.load.requests - member.opened_at_sample
        beyond = sample.running + sample.waiting + since - places - member.awaiting_adapter(now)
        return max(beyond, 0) * turnover_s / places

    def _places_of(self, member: Member, now: float) -> int | None:
        sample, address = member.sample, member.address
        assert sample is not None
        running, waiting = sample.running or 0, sample.waiting or 0
        if running and waiting > member.prefilling(now) + member.awaiting_adapter(now):
            if len(self._places) >= MAX_REPLICAS:
                self._places.clear()
            self._places[address] = running
        elif not waiting and running >= self._places.get(address, running):
            self._places.pop(address, None)  # it runs more than we thought it could
        return self._places.get(address)


def crosses_at(members: Iterable[Member], within_s: float, now: float) -> float | None:
    """When the prefill queued on one of them will first have fallen to so many seconds; None if it has on all."""
    over = (member.backlog_s(now) - within_s for member in members)
    least_s = min((s for s in over if s > 0), default=None)
    return None if least_s is None else now + max(least_s, _STEP_S)


def in_time(ask: Ask, members: Sequence[Member], within_s: float | None, now: float) -> Sequence[Member]:
    """Those that would bring the first token within so many seconds; all where the client set no limit."""
    if within_s is None:
        return members
    return [member for member in members if predict(ask, member, now).ttft_s <= within_s]


def soonest(ask: Ask, members: Sequence[Member], slack_s: float, now: float) -> list[Member]:
    """Those that would bring the first token no later than `slack_s` after the earliest that can be had."""
    ttfts = [predict(ask, member, now).ttft_s for member in members]
    limit_s = min(ttfts) + slack_s
    return [member for member, ttft_s in zip(members, ttfts, strict=True) if ttft_s <= limit_s]
