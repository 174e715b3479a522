"""How many tokens a prompt has and how many will be generated: priors, corrected by the usage that engines report."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from extproc.core.types import Api

BYTES_PER_TOKEN: Final = 4.0
"""Prior for text; learned per model from the first usage on. Real tokenizers lie between 3 and 5 for English and code."""
OUTPUT_TOKENS: Final = 256.0
"""Prior mean of a generation; the Mooncake and Azure conversation traces have 343 and 211."""
OUTPUT_P90_TOKENS: Final = 590.0
"""Prior p90: of the exponential distribution with that mean; the two traces have 597 and 424."""

K = TypeVar("K")
V = TypeVar("V")


class Bounded(Generic[K, V]):
    """A mapping that forgets the key that was learned longest ago: names come from clients, so their number has no bound.

    Reading leaves the order alone, so that asking what would be decided changes nothing.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K) -> V | None:
        return self._items.get(key)

    def learned(self, key: K, new: Callable[[], V]) -> V:
        """The value to correct, made if there is none yet; the key counts as the most recent."""
        value = self._items.pop(key, None) or new()
        self._items[key] = value
        if len(self._items) > self._limit:
            self._items.popitem(last=False)
        return value


class Ratio:
    """A ratio of two sums with forgetting, so that large observations count more than small ones."""

    __slots__ = ("_denominator", "_forget", "_numerator")

    def __init__(self, prior: float, weight: float, forget: float = 0.98) -> None:
        self._numerator = prior * weight
        self._denominator = weight
        self._forget = forget

    def learn(self, numerator: float, denominator: float) -> None:
        self._numerator = self._numerator * self._forget + numerator
        self._denominator = self._denominator * self._forget + denominator

    @property
    def value(self) -> float:
        return self._numerator / self._denominator


class PromptTokens:
    """Prompt bytes to prompt tokens, per model."""

    def __init__(self, models: int = 256) -> None:
        self._ratios: Bounded[str, Ratio] = Bounded(models)

    def bytes_per_token(self, model: str | None) -> float:
        ratio = self._ratios.get(model) if model else None
        return ratio.value if ratio else BYTES_PER_TOKEN

    def estimate(self, model: str | None, prompt_bytes: int) -> int:
        """Tokens of a prompt of that many canonical bytes, at least one."""
        return max(1, round(prompt_bytes / self.bytes_per_token(model)))

    def learn(self, model: str, prompt_bytes: int, prompt_tokens: int) -> None:
        """Correct the model's ratio by one reported usage; ratios that no tokenizer has are left out."""
        if prompt_tokens < 1 or not 0.25 <= prompt_bytes / prompt_tokens <= 64:
            return
        self._ratios.learned(model, lambda: Ratio(BYTES_PER_TOKEN, weight=100.0)).learn(prompt_bytes, prompt_tokens)


_BOUNDS: Final = tuple(round(2 ** (i / 2)) for i in range(1, 36))
"""Upper ends of the length classes, a factor of sqrt(2) apart: 1, 2, 3, 4, 6, 8, ... 185,364 tokens."""


class Lengths:
    """A distribution of output lengths: counts and sums by class, with forgetting."""

    __slots__ = ("_counts", "_forget", "_sums", "p90", "total")

    def __init__(self, forget: float = 0.995) -> None:
        self._counts = [0.0] * (len(_BOUNDS) + 1)
        self._sums = [0.0] * (len(_BOUNDS) + 1)
        self._forget = forget
        self.total = 0.0
        """Observations, discounted by age."""
        self.p90 = 1.0
        """Tokens that nine of ten do not exceed, at least one."""

    def learn(self, tokens: int) -> None:
        forget = self._forget
        self._counts = [c * forget for c in self._counts]
        self._sums = [s * forget for s in self._sums]
        i = bisect_right(_BOUNDS, tokens)
        self._counts[i] += 1.0
        self._sums[i] += tokens
        self.total = self.total * forget + 1.0
        self.p90 = max(self.quantile(0.9), 1.0)  # here, where no request waits: a scan for each decision took 4.5 us

    def mean(self, cap: float, beyond: float = 0.0) -> float | None:
        """Mean of min(length, cap) among the lengths above `beyond` tokens; None where none was seen."""
        start = bisect_right(_BOUNDS, beyond) if beyond else 0
        count = total = 0.0
        for n, s in zip(self._counts[start:], self._sums[start:], strict=True):
            if n:
                count += n
                total += min(s / n, cap) * n
        return max(total / count, beyond) if count > 1e-3 else None

    def quantile(self, share: float) -> float:
        """Tokens that the next length does not exceed with probability `share`, between 0 and 1; 0 where none was seen.

        The k-th shortest of n lengths is not exceeded with probability k / (n + 1), so k = share * (n + 1). With share * n the
        p90 of twenty observations covers 88 %, with this 91 %.
        """
        longer = max(self.total - share * (self.total + 1.0), 1e-3)
        i = len(_BOUNDS)
        for count in reversed(self._counts):  # a high quantile is near that end
            if count >= longer:
                return self._within(i, 1.0 - longer / count)
            longer -= count
            i -= 1
        return 0.0

    def _within(self, i: int, part: float) -> float:
        """Tokens below which that part of a class lies, spread evenly around the mean as far as the class's nearer end.

        Length n fills the interval from n - 1 to n. Without the mean, a class full of one length, such as a common
        `max_tokens`, would be spread on to lengths that never came, and a quantile could fall just short of it.
        """
        low = _BOUNDS[i - 1] - 1.0 if i else -1.0
        high = _BOUNDS[i] - 1.0 if i < len(_BOUNDS) else math.inf
        middle = self._sums[i] / self._counts[i] - 0.5
        reach = middle - low if middle - low < high - middle else high - middle
        return middle + reach * (2.0 * part - 1.0)


class OutputTokens:
    """Generation length by (model, API, tenant), falling back to (model, API) and then to the prior."""

    def __init__(self, keys: int = 4096) -> None:
        self._lengths: Bounded[tuple[str | None, ...], Lengths] = Bounded(keys)

    def estimate(self, model: str | None, api: Api, tenant: str | None, cap: int | None, so_far: int = 0) -> float:
        """Expected length in tokens of one generation of which `so_far` are out, at most `cap`.

        A key with few observations leans on the wider one: n observations weigh n / (n + 8) against it.
        """
        if api is Api.EMBEDDINGS or api is Api.OTHER:
            return 0.0
        limit = float(cap) if cap is not None else float("inf")
        expected = min(max(OUTPUT_TOKENS, 1.5 * so_far), limit)
        for key in _keys(model, api, tenant):
            if (lengths := self._lengths.get(key)) and (mean := lengths.mean(limit, so_far)) is not None:
                expected += (mean - expected) * lengths.total / (lengths.total + 8.0)
        return expected

    def p90(self, model: str | None, api: Api, tenant: str | None, cap: int | None) -> int:
        """Tokens that nine of ten generations do not exceed, at most `cap`; 0 for an API that generates nothing.

        Keys lean on wider ones as in `estimate`, but by ratio, and n observations weigh n / (n + 2). By difference, one tenant
        of long answers would lift the others' p90 far too high; with n / (n + 8), its own would be too low for a hundred requests.
        The cap comes last: it shortens no answer that would have been shorter anyway, so it moves no quantile below it.
        """
        if api is Api.EMBEDDINGS or api is Api.OTHER:
            return 0
        length = OUTPUT_P90_TOKENS
        for key in _keys(model, api, tenant):
            if lengths := self._lengths.get(key):
                length *= (lengths.p90 / length) ** (lengths.total / (lengths.total + 2.0))
        tokens = math.ceil(length)
        return tokens if cap is None else min(tokens, cap)

    def learn(self, model: str | None, api: Api, tenant: str | None, tokens: int) -> None:
        for key in _keys(model, api, tenant):
            self._lengths.learned(key, Lengths).learn(tokens)


def _keys(model: str | None, api: Api, tenant: str | None) -> tuple[tuple[str | None, ...], ...]:
    """Under what lengths are kept, the widest first."""
    return ((model, api), (model, api, tenant)) if tenant else ((model, api),)


_STREAMED_BYTES: Final = 180.0
"""Prior: a chat chunk of one token from vLLM 0.32, frame included."""
_WHOLE_BYTES: Final = 5.0
"""Prior: text of one token and its share of the frame."""


class ResponseBytes:
    """Response bytes to output tokens, where no usage came: per model, streamed (one event a token) or whole."""

    def __init__(self, models: int = 256) -> None:
        self._ratios: Bounded[tuple[str | None, Api, bool], Ratio] = Bounded(models)

    def tokens(self, model: str | None, api: Api, stream: bool, response_bytes: int) -> int:
        """Output tokens in a response body of that size."""
        ratio = self._ratios.get((model, api, stream))
        return round(response_bytes / (ratio.value if ratio else self._prior(stream)))

    def learn(self, model: str | None, api: Api, stream: bool, response_bytes: int, tokens: int) -> None:
        if tokens < 1 or response_bytes < tokens:
            return
        ratio = self._ratios.learned((model, api, stream), lambda: Ratio(self._prior(stream), weight=50.0))
        ratio.learn(response_bytes, tokens)

    @staticmethod
    def _prior(stream: bool) -> float:
        return _STREAMED_BYTES if stream else _WHOLE_BYTES
