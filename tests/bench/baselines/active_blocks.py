"""Prompt blocks of the requests in flight on one replica, each counted once however many requests share it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from extproc.core.flights import Flight, Load
from extproc.core.types import Blocks


class ActiveBlocks:
    """Follows a replica's ledger. Bytes are integers, so the order in which flights come and go leaves no trace."""

    __slots__ = ("_counts", "_flights", "active_bytes")

    def __init__(self) -> None:
        self._flights: set[Flight] = set()
        self._counts: Counter[int] = Counter()
        self.active_bytes = 0
        """Of prompts in flight, shared blocks once; the tail of a prompt that fills no block is its own."""

    def __len__(self) -> int:
        """Flights that are counted."""
        return len(self._flights)

    def __repr__(self) -> str:
        return f"<active blocks of {len(self)} flights, {self.active_bytes} bytes>"

    def sync(self, load: Load) -> None:
        """Take in what was opened and closed since the last time."""
        live = set(load)
        for flight in live - self._flights:
            self.active_bytes += self.added_bytes(flight.blocks, flight.prompt_bytes)
            self._counts.update(flight.blocks.hashes)
        for flight in self._flights - live:
            self._remove(flight.blocks.hashes)
            self.active_bytes -= self.added_bytes(flight.blocks, flight.prompt_bytes)
        self._flights = live

    def added_bytes(self, blocks: Blocks, prompt_bytes: int | None) -> int:
        """Bytes of the prompt that are not in flight there. Chains share heads only, so the last one known tells it."""
        hashes, counts = blocks.hashes, self._counts
        depth = bisect_left(hashes, True, key=lambda block: block not in counts)
        return (prompt_bytes or 0) - (blocks.ends[depth - 1] if depth else 0)

    def _remove(self, hashes: tuple[int, ...]) -> None:
        counts = self._counts
        for block in hashes:
            held = counts[block]
            if held > 1:
                counts[block] = held - 1
            else:
                counts.pop(block)  # `del` of a Counter is not the dictionary's own, and slow
