"""LoRA adapters of one replica: slots that hold a few of them at a time, as in vLLM (`lora/worker_manager.py`, `v1/core/sched`).

A batch uses no more adapters than there are slots. One that nobody uses keeps its slot until another needs it, least recently used first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from extproc.core.types import AdaptersSampled


class AdapterSlots:
    """Who holds the slots, and who uses them."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.loads = 0
        """Since the start."""
        self._running: Counter[str] = Counter()
        self._held: OrderedDict[str, None] = OrderedDict()
        """The one not used for longest first."""

    def __repr__(self) -> str:
        return f"<slots {list(self._held)} of {self.slots}, {len(self._running)} in use>"

    def fits(self, adapter: str | None) -> bool:
        """Whether a request for it may join the batch."""
        return adapter is None or adapter in self._running or len(self._running) < self.slots

    def start(self, adapter: str) -> bool:
        """A request for it joins the batch. Whether it must be loaded first."""
        self._running[adapter] += 1
        loaded = adapter in self._held
        self._held[adapter] = None
        self._held.move_to_end(adapter)
        if not loaded:
            self.loads += 1
            if len(self._held) > self.slots:
                del self._held[next(name for name in self._held if name not in self._running)]
        return not loaded

    def stop(self, adapter: str) -> None:
        """A request for it leaves the batch."""
        self._running[adapter] -= 1
        if not self._running[adapter]:
            del self._running[adapter]
        self._held.move_to_end(adapter)

    def told(self) -> AdaptersSampled:
        """What the metrics say. Of those that wait for a slot they say nothing: vLLM 0.32 puts into both of its lists whoever has begun."""
        names = tuple(self._running)
        return AdaptersSampled(self.slots, names, names)
