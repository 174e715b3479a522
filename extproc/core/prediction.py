"""What a request will see on one replica, and what it costs those already there: the one place where seconds are added up."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from extproc.core.fleet import Member
from extproc.core.lora import Wanted
from extproc.core.speed import CHUNK_TOKENS
from extproc.core.traffic import Prices
from extproc.core.types import Prediction, PrefixSource, Request, Sample

Parts = tuple[int, float, float, float, float, float, float, float | None]
"""The fields of a Prediction: a frozen dataclass for each candidate would cost a tenth of a decision."""


@dataclass(slots=True)
class Split:
    """The prompt of a request is computed by another replica than the one that answers."""

    member: Member
    prediction: Prediction
    """There."""
    transfer_s: dict[str, float] = field(default_factory=dict)
    """Replica that answers -> expected seconds to bring it what it does not have."""


@dataclass(slots=True)
class Ask:
    """A request with the estimates that policies need."""

    request: Request
    prompt_tokens: int
    output_tokens: float
    """Expected of one generation."""
    hit_tokens: dict[str, float]
    """Replica -> tokens of the prompt's head that the indexes say are cached there."""
    prices: Prices = field(default_factory=Prices)
    """What the parts of a cost are worth at present."""
    slack_s: float = 0.0
    """Costs no further apart than this are equal: what other routers have placed and not yet told is unknown by more."""
    parts: dict[str, Parts] = field(default_factory=dict)
    """What was predicted for this request so far; nothing changes between ranking and reservation."""
    exact: AbstractSet[str] = frozenset()
    """Replicas whose hits are known by what they tell of their caches, not guessed."""
    split: Split | None = None
    """None where the replica that answers computes the prompt as well."""
    adapter: Wanted | None = None
    """The LoRA adapter that it needs; None for the base model."""

    def lacks_prefiller(self, now: float) -> bool:
        """Whether nothing listens on the replica that would compute the prompt: then there is none that could."""
        return self.split is not None and self.split.member.health.unreachable(now)

    @property
    def tie_key(self) -> int | None:
        """Same for requests that share their head: ties go by it, so that routers that do not talk still agree."""
        hashes = self.request.blocks.hashes
        return hashes[min(3, len(hashes) - 1)] if hashes else None

    def cached_tokens(self, member: Member) -> int:
        """Expected hit on that replica; the engine always computes the last token itself."""
        address = member.replica.address
        hit = self.hit_tokens.get(address)
        if not hit:
            return 0
        return min(int(hit if address in self.exact else hit * member.hit_trust), self.prompt_tokens - 1)

    def prefix_source(self, address: str) -> PrefixSource:
        """What told of the hit on that replica."""
        if address in self.exact:
            return PrefixSource.EXACT
        return PrefixSource.APPROXIMATE if self.request.blocks.hashes else PrefixSource.NONE


def company(member: Member, now: float) -> tuple[float, float]:
    """Sequences that will generate there beside this request, and the KV tokens that they hold.

    All that are in flight, also those whose prefill is queued: first come, first served, so they generate by the time
    this one is prefilled. Counting only those that generate now would make a replica with a long queue look free.
    Requests of others than us, by the samples of the last seconds, count like ours on average.
    """
    load = member.load
    known, held = len(load), load.held_tokens
    if member.others is not None:
        known, held = known + member.others.requests, held + member.others.context_tokens
    strangers = unseen(member, now)
    if not strangers:
        return float(known), held
    mean = held / known if known else 1024.0
    return float(known + strangers), held + strangers * mean


def unseen(member: Member, now: float) -> float:
    """Requests there that neither we nor a router that tells us of its own have sent, by the samples of the last seconds."""
    return member.strangers if member.fresh(now) is not None else 0.0


def capacity_wait_s(ask: Ask, member: Member, now: float) -> float:
    """Seconds until the replica has room for one more, where KV blocks or slots, not prefill, hold requests back."""
    sample = member.fresh(now)
    if sample is None:
        return 0.0
    held = member.load.held_tokens + (member.others.context_tokens if member.others is not None else 0.0)
    return max(slots_wait_s(member, sample, now), blocks_wait_s(member, sample, ask.prompt_tokens, held))


def slots_wait_s(member: Member, sample: Sample, now: float) -> float:
    """What waits beyond the prefill queue waits for places; by Little's law one frees every `turnover / running` seconds."""
    if not sample.waiting or not sample.running or member.latency_s is None:
        return 0.0
    beyond = (member.queued(now) or 0) - member.prefilling(now) - member.awaiting_adapter(now)
    return max(beyond, 0) * member.latency_s / sample.running


def blocks_wait_s(member: Member, sample: Sample, tokens: int, held: float) -> float:
    """Seconds until so many more tokens fit into a KV cache of which `held` are in use, likewise by Little's law."""
    capacity, turnover_s = sample.kv_capacity_tokens, member.latency_s
    if not capacity or not held or turnover_s is None:
        return 0.0
    return max(held + tokens - capacity, 0.0) * turnover_s / held


def adapter_s(wanted: Wanted, member: Member, now: float) -> tuple[float, float, float]:
    """Seconds until the replica has a slot for the LoRA adapter, of loading it, in which its whole batch stands still, and of loading
    again the one that it pushes out.
    """
    held = member.load.lora
    if held is None:
        return 0.0, wanted.load_s, 0.0
    return held.expected(wanted, member.fresh(now) is not None, member.latency_s, now)


def predict(ask: Ask, member: Member, now: float) -> Prediction:
    """The latency that the request would see on that replica, and what it would add to that of others.

    Queued prefill counts in full: of all terms its absence costs most (rules with and without it, on the Mooncake
    conversation trace, differ by 23 to 49 % of mean TTFT). Decode enters by the number of sequences: each stands still
    while this prompt is prefilled, and each of its steps gets longer by one more sequence.
    """
    return Prediction(*_parts(ask, member, now))


def cost_s(ask: Ask, member: Member, now: float) -> float:
    """`predict(...).cost_s`, without the record: this runs once per candidate and request."""
    return _parts(ask, member, now)[6]


def _parts(ask: Ask, member: Member, now: float) -> Parts:
    """The fields of a Prediction, in its order."""
    address = member.replica.address
    if (known := ask.parts.get(address)) is not None:
        return known
    speed, load, prices = member.speed, member.load, ask.prices
    cached = ask.cached_tokens(member) if ask.hit_tokens else 0
    uncached = max(ask.prompt_tokens - cached, 1)
    sequences, kv_tokens = company(member, now)
    others = member.others
    if others is None:
        strangers, backlog_s = sequences - len(load), load.backlog_s(now)
    else:
        strangers, backlog_s = sequences - len(load) - others.requests, member.backlog_s(now)
    wait_s = max(backlog_s, capacity_wait_s(ask, member, now))
    prefill_s = speed.prefill_s(speed.work_s(uncached, cached, sequences, kv_tokens))
    load_s: float | None = None
    again_s = 0.0
    if ask.adapter is not None:
        slot_s, load_s, again_s = adapter_s(ask.adapter, member, now)
        wait_s, prefill_s = max(wait_s, slot_s), prefill_s + load_s
    queue_s = speed.base_s + wait_s + strangers * prices.unseen_s
    steps = max(ask.output_tokens - 1.0, 0.0)
    decode_factor, steps_of = speed.decode_factor, speed.prior.decode_step_s
    step_s = decode_factor * steps_of(sequences + ask.request.samples, kv_tokens + ask.prompt_tokens)
    delay_s = 0.0
    if sequences:
        before_s = decode_factor * steps_of(sequences, kv_tokens)
        chunks = -(-uncached // CHUNK_TOKENS)
        remaining = 0.5 * load.output_tokens / len(load) if len(load) else steps
        stalled = max(prefill_s - chunks * before_s, 0.0)
        delay_s = sequences * (stalled + (step_s - before_s) * min(steps, remaining))
    # Those to come; and others' requests for which this one is what they do not see, on average half done.
    crowding_s = again_s + prefill_s * (prices.later + strangers * prices.unseen_rate * 0.5 * prefill_s)
    if backlog_s:
        flights, tokens = load.sharing_step(now, CHUNK_TOKENS)
        crowding_s += flights * speed.fill_s(min(CHUNK_TOKENS - tokens, uncached), cached)
    cost = queue_s + prefill_s + crowding_s + prices.decode * (steps * step_s + delay_s)
    parts = ask.parts[address] = (cached, queue_s, prefill_s, steps * step_s, delay_s, crowding_s, cost, load_s)
    return parts
