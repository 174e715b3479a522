"""From a ranking to the one record of the decision, and to the flight that it reserves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

from extproc.core.fleet import FAILED_OPEN, Member
from extproc.core.flights import Flight
from extproc.core.policies.base import Ranking
from extproc.core.pool import Pool
from extproc.core.prediction import Ask, company, predict, unseen
from extproc.core.ranks import endpoint_of, on_rank_of
from extproc.core.types import Decision, Scored

TRIAL: Final = "trial"
"""The reason of decisions for a replica that would otherwise wait in vain to show that it is well."""
ENDPOINTS: Final = 3
"""Length of the list given to Envoy: the best and two alternates for its retries."""


def decide(flight: str, pool: Pool, ask: Ask, ranking: Ranking, now: float, listed: int = ENDPOINTS) -> Decision:
    """The record of a decision for the first of the ranking, with the `listed` first candidates and what they would cost.

    `flight` is the id that it gets; empty for a decision that is not acted on.
    """
    order, request = ranking.order, ask.request
    best = order[0][1]
    return Decision(
        at=now,
        flight=flight,
        pool=pool.settings.name,
        model=request.model,
        api=request.api,
        policy=pool.policy.name,
        reason=FAILED_OPEN if best.health.passed_over(now) else ranking.reason,
        endpoints=_endpoints(pool, order),
        prompt_tokens=ask.prompt_tokens,
        output_tokens=ask.output_tokens,
        prediction=predict(ask, best, now),
        candidates=tuple(
            Scored(member.replica.address, score, pool.policy.terms(ask, member, now))
            for score, member in order[:listed]
        ),
        output_p90_tokens=pool.output_tokens.p90(request.model, request.api, request.tenant, request.max_output_tokens),
        target=request.target,
        prefix_source=ask.prefix_source((best if ask.split is None else ask.split.member).replica.address),
        bootstrap_port=_bootstrap_port(pool, ask),
        prefiller=None if ask.split is None else ask.split.member.address,
    )


def _bootstrap_port(pool: Pool, ask: Ask) -> int | None:
    return None if ask.split is None or pool.disaggregation is None else pool.disaggregation.port_of(ask.split.member)


def _endpoints(pool: Pool, order: Sequence[tuple[float, Member]]) -> tuple[str, ...]:
    """The best, and where the proxy may try it again: at other addresses, which it then asks for the same data parallel rank."""
    if pool.settings.ranks == 1:
        return tuple([member.replica.address for _, member in order[:ENDPOINTS]])
    best = order[0][1].address
    apart = dict.fromkeys([endpoint_of(best), *(endpoint_of(member.address) for _, member in order)])
    return tuple(on_rank_of(endpoint, best) for endpoint in islice(apart, ENDPOINTS))


def on_trial(ranking: Ranking, address: str) -> Ranking:
    """With that replica first, if it is a candidate."""
    first = [scored for scored in ranking.order if scored[1].address == address]
    if not first:
        return ranking
    return Ranking([*first, *(scored for scored in ranking.order if scored[1].address != address)], TRIAL)


def flight_for(decision: Decision, ask: Ask, member: Member, backlog_s: float, now: float, expires_at: float) -> Flight:
    """What the decision sends to the member, behind so many seconds of prefill, as the ledger keeps it."""
    request, prediction = ask.request, decision.prediction
    return Flight(
        id=decision.flight,
        pool=decision.pool,
        address=member.replica.address,
        model=request.model,
        api=request.api,
        tenant=request.tenant,
        stream=request.stream,
        blocks=request.blocks,
        prompt_bytes=request.prompt_bytes,
        prompt_tokens=ask.prompt_tokens,
        output_tokens=ask.output_tokens,
        samples=request.samples,
        hit_bytes=_hit_bytes(ask, member),
        prediction=prediction,
        work_s=(backlog_s + prediction.prefill_s) / member.speed.prefill_factor,
        unseen_s=unseen(member, now) * ask.prices.unseen_s,
        company=company(member, now),
        exact_tokens=request.prompt_tokens is not None and not request.tokenized,
        tokenized=request.tokenized,
        routed_at=now,
        expires_at=expires_at,
        heard_at=now,
        reported_at=now,
        output_p90_tokens=decision.output_p90_tokens,
        target=request.target,
        prefix_source=decision.prefix_source,
        adapter=ask.adapter,
        slot_at=0.0 if ask.adapter is None else now + prediction.queue_s,
    )


def _hit_bytes(ask: Ask, member: Member) -> int:
    hit = ask.hit_tokens.get(member.replica.address) if ask.split is None else None
    return round(hit * (ask.request.prompt_bytes or 0) / ask.prompt_tokens) if hit else 0
