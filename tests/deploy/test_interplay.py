"""deploy/interplay: built as the other ways of deploying are, held to the same rules, and that what they select is what the others make."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from extproc.adapters.discovery.kube_objects import pool_spec
from extproc.config import load
from tests.deploy import schemas
from tests.deploy import test_kubernetes as same
from tests.deploy.support import DEPLOY, ROOT, Built, built, objects

INTERPLAY = DEPLOY / "interplay"
SYSTEMS = sorted(path.name for path in INTERPLAY.iterdir() if path.is_dir())
PICKERS = ("ai-gateway", "llm-d")

OTHERS = {
    "AIGatewayRoute": ("aigateway.envoyproxy.io/v1beta1", ["parentRefs", "rules"]),
    "ClientTrafficPolicy": ("gateway.envoyproxy.io/v1alpha1", ["targetRefs", "connection.bufferLimit"]),
}
"""Kinds of others that only these have. As in `same.SHAPES`: version, and what must be there, by their documentation; no schema of them is at hand."""


def system(name: str) -> Built:
    return Built(name, objects(str(INTERPLAY / name)))


@pytest.fixture(params=SYSTEMS)
def overlay(request: pytest.FixtureRequest) -> Built:
    return system(request.param)


@pytest.fixture
def way(overlay: Built) -> Built:
    return overlay


# What holds for every way of deploying, with the fixtures of this module.
test_probes_name_ports = same.test_probes_name_ports_of_their_container
test_services_name_ports = same.test_services_and_monitors_name_ports_that_pods_have
test_mounts_are_there = same.test_what_pods_mount_and_read_is_there
test_account = same.test_routers_run_as_an_account_that_may_look_and_nothing_else
test_one_namespace = same.test_everything_is_in_one_namespace
test_security = same.test_containers_may_do_no_more_than_they_must
test_bounds = same.test_containers_have_bounds_and_images_a_version
test_ends = same.test_envoy_and_then_extproc_have_the_time_they_need
test_extproc_checks = same.test_extproc_takes_its_configuration
test_redis = same.test_routers_share_a_redis_that_is_there
test_paths_agree = same.test_extproc_writes_where_envoy_looks
test_envoy_validates = same.test_envoy_takes_its_files


def test_kinds_are_by_their_schemas(overlay: Built) -> None:
    for each in overlay.objects:
        if (shape := {**same.SHAPES, **OTHERS}.get(each["kind"])) is None:
            schemas.validate(each)
            continue
        assert each["apiVersion"] == shape[0]
        assert [path for path in shape[1] if same.at(each["spec"], path) is None] == [], each["kind"]


def test_the_systems_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "interplay.md").read_text()
    assert [name for name in SYSTEMS if f"deploy/interplay/{name}" not in page] == []
    assert SYSTEMS == ["ai-gateway", "dynamo", "llm-d", "production-stack"]


@pytest.mark.parametrize("name", ["llm-d", "production-stack", "dynamo"])
def test_model_servers_of_others_are_theirs_and_so_is_who_reaches_them(name: str) -> None:
    way = system(name)
    assert dict(way.pods()).keys() == {"extproc", "redis"}
    assert "vllm" not in {o["metadata"]["name"] for o in way.of("Service", "NetworkPolicy", "PodDisruptionBudget")}


@pytest.mark.parametrize(("name", "ours"), [("ai-gateway", 1), ("dynamo", 1), ("llm-d", 0), ("production-stack", 0)])
def test_a_namespace_that_others_made_is_left_as_it_is(name: str, ours: int) -> None:
    """Ours enforces a level of pod security that model servers with RDMA, for one, do not meet: their next start would fail."""
    assert len(system(name).of("Namespace")) == ours


@pytest.mark.parametrize("name", PICKERS)
def test_the_pool_has_extproc_as_its_picker(name: str) -> None:
    way = system(name)
    (pool,) = way.of("InferencePool")
    ref = pool["spec"]["endpointPickerRef"]
    ports = {p["port"] for p in way.one("Service", ref["name"])["spec"]["ports"]}
    assert ref["port"]["number"] in ports
    assert pool["metadata"]["name"] == same.own_config(way)["pools"][0]["discovery"]["inference_pool"]["name"]
    assert same.own_config(way)["envoy"]["endpoints"] == 1


def test_llm_ds_pool_selects_its_model_servers_and_their_roles_are_read() -> None:
    way = system("llm-d")
    (pool,) = way.of("InferencePool")
    assert pool_spec(pool).selector == "llm-d.ai/inference-serving=true,llm-d.ai/model=qwen3-32b"
    config = load(INTERPLAY / "llm-d" / "extproc.yaml")
    discovery = config.pools[0].discovery
    assert discovery is not None
    assert discovery.inference_pool is not None
    assert discovery.inference_pool.pod_labels["role"] == "llm-d.ai/role"
    assert config.requests.objectives


def test_the_route_of_ai_gateway_leads_to_the_pool() -> None:
    way = system("ai-gateway")
    route = way.one("AIGatewayRoute", "llm")["spec"]
    assert {p["name"] for p in route["parentRefs"]} == {g["metadata"]["name"] for g in way.of("Gateway")}
    refs = [ref for rule in route["rules"] for ref in rule["backendRefs"]]
    assert {(r["kind"], r["name"]) for r in refs} == {("InferencePool", "llm")}
    assert not way.of("HTTPRoute"), "its controller makes one"


def test_the_production_stack_is_found_by_what_its_chart_makes() -> None:
    """Chart 0.1.9: the Service is RELEASE-MODEL-engine-service, its port service-port, its pods have the labels model and helm-release-name."""
    discovery = yaml.safe_load((INTERPLAY / "production-stack" / "extproc.yaml").read_text())["pools"][0]["discovery"]
    asked: dict[str, Any] = discovery["kubernetes"]
    assert asked["port"] == "service-port"
    labels = dict(pair.split("=") for pair in asked["pod_selector"].split(","))
    assert asked["service"] == f"{labels['helm-release-name']}-{labels['model']}-engine-service"


def test_nothing_of_the_base_is_left_out_by_mistake() -> None:
    """A patch that deletes an object which is not there fails the build; one that should be there and is not shows here."""
    here = {(o["kind"], o["metadata"]["name"]) for o in built("endpoint-picker").objects if o["kind"] != "ConfigMap"}
    there = {(o["kind"], o["metadata"]["name"]) for o in system("ai-gateway").objects if o["kind"] != "ConfigMap"}
    assert here - there == {("HTTPRoute", "llm")}
    assert there - here == {("AIGatewayRoute", "llm"), ("ClientTrafficPolicy", "llm")}
