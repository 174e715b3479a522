"""What prefill and decode cost on one replica, in seconds: a prior by its labels, corrected by what is seen of the fleet.

Two things are learned. Prefill: `ttft = base + factor * work`, where work is the prior's own seconds for what stands before
the first token; base takes in what every request of the pool pays (HTTP, tokenization), so that short prompts do not make the
GPU look slow. Decode: the factor between the observed time per output token and the prior's.
"""

from __future__ import annotations

import math
from typing import Final

from extproc.core.factors import SURPRISE, Factor, Parts
from extproc.core.steptime import DEFAULT_BUDGET, StepTime

CHUNK_TOKENS: Final = DEFAULT_BUDGET
BASE_S: Final = 0.01
_BASE_LIMIT_S: Final = 1.0
_BASE_DRIFT_S: Final = 0.0003
"""By how much the base may wander from one observation to the next."""
_PREFILL_NOISE: Final = 0.25
"""Of a TTFT that is predicted well, as a share of it."""
_WAIT_NOISE: Final = 0.3
"""Of a predicted wait, as a share of it: it is a sum of other predictions."""
_MOMENT_S: Final = 0.004
"""Nobody knows when the step under way began."""
_DECODE_NOISE: Final = 0.4
"""Of a time per output token, as a share of it: the company changed while it ran."""


class Shared:
    """What is learned of the speed of a pool's replicas together."""

    __slots__ = ("_base_variance", "base_s", "decode", "lessons", "prefill")

    def __init__(self) -> None:
        self.base_s = BASE_S
        """What every first token pays besides prefill."""
        self._base_variance = BASE_S**2
        self.prefill, self.decode = Parts(), Parts()
        self.lessons = 0
        """Counts whatever changes a factor, so that factors are computed again then, not for each candidate of each request."""

    def base_variance(self, expected_s: float) -> float:
        """How unsure the base makes the logarithm of an expected time."""
        return self._base_variance / expected_s**2

    def learn_base(self, expected_s: float, error: float, variance: float) -> None:
        """A time was `error` off, as a logarithm, with `variance` expected."""
        gain = self.base_variance(expected_s) / variance
        self.base_s = min(max(self.base_s + gain * expected_s * error, 0.0), _BASE_LIMIT_S)
        self._base_variance = self._base_variance * (1.0 - gain) + _BASE_DRIFT_S**2


class Speed:
    """Seconds for prefill and decode on one replica."""

    __slots__ = ("_decode", "_decode_factor", "_lessons", "_prefill", "_prefill_factor", "_shared", "prior")

    def __init__(self, prior: StepTime, shared: Shared | None = None) -> None:
        """`shared`: what is learned together with others; None for a replica alone. Replicas of equal priors are of one kind."""
        self.prior = prior
        self._shared = shared or Shared()
        self._prefill: Factor = self._shared.prefill.factor(prior)
        self._decode: Factor = self._shared.decode.factor(prior)
        self._prefill_factor = self._decode_factor = 1.0
        self._lessons = -1

    def __repr__(self) -> str:
        return f"<speed prefill x{self.prefill_factor:.2f} decode x{self.decode_factor:.2f} base {self.base_s * 1e3:.0f} ms>"

    @property
    def prefill_factor(self) -> float:
        """Observed prefill time over the prior's."""
        if self._lessons != self._shared.lessons:
            self._refresh()
        return self._prefill_factor

    @property
    def decode_factor(self) -> float:
        """Observed time per output token over the prior's."""
        if self._lessons != self._shared.lessons:
            self._refresh()
        return self._decode_factor

    def _refresh(self) -> None:
        self._lessons = self._shared.lessons
        self._prefill_factor, self._decode_factor = self._prefill.value, self._decode.value

    @property
    def base_s(self) -> float:
        """What every first token pays besides prefill."""
        return self._shared.base_s

    def work_s(self, uncached_tokens: int, cached_tokens: int, sequences: float = 0.0, kv_tokens: float = 0.0) -> float:
        """The prior's seconds to prefill, with the decodes that ride in the same steps."""
        chunks = -(-uncached_tokens // CHUNK_TOKENS)
        shared = chunks * (self.prior.k * kv_tokens + self.prior.s * sequences)
        return self.prior.prefill_s(uncached_tokens, cached_tokens, CHUNK_TOKENS) + shared

    def prefill_s(self, work_s: float) -> float:
        """Expected seconds for prefill that the prior puts at `work_s`, without `base_s`."""
        return self.prefill_factor * work_s

    def fill_s(self, tokens: int, cached_tokens: int) -> float:
        """Expected seconds by which a step gets longer that takes in so many more tokens of a prefill."""
        attention = self.prior.a * tokens * (cached_tokens + tokens / 2)
        return self.prefill_factor * (self.prior.g * tokens + attention)

    def step_s(self, sequences: float, kv_tokens: float) -> float:
        """Expected seconds of one decode step: also the time per output token of each sequence in it."""
        return self.decode_factor * self.prior.decode_step_s(sequences, kv_tokens)

    def fade(self, elapsed_s: float) -> None:
        """So many seconds passed; what sets this replica apart is believed a little less."""
        self._prefill.fade(elapsed_s)
        self._decode.fade(elapsed_s)
        self._lessons = -1

    def ttft_variance(self, work_s: float, expected_s: float) -> float:
        """How unsure what is learned here makes the logarithm of a time that was expected with so much work in it."""
        slope = self.prefill_s(work_s) / expected_s
        return slope * slope * self._prefill.variance + self._shared.base_variance(expected_s)

    def learn_ttft(
        self, work_s: float, ttft_s: float, waited_s: float = 0.0, unseen_s: float = 0.0, doubt: float = 0.0
    ) -> None:
        """A first token came `ttft_s` after the replica was sent a request with `work_s` of prior prefill ahead of it.

        `waited_s` was predicted to be waiting, which is less sure than the work itself; `unseen_s` came on top of the work,
        for requests of others, or after it. `doubt`: how unsure those make the logarithm of the whole, as a variance.
        """
        if not (work_s > 0 and ttft_s > 0):
            return
        shared, prefill_s = self._shared, self.prefill_s(work_s)
        expected_s = shared.base_s + prefill_s + unseen_s
        slope = prefill_s / expected_s
        error = max(min(math.log(ttft_s / expected_s), SURPRISE), -SURPRISE)
        noise = _PREFILL_NOISE**2 + ((_MOMENT_S + _WAIT_NOISE * waited_s) / expected_s) ** 2
        variance = slope * slope * self._prefill.variance + shared.base_variance(expected_s) + noise + doubt
        self._prefill.learn(error, variance, slope)
        shared.learn_base(expected_s, error, variance)
        shared.lessons += 1

    def learn_step(self, sequences: float, kv_tokens: float, step_s: float) -> None:
        """A finished request saw `step_s` per output token, in about this company."""
        expected_s = self.step_s(sequences, kv_tokens)
        if not (step_s > 0 and expected_s > 0):
            return
        error = max(min(math.log(step_s / expected_s), SURPRISE), -SURPRISE)
        self._decode.learn(error, self._decode.variance + _DECODE_NOISE**2)
        self._shared.lessons += 1
