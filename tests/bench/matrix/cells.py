"""The settings that are compared: one cell for each, and which cells the quick and the whole matrix have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from random import Random
from typing import Final

from extproc.sim import fleet_spec
from extproc.sim.fleet_spec import Group
from extproc.sim.incidents import Incident, Kind
from extproc.sim.node import NodeSpec
from extproc.sim.sidecar import NO_QUEUE, Wiring
from extproc.sim.simulate_report import Slo

LOADS: Final = (0.4, 0.7, 0.9, 1.1, 1.3)
"""Shares of saturation."""
VARIED_AT: Final = 0.8
"""The load at which the quick matrix varies the rest."""
CPU_OVERHEAD_S: Final = 0.002

CACHES: Final[Mapping[str, int]] = {"hbm": 1, "large": 5}
"""KV cache as a multiple of what the GPUs' memory leaves."""

STATES: Final[Mapping[str, Wiring]] = {
    "exact": Wiring(scrape_interval_s=0.1, log_flush_interval_s=0.0, progress_interval_s=0.25, queue=NO_QUEUE),
    "stale": Wiring(
        scrape_interval_s=0.5,
        scrape_age_s=1.0,
        log_flush_interval_s=0.0,
        completion_delay_s=0.05,
        progress_interval_s=0.25,
        estimate_error=0.2,
        queue=NO_QUEUE,
    ),
}
"""What the routers know. Stale: a sample is 1 s old when it arrives and the next is asked for half a second later, so that it is 1.8 s
old on average; ends and progress come 50 ms late; each prompt is misjudged by 20 %. Neither holds requests: rules of choice are compared,
and each must bear the load that it has let in."""

FLEETS: Final[Mapping[str, tuple[Group, ...]]] = {
    "equal": (Group(gpu="h100", count=8),),
    "mixed": (
        Group(gpu="h100", count=3),
        Group(gpu="a100", count=3),
        Group(gpu="h100", tp=4),
        Group(gpu="h200"),
    ),
    "70b": (Group(gpu="h100", tp=4, count=8),),
}
SIZES: Final[Mapping[str, str]] = {"equal": "8b", "mixed": "8b", "70b": "70b"}
"""The model that a fleet serves."""
SLOS: Final[Mapping[str, Slo]] = {"8b": Slo(2.0, 0.025), "70b": Slo(5.0, 0.05)}

FAULTS: Final = ("none", "dies", "slows")
"""One replica dies when 30 % of the requests have come, and is back with an empty cache when 60 % have; or its steps take three
times as long from 30 % on."""
SLOWER: Final = 3.0
NOTHING_SHARED: Final = ("azure", "unshared")
"""A larger cache changes nothing there."""
LARGE_MODEL_TRACES: Final = ("conversation", "chat", "siblings")
"""The first two that are there are also replayed on the fleet of the large model."""


class CellError(Exception):
    """The cells cannot be chosen as asked; the text says what there is."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting."""

    trace: str
    load: float = VARIED_AT
    cache: str = "hbm"
    state: str = "exact"
    routers: int = 1
    fleet: str = "equal"
    fault: str = "none"

    def __str__(self) -> str:
        return f"{self.trace}, {self.setting}"

    @property
    def setting(self) -> str:
        """All but the trace: the load, and what is not as usual."""
        usual = Cell(self.trace, self.load)
        unusual = [
            f"{getattr(self, f.name)} routers" if f.name == "routers" else str(getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != getattr(usual, f.name)
        ]
        return ", ".join([f"{self.load:g}", *unusual])


def quick(traces: Sequence[str]) -> list[Cell]:
    """Each load as usual, each variation by itself, and one that has several."""
    large_model = [trace for trace in LARGE_MODEL_TRACES if trace in traces][:2]
    return [cell for trace in traces for cell in _quick(trace, trace in large_model)]


def _quick(trace: str, large_model: bool) -> Iterator[Cell]:
    yield from (Cell(trace, load) for load in LOADS)
    base = Cell(trace)
    if trace not in NOTHING_SHARED:
        yield replace(base, cache="large")
    yield replace(base, state="stale")
    yield from (replace(base, routers=n) for n in (2, 4))
    yield replace(base, fleet="mixed")
    if large_model:
        yield replace(base, fleet="70b")
    yield from (replace(base, fault=fault) for fault in FAULTS[1:])
    yield replace(base, state="stale", routers=4, fleet="mixed")


def full(traces: Sequence[str]) -> list[Cell]:
    """The whole product, and what the quick one has beside it."""
    return list(dict.fromkeys([*(Cell(*each) for each in _product(traces)), *quick(traces)]))


def sample(traces: Sequence[str], size: int) -> list[Cell]:
    """So many of the whole product, drawn by lot: the same each time, and each trace as often as another.

    The quick matrix looks mostly at what is usual; this shows what the whole one would, in minutes.
    """
    rng, chosen = Random("sample of cells"), []
    for place, trace in enumerate(traces):
        every = [Cell(*each) for each in _product([trace])]
        share = size // len(traces) + (place < size % len(traces))
        chosen += rng.sample(every, min(share, len(every)))
    return chosen


def _product(traces: Sequence[str]) -> Iterator[tuple[str, float, str, str, int, str, str]]:
    yield from product(traces, LOADS, CACHES, STATES, (1, 2, 4), ("equal", "mixed"), FAULTS)


def only(cells: Sequence[Cell], filters: Sequence[str]) -> list[Cell]:
    """Those that pass one of the filters, each like `trace=chat,load=0.9`; all without filters. Raises CellError."""
    wanted = [_filter(text) for text in filters]
    return [c for c in cells if not wanted or any(all(str(getattr(c, k)) == v for k, v in w.items()) for w in wanted)]


def _filter(text: str) -> dict[str, str]:
    pairs = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in text.split(","))}
    names = [f.name for f in fields(Cell)]
    if unknown := pairs.keys() - set(names):
        raise CellError(f"--only {text}: cells have no {', '.join(sorted(unknown))}; they have {', '.join(names)}")
    return pairs


def fleet(groups: Sequence[Group], size: str, cache: str, block_size: int) -> tuple[NodeSpec, ...]:
    """The replicas of these groups with caches of that size."""
    sized = [g.model_copy(update={"kv_tokens": g.kv_capacity(size) * CACHES[cache]}) for g in groups]
    return fleet_spec.nodes(sized, size, block_size, CPU_OVERHEAD_S)


def incidents(fault: str, replica: int, early_s: float, late_s: float) -> tuple[Incident, ...]:
    """What befalls that replica (from 1)."""
    if fault == "dies":
        return Incident(early_s, replica, Kind.DIES), Incident(late_s, replica, Kind.JOINS)
    if fault == "slows":
        return (Incident(early_s, replica, Kind.SLOWS, SLOWER),)
    return ()
