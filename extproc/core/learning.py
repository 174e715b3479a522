"""What facts and ends of requests teach of a replica."""

from __future__ import annotations

from typing import Final

from extproc.core.fleet import Member
from extproc.core.flights import Flight
from extproc.core.health.states import State
from extproc.core.pool import Pool
from extproc.core.prediction import company
from extproc.core.types import (
    CacheChanged,
    CacheUnknown,
    DrainAsked,
    DrainEnded,
    GpuSampled,
    Identified,
    NotSampled,
    Outcome,
    Placed,
    PrefixSource,
    Probed,
    ReplicaFact,
    Sample,
    Sampled,
    Serves,
)

SLOT_S: Final = 0.05
"""A request for a LoRA adapter that was expected to wait for longer than prefill takes, by more than this, waits for a slot."""


def learn(pool: Pool, fact: ReplicaFact, now: float) -> None:
    """Take in what was heard of one replica of the pool. What is told of others than members changes nothing."""
    member = pool.fleet.get(fact.address)
    if member is None:
        return
    match fact:
        case Sampled(sample=sample):
            _sampled(pool, member, sample, now)
        case NotSampled(why=why):
            member.not_sampled(why, now)
        case Identified(engine=engine):
            if member.identified(engine, now):
                pool.caches.restarted(member.address, now)
        case GpuSampled():
            member.gpu_sampled(fact, now)
        case Probed(refused=True):
            member.health.refused(now)
        case Probed(probe=probe, ok=ok):
            if member.probed(probe, ok, now):
                pool.caches.restarted(member.address, now)
        case DrainAsked(within_s=within_s):
            member.health.drain(within_s, now)
        case DrainEnded():
            member.health.drain_ended(now)
        case Serves(models=models, parents=parents):
            if (models, parents) != (member.models, member.parents):
                member.models, member.parents = models, parents
                pool.lists(member.address, models, parents)
        case Placed(blocks=blocks):
            if member.state(now) is not State.GONE:
                pool.index.insert(member.address, blocks)
        case CacheChanged() | CacheUnknown():
            pool.caches.told(fact, now)


def _sampled(pool: Pool, member: Member, sample: Sample, now: float) -> None:
    if member.sampled(sample, now):
        pool.caches.restarted(member.address, now)
    if sample.adapters is not None:
        pool.lora.slots_told = sample.adapters.slots
    if capacity := sample.kv_capacity_tokens:
        model = next(iter(pool.settings.models or member.models), None)
        per_token = pool.prompt_tokens.bytes_per_token(model)
        pool.index.set_capacity(member.address, capacity * per_token * member.cache_share)


def learn_first_token(pool: Pool, member: Member, flight: Flight, replica_ttft_s: float) -> None:
    """Correct what is believed of the replica's prefill, or of how long it loads a LoRA adapter, by a first token that came."""
    predicted, speed = flight.prediction, member.speed
    if flight.adapter is not None:
        ahead_s = speed.base_s + flight.work_s * speed.prefill_factor - predicted.prefill_s + flight.unseen_s
        if predicted.queue_s > ahead_s + SLOT_S:
            return  # it waited for others to end, and nobody knows when they did
    if predicted.load_s:
        other_s = predicted.ttft_s - predicted.load_s
        pool.lora.load.learn(replica_ttft_s - other_s, other_s)
        return
    speed.learn_ttft(flight.work_s, replica_ttft_s, predicted.queue_s, flight.unseen_s)


def learn_speed(member: Member, flight: Flight, outcome: Outcome, output_tokens: int | None, now: float) -> None:
    """Correct what is believed of the replica's cache and speed by a response that it gave in whole, alone.

    `output_tokens`: of all samples, reported or estimated; None when nothing tells.
    """
    usage = outcome.usage
    guessed = flight.prefix_source is not PrefixSource.EXACT  # what is known needs no trust, and teaches none
    if guessed and usage and usage.cached_tokens is not None and flight.hit_bytes and flight.prompt_bytes:
        member.hit(flight.prompt_tokens * flight.hit_bytes / flight.prompt_bytes, usage.cached_tokens)
    if not flight.shows_first_token or not output_tokens or output_tokens < 8 or flight.samples > 1:
        return
    if outcome.duration_s is not None and outcome.ttft_s is not None:
        sequences, kv_tokens = _mean(flight.company, company(member, now))
        step_s = (outcome.duration_s - outcome.ttft_s) / (output_tokens - 1)
        member.speed.learn_step(sequences + 1, kv_tokens + flight.prompt_tokens, step_s)


def _mean(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    """The company of a request changes while it runs: halfway between what it found and what it leaves."""
    return (before[0] + after[0]) / 2, (before[1] + after[1]) / 2
