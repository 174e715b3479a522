"""Dashboard and alerts ask for series that exist, with labels that these have."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
import yaml

from extproc.app import App
from extproc.config import load, parse
from extproc.envoy import bootstrap, endpoints
from tests.deploy.support import DEPLOY, KUBERNETES, ROOT, tool
from tests.support.envoy import EnvoyProcess
from tests.support.ports import free_port

SUFFIXES = ("_bucket", "_sum", "_count")
EXPORTER = {"DCGM_FI_DEV_GPU_UTIL"}
"""Of NVIDIA's dcgm-exporter, which is not ours to check."""
VLLM_PAGE = (ROOT / "tests" / "fixtures" / "vllm-0.32" / "metrics_loaded_30req.txt").read_text()


def dashboard() -> Iterator[str]:
    for panel in json.loads((DEPLOY / "grafana" / "extproc.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]:
        yield from group["rules"]


def scalers() -> Iterator[str]:
    for path in (KUBERNETES / "components").rglob("*.yaml"):
        text = path.read_text()
        yield from re.findall(r"query: (.*)", text) + re.findall(r"metric: \{name: (\w+)", text)


def asked() -> set[str]:
    """Names of all series in dashboard, alerts and scalers."""
    expressions = [*dashboard(), *(rule["expr"] for rule in rules()), *scalers()]
    return {
        name for e in expressions for name in re.findall(r"\b(?:extproc|vllm:|envoy|DCGM)\w*_\w+(?=[\[{) ]|$)", bare(e))
    }


def bare(expression: str) -> str:
    """Without the labels, whose values may look like names."""
    return re.sub(r"\{[^}]*\}", "{}", re.sub(r"\b(by|on|group_left) ?\([^)]*\)", "", expression))


def base(name: str) -> str:
    return next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)


def documented() -> set[str]:
    return set(re.findall(r"^\| `(extproc_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))


def test_what_is_asked_of_extproc_is_on_its_page_of_metrics() -> None:
    names = {name for name in asked() if name.startswith("extproc_")}
    assert len(names) > 30
    known = documented()
    assert {name for name in names if name not in known and base(name) not in known} == set()


def test_what_is_asked_of_vllm_is_on_a_page_of_its() -> None:
    names = {name for name in asked() if name.startswith("vllm:")}
    assert names
    assert [name for name in names if f"\n{name}{{" not in VLLM_PAGE] == []


def test_nothing_else_is_asked() -> None:
    others = {n for n in asked() if not n.startswith(("extproc_", "vllm:", "envoy_"))}
    assert others == EXPORTER


@pytest.mark.envoy
async def test_what_is_asked_of_envoy_comes_through_its_status_port_and_nothing_else(tmp_path: Path) -> None:
    """The bootstrap of the sidecar, with the ports and paths of this machine."""
    config = load(KUBERNETES / "overlays" / "sidecar" / "extproc.yaml")
    admin, status = free_port(), free_port()
    moved = {
        "listen": f"127.0.0.1:{free_port()}",
        "admin": f"127.0.0.1:{admin}",
        "endpoints_file": tmp_path / "endpoints.json",
    }
    config = config.model_copy(update={"envoy": config.envoy.model_copy(update=moved)})
    endpoints.create_if_missing(config)
    rendered = bootstrap.render(config)
    more = (KUBERNETES / "base" / "status.yaml").read_text().replace("9901", str(admin)).replace("9902", str(status))
    async with (
        EnvoyProcess(rendered, args=("--config-yaml", more.replace("0.0.0.0", "127.0.0.1"))),
        aiohttp.ClientSession(f"http://127.0.0.1:{status}") as http,
    ):
        async with http.get("/ready") as ready, http.get("/stats/prometheus") as page:
            assert (ready.status, page.status) == (200, 200)
            served = set(re.findall(r"^# TYPE (\w+)", await page.text(), re.MULTILINE))
        async with (
            http.post("/quitquitquit") as quit_,
            http.post("/stats/prometheus") as post,
            http.get("/config_dump") as dump,
        ):
            assert [quit_.status, post.status, dump.status] == [404, 404, 404]
    names = {name for name in asked() if name.startswith("envoy_")}
    assert len(names) >= 2
    assert names - served == set()
    kept = yaml.safe_load_all((KUBERNETES / "components" / "monitoring" / "podmonitors.yaml").read_text())
    regex = next(kept)["spec"]["podMetricsEndpoints"][1]["metricRelabelings"][0]["regex"]
    assert [name for name in names if not re.fullmatch(regex, name)] == []


# --- labels -----------------------------------------------------------------------------------------------------------


def labels() -> dict[str, set[str]]:
    """Labels of each series of extproc, from the code that registers them."""
    config = parse("pools: [{replicas: ['127.0.0.1:1']}]")
    app = App(config, rng=Random(1))
    declared: dict[str, set[str]] = {}
    for collector in list(app.registry._collector_to_names):
        if (names := getattr(collector, "_labelnames", None)) is not None:
            declared[str(getattr(collector, "_name", ""))] = set(names)
    for family in app.registry.collect():
        for sample in family.samples:
            declared.setdefault(family.name, set()).update(set(sample.labels) - {"le"})
    return declared


OF_PROMETHEUS = {"le", "instance", "job", "namespace", "pod"}


def test_expressions_name_labels_that_the_series_have() -> None:
    known = labels()
    for expression in [*dashboard(), *(rule["expr"] for rule in rules())]:
        series = {base(n).removesuffix("_total") for n in re.findall(r"\bextproc_\w+", bare(expression))}
        grouped = {g.strip() for found in re.findall(r"\bby ?\(([^)]*)\)", expression) for g in found.split(",")}
        matched = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|=)", expression))
        for one in series & set(known):
            if one.startswith("extproc_loop_stalls"):
                continue  # its labels come with its first stall
            wanted = (grouped | (matched if len(series) == 1 else set())) - OF_PROMETHEUS
            assert wanted <= known[one], f"{one}: {wanted - known[one]} in {expression}"


async def test_the_count_of_discovery_errors_is_there_before_the_first() -> None:
    """A series that begins with 1 has not increased, and no alert would fire on what is wrong from the start."""
    app = App(
        parse(
            f"{{listen: {{grpc: '127.0.0.1:{free_port()}', http: '127.0.0.1:{free_port()}'}}, pools: [{{replicas: ['127.0.0.1:1']}}]}}"
        )
    )
    await app.start()
    try:
        assert app.registry.get_sample_value("extproc_discovery_errors_total", {"pool": "default"}) == 0.0
    finally:
        await app.stop(grace_s=0)


# --- Prometheus' own word ---------------------------------------------------------------------------------------------


def promtool(*arguments: str) -> None:
    found = tool("promtool", "it comes with Prometheus, and checks rules and expressions")
    done = subprocess.run([found, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_alerts() -> None:
    promtool("check", "rules", str(DEPLOY / "prometheus" / "alerts.yaml"))


def test_alerts_fire_on_what_they_are_for_and_on_nothing_else() -> None:
    promtool("test", "rules", str(DEPLOY / "prometheus" / "alerts_test.yaml"))


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    for path in (DEPLOY / "compose" / "prometheus.yaml", DEPLOY / "prometheus" / "alerts.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    promtool("check", "config", str(tmp_path / "prometheus.yaml"))


def test_prometheus_takes_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    filled = [
        e.replace("$__rate_interval", "5m").replace("$pool", ".*").replace("$replica_hour", "2.5")
        for e in [*dashboard(), *scalers()]
    ]
    recorded = [{"record": f"panel_{i}", "expr": e} for i, e in enumerate(filled)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    promtool("check", "rules", str(tmp_path / "panels.yaml"))


def test_each_severity_but_info_has_somebody_who_is_told() -> None:
    manager = yaml.safe_load((DEPLOY / "prometheus" / "alertmanager.yaml").read_text())
    receivers = {each["name"]: each for each in manager["receivers"]}
    told = {m: receivers[r["receiver"]] for r in manager["route"]["routes"] for m in r["matchers"]}
    assert set(told) == {f'severity = "{rule["labels"]["severity"]}"' for rule in rules()} - {'severity = "info"'}
    assert all(len(receiver) > 1 for receiver in told.values())
    patterns = [
        re.search(r'"(.*)"', text)[1]  # type: ignore[index]
        for rule in manager["inhibit_rules"]
        for text in (*rule["source_matchers"], *rule["target_matchers"])
    ]
    names = {rule["alert"] for rule in rules()}
    assert [p for p in patterns if not any(re.fullmatch(p, name) for name in names)] == []


def test_alertmanager_takes_its_configuration() -> None:
    found = tool("amtool", "it comes with Debian's prometheus-alertmanager")
    path = DEPLOY / "prometheus" / "alertmanager.yaml"
    done = subprocess.run([found, "check-config", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_say_how_bad_and_what() -> None:
    listed = list(rules())
    assert len(listed) == len({rule["alert"] for rule in listed}) > 15
    for rule in listed:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"]


def test_every_alert_that_operations_names_is_there() -> None:
    """Series under "What to alert on" of docs/operations.md."""
    page = (ROOT / "docs" / "operations.md").read_text()
    section = page.partition("## What to alert on")[2].partition("\n## ")[0]
    named = {base(n) for n in re.findall(r"`[^`]*?(extproc_\w+)", section)} - {"extproc_replica_hit_trust_ratio"}
    in_rules = {base(n) for rule in rules() for n in re.findall(r"extproc_\w+", rule["expr"])}
    assert len(named) > 8
    assert named - in_rules == set()


# --- the dashboard ----------------------------------------------------------------------------------------------------


def test_panels_do_not_overlap_and_have_targets() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in json.loads((DEPLOY / "grafana" / "extproc.json").read_text())["panels"]:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        assert panel["type"] == "row" or panel["targets"]
        cells |= mine
