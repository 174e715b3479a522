"""Prefill and decode on different replicas: whether a request is split, and where its prompt is computed, in seconds like all else.

Two costs are compared, and no threshold. Whole: that of the request on the best replica that decodes, which stops its steps for the
prompt. Split: the prompt's on the best replica that prefills, with what waits there and what is cached there; the transfer of what the
one that decodes lacks; and there one more sequence, whose prompt is there already. The best of each side is found apart from the other,
for neither cost depends on who is chosen for the other part.

A split request is one flight, on the replica that answers it, and has a leg: its prefill, in the queue of the replica that computes it
until the first token or the end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from extproc.core.factors import SURPRISE, Part
from extproc.core.fleet import Fleet, Member
from extproc.core.flights import Flight, Leg
from extproc.core.policies.base import Ranking, rendezvous
from extproc.core.prediction import Ask, Parts, Split, cost_s, predict
from extproc.core.roles import Role, bootstrap_port, role
from extproc.core.settings import DisaggregationSettings
from extproc.core.traffic import Traffic
from extproc.core.types import Api, End, Outcome, Prediction, Request

SPLIT: Final = "split"
"""The reason of decisions for a request whose prompt another replica computes."""
TOLERANCE_S: Final = 1e-3
"""Costs closer than a millisecond are equal, as for the policy."""
_LEG: Final = "/prefill"
"""What the id of a leg has more than that of its flight."""
_LATE: Final = 3.0
"""A first token comes within so many times its prediction, with few exceptions."""
_ROOM_S: Final = 0.01
"""A request that was expected to wait for the replica that answers by more than this tells nothing of the way of its prompt."""
_NOISE: Final = 0.25
_WAIT_NOISE: Final = 0.3
"""Of a predicted time, and of a predicted wait, as shares of it: those of `core/speed.py`."""


def role_of(member: Member) -> Role | None:
    """That of a member."""
    return role(member.replica.labels)


def decodes(member: Member) -> bool:
    """Whether requests may be sent to it."""
    return role_of(member) in (Role.DECODE, Role.BOTH)


def prefills(member: Member) -> bool:
    """Whether it may compute prompts for others."""
    return role_of(member) in (Role.PREFILL, Role.BOTH)


def does_both(member: Member) -> bool:
    """Whether it can answer alone, whatever the engine."""
    return role_of(member) is Role.BOTH


class Transfer:
    """Seconds to bring a KV cache from one replica to another: settings at first, and a factor learned of split requests."""

    __slots__ = ("_part", "settings")

    def __init__(self, settings: DisaggregationSettings) -> None:
        self.settings = settings
        self._part = Part(1.0, 0.02)

    def __repr__(self) -> str:
        return f"<transfer {self._part!r}>"

    @property
    def factor(self) -> float:
        """What it takes over what the settings say."""
        return math.exp(self._part.log)

    def seconds(self, tokens: float) -> float:
        """For the KV cache of so many tokens."""
        settings = self.settings
        if tokens <= 0:
            return 0.0
        size_s = tokens * settings.kv_bytes_per_token / settings.bandwidth_bytes_per_s
        return self.factor * (settings.latency_s + size_s)

    def doubt(self, transfer_s: float, expected_s: float) -> float:
        """How unsure the transfer makes the logarithm of a time that it is a part of, as a variance."""
        slope = transfer_s / expected_s
        return slope * slope * self._part.variance

    def learn(self, transfer_s: float, waited_s: float, expected_s: float, ttft_s: float, doubt: float = 0.0) -> None:
        """A first token was expected after `expected_s`, of it the transfer and a wait, and came after `ttft_s`.

        The smaller the transfer's share, and the less sure the rest (`doubt`, a variance of the logarithm), the less it tells.
        """
        error = max(min(math.log(ttft_s / expected_s), SURPRISE), -SURPRISE)
        noise = _NOISE**2 + (_WAIT_NOISE * waited_s / expected_s) ** 2
        variance = self.doubt(transfer_s, expected_s) + noise + doubt
        self._part.move(transfer_s / expected_s, error, variance)


class Disaggregation:
    """What one pool knows of it."""

    def __init__(self, settings: DisaggregationSettings) -> None:
        self.settings = settings
        self.transfer = Transfer(settings)
        self.legs = Traffic()
        """Of the prompts computed for others."""

    def __repr__(self) -> str:
        return f"<disaggregation {self.transfer!r} {self.legs!r}>"

    def configure(self, settings: DisaggregationSettings) -> None:
        """Go on with other settings; what was learned of transfers is in proportion to them, and stays."""
        self.settings = self.transfer.settings = settings

    def apart(self, request: Request) -> bool:
        """Whether the request may be split: side-cars do so for the two APIs of completions alone.

        Without them what can be sent to both. Of several samples SGLang 0.5.23 would have the KV caches all under one name.
        """
        if request.api not in (Api.CHAT, Api.COMPLETIONS):
            return False
        return self.settings.bootstrap_port is None or (request.mirrorable and request.samples == 1)

    def helped(self, member: Member) -> bool:
        """Whether it can answer a request whose prompt another computes."""
        return decodes(member) if self.settings.bootstrap_port is None else role_of(member) is Role.DECODE

    def helps(self, member: Member) -> bool:
        """Whether it can compute prompts for others."""
        return prefills(member) if self.settings.bootstrap_port is None else role_of(member) is Role.PREFILL

    def port_of(self, prefiller: Member) -> int | None:
        """Where it is asked for the KV cache; None where that is a side-car's matter."""
        port = self.settings.bootstrap_port
        return None if port is None else bootstrap_port(prefiller.replica.labels) or port

    def alone(self, member: Member) -> bool:
        """Whether the replica can answer without another."""
        return decodes(member) if self.settings.local_prefill else does_both(member)

    def plan(
        self, ask: Ask, members: Sequence[Member], prefillers: Sequence[Member], within_s: float | None, now: float
    ) -> None:
        """Mark the ask as split where that costs less. `members` may decode it, `prefillers` compute its prompt.

        `within_s`: seconds in which the first token must come; None for whenever. Where only one of the two ways is in time, it is taken.
        Then the ask's predictions are those of a split request, on every one but the chosen prefiller: that would keep it.
        """
        if not prefillers or not members:
            return
        split = self._best_leg(ask, prefillers, now)
        parts = self._split_parts(ask, split, members, now)
        if not parts:
            return  # the only one that decodes is the one that would prefill
        if self.settings.local_prefill and not self._splits(ask, members, parts.values(), within_s, now):
            return
        ask.split = split
        for address, part in parts.items():
            ask.parts[address] = _fields(part)

    def _splits(
        self,
        ask: Ask,
        members: Sequence[Member],
        parts: Collection[Prediction],
        within_s: float | None,
        now: float,
    ) -> bool:
        if within_s is not None:
            whole = any(predict(ask, member, now).ttft_s <= within_s for member in members)
            apart = any(part.ttft_s <= within_s for part in parts)
            if whole is not apart:
                return apart
        alone = min(members, key=lambda m: cost_s(ask, m, now))
        return self.prefers(ask, alone, cost_s(ask, alone, now), min(part.cost_s for part in parts))

    def prefers(self, ask: Ask, alone: Member, whole_s: float, split_s: float) -> bool:  # noqa: ARG002  # other rules need them
        """Whether to split a request that costs `whole_s` on `alone`, the best, and `split_s` where it is split best."""
        return split_s < whole_s

    def settled(self, ask: Ask, ranking: Ranking) -> Ranking:
        """A ranking of a split ask, without the replica that computes the prompt.

        Where that is the best, it keeps the request, and the alternates are those that need no help either.
        """
        assert ask.split is not None
        at = ask.split.member
        if ranking.order[0][1] is at:
            ask.split = None
            return Ranking([scored for scored in ranking.order if self.alone(scored[1])], ranking.reason)
        return Ranking([scored for scored in ranking.order if scored[1] is not at], SPLIT)

    def _best_leg(self, ask: Ask, prefillers: Sequence[Member], now: float) -> Split:
        prompt = self._alone(ask, len(prefillers), now)
        costs = [(cost_s(prompt, member, now), member) for member in prefillers]
        limit_s = min(cost for cost, _ in costs) + max(TOLERANCE_S, ask.slack_s)
        level = [member for cost, member in costs if cost <= limit_s]
        key = ask.tie_key or 0
        at = max(level, key=lambda m: rendezvous(key, m.address))
        return Split(at, predict(prompt, at, now))

    def _alone(self, ask: Ask, prefillers: int, now: float) -> Ask:
        """The prompt as a request of its own: one token, and prices of what else is computed for others."""
        prices = replace(ask.prices, later=self.legs.prices(prefillers, 0.0, now).later)
        alone = Ask(ask.request, ask.prompt_tokens, 1.0, ask.hit_tokens, prices, ask.slack_s, exact=ask.exact)
        alone.adapter = ask.adapter
        return alone

    def _split_parts(self, ask: Ask, split: Split, members: Sequence[Member], now: float) -> dict[str, Prediction]:
        """What the request sees, and costs, on each that may decode it, were its prompt computed as `split` says.

        Cached is what nobody has to compute: what is on the replica that prefills. The side-car reports the same in `usage`.
        """
        others = [member for member in members if member is not split.member]
        there = {member.address: float(ask.prompt_tokens) for member in others}
        computed = Ask(
            ask.request, ask.prompt_tokens, ask.output_tokens, there, ask.prices, ask.slack_s, exact=there.keys()
        )
        computed.adapter = ask.adapter
        ready_s = split.prediction.ttft_s
        burden_s = split.prediction.cost_s - ready_s
        parts = {}
        for member in others:
            here = predict(computed, member, now)
            split.transfer_s[member.address] = transfer_s = self.transfer.seconds(
                ask.prompt_tokens - (ask.cached_tokens(member) if ask.hit_tokens else 0)
            )
            queue_s = max(here.queue_s, ready_s + transfer_s)
            cost = here.cost_s - here.queue_s + queue_s + burden_s
            parts[member.address] = replace(
                here, cached_tokens=split.prediction.cached_tokens, queue_s=queue_s, cost_s=cost
            )
        return parts


def book(flight: Flight, split: Split, unseen_s: float, now: float, tried_again: bool = True) -> Leg:
    """Put the prompt of a flight into the queue of the replica that computes it. `unseen_s`: others' prefill expected there."""
    member, prediction = split.member, split.prediction
    backlog_s = member.backlog_s(now)
    leg = replace(
        flight,
        id=flight.id + _LEG,
        address=member.address,
        at=member.address,
        output_tokens=0.0,
        samples=1,
        hit_bytes=0,
        whole=flight,
        prediction=prediction,
        work_s=(backlog_s + prediction.prefill_s) / member.speed.prefill_factor,
        unseen_s=unseen_s,
        leg=None,
    )
    flight.leg = Leg(leg, split.transfer_s[flight.address], tried_again)
    member.load.open_leg(leg, now, backlog_s)
    member.health.tried(leg.id, now)
    return flight.leg


def suspected(flight: Flight, outcome: Outcome, now: float) -> bool:
    """Whether an error of a flight is laid to the replica that computes its prompt, and not to those that were to answer.

    A side-car gives the client the error of that replica. So says any error before the first token, and one that the proxy got again
    when it asked another, even if it then found nobody else to ask; where no first token is seen, else one that came as early as
    the first token might have.
    """
    again = outcome.attempts > 1 and flight.leg is not None and flight.leg.tried_again
    if flight.leg is None or not (outcome.end is End.UPSTREAM_ERROR or (outcome.end is End.UNREACHABLE and again)):
        return False
    if flight.shows_first_token or again:
        return True
    after_s = now - flight.routed_at
    if outcome.duration_s is not None:  # what is reported comes late, and a duration has the wait here in it
        after_s = min(after_s, outcome.duration_s)
    return after_s <= _LATE * flight.prediction.ttft_s


def still_at_leg(fleet: Fleet, flight: Flight, now: float) -> None:
    """The proxy says that no byte of a split flight has come yet: its prompt may not be done."""
    assert flight.leg is not None
    leg = flight.leg.flight
    leg.reported_at = now
    member = fleet.get(leg.address)
    if member is not None and member.load.has_leg(leg):
        member.load.still_prefilling(leg, now - flight.leg.transfer_s)


def learn(disaggregation: Disaggregation, flight: Flight, member: Member, replica_ttft_s: float) -> None:
    """The first token of a split flight came; `member` computed its prompt."""
    assert flight.leg is not None
    leg, transfer_s = flight.leg.flight, flight.leg.transfer_s
    after_s = transfer_s + flight.prediction.prefill_s
    speed, waited_s = member.speed, leg.prediction.queue_s
    expected_s = speed.base_s + speed.prefill_s(leg.work_s) + leg.unseen_s + after_s
    if replica_ttft_s <= 0 or expected_s <= 0 or leg.prediction.load_s or flight.prediction.load_s:
        return
    if flight.prediction.queue_s > leg.prediction.ttft_s + transfer_s + _ROOM_S:
        return  # it waited for a place where it is answered, and nobody knows when that became free
    transfer = disaggregation.transfer
    unsure, of_prefill = transfer.doubt(transfer_s, expected_s), speed.ttft_variance(leg.work_s, expected_s)
    if transfer_s > 0:
        transfer.learn(transfer_s, waited_s, expected_s, replica_ttft_s, of_prefill)
    speed.learn_ttft(leg.work_s, replica_ttft_s, waited_s, leg.unseen_s + after_s, unsure)
    disaggregation.legs.answered(max(replica_ttft_s - after_s, 0.0), 0.0)


def _fields(p: Prediction) -> Parts:
    return (p.cached_tokens, p.queue_s, p.prefill_s, p.decode_s, p.delay_s, p.crowding_s, p.cost_s, p.load_s)
