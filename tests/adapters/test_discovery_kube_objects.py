from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.adapters.discovery.kube_objects import (
    Endpoint,
    PodSeen,
    PoolSpec,
    pod_labels,
    pod_seen,
    pool_members,
    pool_spec,
    slice_endpoints,
    slice_members,
)
from extproc.adapters.discovery.mirror import ObjectError
from extproc.core.types import Replica
from tests.support.kube_objects import (
    CLOSED,
    LEAVING,
    READY,
    UNREADY,
    endpoint,
    endpoint_slice,
    inference_pool,
    pod,
)

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


class TestConditions:
    @pytest.mark.parametrize(
        ("conditions", "drain"),
        [
            (READY, False),
            (UNREADY, True),
            (LEAVING, True),
            ({}, False),
            (None, False),
            ({"ready": True}, False),
            ({"ready": False}, True),
            ({"ready": None, "serving": None, "terminating": None}, False),
            ({"ready": True, "terminating": True}, True),  # publishNotReadyAddresses
        ],
    )
    def test_of_an_endpoint_that_is_a_member(self, conditions: dict[str, Any] | None, drain: bool) -> None:
        item = endpoint_slice("s", endpoint("10.0.0.1", conditions))
        assert slice_endpoints(item, None) == (Endpoint(A, drain),)

    @pytest.mark.parametrize("conditions", [CLOSED, {"ready": False, "terminating": True}])
    def test_of_one_that_is_none(self, conditions: dict[str, Any]) -> None:
        assert slice_endpoints(endpoint_slice("s", endpoint("10.0.0.1", conditions)), None) == ()

    @pytest.mark.parametrize(
        ("said", "seen"),
        [
            ({}, PodSeen("10.0.0.1", False, {})),
            ({"ready": False}, PodSeen("10.0.0.1", True, {})),
            ({"leaving": True}, PodSeen("10.0.0.1", True, {})),
            ({"leaving": True, "ready": False}, None),
            ({"phase": "Succeeded"}, None),
            ({"phase": "Failed"}, None),
            ({"ip": None}, None),
        ],
    )
    def test_of_a_pod_say_the_same(self, said: dict[str, Any], seen: PodSeen | None) -> None:
        assert pod_seen(pod("p", **{"ip": "10.0.0.1", **said}), {}) == seen


class TestPort:
    @pytest.mark.parametrize(
        ("ports", "wanted", "found"),
        [
            ([{"name": "", "port": 8000}], None, 8000),
            ([{"port": 8000}], None, 8000),
            ([{"name": "api", "port": 8000}], None, 8000),
            ([{"name": "metrics", "port": 9}, {"name": "http", "port": 8000}], None, 8000),
            ([{"name": "metrics", "port": 9}, {"name": "http", "port": 8000}], "metrics", 9),
            ([{"name": "metrics", "port": 9}], 7000, 7000),
            (None, 7000, 7000),
        ],
    )
    def test_is_the_only_one_or_http_or_the_one_asked_for(
        self, ports: Any, wanted: int | str | None, found: int
    ) -> None:
        item = {**endpoint_slice("s", endpoint("10.0.0.1")), "ports": ports}
        assert [e.address for e in slice_endpoints(item, wanted)] == [f"10.0.0.1:{found}"]

    @pytest.mark.parametrize(
        ("ports", "wanted", "mistake"),
        [
            ([{"name": "a", "port": 1}, {"name": "b", "port": 2}], None, "its ports are a, b; set port"),
            ([{"port": 1}], "b", "its ports are one without a name; none is called b"),
            (None, None, "its ports are none; set port"),
            ([{"name": "http", "port": 70000}], None, "port 70000 is not between 1 and 65535"),
        ],
    )
    def test_that_cannot_be_told_is_a_mistake(self, ports: Any, wanted: str | None, mistake: str) -> None:
        item = {**endpoint_slice("s", endpoint("10.0.0.1")), "ports": ports}
        with pytest.raises(ObjectError) as raised:
            slice_endpoints(item, wanted)
        assert str(raised.value) == mistake

    def test_is_not_asked_of_a_slice_without_endpoints(self) -> None:
        assert slice_endpoints(endpoint_slice("s", port=None), None) == ()


class TestMembers:
    def test_get_the_labels_of_their_pods_over_those_of_the_pool(self) -> None:
        found = slice_members(
            [(Endpoint(A, pod="a"), Endpoint(B, pod="b"))], {"a": {"gpu": "h200", "drain": "true"}}, {"gpu": "h100"}
        )
        assert found == {A: Replica(A, {"gpu": "h200"}, drain=True), B: Replica(B, {"gpu": "h100"})}

    @pytest.mark.parametrize("drains", [(True, False), (False, True), (True, True)])
    def test_in_two_slices_drain_only_if_both_say_so(self, drains: tuple[bool, bool]) -> None:
        found = slice_members([(Endpoint(A, drain),) for drain in drains], {}, {})
        assert found == {A: Replica(A, drain=all(drains))}

    def test_of_both_families_are_one_replica_by_pod(self) -> None:
        v6, other = "[fd00::1]:8000", "[fd00::2]:8000"
        found = slice_members([(Endpoint(v6, pod="a"), Endpoint(other, pod="b")), (Endpoint(A, pod="a"),)], {}, {})
        assert set(found) == {A, other}

    def test_ipv6_addresses_are_written_as_envoy_writes_them(self) -> None:
        item = endpoint_slice("s", endpoint("FD00:0::1"), family="IPv6")
        assert slice_endpoints(item, None) == (Endpoint("[fd00::1]:8000"),)

    def test_a_pool_has_every_port_of_every_pod(self) -> None:
        spec = pool_spec(inference_pool("p", {"app": "vllm", "a": "b"}, 8000, 8001))
        assert spec == PoolSpec("a=b,app=vllm", (8000, 8001))
        found = pool_members(spec, [PodSeen("10.0.0.1", True, {"tp": "2"}), None], {"gpu": "h100"})
        assert found == {
            a: Replica(a, {"gpu": "h100", "tp": "2"}, drain=True) for a in ("10.0.0.1:8000", "10.0.0.1:8001")
        }

    @pytest.mark.parametrize("order", [1, -1])
    def test_an_address_that_a_new_pod_has_is_not_drained_by_the_one_before(self, order: int) -> None:
        pods = [PodSeen("10.0.0.1", True, {"tp": "1"}), PodSeen("10.0.0.1", False, {"tp": "2"})]
        assert pool_members(PoolSpec("a=b", (8000,)), pods[::order], {}) == {A: Replica(A, {"tp": "2"})}

    def test_the_older_pool_says_the_same_in_other_words(self) -> None:
        item = {"metadata": {"name": "p"}, "spec": {"selector": {"app": "vllm"}, "targetPortNumber": 8000}}
        assert pool_spec(item) == PoolSpec("app=vllm", (8000,))

    def test_labels_are_taken_by_the_keys_that_the_configuration_names(self) -> None:
        item = pod("p", {"nvidia.com/gpu.product": "H100", "tp": "4", "other": "x"})
        assert pod_labels(item, {"gpu": "nvidia.com/gpu.product", "tp": "tp", "role": "role"}) == {
            "gpu": "H100",
            "tp": "4",
        }


class TestMistakes:
    @pytest.mark.parametrize(
        ("read", "item", "mistake"),
        [
            (slice_endpoints, {"addressType": "IPv4", "endpoints": 3}, "endpoints: input should be a valid tuple"),
            (slice_endpoints, {"endpoints": []}, "addressType: field required"),
            (
                slice_endpoints,
                endpoint_slice("s", endpoint("vllm.example.org"), family="FQDN"),
                "addressType FQDN has no IP addresses; use a Service that selects pods",
            ),
            (slice_endpoints, endpoint_slice("s", endpoint("10.0.0.256")), "'10.0.0.256' is not an IP address"),
            (pod_seen, {"status": {"podIP": 7}}, "status.podIP: input should be a valid string"),
        ],
    )
    def test_are_named_in_one_line(self, read: Callable[..., object], item: dict[str, Any], mistake: str) -> None:
        with pytest.raises(ObjectError) as raised:
            read(item, None) if read is slice_endpoints else read(item, {})
        assert str(raised.value) == mistake

    def test_of_a_pool(self) -> None:
        with pytest.raises(ObjectError, match="spec needs a selector and targetPorts"):
            pool_spec(inference_pool("p", {}))
        with pytest.raises(ObjectError, match="spec: field required"):
            pool_spec({})

    JSON = st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["IPv4", "10.0.0.1", "x", ""]),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["metadata", "labels", "addressType", "endpoints", "addresses", "ports", "port", "conditions", "ready",
                 "status", "podIP", "spec", "selector", "matchLabels", "targetPorts", "number", "name", "targetRef"]
            ),
            inner,
            max_size=4,
        ),
        max_leaves=15,
    )  # fmt: skip

    @given(st.dictionaries(st.sampled_from(["metadata", "addressType", "endpoints", "ports", "status", "spec"]), JSON))
    def test_no_object_raises_anything_else(self, item: dict[str, Any]) -> None:
        for read in (lambda i: slice_endpoints(i, None), lambda i: pod_seen(i, {"a": "a"}), pool_spec):
            with suppress(ObjectError):
                read(item)
        with suppress(ObjectError):
            pod_labels(item, {"a": "a"})
