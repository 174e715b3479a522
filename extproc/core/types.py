"""The values that cross the core's one door: requests in, verdicts out, facts and outcomes learned.

Time is in seconds on one monotonic scale chosen by the caller, sizes are bytes or tokens as the name says, and unknown is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum

from extproc.core.account import Account, Allowance
from extproc.core.catalog.settings import CatalogSettings, Target
from extproc.core.record import record
from extproc.core.settings import PoolSettings


class Api(StrEnum):
    """Which API a request speaks; also the metric label and the key of the output length statistics."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    EMBEDDINGS = "embeddings"
    OTHER = "other"  # any path we do not read; goes to any healthy replica


@record
class Replica:
    """One inference engine, as discovery describes it."""

    address: str
    """`ip:port`, the identity of the replica."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Free labels; `gpu`, `tp`, `pp` and `model_size` give the prior of its speed, `max_tokens_per_s` its capacity."""
    weight: float = 1.0
    """Share for the `weighted` policy."""
    drain: bool = False
    """Whoever lists it wants it to get nothing new."""


@record
class Blocks:
    """The canonical prompt cut into blocks: `hashes[i]` covers everything up to byte `ends[i]`."""

    hashes: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.hashes)


@record
class TokenBlocks:
    """The prompt's token ids cut into blocks: `hashes[i]` covers the first `(i + 1) * size` of them."""

    size: int
    """Tokens in a block: `core/prefix/exact.py`'s UNIT, of which engines' blocks are multiples; others are matched by nothing."""
    hashes: tuple[int, ...] = ()
    """Chained, of full blocks alone; seeded with LoRA adapter and salt (`core/prefix/exact.py`)."""


@record
class Request:
    """What routing needs to know of a client's request."""

    api: Api = Api.OTHER
    model: str | None = None
    """As the client names it, a LoRA adapter included, and once `target` is known as the engine does; None where the path is not one we read."""
    blocks: Blocks = Blocks()
    prompt_bytes: int | None = None
    """Canonical prompt, bytes; None when the body was not read."""
    prompt_tokens: int | None = None
    """Exact count, known when the client sent token ids, or the prompt was tokenized here."""
    prompt_words: int | None = None
    """Words of a prompt that is one text; None where it is not, and where nobody wants to know."""
    tokens: TokenBlocks | None = None
    """The prompt as the engine will have it; None where it was not tokenized."""
    tokenized: bool = False
    """`prompt_tokens` was counted here, and not by the client."""
    max_output_tokens: int | None = None
    samples: int = 1
    """Completions asked for (`n`), each generated and held separately."""
    stream: bool = False
    session: str | None = None
    tenant: str | None = None
    """Keyed hash of whoever asks; None when unknown."""
    priority: int = 0
    """Higher goes first."""
    slo_ttft_s: float | None = None
    """The client wants its first token within so long, and a refusal at once where that cannot be; None where it waits."""
    body_bytes: int = 0
    """What holding it takes up."""
    mirrorable: bool = False
    """The proxy can send a copy to a second replica, with what we put into the body."""
    subset: frozenset[str] | None = None
    """Only these endpoints (`ip:port` or `ip`) may be chosen; None is no restriction, empty is none allowed."""
    account: Account | None = None
    """Whose limits it is counted for; None where there are no tenants, and for what is not counted."""
    tier: str | None = None
    """Of the tenant; None where there are no tenants."""
    tools: bool = False
    """It brings tools that the model may call."""
    media: bool = False
    """Something in the prompt is no text: an image, a sound, a video."""
    quality: str | None = None
    """What the client says of the answer that it wants; only rules of the catalog read it."""
    target: Target | None = None
    """Where the catalog sends it; None before that, and for models that the catalog does not have."""


@record
class AdaptersSampled:
    """What a replica said of its LoRA adapters."""

    slots: int
    """Adapters that one batch may use."""
    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    """Those of requests that run, and that wait; one may be among both."""


@record
class Sample:
    """What a replica said of itself in one scrape. Counters count since the engine's start."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    """Share of KV blocks held by running requests, 0 to 1; cached but unused blocks do not count."""
    block_size: int | None = None
    """Tokens in one KV block."""
    num_blocks: int | None = None
    prompt_tokens: float | None = None
    """Counter: prompt tokens taken in."""
    generated_tokens: float | None = None
    """Counter: tokens generated."""
    prefix_queries: float | None = None
    """Counter: prompt tokens looked up in the prefix cache."""
    prefix_hits: float | None = None
    """Counter: prompt tokens found there."""
    preemptions: float | None = None
    cache_tokens: int | None = None
    """Size of the KV cache where the engine tells it in tokens."""
    adapters: AdaptersSampled | None = None
    """None where the engine has none, or does not tell."""
    awake: bool | None = None
    """False while it sleeps: what is sent there waits until somebody wakes it. None where the engine does not tell."""
    counted_at_end: bool = False
    """`prompt_tokens` and `generated_tokens` move when a request ends, and not while it runs: that they stand still says nothing."""

    @property
    def kv_capacity_tokens(self) -> int | None:
        """KV cache size in tokens, when the engine tells it, or both factors."""
        if self.cache_tokens:
            return self.cache_tokens
        return self.block_size * self.num_blocks if self.block_size and self.num_blocks else None


@record
class Usage:
    """Token counts as the engine reports them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens served from the prefix cache; None where the engine does not tell."""


class End(StrEnum):
    """How a flight ended; also the metric label."""

    OK = "ok"
    CLIENT_ERROR = "client_error"  # the replica answered 4xx: it is healthy
    UPSTREAM_ERROR = "upstream_error"  # the replica answered 5xx or broke off
    UNREACHABLE = "unreachable"  # no connection
    TIMEOUT = "timeout"
    CLIENT_GONE = "client_gone"
    LOST = "lost"  # no end was ever reported; closed by the sweep


@record
class Outcome:
    """The end of a flight, as the proxy reports it."""

    end: End
    status: int | None = None
    served: str | None = None
    """`ip:port` that answered in the end, after retries."""
    attempts: int = 1
    ttft_s: float | None = None
    """From the client's request to the first byte of the response body."""
    replica_ttft_s: float | None = None
    """The same from the first byte sent to the replica: what the replica is responsible for."""
    duration_s: float | None = None
    response_bytes: int | None = None
    usage: Usage | None = None
    broken: bool = False
    """The body said under status 200 that it failed: an error event in a stream, or `finish_reason: abort`."""


# --- facts: `Router.learn(fact, now)` ---------------------------------------------------------------------------------


@record
class Reset:
    """The pool now has exactly these replicas."""

    pool: str
    replicas: tuple[Replica, ...]


@record
class Add:
    """The replica joined, or its labels or weight changed."""

    pool: str
    replica: Replica


@record
class Remove:
    """The replica left; its open flights end by themselves."""

    pool: str
    address: str


Change = Reset | Add | Remove


@record
class Sampled:
    """A scrape came back."""

    pool: str
    address: str
    sample: Sample


class ScrapeFailure(StrEnum):
    """Why a scrape brought nothing. Only `REFUSED` says that the replica is gone; the others leave its sample to age."""

    LATE = "late"  # no answer in time: a busy engine answers late
    REFUSED = "refused"  # nothing listens there
    STATUS = "status"  # answered, but not 200
    UNREADABLE = "unreadable"  # broke off, or answered 200 with a page that has none of the wanted lines
    TOO_LARGE = "too_large"  # more bytes than are read


@record
class NotSampled:
    """A scrape failed."""

    pool: str
    address: str
    why: ScrapeFailure


@record
class Identified:
    """What runs there was found out, or is another engine than before."""

    pool: str
    address: str
    engine: str | None
    """By its metrics; None while these say nothing of use, so that only what we send there is known of its load."""


@record
class GpuSampled:
    """How much the GPUs of a replica are used, on average."""

    pool: str
    address: str
    use: float | None
    """Share of the time with work on them, 0 to 1; None where that is no longer known."""
    memory: float | None = None
    """Share of their memory that is taken, 0 to 1."""


@record
class Serves:
    """The models (LoRA adapters included) that a replica lists."""

    pool: str
    address: str
    models: tuple[str, ...]
    parents: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapter among them -> its base model, where the engine tells."""


@record
class Progressed:
    """A periodic report on a flight that still runs."""

    flight: str
    ttft_s: float | None
    """From the client's request; None while no body byte has come."""
    replica_ttft_s: float | None
    response_bytes: int
    served: str | None = None
    """`ip:port` that has it now, after retries; None where the proxy does not tell."""


class Probe(StrEnum):
    """What an active check asks of a replica; also a metric label."""

    LIVE = "live"  # the process answers `/health`
    READY = "ready"  # the model is listed
    DEEP = "deep"  # one token is generated


@record
class Probed:
    """An active check came back."""

    pool: str
    address: str
    probe: Probe
    ok: bool
    refused: bool = False
    """Nothing listens there: no second opinion is needed."""


@record
class DrainAsked:
    """Somebody wants the replica to get nothing new; what runs there may finish."""

    pool: str
    address: str
    within_s: float | None = None
    """The replica ends so many seconds from now whatever runs there (a spot notice); None where it waits."""


@record
class DrainEnded:
    """The replica shall get requests again."""

    pool: str
    address: str


@record
class Configured:
    """The pool's settings are others from now on. Nothing learned is lost; whether it is scraped at all stays as it was."""

    pool: str
    settings: PoolSettings


@record
class CatalogConfigured:
    """The models and providers are these from now on. Who waits goes on waiting where it does."""

    settings: CatalogSettings


@record
class PeerLoad:
    """One replica as one router has loaded it: absolute, of what it sent there and has not seen end."""

    address: str
    requests: int
    backlog_s: float
    """Seconds of prefill among them that the replica has yet to do, when it was told; the work of others not counted in."""
    context_tokens: float
    """KV cache tokens that they hold, expected on average over their lives."""
    prefilling: int = 0
    """Of the requests, those whose first token is still to come."""


@record
class Judgement:
    """What one router has against a replica, by its own evidence; what it merely heard of others is not in it."""

    address: str
    out: bool
    """It is taken out there: nothing listens, checks or requests fail, or it hangs."""
    draining: bool
    """Somebody asked this router that it get nothing new."""
    ends_in_s: float | None = None
    """The replica is taken away so many seconds from now (a spot notice); None where no time is known."""


@record
class PeerReported:
    """The load that another router has put on the replicas. Replaces the one before; a replica not named has none of it."""

    pool: str
    peer: str
    """Name of the router's process: another one after a restart."""
    loads: tuple[PeerLoad, ...]
    age_s: float = 0.0
    """How long ago it was true."""
    number: int | None = None
    """Of the router's words, counted up: what an older one says of a replica does not count. None: it is newer than all."""
    whole: bool = True
    """False where it only names replicas whose load changed, and says nothing of the others."""


@record
class PeerJudged:
    """What another router has against replicas. Replaces the one before; a replica not named is well for all it knows."""

    pool: str
    peer: str
    judgements: tuple[Judgement, ...]


@record
class TenantServed:
    """Tokens that one router has charged a tenant for requests of one priority since it began."""

    tenant: str | None
    """None for all who are unknown."""
    priority: int
    tokens: float


@record
class PeerServed:
    """What another router has charged tenants since it began; what it did not name is as it was."""

    pool: str
    peer: str
    tenants: tuple[TenantServed, ...]


@record
class PeerGone:
    """Another router is no longer there: its load, and what it had against replicas, are void."""

    pool: str
    peer: str


@record
class Placed:
    """A router sent a prompt with these first blocks to the replica."""

    pool: str
    address: str
    blocks: Blocks


PeerFact = PeerReported | PeerJudged | PeerServed | PeerGone
"""What one router tells of itself; `Placed` may come from any."""


BlockId = int | bytes
"""An engine's own name for a KV block: opaque, and its meaning that replica's alone."""


@record
class BlocksStored:
    """The engine holds these KV blocks now, one after the other in a chain."""

    ids: tuple[BlockId, ...]
    parent: BlockId | None
    """The block before the first; None where that begins a prompt."""
    token_ids: tuple[int, ...]
    """Of all blocks: `size` each."""
    size: int
    """Tokens in a block."""
    lora: str | None = None
    """Name of the adapter that computed them; None for the base model."""
    salt: str | None = None
    """`cache_salt` of the request; engines tell it with the first block of a chain only."""


@record
class BlocksRemoved:
    """The engine gave these KV blocks up."""

    ids: tuple[BlockId, ...]


@record
class CacheCleared:
    """The engine holds no KV block any more: it restarted, or was told to."""


CacheChange = BlocksStored | BlocksRemoved | CacheCleared


@record
class CacheChanged:
    """What a replica's KV events told, in their order. From the first on its cache counts as known precisely."""

    pool: str
    address: str
    changes: tuple[CacheChange, ...]
    whole: bool = True
    """False where blocks may be held of which nothing was told, so that what is known is the least of what is there."""


@record
class CacheUnknown:
    """Events were missed that nobody can tell again, or no more will come: the cache is as good as not known."""

    pool: str
    address: str


@record
class GpuUsed:
    """How much the pool's GPUs are used, 0 to 1; None where that is no longer known."""

    pool: str
    share: float | None


@record
class Stalled:
    """The router stood still, and heard nothing of what happened meanwhile: that silence counts against nobody."""

    for_s: float


ReplicaFact = (
    Sampled
    | NotSampled
    | Identified
    | GpuSampled
    | Serves
    | Probed
    | DrainAsked
    | DrainEnded
    | Placed
    | CacheChanged
    | CacheUnknown
)
"""Of one replica, whose pool and address it names."""

Fact = Change | PeerFact | ReplicaFact | Progressed | Configured | CatalogConfigured | GpuUsed | Stalled


# --- verdicts ---------------------------------------------------------------------------------------------------------


class Refusal(StrEnum):
    """Why a request was not routed; also the metric label. The HTTP status of each is decided in `openai/errors.py`."""

    UNKNOWN_MODEL = "unknown_model"
    MODEL_NOT_FOUND = "model_not_found"  # where there is a catalog: no such name, or not for this client or request
    BUDGET = "budget"  # what may be spent on the provider in a day is spent
    NO_REPLICAS = "no_replicas"  # the pool has no member at all
    SUBSET_EMPTY = "subset_empty"  # the subset hint leaves no candidate
    ABSENT = "absent"  # members there are, but none that anything can be sent to, for as long as it was held
    QUEUE_FULL = "queue_full"  # too many requests, or bytes, are held already
    DISPLACED = "displaced"  # held, and given up for one that goes before it
    DEADLINE = "deadline"  # held for as long as may be, and its turn did not come
    SLO = "slo"  # its first token cannot come within the time that the client set
    STOPPING = "stopping"  # held, and this process ends
    OVERLOADED = "overloaded"  # too much is in flight, or being read, for this process
    RATE_LIMITED = "rate_limited"  # the tenant's requests a minute
    TOKENS_LIMITED = "tokens_limited"  # the tenant's tokens a minute
    CONCURRENCY = "concurrency"  # the tenant's requests in flight
    PROMPT_TOO_LONG = "prompt_too_long"  # for the tenant's tier
    LIMITS_UNKNOWN = "limits_unknown"  # what the routers count together cannot be reached


@record
class Prediction:
    """What is expected of a request on one replica."""

    cached_tokens: int
    queue_s: float
    """Until its own prefill begins, with what every request pays whatever its length (HTTP, tokenization)."""
    prefill_s: float
    """Its own uncached prompt tokens, and the decode steps that share the engine meanwhile."""
    decode_s: float
    """From the first token to the last."""
    delay_s: float
    """What it adds to the answers being generated there, summed over them."""
    crowding_s: float
    """What it adds to the waits of others for their first token: those who share its step, and those to come."""
    cost_s: float
    """Of the placement, for this request and the others, in seconds until a first token; `core/traffic.py` has the rates."""
    load_s: float | None = None
    """Of `prefill_s`, what loading its LoRA adapter takes there: 0 where the replica has it, None for the base model."""

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.prefill_s


class PrefixSource(StrEnum):
    """What told how much of a prompt is cached on a replica; also a metric label."""

    EXACT = "exact"  # the replica's own KV events
    APPROXIMATE = "approximate"  # what was sent there
    NONE = "none"  # nothing: there was no prompt to look for


@record
class Scored:
    """One candidate in the order in which the policy ranked it."""

    address: str
    score: float
    """Lower is better; the unit is the policy's own (seconds for `predicted`)."""
    terms: Mapping[str, float | None]
    """What the policy looked at."""


@record
class Decision:
    """The record of one verdict, handed to observers and kept for inspection."""

    at: float
    flight: str
    pool: str
    model: str | None
    api: Api
    policy: str
    reason: str
    """One word for why the first was first, from the policy's own short list; a metric label."""
    endpoints: tuple[str, ...]
    """Best replica first, then up to two alternates."""
    prompt_tokens: int
    output_tokens: float
    """Expected, capped by what the client allows."""
    prediction: Prediction
    """For the first endpoint, whatever the policy."""
    candidates: tuple[Scored, ...]
    output_p90_tokens: int = 0
    """Nine of ten such generations are no longer; capped likewise, 0 for an API that generates nothing."""
    target: Target | None = None
    """Of the catalog's model that was asked for; None where the catalog does not have it."""
    prefix_source: PrefixSource = PrefixSource.NONE
    """What told how much of the prompt is cached on the first endpoint."""
    bootstrap_port: int | None = None
    """Where the prefiller is asked for the KV cache; None where a side-car does that, and where there is no prefiller."""
    prefiller: str | None = None
    """Replica that computes the prompt for the first endpoint; None where that does it itself."""


@record
class Route:
    """Send it to `endpoints[0]`; where that fails before it answers, to the next. Without any: to the provider that the decision names as its pool."""

    flight: str
    endpoints: tuple[str, ...]
    decision: Decision
    patience_s: float | None = None
    """How long one replica may take to begin its response before the next is tried; None for as long as it likes."""
    allowance: Allowance | None = None
    """What is left to the tenant after this request; None where it is not counted."""


@record
class Reject:
    """Do not send it anywhere."""

    refusal: Refusal
    model: str | None = None
    known_models: tuple[str, ...] = ()
    retry_after_s: float | None = None
    """When to come again, by the rate at which the queue drains or the limit recovers; None where nothing tells."""
    allowance: Allowance | None = None
    """What is left to the tenant; None where the request is not counted."""
    limit: int | None = None
    """The limit that was exceeded, for the text."""


@record
class Wait:
    """Keep it: its turn comes by `Router.turns`, or `Router.leave` ends its wait."""

    ticket: str
    deadline: float
    """By then its turn has come, or its refusal."""


Verdict = Route | Wait | Reject


@record
class Turn:
    """The end of a wait."""

    ticket: str
    verdict: Route | Reject
