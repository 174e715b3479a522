"""Chained hashes of a prompt: equal hash, equal prefix.

Block boundaries depend on the position alone, so prompts that share a head share the head of their chains, whatever
their lengths. Blocks are small where most prompts differ and larger where a prompt is long anyway: an even 256 bytes
would make 4,096 hashes of one megabyte, an even 16 KiB would see no shared system prompt at all.

    bytes of the prompt     block       a hit is read short by at most
    up to 8 KiB             256 B       256 B: about 64 tokens, four KV blocks of 16
    up to 64 KiB            1 KiB       12.5 % of the hit (at 8 KiB), 1.6 % at 64 KiB
    up to 1 MiB             4 KiB       6.3 % (at 64 KiB), 0.4 % at 1 MiB
    beyond                  16 KiB      1.6 % (at 1 MiB)

Blocks and worst resolution of a whole prompt: 4 KB 15 and 6.4 %, 100 KB 96 and 4.1 %, 1 MB 316 and 0.4 %,
8 MB 752 and 0.2 %. The chain ends after `MAX_BLOCKS`, at 12.45 MB; what follows is never counted as cached.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, repeat

from xxhash import xxh3_64_intdigest

from extproc.core.types import Blocks

MAX_BLOCKS = 1024

_SIZES = (*repeat(256, 32), *repeat(1024, 56), *repeat(4096, 240), *repeat(16384, MAX_BLOCKS - 328))
ENDS = tuple(accumulate(_SIZES))
"""Byte at which each possible block ends."""


def chain(seed: bytes, prompt: bytes, limit: int = MAX_BLOCKS) -> Blocks:
    """Hash the full blocks of a canonical prompt, up to `limit` of them; the partial tail is left out.

    Each hash is XXH3-64 of its block, seeded with the hash before it, and the first with that of `seed`: it depends on
    the seed and on every byte before its end. A running hash state, read out at each boundary, is no faster.
    Hashes are unsigned 64-bit; among a million of them two meet by chance in one case of 37 million.
    """
    ends = ENDS[: min(bisect_right(ENDS, len(prompt)), limit)]
    digest = xxh3_64_intdigest(seed)
    hashes = []
    start = 0
    for end in ends:
        digest = xxh3_64_intdigest(prompt[start:end], digest)
        hashes.append(digest)
        start = end
    return Blocks(tuple(hashes), ends)
