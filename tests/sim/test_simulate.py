"""The command, from the options to the table and the files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from extproc.cli import main
from extproc.core.types import End
from extproc.sim.cluster import Served
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


def runs_of(*arguments: object, path: Path) -> dict[str, Any]:
    """Summaries by policy of a command with one load."""
    (load,) = document(*arguments, path=path)["loads"]
    runs: dict[str, Any] = load["runs"]
    return runs


def test_policies_stand_side_by_side(tmp_path: Path) -> None:
    result = simulate("--trace", mooncake(tmp_path), "--policy", "predicted", "--policy", "round_robin")
    assert result.exit_code == 0, result.output
    assert re.search(r"mooncake: 40 requests on 8 replicas", result.output)
    assert re.search(r"predicted +round_robin", result.output)
    for row in ("TTFT p99, ms", "end to end mean, ms", "TPOT mean, ms", "queue mean, ms", "goodput", "makespan, s"):
        assert re.search(rf"{row} +[\d.,%]+ +[\d.,%]+", result.output), row
    assert re.search(r"h100 tp1 10\.0\.0\.8 +\d+ ", result.output)


def test_the_summary_has_every_figure(tmp_path: Path) -> None:
    run = runs_of("--trace", mooncake(tmp_path), "--policy", "predicted", path=tmp_path / "out.json")["predicted"]
    assert (run["requests"], run["failed"], run["ends"]) == (40, 0, {"ok": 40})
    assert run["goodput_share"] == 1.0
    assert run["goodput_requests_per_s"] == run["offered_requests_per_s"] == pytest.approx(40 / 3.9)
    assert 0 < run["ttft_p50_s"] <= run["ttft_p90_s"] <= run["ttft_p99_s"] < run["e2e_p99_s"]
    assert 0.3 < run["prefix_hit_actual"] < 0.9
    assert sum(r["requests"] for r in run["replicas"].values()) == 40
    assert all(0 <= r["busy_share"] <= 1 for r in run["replicas"].values())


def test_limits_and_speed_change_what_is_replayed(tmp_path: Path) -> None:
    trace, out = mooncake(tmp_path), tmp_path / "out.json"
    options = ("--trace", trace, "--policy", "round_robin")
    whole = runs_of(*options, path=out)["round_robin"]
    faster = runs_of(*options, "--speed-up", 4, path=out)["round_robin"]
    assert document(*options, "--limit", 7, path=out)["requests"] == 7
    assert faster["makespan_s"] < 0.5 * whole["makespan_s"]


@pytest.mark.parametrize("speed_ups", [("1,2", "4"), ("1,2,4",), ("1", "2", "4")])
def test_every_policy_runs_at_each_of_several_loads(speed_ups: tuple[str, ...], tmp_path: Path) -> None:
    out, log = tmp_path / "out.json", tmp_path / "log.jsonl"
    options = ("--trace", mooncake(tmp_path), "--policy", "random", "--policy", "round_robin")
    several = [part for text in speed_ups for part in ("--speed-up", text)]
    loads = document(*options, *several, "--log", log, path=out)["loads"]
    assert [load["speed_up"] for load in loads] == [1.0, 2.0, 4.0]
    for load in loads:
        offered = [run["offered_requests_per_s"] for run in load["runs"].values()]
        assert offered == pytest.approx([load["speed_up"] * 40 / 3.9] * 2)
    alone = runs_of(*options, "--speed-up", "2", path=out)
    assert {name: run["digest"] for name, run in loads[1]["runs"].items()} == {n: r["digest"] for n, r in alone.items()}
    rows = Counter((row["speed_up"], row["policy"]) for row in map(json.loads, log.read_text().splitlines()))
    assert rows == {(speed_up, policy): 40 for speed_up in (1, 2, 4) for policy in ("random", "round_robin")}


CROWD = ("--generate", "sessions=400,sessions_per_s=40,turns=1,user_tokens=4000,tenants=1", "--replica", "count=1")


def test_the_queue_is_on_unless_it_is_told_not_to_be(tmp_path: Path) -> None:
    options, out = (*CROWD, "--policy", "predicted"), tmp_path / "out.json"
    held, placed = (runs_of(*options, *more, path=out)["predicted"] for more in ((), ("--no-queue",)))
    assert held["held"] > 100
    assert held["held_mean_s"] > 0.5
    assert (placed["held"], placed["held_mean_s"], placed["refused"]) == (0, None, 0)
    assert sum(held["refusals"].values()) == held["refused"] == held["requests"] - sum(held["ends"].values())
    assert held["failed"] == 0


def test_priorities_have_lines_of_their_own(tmp_path: Path) -> None:
    options = (*CROWD, "--policy", "predicted", "--priority", 0.2)
    classes = runs_of(*options, path=tmp_path / "out.json")["predicted"]["priorities"]
    assert list(classes) == ["1", "0"]
    assert 40 < classes["1"]["requests"] < 130
    assert classes["1"]["ttft_p50_s"] < 0.5 * classes["0"]["ttft_p50_s"]
    output = simulate(*options).output
    for row in ("priority 1: TTFT p50, ms", "priority 0: TTFT p99, ms", "priority 1: goodput", "priority 0: refused"):
        assert re.search(rf"{row} +[\d.,%]+", output), row


def test_a_tenant_that_floods_and_clients_that_want_their_answer_soon(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    options = (*CROWD, "--policy", "predicted", "--flood", 5, "--ask-ttft", 2, "--log", log)
    assert simulate(*options).exit_code == 0
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["tenant"] for row in rows} == {"flooding", "modest"}
    refused = [row for row in rows if row["refusal"]]
    assert refused
    assert {(row["status"], row["refusal"], row["end"]) for row in refused} == {(429, "slo", None)}
    assert all(row["ttft_s"] < 4 for row in rows if row["end"] == "ok")


def test_each_load_has_its_table(tmp_path: Path) -> None:
    output = simulate("--trace", mooncake(tmp_path), "--policy", "random", "--speed-up", "1,2.5").output
    assert re.findall(r"virtual time, speed-up ([\d.]+)", " ".join(output.split())) == ["1", "2.5"]
    assert len(re.findall(r"offered, requests/s +[\d.]+", output)) == 2


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
    assert list(runs_of(*SMALL, "--policy", text, path=tmp_path / "o.json")) == [text]


def test_the_demos_fleet_can_be_simulated(tmp_path: Path) -> None:
    runs = runs_of("--generate", "sessions=5", "--fleet", "deploy/demo.yaml", path=tmp_path / "o.json")
    labels = [(r["labels"]["gpu"], r["labels"]["tp"]) for r in runs["predicted"]["replicas"].values()]
    assert labels == [("h100", "1"), ("h100", "1"), ("a100", "1"), ("h100", "4")]


@pytest.mark.parametrize(("name", "begins"), [("plot.html", b"<!doctype html>"), ("plot.png", b"\x89PNG")])
def test_curves_are_drawn_in_the_format_of_the_name(name: str, begins: bytes, tmp_path: Path) -> None:
    result = simulate(*SMALL, "--policy", "random", "--speed-up", "1,2", "--plot", tmp_path / name)
    assert result.exit_code == 0, result.output
    assert (tmp_path / name).read_bytes().startswith(begins)


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
        ((*SMALL, "--plot", "x.pdf"), "HTML or PNG is written"),
        ((*SMALL, "--plot", "plot"), "HTML or PNG is written"),
        ((*SMALL, "--json", "/nowhere/x.json"), "/nowhere is no directory"),
        ((*SMALL, "--block-size", "48"), "--block-size 48 does not divide"),
        ((*SMALL, "--speed-up", "0"), "--speed-up 0: each must be a number above 0"),
        ((*SMALL, "--speed-up", "1,x"), "--speed-up x: each must be a number above 0"),
        ((*SMALL, "--speed-up", "1,"), "each must be a number above 0"),
        ((*SMALL, "--speed-up", "nan"), "each must be a number above 0"),
        ((*SMALL, "--flood", "0"), "--flood must be above 0"),
        ((*SMALL, "--ask-ttft", "-1"), "--ask-ttft must be above 0"),
        ((*SMALL, "--estimate-error", "-1"), "--estimate-error must be from 0 to 3"),
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
