"""A replica like vLLM V1, step by step: which sequences share a step, how long it takes, which tokens come out.

Pure, and without any notion of the present: `start_step` says how long the step runs. A step shares a budget of tokens:
 1. each decoding sequence gets one token; where a block is missing, the sequence admitted last is preempted and will be
    computed again from its prompt;
 2. the prefill that the previous step left unfinished goes on; there is at most one, for a chunk is cut only where it
    exhausts the budget; where blocks are missing, it is itself the one admitted last, and preempted;
 3. unless something was preempted, waiting requests are admitted first come, first served, each with its cached prefix
    and a first chunk, while budget and slots last and there are blocks for all that it has to compute, not only for
    the chunk (`scheduler_reserve_full_isl`).
With asynchronous scheduling the prefill part of a step is decided when the step before it begins, before anyone knows
what that one frees: a request that arrives during a step joins the second step after it.

Rules and their order are those of vLLM 0.19; `make bench-sim` holds them against recorded runs of it, and
`python -m tests.bench.sim_vllm` against running replicas of 0.32, step by step and block by block.

A step costs the same however many sequences decode: they advance together, so a sequence that starts to decode is filed
at once under the step that ends it and under the steps that need a new block for it. For the same reason steps in which
nothing starts or ends need not be taken one by one: `quiet_steps` counts them, `skip` lets them pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple, TypeAlias

from extproc.core.steptime import StepTime
from extproc.core.types import AdaptersSampled
from extproc.sim.adapter_slots import AdapterSlots
from extproc.sim.blocks import BlockPool, Key, Note, Stored

RequestId: TypeAlias = Hashable


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What one replica is."""

    step_time: StepTime
    num_blocks: int = 25_000
    """KV blocks that sequences can use, one less than vLLM's `num_gpu_blocks`, for it never hands out the first.

    400,000 tokens is about what 80 GB leave to an 8B model in bf16.
    """
    block_size: int = 16
    """Tokens."""
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    max_model_len: int = 131_072
    """Tokens of prompt and output together."""
    prefix_caching: bool = True
    async_scheduling: bool = True
    """vLLM's default. Below saturation the simulation misses the first token of a request by 10 % on average, and by 24 %
    with this taken for off: each would come a step too early (`make bench-sim`, the run that queues less, first half).
    """
    cpu_overhead_s: float = 0.002
    """Scheduling, sampling and detokenization in each step, beside the GPU: 1 to 3 ms in vLLM V1."""
    max_loras: int | None = None
    """LoRA adapters that one batch may use; None where they cost nothing."""
    lora_load_s: float = 0.0
    """By which a step gets longer for each adapter that is loaded for it."""

    def __post_init__(self) -> None:
        if not 0 < self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs, or a full batch could not decode")
        if self.num_blocks < 1 or self.block_size < 1:
            raise ValueError("num_blocks and block_size must be positive")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate; its length is decided beforehand."""

    id: RequestId
    prompt_tokens: int
    output_tokens: int
    hashes: Sequence[int] = ()
    """Chained hashes of the full blocks of the prompt, and where known of prompt and output; blocks beyond are never shared."""
    brought_tokens: int = 0
    """Of the prompt's head, computed elsewhere: their KV cache is there when the request comes. Not so after a preemption."""
    adapter: str | None = None
    """The LoRA adapter that it needs."""


class Refusal(StrEnum):
    """Why the engine would never run a request."""

    EMPTY = "empty"  # no prompt or no output
    TOO_LONG = "too_long"  # beyond max_model_len, or beyond the whole KV cache
    DUPLICATE = "duplicate"  # the id is still in use


class Token(NamedTuple):
    """One generated token."""

    id: RequestId
    position: int
    """0 for the first."""
    first: bool
    finished: bool
    cached_tokens: int
    """Prompt tokens that were in the prefix cache on admission."""


class _State(Enum):
    WAITING = 0
    PREFILL = 1
    DECODE = 2
    GONE = 3


class _Sequence:
    """A request under way."""

    __slots__ = ("blocks", "cached", "computed", "emitted", "hashes", "keys", "offset", "request", "state")

    def __init__(self, request: EngineRequest, hashes: Sequence[int]) -> None:
        self.request = request
        self.hashes = hashes
        self.state = _State.WAITING
        self.computed = 0
        """Tokens in the KV cache, except while decoding: then `offset` plus the engine's step count."""
        self.emitted = 0
        """Output tokens, kept up to date except while decoding."""
        self.offset = 0
        self.blocks = 0
        """Blocks in use."""
        self.keys: list[Key] = []
        """Those of them, the first ones, that are in the pool under their hash."""
        self.cached: int | None = None
        """Prefix hit of the first admission, tokens; None before."""

    @property
    def target(self) -> int:
        """Tokens to compute before the next one can be sampled: after a preemption the output so far is prefilled too."""
        return self.request.prompt_tokens + self.emitted


@dataclass(slots=True)
class Step:
    """What runs now, for `duration_s`."""

    duration_s: float = 0.0
    decodes: int = 0
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """Prefill: (new tokens, context before them)."""
    prefills: list[_Sequence] = field(default_factory=list)
    """Whose they are."""
    admitted: list[RequestId] = field(default_factory=list)
    """Who left the queue when this step began; with asynchronous scheduling their prefill begins in the next one."""
    growth_s: float = 0.0
    """How much longer the next step takes than this one, if the same sequences decode in it: their contexts have grown."""
    loads: int = 0
    """LoRA adapters that are loaded for it."""

    @property
    def new_tokens(self) -> int:
        return self.decodes + sum(q for q, _ in self.chunks)

    @property
    def empty(self) -> bool:
        return not self.decodes and not self.chunks

    def completed(self) -> list[_Sequence]:
        """Whose prefill is complete with this step."""
        # Not by what is computed: the next chunk may have been decided, and counted, by now.
        return [
            seq
            for seq, (q, p) in zip(self.prefills, self.chunks, strict=True)
            if q + p == seq.target and seq.state is _State.PREFILL
        ]

    def lasting_s(self, steps: int) -> float:
        """Duration of so many steps, this one the first, all with the same sequences."""
        return steps * self.duration_s + 0.5 * self.growth_s * steps * (steps - 1)

    def whole_steps(self, elapsed_s: float) -> int:
        """How many steps like these are over `elapsed_s` after the start of this one."""
        steps = int(elapsed_s / self.duration_s)  # too many at first: the later ones take longer
        while steps and self.lasting_s(steps) > elapsed_s:
            excess_s = self.lasting_s(steps) - elapsed_s
            steps -= max(1, int(excess_s / (self.duration_s + self.growth_s * steps)))
        return steps


def _drop_gone(step: Step) -> None:
    """Take out what was decided for sequences that were aborted or preempted since."""
    if all(seq.state is _State.PREFILL for seq in step.prefills):
        return
    kept = [(seq, c) for seq, c in zip(step.prefills, step.chunks, strict=True) if seq.state is _State.PREFILL]
    step.prefills, step.chunks = [seq for seq, _ in kept], [chunk for _, chunk in kept]


@dataclass(slots=True)
class Emitted:
    """The tokens of one step; iterating gives all of them, and must come before the next step starts."""

    edges: list[Token]
    """Each first and each last token of a sequence."""
    inner: list[_Sequence]
    """Sequences that emitted any other token, not unfolded: whoever only counts need not look at them."""
    steps: int

    def __iter__(self) -> Iterator[Token]:
        yield from self.edges
        yield from self.inner_tokens()

    def inner_tokens(self) -> Iterator[Token]:
        for seq in self.inner:
            position = self.steps + seq.offset - seq.request.prompt_tokens
            yield Token(seq.request.id, position, False, False, seq.cached or 0)

    def __len__(self) -> int:
        return len(self.edges) + len(self.inner)


@dataclass(slots=True)
class Counters:
    """Since the start, as the metrics page shows them."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up, once for each request."""
    prefix_hits: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    steps: int = 0


@dataclass(slots=True)
class _Decoding:
    """Sequences that get one token in each step, filed under what a later step must do for them."""

    block_size: int
    sequences: dict[RequestId, _Sequence] = field(default_factory=dict)
    growing: list[dict[RequestId, _Sequence]] = field(init=False)
    """By step count modulo block size: who needs a new block in that step."""
    ending: dict[int, dict[RequestId, _Sequence]] = field(default_factory=dict)
    """By step count: whose last token comes out of that step."""
    kv_tokens: int = 0

    def __post_init__(self) -> None:
        self.growing = [{} for _ in range(self.block_size)]

    def enter(self, seq: _Sequence, steps: int) -> None:
        """From the step after `steps` on."""
        seq.state = _State.DECODE
        seq.offset = seq.computed - steps
        request = seq.request
        self.sequences[request.id] = seq
        self.growing[-seq.offset % self.block_size][request.id] = seq
        last = steps + request.output_tokens - seq.emitted
        self.ending.setdefault(last, {})[request.id] = seq
        self.kv_tokens += seq.computed

    def leave(self, seq: _Sequence, steps: int) -> None:
        """After `steps`; brings the sequence's own counts up to date."""
        request = seq.request
        seq.computed = steps + seq.offset
        seq.emitted = seq.computed - request.prompt_tokens + 1
        del self.sequences[request.id]
        del self.growing[-seq.offset % self.block_size][request.id]
        last = steps + request.output_tokens - seq.emitted
        del self.ending[last][request.id]
        if not self.ending[last]:
            del self.ending[last]
        self.kv_tokens -= seq.computed


class Engine:
    """One replica. Call `start_step`, let its duration pass, `finish_step`, and so on; `add` and `abort` at any time."""

    def __init__(self, config: EngineConfig, journal: bool = False) -> None:
        """`journal`: what happens in the prefix cache is written down, for `notes`."""
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        if journal:
            self.pool.journal = []
        self.counters = Counters()
        self.adapters = AdapterSlots(config.max_loras) if config.max_loras is not None else None
        self._sequences: dict[RequestId, _Sequence] = {}
        self._waiting: OrderedDict[RequestId, _Sequence] = OrderedDict()
        self._running: dict[RequestId, _Sequence] = {}
        """In order of admission."""
        self._decoding = _Decoding(config.block_size)
        self._partial: _Sequence | None = None
        self._ahead = Step()
        """What is decided of the next step: its prefill, where scheduling is asynchronous."""
        self._stuck: tuple[RequestId, int] | None = None
        """Head of the queue that found no room, and the free blocks then: looking again before there are more is in vain."""

    def __repr__(self) -> str:
        return f"<engine {self.running} running, {self.waiting} waiting, {self.kv_usage:.0%} kv>"

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def cached_tokens(self, hashes: Sequence[int], prompt_tokens: int) -> int:
        """Of a prompt with these blocks, what the prefix cache holds now."""
        size = self.config.block_size
        return len(self.pool.leading(hashes, (prompt_tokens - 1) // size)) * size

    @property
    def kv_usage(self) -> float:
        """Share of blocks that sequences use; cached blocks without a user do not count."""
        return self.pool.used / self.pool.num_blocks

    @property
    def adapters_told(self) -> AdaptersSampled | None:
        """What it says of its LoRA adapters; None where they cost nothing."""
        return None if self.adapters is None else self.adapters.told()

    def check(self) -> None:
        """Raises AssertionError where the books do not balance; for tests and the end of a simulation."""
        running, steps = self._running.values(), self.counters.steps
        private = sum(s.blocks - len(s.keys) for s in running)
        assert self.pool.blank >= 0
        assert len(self.pool.held) + private + self.pool.free == self.pool.num_blocks
        assert all(users > 0 for users in self.pool.held.values())
        assert sum(self.pool.held.values()) == sum(len(s.keys) for s in running)
        assert self._decoding.kv_tokens == sum(steps + s.offset for s in self._decoding.sequences.values())
        assert len(self._sequences) == self.running + self.waiting

    # --- in and out ---------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> Refusal | None:
        """Queue a request; None when accepted."""
        if refusal := self._refusal(request):
            return refusal
        hashes = request.hashes if self.config.prefix_caching else ()
        seq = _Sequence(request, hashes)
        self._sequences[request.id] = self._waiting[request.id] = seq
        return None

    def _refusal(self, request: EngineRequest) -> Refusal | None:
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            return Refusal.EMPTY
        tokens = request.prompt_tokens + request.output_tokens
        if tokens > min(self.config.max_model_len, self.config.num_blocks * self.config.block_size):
            return Refusal.TOO_LONG
        return Refusal.DUPLICATE if request.id in self._sequences else None

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request at once, also in the middle of a step; False when it is not there (any more)."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        if seq.state is _State.WAITING:
            del self._waiting[request_id]
            self._stuck = None  # the id may come back with a request that fits
        else:
            self._stop(seq)
        self._forget(seq)
        self.counters.aborted += 1
        return True

    def _forget(self, seq: _Sequence) -> None:
        seq.state = _State.GONE
        del self._sequences[seq.request.id]

    def notes(self) -> list[Note]:
        """What happened in the prefix cache since the last call. An engine tells it at the end of each step."""
        journal = self.pool.journal
        if journal:
            self.pool.journal = []
        return journal or []

    def emitted(self, request_id: RequestId) -> int:
        """Output tokens of a request so far; 0 when it is not there (any more)."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return 0
        if seq.state is _State.DECODE:
            return self.counters.steps + seq.offset - seq.request.prompt_tokens + 1
        return seq.emitted

    # --- many steps at once -------------------------------------------------------------------------------------------

    def quiet_steps(self, step: Step) -> int:
        """How many steps, from the one just started on, bring neither a first nor a last token nor an admission.

        True until the next `add` or `abort`. 0 also where a shortage of blocks might preempt a sequence.
        """
        decoding = self._decoding
        if step.chunks or self._ahead.chunks or self._partial or self._may_admit():
            return 0
        quiet = min(decoding.ending) - self.counters.steps - 1
        blocks = step.decodes * (quiet // self.config.block_size + 1)
        return quiet if blocks <= self.pool.free else 0

    def _may_admit(self) -> bool:
        if not self._waiting or len(self._running) >= self.config.max_num_seqs:
            return False
        head = self._head()
        if head is None:
            return False
        return not (self._stuck and self._stuck[0] == head.request.id and self.pool.free <= self._stuck[1])

    def _head(self) -> _Sequence | None:
        """The first in line, but for those that wait for an adapter's slot: these let others pass."""
        adapters, waiting = self.adapters, self._waiting.values()
        if adapters is None:
            return next(iter(waiting), None)
        return next((seq for seq in waiting if adapters.fits(seq.request.adapter)), None)

    def skip(self, step: Step, steps: int) -> None:
        """So many of the quiet steps are over: `step` becomes the one after them, just started."""
        decoding, counters, size = self._decoding, self.counters, self.config.block_size
        first = counters.steps + 1
        for count in range(first, first + steps):
            if decoding.growing[count % size]:
                counters.steps = count
                self._grow()
        counters.steps = first + steps - 1
        tokens = steps * step.decodes
        decoding.kv_tokens += tokens
        counters.generated_tokens += tokens
        step.duration_s += steps * step.growth_s

    # --- decide -------------------------------------------------------------------------------------------------------

    def start_step(self) -> Step | None:
        """What runs next; None when there is nothing to do. No other step may be under way."""
        may_admit = not self._grow()
        step, self._ahead = self._ahead, Step()
        _drop_gone(step)
        step.decodes = len(self._decoding.sequences)
        if not self.config.async_scheduling or step.empty:
            step.admitted += self._prefill(step, step.decodes, may_admit)
        if step.empty:
            return None
        if self.config.async_scheduling:
            step.admitted += self._prefill(self._ahead, self._decodes_after(step), may_admit)
        sequences = step.decodes + len(step.chunks)
        kv_tokens = self._decoding.kv_tokens + step.decodes
        gpu_s = self.config.step_time.step_s(step.new_tokens, step.chunks, kv_tokens, sequences)
        step.duration_s = self.config.cpu_overhead_s + gpu_s + step.loads * self.config.lora_load_s
        step.growth_s = self.config.step_time.k * step.decodes
        return step

    def _decodes_after(self, step: Step) -> int:
        """How many sequences decode in the step after this one."""
        ending = len(self._decoding.ending.get(self.counters.steps + 1, {}))
        return step.decodes - ending + sum(seq.emitted + 1 < seq.request.output_tokens for seq in step.completed())

    def _prefill(self, step: Step, decodes: int, may_admit: bool) -> list[RequestId]:
        """Fill up a step with prefill beside so many decodes; who was admitted for it."""
        budget = self.config.max_num_batched_tokens - decodes
        if self._partial:
            # Preempted instead, it is now the first in line and finds no room: nothing is admitted past it.
            budget -= self._continue(self._partial, budget, step)
        return self._admit(budget, step) if may_admit else []

    def _grow(self) -> bool:
        """A new block for each decoding sequence whose last one is full; True when some were preempted for it."""
        steps, preempted = self.counters.steps, False
        for seq in list(self._decoding.growing[steps % self.config.block_size].values()):
            while seq.state is _State.DECODE and not self.pool.free:
                self._preempt(next(reversed(self._running.values())))
                preempted = True
            if seq.state is _State.DECODE:
                self.pool.take(1)
                seq.blocks += 1
                self._register(seq, steps + seq.offset)
        return preempted

    def _continue(self, seq: _Sequence, budget: int, step: Step) -> int:
        """The next chunk of the unfinished prefill; its tokens, 0 where that was preempted for want of blocks."""
        tokens = min(seq.target - seq.computed, budget)
        if seq.computed + tokens > (seq.blocks + self.pool.free) * self.config.block_size:
            self._preempt(seq)
            return 0
        return self._chunk(seq, tokens, step)

    def _admit(self, budget: int, step: Step) -> list[RequestId]:
        admitted: list[RequestId] = []
        while self._waiting and budget and len(self._running) < self.config.max_num_seqs:
            seq = self._head()
            if seq is None:
                break
            if self._stuck and self._stuck[0] == seq.request.id and self.pool.free <= self._stuck[1]:
                break
            if not (used := self._start(seq, budget, step)):
                self._stuck = (seq.request.id, self.pool.free)
                break
            self._stuck = None
            budget -= used
            admitted.append(seq.request.id)
        return admitted

    def _start(self, seq: _Sequence, budget: int, step: Step) -> int:
        """Admit a waiting sequence; tokens of its first chunk, 0 when there is no room for the whole."""
        size = self.config.block_size
        # The last token is computed in any case: without it there is nothing to sample from.
        hits = self.pool.leading(seq.hashes, (seq.target - 1) // size)
        # Room for the first chunk alone would admit long prompts that then preempt each other over and over.
        if not self.pool.can_take(hits, -(-seq.target // size) - len(hits)):
            return 0
        self.pool.share(hits)
        seq.keys = hits
        seq.blocks = len(hits)
        seq.computed = len(hits) * size
        del self._waiting[seq.request.id]
        self._running[seq.request.id] = seq
        if self.adapters is not None and seq.request.adapter is not None:
            step.loads += self.adapters.start(seq.request.adapter)
        before = seq.cached is not None
        self._note_hit(seq)  # what is brought is no hit of the prefix cache: vLLM counts it as external
        if not before and seq.request.brought_tokens > seq.computed:
            self._bring(seq)
        return self._chunk(seq, min(seq.target - seq.computed, budget), step)

    def _bring(self, seq: _Sequence) -> None:
        """Take blocks for what came from another replica; they are shared like any."""
        seq.computed = min(seq.request.brought_tokens, seq.target - 1)
        new = -(-seq.computed // self.config.block_size) - seq.blocks
        self.pool.take(new)
        seq.blocks += new
        self._register(seq, seq.computed)

    def _note_hit(self, seq: _Sequence) -> None:
        if seq.cached is None:
            seq.cached = seq.computed
            self.counters.prefix_queries += seq.request.prompt_tokens
            self.counters.prefix_hits += seq.cached

    def _chunk(self, seq: _Sequence, tokens: int, step: Step) -> int:
        """Take blocks for `tokens` more tokens of a prefill and put them into the step."""
        step.chunks.append((tokens, seq.computed))
        step.prefills.append(seq)
        seq.computed += tokens
        new = -(-seq.computed // self.config.block_size) - seq.blocks
        self.pool.take(new)
        seq.blocks += new
        # Shared from now on, not from the end of the step: whoever is scheduled later finds them computed.
        self._register(seq, seq.computed)
        seq.state = _State.PREFILL
        self._partial = seq if seq.computed < seq.target else None
        return tokens

    # --- account ------------------------------------------------------------------------------------------------------

    def finish_step(self, step: Step) -> Emitted:
        """The step is over: the tokens that came out of it."""
        self.counters.steps += 1
        decoding, edges = self._decoding, []
        decoding.kv_tokens += len(decoding.sequences)
        for seq in list(decoding.ending.get(self.counters.steps, {}).values()):
            self._stop(seq)
            edges.append(self._end(seq))
        inner = list(decoding.sequences.values())
        for seq in step.completed():
            self._sampled(seq, edges, inner)
        emitted = Emitted(edges, inner, self.counters.steps)
        self.counters.generated_tokens += len(emitted)
        return emitted

    def _sampled(self, seq: _Sequence, edges: list[Token], inner: list[_Sequence]) -> None:
        """A prefill is complete and has given a token: the first, or the next after a preemption."""
        seq.emitted += 1
        request, first = seq.request, seq.emitted == 1
        if first:
            self.counters.prompt_tokens += request.prompt_tokens
        if seq.emitted == request.output_tokens:
            self._stop(seq)
            edges.append(self._end(seq))
            return
        self._decoding.enter(seq, self.counters.steps)
        if first:
            edges.append(Token(request.id, 0, True, False, seq.cached or 0))
        else:
            inner.append(seq)

    def _end(self, seq: _Sequence) -> Token:
        self._forget(seq)
        self.counters.finished += 1
        request = seq.request
        return Token(request.id, request.output_tokens - 1, request.output_tokens == 1, True, seq.cached or 0)

    def _preempt(self, seq: _Sequence) -> None:
        self._stop(seq)
        seq.state = _State.WAITING
        seq.computed = 0
        self._waiting[seq.request.id] = seq
        self._waiting.move_to_end(seq.request.id, last=False)
        self.counters.preemptions += 1

    def _stop(self, seq: _Sequence) -> None:
        """Out of the batch, blocks back to the pool."""
        if seq.state is _State.DECODE:
            self._decoding.leave(seq, self.counters.steps)
            self._register(seq, seq.computed)
        if self._partial is seq:
            self._partial = None
        del self._running[seq.request.id]
        if self.adapters is not None and seq.request.adapter is not None:
            self.adapters.stop(seq.request.adapter)
        self.pool.release(seq.keys, seq.blocks - len(seq.keys))
        seq.blocks, seq.keys = 0, []

    def _register(self, seq: _Sequence, computed: int) -> None:
        full, known = min(computed // self.config.block_size, len(seq.hashes)), len(seq.keys)
        if full > known:
            seq.keys += self.pool.register(seq.hashes[known:full])
            if self.pool.journal is not None:
                self.pool.journal.append(
                    Stored(tuple(seq.hashes[known:full]), seq.hashes[known - 1] if known else None)
                )
