"""What prefill and decode cost on one replica, in seconds: a prior by its labels, corrected by what is seen there.

Two things are learned. Prefill: `ttft = base + factor * work`, where work is the prior's own seconds for the uncached
tokens, by recursive least squares with forgetting; base takes in what every request pays (HTTP, tokenization), so that
short prompts do not make the GPU look slow. Decode: the factor between the observed time per output token and the prior's.
"""

from __future__ import annotations

import math
from typing import Final

from extproc.core.steptime import DEFAULT_BUDGET, StepTime

CHUNK_TOKENS: Final = DEFAULT_BUDGET
_FACTOR = (0.02, 50.0)
_BASE_S = (0.0, 1.0)
_SURPRISE: Final = 8.0
"""An observation further off than this factor is clipped to it: one stalled request must not set the speed."""


class Line:
    """`y = base + factor * x`, two-parameter recursive least squares on relative errors, with forgetting."""

    __slots__ = ("_forget", "_p00", "_p01", "_p11", "base", "factor", "seen")

    def __init__(self, base: float, factor: float, forget: float = 0.97) -> None:
        self.base, self.factor = base, factor
        # How unsure we are: 20 ms of base, a factor of about two.
        self._p00, self._p01, self._p11 = 0.02**2, 0.0, 0.7**2
        self._forget = forget
        self.seen = 0

    def at(self, x: float) -> float:
        return self.base + self.factor * x

    def learn(self, x: float, y: float) -> None:
        expected = self.at(x)
        y = min(max(y, expected / _SURPRISE), expected * _SURPRISE)
        noise = (0.2 * expected + 0.002) ** 2  # a fifth of the value: relative errors, so long prompts do not rule
        g0, g1 = self._p00 + self._p01 * x, self._p01 + self._p11 * x
        denominator = noise * self._forget + g0 + g1 * x
        k0, k1 = g0 / denominator, g1 / denominator
        error = y - expected
        self.base = min(max(self.base + k0 * error, _BASE_S[0]), _BASE_S[1])
        self.factor = min(max(self.factor + k1 * error, _FACTOR[0]), _FACTOR[1])
        scale = 1.0 / self._forget
        # Bounded: without new directions in the data, forgetting alone would let the uncertainty grow for ever.
        self._p00 = min((self._p00 - k0 * g0) * scale, 0.1**2)
        self._p11 = min((self._p11 - k1 * g1) * scale, 2.0**2)
        self._p01 = max(min((self._p01 - k0 * g1) * scale, 0.05), -0.05)
        self._limit_covariance()
        self.seen += 1

    def _limit_covariance(self) -> None:
        bound = 0.99 * math.sqrt(max(self._p00 * self._p11, 0.0))
        self._p01 = max(min(self._p01, bound), -bound)


class Speed:
    """Seconds for prefill and decode on one replica."""

    __slots__ = ("_line", "_log_decode", "decode_factor", "prior")

    def __init__(self, prior: StepTime, base_s: float = 0.01) -> None:
        self.prior = prior
        self._line = Line(base=base_s, factor=1.0)
        self._log_decode = 0.0
        self.decode_factor = 1.0
        """Observed time per output token over the prior's."""

    def __repr__(self) -> str:
        return f"<speed prefill x{self.prefill_factor:.2f} decode x{self.decode_factor:.2f} base {self.base_s * 1e3:.0f} ms>"

    @property
    def prefill_factor(self) -> float:
        """Observed prefill time over the prior's."""
        return self._line.factor

    @property
    def base_s(self) -> float:
        """What every first token pays besides prefill."""
        return self._line.base

    def work_s(self, uncached_tokens: int, cached_tokens: int, sequences: float = 0.0, kv_tokens: float = 0.0) -> float:
        """The prior's seconds to prefill, with the decodes that ride in the same steps."""
        chunks = -(-uncached_tokens // CHUNK_TOKENS)
        shared = chunks * (self.prior.k * kv_tokens + self.prior.s * sequences)
        return self.prior.prefill_s(uncached_tokens, cached_tokens, CHUNK_TOKENS) + shared

    def prefill_s(self, work_s: float) -> float:
        """Expected seconds for prefill that the prior puts at `work_s`, without `base_s`."""
        return self._line.factor * work_s

    def step_s(self, sequences: float, kv_tokens: float) -> float:
        """Expected seconds of one decode step: also the time per output token of each sequence in it."""
        return self.decode_factor * self.prior.decode_step_s(sequences, kv_tokens)

    def learn_ttft(self, work_s: float, ttft_s: float) -> None:
        """A first token came `ttft_s` after the replica was sent a request with `work_s` of prior prefill ahead of it."""
        if work_s > 0 and ttft_s > 0:
            self._line.learn(work_s, ttft_s)

    def learn_step(self, sequences: float, kv_tokens: float, step_s: float) -> None:
        """A finished request saw `step_s` per output token, in about this company."""
        expected = self.prior.decode_step_s(sequences, kv_tokens)
        if step_s <= 0 or expected <= 0:
            return
        error = math.log(step_s / expected) - self._log_decode
        self._log_decode += 0.1 * max(min(error, math.log(_SURPRISE)), -math.log(_SURPRISE))
        self._log_decode = max(min(self._log_decode, math.log(_FACTOR[1])), math.log(_FACTOR[0]))
        self.decode_factor = math.exp(self._log_decode)
