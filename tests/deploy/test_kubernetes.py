"""The Kubernetes objects, as kustomize builds them: by their schemas, that they refer to each other rightly, and that their times add up."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import ValidationError

from extproc.cli import main
from extproc.config import Scaling, load
from extproc.envoy import bootstrap
from tests.deploy import schemas
from tests.deploy.support import (
    COMPONENTS,
    DEPLOY,
    OVERLAYS,
    ROOT,
    Built,
    Json,
    built,
    config_maps,
    containers,
    objects,
    tool,
)
from tests.deploy.test_compose import bootstrap_and_status

WAYS = [(overlay, component) for overlay in OVERLAYS for component in ("", *COMPONENTS)]


@pytest.fixture(params=WAYS, ids=lambda way: "+".join(filter(None, way)))
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Built:
    overlay, component = request.param
    return built(overlay, component, at=tmp_path) if component else built(overlay)


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Built:
    return built(request.param)


# --- schemas ----------------------------------------------------------------------------------------------------------

SHAPES = {
    "InferencePool": ("inference.networking.k8s.io/v1", ["selector.matchLabels", "targetPorts", "endpointPickerRef.name", "endpointPickerRef.port.number"]),
    "GatewayClass": ("gateway.networking.k8s.io/v1", ["controllerName"]),
    "Gateway": ("gateway.networking.k8s.io/v1", ["gatewayClassName", "listeners"]),
    "HTTPRoute": ("gateway.networking.k8s.io/v1", ["parentRefs", "rules"]),
    "PodMonitor": ("monitoring.coreos.com/v1", ["selector", "podMetricsEndpoints"]),
    "PrometheusRule": ("monitoring.coreos.com/v1", ["groups"]),
    "ScaledObject": ("keda.sh/v1alpha1", ["scaleTargetRef.name", "triggers"]),
}  # fmt: skip
"""Kinds that Kubernetes itself does not have: version, and what their spec must have. Their schemas are in no package that works offline."""


def test_kinds_of_kubernetes_are_by_its_schema(way: Built) -> None:
    for each in way.objects:
        if each["kind"] not in SHAPES:
            schemas.validate(each)


@pytest.mark.parametrize(
    ("path", "value", "mistake"),
    [
        (["replicas"], "2", "'2' is not of type"),
        (["template", "spec", "terminationGracePeriod"], 5, "'terminationGracePeriod' was unexpected"),
        (["template", "spec", "containers", 0, "name"], None, "None is not of type 'string'"),
        (["template", "spec", "containers", 0, "livenessProbe", "httpGet", "path"], 7, "7 is not of type"),
        (["selector"], {}, ""),
    ],
)
def test_the_schemas_notice_mistakes(path: list[Any], value: Any, mistake: str) -> None:
    deployment = deepcopy(built("sidecar").one("Deployment", "extproc"))
    inner = deployment["spec"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValidationError, match=mistake) if mistake else nullcontext():
        schemas.validate(deployment)
    with pytest.raises(LookupError, match="no schema of deployment-apps-v2"):
        schemas.validate({**deployment, "apiVersion": "apps/v2"})


def test_kinds_of_others_have_what_they_must(way: Built) -> None:
    for each in way.of(*SHAPES):
        version, required = SHAPES[each["kind"]]
        assert each["apiVersion"] == version
        assert [path for path in required if at(each["spec"], path) is None] == [], each["kind"]


def at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


# --- references -------------------------------------------------------------------------------------------------------


def selects(selector: Json, labels: Json) -> bool:
    return selector.items() <= labels.items()


def test_selectors_find_pods(way: Built) -> None:
    pods = [template["metadata"]["labels"] for _, template in way.pods()]
    selectors = [(o, o["spec"]["selector"]) for o in way.of("Service")]
    selectors += [
        (o, o["spec"]["selector"]["matchLabels"])
        for o in way.of("PodDisruptionBudget", "PodMonitor", "InferencePool", "Deployment")
    ]
    selectors += [(o, o["spec"]["podSelector"]["matchLabels"]) for o in way.of("NetworkPolicy")]
    assert selectors
    assert [o["metadata"]["name"] for o, selector in selectors if not any(selects(selector, p) for p in pods)] == []


def test_services_and_monitors_name_ports_that_pods_have(way: Built) -> None:
    for service in way.of("Service"):
        found = ports(way, service["spec"]["selector"], sidecars=False)
        numbers = {p["containerPort"] for p in ports(way, service["spec"]["selector"]).values()}
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= set(found) | numbers
    for monitor in way.of("PodMonitor"):
        named = ports(way, monitor["spec"]["selector"]["matchLabels"])
        assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= set(named)


def ports(way: Built, selector: Json, *, sidecars: bool = True) -> dict[str, Json]:
    """The ports of the pods selected by their names, which a Service does not find in sidecars before Kubernetes 1.32."""
    return {
        port["name"]: port
        for _, template in way.pods()
        if selects(selector, template["metadata"]["labels"])
        for container in (containers(template) if sidecars else template["spec"]["containers"])
        for port in container.get("ports", ())
    }


def test_probes_name_ports_of_their_container(way: Built) -> None:
    for _, template in way.pods():
        for container in containers(template):
            named = {p["name"] for p in container.get("ports", ())}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(kind, {})
                asked = probe.get("httpGet") or probe.get("tcpSocket")
                assert asked is None or asked["port"] in named


def test_what_pods_mount_and_read_is_there(way: Built) -> None:
    maps = config_maps(way)
    for _, template in way.pods():
        volumes = template["spec"].get("volumes", ())
        assert {v["configMap"]["name"] for v in volumes if "configMap" in v} <= set(maps)
        for container in containers(template):
            assert {m["name"] for m in container.get("volumeMounts", ())} <= {v["name"] for v in volumes}
            for variable in container.get("env", ()):
                if ref := variable.get("valueFrom", {}).get("configMapKeyRef"):
                    assert ref["key"] in maps[ref["name"]]


def test_routers_run_as_an_account_that_may_look_and_nothing_else(overlay: Built) -> None:
    account = dict(overlay.pods())["extproc"]["spec"]["serviceAccountName"]
    assert overlay.one("ServiceAccount", account)
    bound = [b for b in overlay.of("RoleBinding") if any(s["name"] == account for s in b["subjects"])]
    assert bound
    rules = [rule for role in overlay.of("Role") for rule in role["rules"]]
    assert {verb for rule in rules for verb in rule["verbs"]} <= {"get", "list", "watch"}
    assert not [rule for rule in rules if "*" in [*rule["resources"], *rule["apiGroups"], *rule["verbs"]]]
    assert not overlay.of("ClusterRole", "ClusterRoleBinding")


def test_scalers_scale_something_that_is_there(way: Built) -> None:
    for scaler in way.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        assert way.one(target["kind"], target["name"])
        for trigger in scaler["spec"].get("triggers", ()):
            if (address := trigger["metadata"].get("scalerAddress")) is not None:
                name, _, port = address.partition(".llm.svc:")
                assert int(port) in {p["port"] for p in way.one("Service", name)["spec"]["ports"]}


def test_scalers_add_no_cooldowns_or_steps_to_those_of_extproc(way: Built) -> None:
    """A minute apart where KEDA asks one router, and may come to ask another."""
    rule = Scaling()
    for scaler in way.of("HorizontalPodAutoscaler", "ScaledObject"):
        spec = scaler["spec"]
        behavior = spec.get("behavior") or spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        one_router = any(t["type"] == "external-push" for t in spec.get("triggers", ()))
        down_s = behavior["scaleDown"]["stabilizationWindowSeconds"]
        assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
        assert down_s == (60 if one_router else 0) < rule.down_cooldown_s
        for way_of, step in (("scaleUp", rule.max_step_up), ("scaleDown", rule.max_step_down)):
            (policy,) = behavior[way_of]["policies"]
            assert policy["type"] == "Pods"
            assert policy["value"] >= step
            assert policy["periodSeconds"] <= rule.interval_s


def test_everything_is_in_one_namespace(way: Built) -> None:
    for each in way.objects:
        if each["kind"] not in ("Namespace", "GatewayClass"):
            assert each["metadata"]["namespace"] == "llm", each["kind"]


# --- what may be done with them ---------------------------------------------------------------------------------------


def test_containers_may_do_no_more_than_they_must(way: Built) -> None:
    for name, template in way.pods():
        for container in containers(template):
            security = {**template["spec"].get("securityContext", {}), **container.get("securityContext", {})}
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            if name != "vllm":  # its image wants root and a home that it can write to
                assert security["runAsNonRoot"] is True
                assert security["readOnlyRootFilesystem"] is True


def test_containers_have_bounds_and_images_a_version(way: Built) -> None:
    for _, template in way.pods():
        for container in containers(template):
            assert "memory" in container["resources"]["limits"]
            assert re.search(r":v?\d+\.\d+\.\d+", container["image"]), container["image"]


def test_the_unauthenticated_ports_are_closed_to_all_but_a_few(way: Built) -> None:
    """extproc's HTTP port and the replicas: no rule without a sender."""
    for policy in way.of("NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            if {p["port"] for p in rule["ports"]} != {10000}:
                assert rule.get("from"), policy["metadata"]["name"]
    policies = [
        p
        for p in way.of("NetworkPolicy")
        if p["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/name"] == "extproc"
    ]
    senders = [s for p in policies for r in p["spec"]["ingress"] if {"port": 9003} in r["ports"] for s in r["from"]]
    assert len(senders) == 2, "the replicas, and Prometheus"


def test_a_spot_pool_has_no_budget_that_could_stop_a_notice(tmp_path: Path) -> None:
    spot = built("sidecar", "spot", at=tmp_path)
    assert [b["metadata"]["name"] for b in spot.of("PodDisruptionBudget")] == ["extproc"]


# --- times ------------------------------------------------------------------------------------------------------------


def argument(container: Json, name: str) -> float:
    words = [*container.get("command", ()), *container.get("args", ())]
    for i, word in enumerate(words):
        if word == name:
            return float(words[i + 1])
        if word.startswith(f"{name}="):
            return float(word.partition("=")[2])
    raise LookupError(name)


def variable(container: Json, name: str) -> float:
    return float(next(v["value"] for v in container["env"] if v["name"] == name))


def test_envoy_and_then_extproc_have_the_time_they_need(overlay: Built) -> None:
    spec = dict(overlay.pods())["extproc"]["spec"]
    envoy, extproc = spec["containers"][0], spec["initContainers"][0]
    assert extproc["restartPolicy"] == "Always", "a sidecar: it ends after Envoy"
    grace_s = own_config(overlay)["shutdown_grace_s"]
    assert argument(envoy, "--drain-time-s") == variable(envoy, "DRAIN_S") < variable(envoy, "LIMIT_S")
    assert variable(envoy, "LIMIT_S") + grace_s < spec["terminationGracePeriodSeconds"]


def own_config(way: Built) -> Json:
    config: Json = yaml.safe_load(way.one("ConfigMap", "extproc")["data"]["extproc.yaml"])
    return config


@pytest.mark.parametrize("component", ["", "spot"])
def test_a_replica_drains_and_stops_before_it_is_killed(component: str, tmp_path: Path) -> None:
    way = built("sidecar", component, at=tmp_path) if component else built("sidecar")
    spec = dict(way.pods())["vllm"]["spec"]
    vllm = spec["containers"][0]
    drain = {"command": vllm["lifecycle"]["preStop"]["exec"]["command"]}
    total = argument(drain, "--within") + argument(vllm, "--shutdown-timeout")
    assert total < spec["terminationGracePeriodSeconds"]
    if component:
        assert spec["terminationGracePeriodSeconds"] < 120, "a notice comes two minutes before the end"


def test_replicas_and_routers_do_not_go_all_at_once(overlay: Built) -> None:
    assert {b["metadata"]["name"]: b["spec"]["maxUnavailable"] for b in overlay.of("PodDisruptionBudget")} == {
        "extproc": 1,
        "vllm": 1,
    }


def test_tensor_parallel_size_gpus_and_label_agree(overlay: Built) -> None:
    template = dict(overlay.pods())["vllm"]
    vllm = template["spec"]["containers"][0]
    size = argument(vllm, "--tensor-parallel-size")
    assert size == float(vllm["resources"]["limits"]["nvidia.com/gpu"]) == float(template["metadata"]["labels"]["tp"])


def test_no_pool_at_zero_keeps_a_router_from_starting(tmp_path: Path) -> None:
    for component, probe in (("keda-prometheus", "/readyz"), ("keda-external", "/livez")):
        directory = tmp_path / component
        directory.mkdir()
        way = built("sidecar", component, at=directory)
        spec = dict(way.pods())["extproc"]["spec"]
        scaled = way.one("ScaledObject", "vllm")["spec"]
        assert (scaled["minReplicaCount"] == 0) == (probe == "/livez")
        assert spec["initContainers"][0]["startupProbe"]["httpGet"]["path"] == probe


# --- the files inside -------------------------------------------------------------------------------------------------


def test_extproc_takes_its_configuration(overlay: Built, tmp_path: Path) -> None:
    path = tmp_path / "extproc.yaml"
    path.write_text(overlay.one("ConfigMap", "extproc")["data"]["extproc.yaml"])
    checked = CliRunner().invoke(main, ["check", "--config", str(path)])
    assert checked.exit_code == 0, checked.output


def test_members_come_from_what_is_there(overlay: Built, tmp_path: Path) -> None:
    path = tmp_path / "extproc.yaml"
    path.write_text(overlay.one("ConfigMap", "extproc")["data"]["extproc.yaml"])
    source = load(path).pools[0].discovery
    assert source is not None
    if source.kubernetes is not None:
        service = overlay.one("Service", source.kubernetes.service or "")
        assert source.kubernetes.port in {p["name"] for p in service["spec"]["ports"]}
        key, _, value = (source.kubernetes.pod_selector or "").partition("=")
        assert service["spec"]["selector"][key] == value
    else:
        assert source.inference_pool is not None
        assert overlay.one("InferencePool", source.inference_pool.name)


def test_routers_share_a_redis_that_is_there(overlay: Built) -> None:
    url = urlsplit(own_config(overlay)["shared"]["url"])
    assert url.port in {p["port"] for p in overlay.one("Service", url.hostname or "")["spec"]["ports"]}


def test_extproc_writes_where_envoy_looks(overlay: Built) -> None:
    config, spec = own_config(overlay), dict(overlay.pods())["extproc"]["spec"]
    bootstrap_file = overlay.one("ConfigMap", "envoy")["data"]["envoy.yaml"]
    paths = [config["listen"]["grpc"].removeprefix("unix:"), config["envoy"]["endpoints_file"]]
    written = {m["mountPath"] for m in spec["initContainers"][0]["volumeMounts"] if not m.get("readOnly")}
    read = {m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
    assert paths[0] in bootstrap_file
    for path in paths:
        assert str(Path(path).parent) in written
        assert path not in bootstrap_file or str(Path(path).parent) in read


@pytest.mark.envoy
def test_envoy_takes_its_files(overlay: Built, tmp_path: Path) -> None:
    """With the directories of the pod moved to where they can be, and a certificate of a minute ago."""
    data = overlay.one("ConfigMap", "envoy")["data"]["envoy.yaml"]
    for directory in ("/var/lib/extproc", "/run/extproc", "/etc/extproc-tls"):
        (tmp_path / directory.strip("/")).mkdir(parents=True)
        data = data.replace(directory, str(tmp_path / directory.strip("/")))
    (tmp_path / "var/lib/extproc/endpoints.json").write_text('{"version_info": "1", "resources": []}')
    if "extproc-tls" in data:
        certificate(tmp_path / "etc/extproc-tls")
    (tmp_path / "envoy.yaml").write_text(data)
    bootstrap_and_status(tmp_path / "envoy.yaml", overlay.one("ConfigMap", "envoy-status")["data"]["status.yaml"])


def certificate(directory: Path) -> None:
    openssl = tool("openssl", "it makes the certificate of the picker")
    made = ["-subj", "/CN=extproc-picker", "-keyout", str(directory / "tls.key"), "-out", str(directory / "tls.crt")]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *made]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.mark.envoy
def test_a_mistake_in_them_would_be_noticed(tmp_path: Path) -> None:
    data = built("sidecar").one("ConfigMap", "envoy-status")["data"]["status.yaml"]
    (tmp_path / "status.yaml").write_text(data.replace("virtual_hosts", "virtual_host"))
    with pytest.raises(bootstrap.BootstrapError, match="virtual_host"):
        bootstrap.validate(tmp_path / "status.yaml")


def routes(way: Built) -> Iterator[Json]:
    status = yaml.safe_load(way.one("ConfigMap", "envoy-status")["data"]["status.yaml"])
    for listener in status["static_resources"]["listeners"]:
        for manager in listener["filter_chains"][0]["filters"]:
            for host in manager["typed_config"]["route_config"]["virtual_hosts"]:
                yield from host["routes"]


def test_nothing_of_envoys_admin_interface_is_shown_but_two_pages(overlay: Built) -> None:
    shown = [r["match"] for r in routes(overlay) if r["route"]["cluster"] == "admin"]
    assert {match["path"] for match in shown} == {"/ready", "/stats/prometheus"}
    assert all(match["headers"][0]["string_match"] == {"exact": "GET"} for match in shown)


def test_a_scaler_may_keep_its_stream_open_while_nothing_changes(overlay: Built) -> None:
    """Envoy ends a stream that is silent for five minutes, unless its route says otherwise; KEDA comes back late then."""
    (route,) = (r["route"] for r in routes(overlay) if "externalscaler" in str(r["match"]))
    assert route == {"cluster": "extproc", "timeout": "0s", "idle_timeout": "0s"}


def test_the_overlay_that_the_page_shows_builds(tmp_path: Path) -> None:
    """With its two files beside it, and the repository where it is."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "kind: Kustomization" in b)
    (tmp_path / "kustomization.yaml").write_text(
        block.replace("extproc/deploy/", f"{os.path.relpath(DEPLOY, tmp_path)}/")
    )
    (tmp_path / "extproc.yaml").write_text("pools: []\n")
    (tmp_path / "envoy.yaml").write_text("admin: {}\n")
    way = Built("docs", objects(str(tmp_path)))
    assert way.one("ConfigMap", "extproc")["data"]["extproc.yaml"] == "pools: []\n"
    pods = dict(way.pods())
    assert pods["extproc"]["spec"]["initContainers"][0]["image"] == "YOUR-REGISTRY/extproc:0.1.0"
    assert pods["vllm"]["spec"]["containers"][0]["args"][0] == "Qwen/Qwen3-32B"
