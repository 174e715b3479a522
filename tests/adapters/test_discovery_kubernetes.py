"""The sources over an API server in memory; how it sounds over HTTP is in test_discovery_kube_client.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.adapters.discovery import InferencePoolSource, SliceSource
from extproc.adapters.discovery.kube_api import ENDPOINT_SLICES, PODS, Event, FakeKube, KubeError, Query
from extproc.adapters.discovery.kube_objects import pod_labels
from extproc.adapters.discovery.mirror import Mirror, Pace
from extproc.config import InferencePoolDiscovery, KubernetesDiscovery
from extproc.core.types import Add, Change, Remove, Replica, Reset
from tests.support.discovery import Make, Watch, running
from tests.support.kube_objects import (
    CLOSED,
    LEAVING,
    OLD_POOLS,
    POOLS,
    READY,
    UNREADY,
    act,
    endpoint,
    endpoint_slice,
    inference_pool,
    on_the_server,
    pod,
)
from tests.support.waiting import until

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
FAST = Pace(resync_s=1000, watch_s=1000, first_pause_s=0.001, longest_pause_s=0.005, steady_s=0.5)
"""Only events tell; what fails is tried again at once."""
SERVICE = KubernetesDiscovery(service="vllm")


def slices_of(
    kube: FakeKube,
    settings: KubernetesDiscovery = SERVICE,
    labels: Mapping[str, str] | None = None,
    pace: Pace = FAST,
) -> Make:
    return lambda watch: SliceSource(
        "p", settings, labels or {}, kube.connect, on_error=watch.mistakes.append, rng=Random(1), pace=pace
    )


def pool_of(kube: FakeKube, **settings: Any) -> Make:
    wanted = InferencePoolDiscovery(name="vllm", **settings)
    return lambda watch: InferencePoolSource(
        "p", wanted, {}, kube.connect, on_error=watch.mistakes.append, rng=Random(1), pace=FAST
    )


def kube_with(*endpoints: dict[str, Any]) -> FakeKube:
    kube = FakeKube()
    kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", *endpoints))
    return kube


class TestEndpointSlices:
    async def test_a_reset_then_the_fewest_changes(self) -> None:
        kube = kube_with(endpoint("10.0.0.1"))
        kube.put(ENDPOINT_SLICES, endpoint_slice("other-1", endpoint("10.0.0.9"), service="other"))
        async with running(slices_of(kube)) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1", LEAVING), endpoint("10.0.0.2")))
            await watch.tells(Add("p", Replica(A, drain=True)), Add("p", Replica(B)))
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1", CLOSED), endpoint("10.0.0.2")))
            await watch.tells(Remove("p", A))
            kube.put(ENDPOINT_SLICES, endpoint_slice("other-1", endpoint("10.0.0.8"), service="other"))
            await watch.stays_quiet()
            assert watch.mistakes == []

    async def test_a_flap_of_readiness_is_a_drain_and_its_end(self) -> None:
        kube = kube_with(endpoint("10.0.0.1"))
        async with running(slices_of(kube)) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1", UNREADY)))
            await watch.tells(Add("p", Replica(A, drain=True)))
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1", READY)))
            await watch.tells(Add("p", Replica(A)))

    async def test_an_endpoint_that_moves_to_another_slice_stays(self) -> None:
        kube = kube_with(endpoint("10.0.0.1"), endpoint("10.0.0.2"))
        async with running(slices_of(kube)) as watch:
            await watch.tells(Reset("p", (Replica(A), Replica(B))))
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-2", endpoint("10.0.0.2"), endpoint("10.0.0.3")))
            await watch.tells(Add("p", Replica(C)))
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1")))
            await watch.stays_quiet()
            kube.delete(ENDPOINT_SLICES, "vllm-1")
            await watch.tells(Remove("p", A))

    async def test_labels_of_pods_come_with_their_endpoints_and_by_themselves(self) -> None:
        kube = kube_with(endpoint("10.0.0.1", pod="vllm-a"))
        kube.put(PODS, pod("vllm-a", {"gpu": "h200", "role": "prefill", "app": "vllm"}))
        async with running(slices_of(kube, labels={"tp": "1", "gpu": "h100"})) as watch:
            labels = {"tp": "1", "gpu": "h200", "role": "prefill"}
            await watch.tells(Reset("p", (Replica(A, labels),)))
            kube.put(PODS, pod("vllm-a", {"gpu": "h200", "role": "prefill", "drain": "true"}))
            await watch.tells(Add("p", Replica(A, labels, drain=True)))
            kube.put(PODS, pod("vllm-b", {"gpu": "a100"}))
            await watch.stays_quiet()
            kube.delete(PODS, "vllm-a")
            await watch.tells(Add("p", Replica(A, {"tp": "1", "gpu": "h100"})))

    async def test_nothing_is_told_before_the_labels_are_known(self) -> None:
        class SlowPods(FakeKube):
            async def list(self, query: Any) -> Any:
                if query.resource == PODS:
                    await go.wait()
                return await super().list(query)

        go, kube = asyncio.Event(), SlowPods()
        kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1", pod="a")))
        kube.put(PODS, pod("a", {"drain": "true"}))
        async with running(slices_of(kube)) as watch:
            await until(lambda: kube.watching)
            await watch.stays_quiet()
            go.set()
            await watch.tells(Reset("p", (Replica(A, drain=True),)))

    async def test_labels_that_fail_to_come_once_or_twice_are_waited_for(self) -> None:
        """Without them a replica that was taken out by hand would get requests for as long."""

        class TiredAtFirst(FakeKube):
            async def list(self, query: Any) -> Any:
                if query.resource == PODS and (refusals := refusals_left.pop(0)):
                    raise KubeError(refusals)
                return await super().list(query)

        refusals_left, kube = ["too many requests", "too many requests", ""], TiredAtFirst()
        kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1", pod="a")))
        kube.put(PODS, pod("a", {"drain": "true"}))
        async with running(slices_of(kube)) as watch:
            await watch.tells(Reset("p", (Replica(A, drain=True),)))
            assert refusals_left == []

    async def test_a_selector_takes_the_slices_of_several_services(self) -> None:
        kube = FakeKube()
        for name in ("a", "b", "c"):
            item = endpoint_slice(name, endpoint(f"10.0.0.{ord(name) - 96}"))
            item["metadata"]["labels"] = {"engine": "vllm" if name != "c" else "other"}
            kube.put(ENDPOINT_SLICES, item)
        async with running(slices_of(kube, KubernetesDiscovery(selector="engine=vllm", pod_labels={}))) as watch:
            await watch.tells(Reset("p", (Replica(A), Replica(B))))
            assert kube.lists == 1  # without labels no pod is asked for

    async def test_no_slice_at_all_is_an_empty_pool_and_a_mistake(self) -> None:
        kube = FakeKube()
        async with running(slices_of(kube)) as watch:
            await watch.tells(Reset("p", ()))
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1")))
            await watch.tells(Add("p", Replica(A)))
            assert watch.mistakes == [
                "endpointslices.discovery.k8s.io with kubernetes.io/service-name=vllm: "
                "there is none; check service and namespace"
            ]

    async def test_a_service_without_endpoints_is_an_empty_pool_and_no_mistake(self) -> None:
        async with running(slices_of(kube_with())) as watch:
            await watch.tells(Reset("p", ()))
            assert watch.mistakes == []

    async def test_a_receiver_that_fails_gets_everything_again(self) -> None:
        kube = kube_with(endpoint("10.0.0.1"))
        watch = Watch()
        source = slices_of(kube)(watch)

        def fails(change: Change) -> None:
            raise RuntimeError("receiver")

        with pytest.raises(ExceptionGroup):
            await source.run(fails)
        task = asyncio.create_task(source.run(watch.emit))
        await watch.tells(Reset("p", (Replica(A),)))
        task.cancel()
        assert repr(source).startswith("<SliceSource p: 1 replicas from <Mirror endpointslices.discovery.k8s.io with ")


class TestTrouble:
    async def test_an_outage_changes_nothing_and_is_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        kube = kube_with(endpoint("10.0.0.1"))
        async with running(slices_of(kube, KubernetesDiscovery(service="vllm", pod_labels={}))) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            kube.down = "Connection refused"
            kube.break_watches()
            await until(lambda: watch.mistakes)
            await watch.stays_quiet()
            text = "endpointslices.discovery.k8s.io with kubernetes.io/service-name=vllm: Connection refused"
            assert watch.mistakes == [text]
            warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
            assert warnings == [f"{text}; what was known stays"]
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.2")))
            kube.down = None
            await watch.tells(Add("p", Replica(B)), Remove("p", A))
            assert kube.lists == 1  # the watch went on where it was

    async def test_trouble_that_lasts_is_said_again(self) -> None:
        """Of each kind: what cannot be asked, what cannot be read, and what is not there."""
        pace = Pace(1000, 0.005, 0.001, 0.005, steady_s=0.0, repeat_s=0.01)
        service = KubernetesDiscovery(service="vllm", pod_labels={})
        query = "endpointslices.discovery.k8s.io with kubernetes.io/service-name=vllm"
        kube = FakeKube()
        async with running(slices_of(kube, service, pace=pace)) as watch:
            for text in ("there is none; check service and namespace", "vllm-1: its ports are none; set port", "down"):
                await until(lambda text=text: watch.mistakes.count(f"{query}: {text}") > 2)  # type: ignore[misc]
                if kube.objects:
                    kube.down = "down"
                else:
                    kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1"), port=None))
            kube.down = None
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1")))
            await until(lambda: watch.members == {A: Replica(A)})
            said = len(watch.mistakes)
            await asyncio.sleep(0.05)
            assert len(watch.mistakes) == said

    async def test_an_outage_at_the_start_gives_no_reset_until_it_is_over(self) -> None:
        kube = kube_with(endpoint("10.0.0.1"))
        kube.down = "Connection refused"
        async with running(slices_of(kube)) as watch:
            await until(lambda: len(watch.mistakes) == 2)  # slices and pods
            await watch.stays_quiet()
            kube.down = None
            await watch.tells(Reset("p", (Replica(A),)))

    async def test_a_break_is_no_mistake_and_nothing_is_missed(self) -> None:
        kube = kube_with(endpoint("10.0.0.1"))
        async with running(slices_of(kube)) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            kube.break_watches()
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.2")))
            await watch.tells(Add("p", Replica(B)), Remove("p", A))
            assert watch.mistakes == []

    async def test_a_version_that_is_gone_is_listed_again(self) -> None:
        kube = kube_with(endpoint("10.0.0.1"))
        async with running(slices_of(kube)) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            lists = kube.lists
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-2", endpoint("10.0.0.3")))
            kube.delete(ENDPOINT_SLICES, "vllm-1")
            kube.forget()
            await watch.tells(Add("p", Replica(C)), Remove("p", A))
            assert watch.mistakes == []
            assert kube.lists > lists

    async def test_a_bookmark_spares_the_list(self) -> None:
        kube = kube_with(endpoint("10.0.0.1"))
        async with running(slices_of(kube, KubernetesDiscovery(service="vllm", pod_labels={}))) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            for i in range(3):
                kube.put(PODS, pod(f"x{i}"))  # moves the version on, and this watch hears nothing of it
            kube.bookmark(ENDPOINT_SLICES)
            await asyncio.sleep(0.01)
            kube.forget()
            await asyncio.sleep(0.01)
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.2")))
            await watch.tells(Add("p", Replica(B)), Remove("p", A))
            assert kube.lists == 1

    async def test_a_server_that_cuts_each_watch_short_is_asked_with_pauses_and_told_of(self) -> None:
        """Whatever they tell first: this one has a bookmark of another version each time."""

        class Short(FakeKube):
            watches = 0

            async def watch(self, _query: Query, version: str, _timeout_s: float) -> AsyncGenerator[Event, None]:
                self.watches += 1
                yield Event("BOOKMARK", {"metadata": {"resourceVersion": str(int(version) + 1)}})

        kube = Short()
        kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1")))
        service, pace = KubernetesDiscovery(service="vllm", pod_labels={}), Pace(1000, 1000, 0.05, 1000, 0.5)
        async with running(slices_of(kube, service, pace=pace)) as watch:
            await until(
                lambda: kube.watches == 4, every_s=0.001
            )  # after 0.05, 0.1 and 0.2 s; the next comes after 0.4 s
            text = "endpointslices.discovery.k8s.io with kubernetes.io/service-name=vllm"
            assert watch.mistakes == [f"{text}: watches end sooner than after 0.5 s"]
            assert watch.members == {A: Replica(A)}

    async def test_everything_is_listed_again_now_and_then(self) -> None:
        """The server lost an event; only a list can tell."""
        kube = kube_with(endpoint("10.0.0.1"))
        pace = Pace(resync_s=0.02, watch_s=0.01, first_pause_s=0.001, steady_s=0.001)
        async with running(slices_of(kube, pace=pace)) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            kube.objects[ENDPOINT_SLICES, "vllm-1"] = endpoint_slice("vllm-1", endpoint("10.0.0.2"))
            await watch.tells(Add("p", Replica(B)), Remove("p", A))

    async def test_pods_that_may_not_be_read_cost_their_labels_only(self) -> None:
        kube, forbidden = kube_with(endpoint("10.0.0.1", pod="a")), FakeKube(down="pods is forbidden")
        kube.put(PODS, pod("a", {"gpu": "h200"}))

        class Both(FakeKube):
            async def list(self, query: Any) -> Any:
                return await (forbidden if query.resource == PODS else kube).list(query)

            def watch(self, query: Any, version: str, timeout_s: float) -> Any:
                return (forbidden if query.resource == PODS else kube).watch(query, version, timeout_s)

        async with running(slices_of(Both())) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            assert watch.mistakes == ["pods: pods is forbidden"]
            forbidden.objects, forbidden.down = kube.objects, None
            await watch.tells(Add("p", Replica(A, {"gpu": "h200"})))

    async def test_a_slice_that_cannot_be_read_stays_as_it_was(self) -> None:
        kube = kube_with(endpoint("10.0.0.1"))
        async with running(slices_of(kube)) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            for _ in range(2):
                kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.2"), port=None))
            await until(lambda: watch.mistakes)
            await watch.stays_quiet()
            assert watch.mistakes == [
                "endpointslices.discovery.k8s.io with kubernetes.io/service-name=vllm: "
                "vllm-1: its ports are none; set port"
            ]
            lists = kube.lists
            kube.put(PODS, pod("x"))
            kube.forget()  # listed again, and still unreadable: neither forgotten nor told again
            await until(lambda: kube.lists > lists)
            await watch.stays_quiet()
            assert len(watch.mistakes) == 1
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.2")))
            await watch.tells(Add("p", Replica(B)), Remove("p", A))


class TestInferencePool:
    @pytest.mark.parametrize(
        ("resource", "item", "settings"),
        [
            (POOLS, inference_pool("vllm", {"app": "vllm"}, 8000), {}),
            (
                OLD_POOLS,
                {"metadata": {"name": "vllm"}, "spec": {"selector": {"app": "vllm"}, "targetPortNumber": 8000}},
                {"group": "inference.networking.x-k8s.io"},
            ),
        ],
    )
    async def test_its_pods_are_members(self, resource: Any, item: dict[str, Any], settings: dict[str, Any]) -> None:
        kube = FakeKube()
        kube.put(resource, item)
        kube.put(PODS, pod("a", {"app": "vllm", "gpu": "h200"}, ip="10.0.0.1"))
        kube.put(PODS, pod("b", {"app": "vllm"}, ip="10.0.0.2", ready=False))
        kube.put(PODS, pod("c", {"app": "other"}, ip="10.0.0.3"))
        async with running(pool_of(kube, **settings)) as watch:
            await watch.tells(Reset("p", (Replica(A, {"gpu": "h200"}), Replica(B, drain=True))))
            kube.put(PODS, pod("b", {"app": "vllm"}, ip="10.0.0.2"))
            await watch.tells(Add("p", Replica(B)))
            kube.put(PODS, pod("a", {"app": "vllm", "gpu": "h200"}, ip="10.0.0.1", leaving=True))
            await watch.tells(Add("p", Replica(A, {"gpu": "h200"}, drain=True)))
            kube.put(PODS, pod("b", {"app": "none"}, ip="10.0.0.2"))  # taken out by its label
            await watch.tells(Remove("p", B))
            kube.delete(PODS, "a")
            await watch.tells(Remove("p", A))
            assert watch.mistakes == []

    async def test_another_port_or_selector_is_followed(self) -> None:
        kube = FakeKube()
        kube.put(POOLS, inference_pool("vllm", {"app": "blue"}, 8000))
        kube.put(PODS, pod("a", {"app": "blue"}, ip="10.0.0.1"))
        kube.put(PODS, pod("b", {"app": "green"}, ip="10.0.0.2"))
        async with running(pool_of(kube)) as watch:
            await watch.tells(Reset("p", (Replica(A),)))
            kube.put(POOLS, inference_pool("vllm", {"app": "blue"}, 8000, 8001))
            await watch.tells(Add("p", Replica("10.0.0.1:8001")))
            kube.put(POOLS, inference_pool("vllm", {"app": "green"}, 8000))
            await watch.tells(Add("p", Replica(B)), Remove("p", A), Remove("p", "10.0.0.1:8001"))
            kube.put(PODS, pod("c", {"app": "green"}, ip="10.0.0.3"))
            kube.put(PODS, pod("d", {"app": "blue"}, ip="10.0.0.4"))
            await watch.tells(Add("p", Replica(C)))
            assert [query.labels for query in kube.watching if query.resource == PODS] == ["app=green"]

    async def test_that_cannot_be_read_is_not_called_missing(self) -> None:
        kube = FakeKube()
        kube.put(POOLS, inference_pool("vllm", {}, 8000))
        kube.put(PODS, pod("a", {"app": "vllm"}, ip="10.0.0.1"))
        async with running(pool_of(kube)) as watch:
            await until(lambda: watch.mistakes)
            await watch.stays_quiet()
            kube.put(POOLS, inference_pool("vllm", {"app": "vllm"}, 8000))
            await watch.tells(Reset("p", (Replica(A),)))
            assert watch.mistakes == [
                "inferencepools.inference.networking.k8s.io vllm: vllm: spec needs a selector and targetPorts"
            ]

    async def test_that_is_missing_or_deleted_changes_nothing(self) -> None:
        kube = FakeKube()
        kube.put(PODS, pod("a", {"app": "vllm"}, ip="10.0.0.1"))
        kube.put(POOLS, inference_pool("another", {"app": "vllm"}, 8000))
        async with running(pool_of(kube)) as watch:
            await until(lambda: watch.mistakes)
            await watch.stays_quiet()
            kube.put(POOLS, inference_pool("vllm", {"app": "vllm"}, 8000))
            await watch.tells(Reset("p", (Replica(A),)))
            kube.delete(POOLS, "vllm")
            await until(lambda: len(watch.mistakes) == 2)
            kube.put(PODS, pod("b", {"app": "vllm"}, ip="10.0.0.2"))
            await watch.tells(Add("p", Replica(B)))  # its pods go on being followed
            text = "inferencepools.inference.networking.k8s.io vllm"
            assert watch.mistakes == [f"{text}: there is none; check its name and namespace"] * 2


# --- whatever happens -------------------------------------------------------------------------------------------------

PUT = st.tuples(
    st.just("put"), st.integers(0, 2), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=3)
)
STEP = st.one_of(
    PUT,
    st.tuples(st.just("delete"), st.integers(0, 2)),
    st.tuples(st.just("label"), st.integers(1, 5), st.sampled_from(["h100", "h200"])),
    st.tuples(st.just("unlabel"), st.integers(1, 5)),
    st.sampled_from([("break",), ("forget",), ("bookmark",), ("down",), ("up",), ("wait",), ("wait",)]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=25), st.integers(0, 1000))
def test_whatever_happens_the_members_end_up_as_the_server_has_them(steps: list[Any], seed: int) -> None:
    async def story() -> None:
        kube = FakeKube()
        async with running(slices_of(kube, pace=Pace(1000, 1000, 0.0002, 0.001, steady_s=0.0))) as watch:
            for step in steps:
                known = watch.members
                act(kube, step)
                for _ in range(Random(seed).randrange(3)):
                    await asyncio.sleep(0)
                if step == ("wait",):
                    await asyncio.sleep(0.003)
                if kube.down and step == ("down",):
                    known = watch.members
                    await asyncio.sleep(0.003)
                    assert watch.members == known
            kube.down = None
            await until(lambda: watch.members == on_the_server(kube), every_s=0.001)

    asyncio.run(story())


async def test_only_what_is_read_makes_a_mirror_say_that_something_changed() -> None:
    kube, moved = FakeKube(), asyncio.Queue[None]()
    mirror: Mirror[Any] = Mirror(
        Query(PODS), kube.connect, lambda item: pod_labels(item, {"gpu": "gpu"}), lambda: moved.put_nowait(None),
        on_error=lambda _: None, rng=Random(1), pace=FAST,
    )  # fmt: skip
    task = asyncio.create_task(mirror.run())
    await moved.get()  # the list
    for labels in ({"gpu": "h100"}, {"gpu": "h100", "beat": "1"}, {"gpu": "h100", "beat": "2"}, {"gpu": "h200"}):
        kube.put(PODS, pod("a", labels))
    await until(lambda: (mirror.items or {}).get("a") == {"gpu": "h200"})
    assert moved.qsize() == 2
    kube.delete(PODS, "a")
    await until(lambda: moved.qsize() == 3)
    task.cancel()
