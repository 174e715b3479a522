"""Whose GPUs are whose, and what is told of them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import pytest

from extproc.adapters.gpu_replicas import GpuWatch, gpus_of, sampled
from extproc.adapters.gpu_sources import FakeGpus, Gpu
from extproc.config import Gpus
from extproc.core.types import GpuSampled, GpuUsed, Replica
from tests.support.waiting import until

H, K = "10.0.0.1", "10.0.0.2"
A, B, C = f"{H}:8000", f"{H}:8001", f"{K}:8000"
GPUS = (
    Gpu(0, "GPU-a", None, 0.75, 0.5),
    Gpu(1, "GPU-b", None, 0.25, 0.25),
    Gpu(2, "GPU-c", "vllm-0", 0.5, None),
)


def own(
    labels: dict[str, str], ports: dict[int, tuple[int, ...]] | None = None, alone: bool = False
) -> list[int | None] | None:
    found = gpus_of(Replica(A, labels), GPUS, ports or {}, alone)
    return None if found is None else [gpu.index for gpu in found]


class TestWhose:
    @pytest.mark.parametrize(
        ("labels", "indices"),
        [
            ({"gpu_index": "1"}, [1]),
            ({"gpu_index": "0, 1"}, [0, 1]),
            ({"gpu_uuid": "GPU-c,GPU-a"}, [0, 2]),
            ({"pod": "vllm-0"}, [2]),
            ({"gpu_uuid": "GPU-a", "gpu_index": "1"}, [0]),
            ({"gpu_index": "0,7"}, None),
            ({"gpu_uuid": "GPU-x"}, None),
            ({"pod": "vllm-1"}, None),
            ({}, None),
        ],
    )
    def test_labels_say_so_and_one_that_is_missing_makes_it_unknown(
        self, labels: dict[str, str], indices: list[int] | None
    ) -> None:
        assert own(labels) == indices

    def test_an_index_that_several_hosts_on_a_page_have_says_nothing(self) -> None:
        elsewhere = (*GPUS, Gpu(0, "GPU-x", None, 0.1, 0.1))
        assert gpus_of(Replica(A, {"gpu_index": "0"}), elsewhere, {}, alone=False) is None
        assert gpus_of(Replica(A), elsewhere, {8000: (0,)}, alone=False) is None

    def test_the_parts_of_a_gpu_are_the_gpu(self) -> None:
        parts = [Gpu(0, "GPU-a", None, use, None) for use in (0.5, 0.25)]
        assert gpus_of(Replica(A, {"gpu_index": "0"}), parts, {}, alone=False) == parts

    def test_else_the_port_and_else_that_it_is_alone_there(self) -> None:
        assert own({}, {8000: (0, 1)}, alone=True) == [0, 1]
        assert own({}, {8001: (0, 1)}) is None
        assert own({}, alone=True) == [0, 1, 2]

    def test_the_mean_is_unknown_where_one_of_them_is(self) -> None:
        assert sampled("p", A, GPUS[:2]) == GpuSampled("p", A, 0.5, 0.375)
        assert sampled("p", A, GPUS) == GpuSampled("p", A, 0.5, None)
        assert sampled("p", A, None) == sampled("p", A, ()) == GpuSampled("p", A, None, None)


class Bench:
    def __init__(self, *replicas: Replica, whole: bool = True, ports: dict[int, tuple[int, ...]] | None = None) -> None:
        self.replicas = list(replicas)
        self.gpus = FakeGpus({H: GPUS})
        self.others: set[str] = set()
        """Of other pools."""
        self.told: list[GpuSampled | GpuUsed] = []
        settings = Gpus(nvml=True, interval_s=0.01, ports=ports or {})
        self.watch = GpuWatch(
            "p", settings, lambda: self.replicas, self.everywhere, self.told.append, whole=whole, gpus=self.gpus
        )

    def everywhere(self) -> set[str]:
        return {replica.address for replica in self.replicas} | self.others


class TestWatch:
    async def test_each_replica_and_the_mean_over_those_known(self) -> None:
        b = Bench(Replica(A, {"gpu_index": "0"}), Replica(B, {"gpu_index": "1"}), Replica(C))
        await b.watch.look()
        assert b.told == [
            GpuSampled("p", A, 0.75, 0.5),
            GpuSampled("p", B, 0.25, 0.25),
            GpuSampled("p", C, None, None),
            GpuUsed("p", 0.5),
        ]

    async def test_the_pools_mean_is_left_to_who_else_tells_it(self) -> None:
        b = Bench(Replica(A), whole=False)
        await b.watch.look()
        assert [type(fact) for fact in b.told] == [GpuSampled]

    async def test_what_was_known_and_cannot_be_read_is_unknown(self, caplog: pytest.LogCaptureFixture) -> None:
        b = Bench(Replica(A, {"gpu_index": "0"}))
        await b.watch.look()
        del b.gpus.gpus_at[H]
        for _ in range(3):
            await b.watch.look()
        assert b.told[-2:] == [GpuSampled("p", A, None, None), GpuUsed("p", None)]
        assert [r.getMessage() for r in caplog.records] == [f"GPU use of pool p is unknown: {H}: nothing there"]
        b.gpus.gpus_at[H] = GPUS
        await b.watch.look()
        assert b.told[-2] == GpuSampled("p", A, 0.75, 0.5)

    async def test_gpus_that_do_not_tell_their_use_are_said_so_once(self, caplog: pytest.LogCaptureFixture) -> None:
        """Those that are cut in parts, by NVML; an exporter that was given other counters."""
        b = Bench(Replica(A, {"gpu_index": "0"}))
        b.gpus.gpus_at[H] = [Gpu(0, "GPU-a", None, None, 0.5)]
        for _ in range(3):
            await b.watch.look()
        assert b.told[-2:] == [GpuSampled("p", A, None, 0.5), GpuUsed("p", None)]
        said = [record.getMessage() for record in caplog.records if record.name.startswith("extproc")]
        assert said == [f"GPU use of pool p is unknown: {H}: none of its GPUs tells its use"]

    async def test_a_replica_of_which_nothing_says_which_are_its_own_is_named_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        b = Bench(Replica(A), Replica(B))
        for _ in range(3):
            await b.watch.look()
        assert b.told[:2] == [GpuSampled("p", A, None, None), GpuSampled("p", B, None, None)]
        assert len(caplog.records) == 2
        assert f"replica {A} of pool p: nothing tells which of 3 GPUs are its own" in caplog.text
        b.replicas = [Replica(A)]  # alone now
        await b.watch.look()
        assert b.told[-2] == GpuSampled("p", A, 0.5, None)
        b.replicas = [Replica(A), Replica(B)]  # B had left, and is said so again
        await b.watch.look()
        assert len(caplog.records) == 4

    async def test_a_replica_of_another_pool_may_have_some_of_the_gpus_there(self) -> None:
        b = Bench(Replica(A))
        b.others = {B}
        await b.watch.look()
        assert b.told == [GpuSampled("p", A, None, None), GpuUsed("p", None)]
        b.others = {A, C}  # itself, and one elsewhere
        await b.watch.look()
        assert b.told[-2] == GpuSampled("p", A, 0.5, None)

    async def test_without_replicas_nothing_is_known_of_the_pool(self) -> None:
        b = Bench()
        await b.watch.look()
        assert b.told == [GpuUsed("p", None)]

    async def test_it_looks_again_and_again_until_it_is_cancelled(self) -> None:
        b = Bench(Replica(A))
        task = asyncio.create_task(b.watch.run())
        await until(lambda: len(b.told) > 6)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert b.gpus.closed
