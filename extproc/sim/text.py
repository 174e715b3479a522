"""Block hashes and generated text of a simulated replica, functions of the request alone; its tokens are in openai/simulated_prompt.py."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

import xxhash

from extproc.openai.simulated_prompt import TOKEN_BYTES


def block_hashes(tokens: bytes, block_size: int, model: str, salt: str) -> list[int]:
    """Chained hashes of the full blocks; prompts of another model, adapter or salt never match."""
    width = block_size * TOKEN_BYTES
    chained = xxhash.xxh3_64_intdigest(f"{model}\0{salt}".encode())
    digest, hashes = xxhash.xxh3_64_intdigest, []
    for start in range(0, len(tokens) - width + 1, width):
        chained = digest(tokens[start : start + width], chained)
        hashes.append(chained)
    return hashes


# --- what the model says ----------------------------------------------------------------------------------------------


def _vocabulary() -> bytes:
    """4,096 tokens of a space and three letters: nothing that JSON would escape."""
    letters = random.Random(4).choices("abcdefghijklmnopqrstuvwxyz", k=3 * 4096)
    return "".join(" " + "".join(letters[i : i + 3]) for i in range(0, len(letters), 3)).encode()


_TEXT: Final = _vocabulary()


@dataclass(frozen=True, slots=True)
class OutputLength:
    """Log-normal lengths of answers in tokens."""

    mean: float = 200.0
    sigma: float = 0.8
    """Of the logarithm: 0.8 puts the 95th percentile at 2.7 times the mean."""

    def draw(self, seed: int, limit: int) -> int:
        """The length for a prompt, at least 1; the same for the same seed, whoever generates it."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return max(1, min(limit, round(random.Random(seed).lognormvariate(mu, self.sigma))))


def prompt_seed(prompt: bytes) -> int:
    """What the length and the text of the answer depend on."""
    return xxhash.xxh3_64_intdigest(prompt)


def answer(seed: int, tokens: int) -> bytes:
    """The generated text, 4 bytes a token."""
    start = seed % (len(_TEXT) // TOKEN_BYTES) * TOKEN_BYTES
    wanted = tokens * TOKEN_BYTES
    repeats = (start + wanted) // len(_TEXT) + 1
    return (_TEXT * repeats)[start : start + wanted]
