"""How much the GPUs of each replica are used: a second source beside what its engine tells, and never in its place."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from extproc.adapters.gpu_sources import DcgmPages, Gpu, GpuError, GpuSource, LocalGpus, NvmlLibrary
from extproc.config import Gpus
from extproc.core.types import GpuSampled, GpuUsed, Replica

log = logging.getLogger(__name__)

UUID_LABEL: Final = "gpu_uuid"
INDEX_LABEL: Final = "gpu_index"
POD_LABEL: Final = "pod"
"""Labels of a replica that say which GPUs are its own; several with commas between them."""

Ports = Mapping[int, tuple[int, ...]]
"""Port of a replica -> index of its GPUs on its host."""


def source(settings: Gpus) -> GpuSource:
    """Where they are read, by the configuration."""
    if settings.url is None:
        return LocalGpus(NvmlLibrary())
    return DcgmPages(settings.url, settings.timeout_s)


def gpus_of(replica: Replica, gpus: Sequence[Gpu], ports: Ports, alone: bool) -> Sequence[Gpu] | None:
    """Which of the GPUs of its place are the replica's; None where nothing tells, or where some of its own are missing.

    The first that says so: its labels `gpu_uuid`, `gpu_index`, `pod`; its port; that it is `alone` there, of all pools.
    """
    labels = replica.labels
    if wanted := _listed(labels.get(UUID_LABEL)):
        return _all([gpu for gpu in gpus if gpu.uuid in wanted], len(wanted))
    if wanted := _listed(labels.get(INDEX_LABEL)):
        return _all([gpu for gpu in gpus if str(gpu.index) in wanted], len(wanted))
    if (pod := labels.get(POD_LABEL)) is not None:
        return [gpu for gpu in gpus if gpu.pod == pod] or None
    if indices := ports.get(int(replica.address.rpartition(":")[2])):
        return _all([gpu for gpu in gpus if gpu.index in indices], len(set(indices)))
    return gpus if alone else None


def _listed(label: str | None) -> frozenset[str]:
    return frozenset(part.strip() for part in label.split(",")) if label else frozenset()


def _all(found: Sequence[Gpu], wanted: int) -> Sequence[Gpu] | None:
    """Where one is missing, or another host's are among them, the mean would be another's figure. Parts of a GPU (MIG) have its UUID."""
    return found if len(found) >= wanted >= len({gpu.uuid for gpu in found}) else None


def sampled(pool: str, address: str, gpus: Sequence[Gpu] | None) -> GpuSampled:
    """What a replica's GPUs come to: the mean over them, unknown where one of them is."""
    return GpuSampled(pool, address, _mean([g.use for g in gpus or ()]), _mean([g.memory for g in gpus or ()]))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


class GpuWatch:
    """Tells the use of the GPUs of one pool's replicas again and again, until `run` is cancelled."""

    def __init__(
        self,
        pool: str,
        settings: Gpus,
        replicas: Callable[[], Sequence[Replica]],
        everywhere: Callable[[], Collection[str]],
        learn: Callable[[GpuSampled | GpuUsed], None],
        *,
        whole: bool,
        gpus: GpuSource | None = None,
    ) -> None:
        """`replicas`: who is a member now; `everywhere`: addresses of the members of every pool, each once. `whole`: also tell the
        mean over the pool, for scaling.
        """
        self._pool = pool
        self._settings = settings
        self._replicas = replicas
        self._everywhere = everywhere
        self._learn = learn
        self._whole = whole
        self._source = gpus or source(settings)
        self._trouble: dict[str, str | None] = {}
        """By place, or address of a replica: what was said of it last. Only of those that are there."""

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(self._settings.interval_s)
        finally:
            await self._source.close()

    async def look(self) -> None:
        """Read every place once, and tell of each replica; what cannot be read is unknown."""
        at: defaultdict[str, list[Replica]] = defaultdict(list)
        for replica in self._replicas():
            at[self._place(replica.address)].append(replica)
        sharing = Counter(self._place(address) for address in self._everywhere())
        read = await asyncio.gather(*(self._read(place) for place in at))
        facts = [
            self._of(replica, gpus, alone=sharing[place] == 1)
            for gpus, (place, replicas) in zip(read, at.items(), strict=True)
            for replica in replicas
        ]
        there = at.keys() | {fact.address for fact in facts}
        self._trouble = {name: why for name, why in self._trouble.items() if name in there}
        for fact in facts:
            self._learn(fact)
        if self._whole:
            known = [fact.use for fact in facts if fact.use is not None]
            self._learn(GpuUsed(self._pool, sum(known) / len(known) if known else None))

    def _place(self, address: str) -> str:
        return self._source.place(address.rpartition(":")[0])

    async def _read(self, place: str) -> Sequence[Gpu]:
        try:
            gpus = await self._source.read(place)
        except GpuError as e:
            self._say(place, f"GPU use of pool {self._pool} is unknown: {e}")
            return ()
        mute = all(gpu.use is None for gpu in gpus)
        self._say(
            place, f"GPU use of pool {self._pool} is unknown: {place}: none of its GPUs tells its use" if mute else None
        )
        return gpus

    def _of(self, replica: Replica, gpus: Sequence[Gpu], alone: bool) -> GpuSampled:
        own = gpus_of(replica, gpus, self._settings.ports, alone)
        missing = gpus and own is None
        self._say(
            replica.address,
            f"replica {replica.address} of pool {self._pool}: nothing tells which of {len(gpus)} GPUs are its own, or they are not "
            f"among them; give it the label {INDEX_LABEL}, {UUID_LABEL} or {POD_LABEL}, or set gpu.ports"
            if missing
            else None,
        )
        return sampled(self._pool, replica.address, own)

    def _say(self, name: str, trouble: str | None) -> None:
        """Once, until it is another or over."""
        if trouble == self._trouble.get(name):
            return
        self._trouble[name] = trouble
        if trouble is not None:
            log.warning("%s", trouble)
