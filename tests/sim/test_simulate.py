"""The command, from the options to the table and the files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from extproc.cli import main
from extproc.core.types import End
from extproc.sim.cluster import Served
from extproc.sim.plot import _thinned
from extproc.sim.simulate_report import Slo, tpot_s

SMALL = ("--generate", "sessions=20", "--replica", "count=2")


def simulate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)])


def mooncake(directory: Path, requests: int = 40) -> Path:
    path = directory / "trace.jsonl"
    rows = (
        {"timestamp": i * 100, "input_length": 3000, "output_length": 20, "hash_ids": [0, 1, 2, 3, 4, 100 + i]}
        for i in range(requests)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def document(*arguments: object, path: Path) -> dict[str, Any]:
    result = simulate(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_policies_stand_side_by_side(tmp_path: Path) -> None:
    result = simulate("--trace", mooncake(tmp_path), "--policy", "predicted", "--policy", "round_robin")
    assert result.exit_code == 0, result.output
    assert re.search(r"mooncake: 40 requests on 8 replicas", result.output)
    assert re.search(r"predicted +round_robin", result.output)
    for row in ("TTFT p99, ms", "end to end mean, ms", "TPOT mean, ms", "queue mean, ms", "goodput", "makespan, s"):
        assert re.search(rf"{row} +[\d.,%]+ +[\d.,%]+", result.output), row
    assert re.search(r"h100 tp1 10\.0\.0\.8 +\d+ ", result.output)


def test_the_summary_has_every_figure(tmp_path: Path) -> None:
    runs = document("--trace", mooncake(tmp_path), "--policy", "predicted", path=tmp_path / "out.json")["runs"]
    run = runs["predicted"]
    assert (run["requests"], run["failed"], run["ends"]) == (40, 0, {"ok": 40})
    assert run["goodput_share"] == 1.0
    assert 0 < run["ttft_p50_s"] <= run["ttft_p90_s"] <= run["ttft_p99_s"] < run["e2e_p99_s"]
    assert 0.3 < run["prefix_hit_actual"] < 0.9
    assert sum(r["requests"] for r in run["replicas"].values()) == 40
    assert all(0 <= r["busy_share"] <= 1 for r in run["replicas"].values())


def test_limits_and_speed_change_what_is_replayed(tmp_path: Path) -> None:
    trace, out = mooncake(tmp_path), tmp_path / "out.json"
    options = ("--trace", trace, "--policy", "round_robin")
    whole = document(*options, path=out)["runs"]["round_robin"]
    faster = document(*options, "--speed-up", 4, path=out)["runs"]["round_robin"]
    assert document(*options, "--limit", 7, path=out)["requests"] == 7
    assert faster["makespan_s"] < 0.5 * whole["makespan_s"]


def test_the_same_seed_writes_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    def written(name: str, hash_seed: str) -> tuple[bytes, bytes]:
        out, log = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        command = "from extproc.cli import main; main()"
        options = (*SMALL, "--policy", "predicted", "--policy", "random", "--event", "3:1:dies", "--routers", "2")
        files = ("--json", str(out), "--log", str(log))
        subprocess.run(
            [sys.executable, "-c", command, "simulate", *options, *files],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            timeout=60,
        )
        return re.sub(rb'"(wall_s|speed)": [\d.]+', b"", out.read_bytes()), log.read_bytes()

    assert written("one", "0") == written("two", "1")


def test_the_log_has_each_request_of_each_run(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert simulate("--trace", mooncake(tmp_path), "--policy", "random", "--log", log).exit_code == 0
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(row["turn"] for row in rows) == list(range(40))
    assert {(row["policy"], row["end"]) for row in rows} == {("random", "ok")}


def test_a_policy_may_have_options(tmp_path: Path) -> None:
    text = "session_affinity:load_factor=2.5"
    assert list(document(*SMALL, "--policy", text, path=tmp_path / "o.json")["runs"]) == [text]


def test_the_demos_fleet_can_be_simulated(tmp_path: Path) -> None:
    runs = document("--generate", "sessions=5", "--fleet", "deploy/demo.yaml", path=tmp_path / "o.json")["runs"]
    labels = [(r["labels"]["gpu"], r["labels"]["tp"]) for r in runs["predicted"]["replicas"].values()]
    assert labels == [("h100", "1"), ("h100", "1"), ("a100", "1"), ("h100", "4")]


def test_curves_are_written_into_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    page = tmp_path / "plot.html"
    assert simulate(*SMALL, "--policy", "predicted", "--policy", "random", "--plot", page).exit_code == 0
    text = page.read_text()
    assert text.count("<svg") == 4  # two distributions, and the replicas' load under each policy
    assert text.count("<polyline") == 2 + 2 + 2 * 2
    assert "nan" not in text
    assert "http" not in text


def test_a_curve_is_thinned_to_what_can_be_seen() -> None:
    curve = [(float(i), 1.0) for i in range(10_000)]
    thin = _thinned(curve)
    assert len(thin) <= 301
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either --trace PATH or --generate OPTIONS"),
        (("--generate", "", "--trace", "x"), "give either"),
        (("--trace", "/nowhere"), "kvcache-ai/Mooncake"),
        (("--generate", "sessions=x"), "--generate: sessions"),
        ((*SMALL, "--policy", "best"), "no policy is called 'best'"),
        ((*SMALL, "--policy", "predicted:x=1"), "has no option 'x'"),
        ((*SMALL, "--event", "1:9:dies"), "replica 9 is not there"),
        ((*SMALL, "--event", "dies"), "is not T:replica:what"),
        ((*SMALL, "--plot", "x.png"), "only HTML"),
        ((*SMALL, "--json", "/nowhere/x.json"), "/nowhere is no directory"),
        ((*SMALL, "--block-size", "48"), "--block-size 48 does not divide"),
        ((*SMALL, "--speed-up", "0"), "--speed-up must be above 0"),
        ((*SMALL, "--fleet", "/nowhere.yaml"), "/nowhere.yaml: No such file"),
        ((*SMALL, "--model-size", "70b"), "raise tp"),
    ],
)
def test_mistakes_end_with_a_line_that_says_what_to_do(arguments: tuple[str, ...], said: str) -> None:
    result = simulate(*arguments)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"ttft_s": 2.1, "e2e_s": 3.0}, False),
        ({"e2e_s": 10.0}, False),
        ({"end": End.TIMEOUT}, False),
        ({"output_tokens": 1, "e2e_s": 1.0}, True),
    ],
)
def test_goodput_wants_both_limits_and_a_whole_answer(changes: dict[str, Any], good: bool) -> None:
    fields: dict[str, Any] = {"end": End.OK, "ttft_s": 1.0, "e2e_s": 2.0, "output_tokens": 101}
    rest: dict[str, Any] = {
        "turn": 0,
        "arrived_s": 0.0,
        "router": 0,
        "replica": "r",
        "attempts": 1,
        "status": 200,
        "reason": "cost",
        "queue_s": 0.0,
        "prompt_tokens": 10,
        "cached_tokens": 0,
        "predicted_cached_tokens": 0,
        "predicted_ttft_s": 1.0,
    }
    served = Served(**rest, **(fields | changes))
    assert Slo(ttft_s=2.0, tpot_s=0.025).met(served) is good
    if not changes:
        assert tpot_s(served) == pytest.approx(0.01)
