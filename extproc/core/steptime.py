"""What one step of an inference engine costs in seconds: a closed form, measured constants, and a prior from labels.

    step = c0 + max(w, g*N) + a*sum(q*(p + q/2)) + k*KV + s*B

N: tokens computed in the step (prefill chunks, and one per decoding sequence); q: new tokens of a prefill chunk on a
context of p tokens already there; KV: summed contexts of the decoding sequences, tokens; B: sequences in the step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Final

DEFAULT_BUDGET: Final = 8192
"""vLLM's usual `max_num_batched_tokens`: a longer prefill takes several steps."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """The constants, in seconds."""

    c0: float
    """Each step: launches and communication."""
    w: float
    """Reading the weights once: the floor under the matrix products of a small batch."""
    g: float
    """Matrix products, per token computed."""
    a: float
    """Attention of a prefill, per pair of new token and token seen."""
    k: float
    """Reading the KV cache, per token of a decoding context."""
    s: float
    """Each sequence in the step."""

    def step_s(
        self, new_tokens: float, prefill_chunks: Iterable[tuple[float, float]], kv_tokens: float, sequences: float
    ) -> float:
        """One step that computes `new_tokens` in all, of which the chunks `(q, p)` are prefill."""
        pairs = sum(q * (p + q / 2) for q, p in prefill_chunks)
        return self.c0 + max(self.w, self.g * new_tokens) + self.a * pairs + self.k * kv_tokens + self.s * sequences

    def prefill_s(self, uncached: float, cached: float = 0, budget: int = DEFAULT_BUDGET) -> float:
        """Prefill of `uncached` tokens behind `cached` ones, alone on the engine, in chunks of at most `budget`.

        Closed form: whatever the chunks, the attention terms add up to `uncached * (cached + uncached/2)`.
        """
        if uncached <= 0:
            return 0.0
        full, rest = divmod(uncached, budget)
        products = full * max(self.w, self.g * budget) + (max(self.w, self.g * rest) if rest else 0.0)
        steps = full + (rest > 0)
        return steps * (self.c0 + self.s) + products + self.a * uncached * (cached + uncached / 2)

    def decode_step_s(self, sequences: float, kv_tokens: float) -> float:
        """One step in which `sequences` decode one token each, over `kv_tokens` of context in all."""
        return self.c0 + max(self.w, self.g * sequences) + self.k * kv_tokens + self.s * sequences

    def scaled(self, prefill: float, decode: float) -> StepTime:
        """The same with the terms of prefill (g, a) and of decode (c0, w, k, s) multiplied."""
        return StepTime(
            self.c0 * decode, self.w * decode, self.g * prefill, self.a * prefill, self.k * decode, self.s * decode
        )


def _row(c0: float, w: float, g: float, a: float, k: float, s: float) -> StepTime:
    """Constants as published: milliseconds, `a` per million pairs, `k` per thousand tokens."""
    return StepTime(c0 * 1e-3, w * 1e-3, g * 1e-3, a * 1e-9, k * 1e-6, s * 1e-3)


MEASURED: Final[Mapping[tuple[float, str, int], StepTime]] = {
    (8, "a100", 1): _row(7.508, 4.37, 0.05482, 2.9616, 0.08448, 0.0067),
    (8, "h100", 1): _row(2.729, 3.84, 0.01910, 0.8112, 0.04124, 0.0082),
    (8, "h200", 1): _row(1.742, 3.34, 0.01949, 0.8176, 0.02927, 0.0082),
    (70, "h100", 4): _row(6.129, 9.67, 0.05992, 1.0540, 0.02642, 0.0180),
    (70, "h100", 8): _row(7.531, 2.81, 0.03726, 0.5088, 0.01351, 0.0053),
    (70, "a100", 4): _row(17.928, 11.03, 0.15203, 3.7639, 0.05943, 0.0137),
}
"""By billions of parameters, GPU and tensor parallelism: Llama 3.1 in bf16, GPU time alone.

Fitted to the kernel tables of AIConfigurator 0.12 for vLLM (0.24; A100: 0.14), 125 points each, chunks of 64 to 8,192
tokens on contexts to 65,536, batches of 1 to 256: mean error 1 to 5 % for prefill, 2.5 to 4.4 % for decode.
"""

# --- combinations that were not measured ------------------------------------------------------------------------------
#
# Roofline reasoning, each rule checked by predicting 70B TP4 from 8B TP1: terms within 14 % on the H100, 22 % on the A100.
#  1. Twice the GPUs: weights, KV cache and attention heads are split evenly, so w, k and a halve (measured from TP4 to
#     TP8: a 0.48, k 0.51). Products also pay for smaller tiles and the all-reduce: g falls to 0.62, as measured. c0 and s
#     stay: launches do not split. The fit trades c0 for w, so only their sum compares: 0.69 by this rule, 0.65 measured.
#  2. A larger model: w and g grow with the parameters; c0, k and s with the layers (KV heads are the same 8 of 128); a
#     with layers x hidden size. Between 8B (32 x 4,096) and 70B (80 x 8,192) that is a power of the size for each.
#  3. Pipeline stages: chunks of a prefill follow each other through them, so g and a are divided by their number; a
#     decoded token passes all of them before the next, so the rest stays.

_DOUBLED_TP: Final = StepTime(
    c0=1.0, w=0.5, g=MEASURED[70, "h100", 8].g / MEASURED[70, "h100", 4].g, a=0.5, k=0.5, s=1.0
)
_LAYERS: Final = math.log(80 / 32) / math.log(70 / 8)
_LAYERS_X_HIDDEN: Final = math.log(80 * 8192 / (32 * 4096)) / math.log(70 / 8)
_SIZE_EXPONENT: Final = StepTime(c0=_LAYERS, w=1.0, g=1.0, a=_LAYERS_X_HIDDEN, k=_LAYERS, s=_LAYERS)

DEFAULT_GPU: Final = "a100"
"""The slowest one known: a replica taken for too slow gets too little until its speed is learned, one taken for too fast drowns."""
DEFAULT_SIZE: Final = 8.0
"""Billions of parameters, when no label says."""


def prior(labels: Mapping[str, str]) -> StepTime:
    """The cost of a step by the labels `gpu`, `tp`, `pp` and `model_size`.

    `gpu` may be any name that contains a100, h100 or h200; `model_size` is like `8b`, `1.5B` or `500m`. What is missing
    or unknown counts as an 8B model on one A100.
    """
    gpu, tp, size = _gpu(labels.get("gpu", "")), _count(labels.get("tp")), _billions(labels.get("model_size", ""))
    rows = {anchor: _at_tp(anchor, gpu, tp) for anchor in sorted({s for s, g, _ in MEASURED if g == gpu})}
    step = _at_size(rows, size)
    stages = _count(labels.get("pp"))
    return step.scaled(prefill=1 / stages, decode=1.0)


def _at_tp(size: float, gpu: str, tp: int) -> StepTime:
    """From the measured row with the nearest tensor parallelism, by rule 1."""
    measured = [t for s, g, t in MEASURED if (s, g) == (size, gpu)]
    nearest = min(measured, key=lambda t: abs(math.log2(tp / t)))
    return _times(MEASURED[size, gpu, nearest], _DOUBLED_TP, math.log2(tp / nearest))


def _at_size(rows: Mapping[float, StepTime], size: float) -> StepTime:
    """Between two measured sizes along the power law through both, outside by rule 2.

    Taking the nearer row instead would make some models faster than smaller ones, where the nearer row changes.
    """
    below, above = max((s for s in rows if s <= size), default=None), min((s for s in rows if s >= size), default=None)
    if below is None or above is None:
        anchor = above if below is None else below
        assert anchor is not None
        return _times(rows[anchor], _power(size / anchor), 1.0)
    if below == above:
        return rows[below]
    ratio = StepTime(*(hi / lo for lo, hi in zip(astuple(rows[below]), astuple(rows[above]), strict=True)))
    return _times(rows[below], ratio, math.log(size / below) / math.log(above / below))


def _power(ratio: float) -> StepTime:
    return StepTime(*(ratio**exponent for exponent in astuple(_SIZE_EXPONENT)))


def _times(row: StepTime, factor: StepTime, power: float) -> StepTime:
    return StepTime(*(term * f**power for term, f in zip(astuple(row), astuple(factor), strict=True)))


def _gpu(label: str) -> str:
    return next((gpu for _, gpu, _ in MEASURED if gpu in label.lower()), DEFAULT_GPU)


def _count(label: str | None) -> int:
    return int(label) if label and label.isdecimal() and 0 < int(label) <= 1024 else 1


def _billions(label: str) -> float:
    found = re.search(r"(\d+(?:\.\d+)?)\s*([bm])\b", label.lower())
    if not found or not (size := float(found[1]) / (1000 if found[2] == "m" else 1)):
        return DEFAULT_SIZE
    return min(max(size, 0.1), 2000.0)
