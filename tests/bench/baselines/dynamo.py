"""NVIDIA Dynamo's KV router: prefill blocks to compute plus KV blocks held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranked, Ranking, Terms
from extproc.core.prediction import Ask
from tests.bench.baselines.active_blocks import ActiveBlocks
from tests.bench.baselines.ties import least

BLOCK_TOKENS: Final = 16
"""All terms are in blocks, so their size changes no choice."""


@dataclass(slots=True)
class Dynamo:
    """The default cost of Dynamo's KV router (`selector/default.rs`, 1.6): least cost, ties by lot (temperature 0).

    prefill = max((active prefill tokens + prompt tokens) / block size - credit x overlap blocks, 0)
    decode  = blocks of the prompts in flight and of this one, those with the same hash once
    cost    = prefill_load_scale x prefill + decode + decode_active_request_weight x requests

    Active prefill tokens are the uncached ones of requests without a first token. Output blocks are not tracked, as by
    default. Simplified: one tier of cache (no host, disk or shared credit, which are of no effect without them), no
    decay, fractions of a block count, and the overlap is our index corrected by reported hits, where Dynamo has the
    engines' KV events.
    """

    name = "dynamo"
    prefill_load_scale: float = 1.0
    overlap_score_credit: float = 1.0
    decode_active_request_weight: float = 0.0
    _active: dict[str, ActiveBlocks] = field(default_factory=dict, init=False)
    _opened: set[str] = field(default_factory=set, init=False)
    """Replicas that were sent a request since their blocks were last brought up to date."""

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        scored: Ranked = []
        for member in members:
            prefill, decode = self._blocks(ask, member, now)
            requests = self.decode_active_request_weight * len(member.load)
            scored.append((self.prefill_load_scale * prefill + decode + requests, member))
        return Ranking(least(scored, rng), "cost")

    def took(self, ask: Ask, member: Member) -> None:
        self._opened.add(member.replica.address)

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        prefill, decode = self._blocks(ask, member, now)
        return {"prefill_blocks": prefill, "decode_blocks": decode, "in_flight": float(len(member.load))}

    def _blocks(self, ask: Ask, member: Member, now: float) -> tuple[float, float]:
        """Prefill and decode blocks, were the request sent there."""
        tokens = member.load.queued_tokens(now) + ask.prompt_tokens
        prefill = tokens - self.overlap_score_credit * ask.cached_tokens(member)
        request, active = ask.request, self._active_on(member)
        held = active.active_bytes + active.added_bytes(request.blocks, request.prompt_bytes)
        per_byte = ask.prompt_tokens / request.prompt_bytes if request.prompt_bytes else 0.0
        return max(prefill, 0.0) / BLOCK_TOKENS, held * per_byte / BLOCK_TOKENS

    def _active_on(self, member: Member) -> ActiveBlocks:
        """The blocks in flight there, up to date.

        Without a request sent there since, flights can only have ended; so the same number is the same flights.
        """
        address = member.replica.address
        active = self._active.get(address)
        if active is None:
            active = self._active[address] = ActiveBlocks()
        if address in self._opened or len(active) != len(member.load):
            active.sync(member.load)
            self._opened.discard(address)
        return active


@dataclass(slots=True)
class DynamoPrefill2(Dynamo):
    """The same with twice the weight on prefill."""

    name = "dynamo_prefill2"
    prefill_load_scale: float = 2.0
