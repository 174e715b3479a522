"""The rules of other routers as policies, so that the benchmark drives them through the same router, ledger and index as ours.

They are models of published rules, not ports: each class names its source and what it leaves out. What all have in common:

 * Where a system counts its requests in flight, ours are counted: the ledger of the router, which lets queued prefill drain
   as predicted and learns of first tokens and ends at the pace of the access log.
 * Where it scrapes, it sees the last sample, at the scrape interval of the run. The endpoint picker's own is 50 ms: give it
   that (`Wiring.scrape_interval_s`), or say what it had.
 * Where it guesses what is cached, it asks our prefix index: contiguous matches, bounded by the replica's KV cache,
   withdrawn on failure. That is a fair and usually stronger stand-in. `hit_tokens` is the index itself, for systems that
   never correct theirs; `cached_tokens` is corrected by the hits that engines report, for rules that are given the truth.
 * A tie for the best place is broken as published. The order behind the first only matters when a connection is refused.

None is in the product's registry but within `installed()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final

from extproc.core.policies.base import REGISTRY
from extproc.core.policies.least import LeastRequest, PowerOfTwo
from extproc.core.policies.rotation import RoundRobin
from tests.bench.baselines.aibrix import AibrixPrefixCache
from tests.bench.baselines.dynamo import Dynamo, DynamoPrefill2
from tests.bench.baselines.epp import EppDefault, EppPrefixFilter
from tests.bench.baselines.prefill import LeastPrefill, LMetric
from tests.bench.baselines.sglang import SglangCacheAware
from tests.bench.baselines.smg import SmgPrefixHash

_CLASSES: Final[tuple[type[Any], ...]] = (
    RoundRobin,
    LeastRequest,
    PowerOfTwo,
    SmgPrefixHash,
    SglangCacheAware,
    EppDefault,
    EppPrefixFilter,
    AibrixPrefixCache,
    Dynamo,
    DynamoPrefill2,
    LMetric,
    LeastPrefill,
)
BASELINES: Final[Mapping[str, type[Any]]] = MappingProxyType({cls.name: cls for cls in _CLASSES})
"""Name -> class; the first three are the product's own."""


@contextmanager
def installed() -> Iterator[None]:
    """Make the baselines selectable by name; on leaving, the registry is as it was. May be nested."""
    added = {name: cls for name, cls in BASELINES.items() if name not in REGISTRY}
    REGISTRY.update(added)
    try:
        yield
    finally:
        for name in added:
            del REGISTRY[name]
