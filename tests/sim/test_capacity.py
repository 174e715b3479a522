"""Worked examples of the arithmetic: published sizes of models, and GPUs that people run them on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from extproc.cli import main
from extproc.config import ConfigError
from extproc.sim.capacity import Asked, Model, answer, checked, load_model

LLAMA_70B = Model(parameters_b=70, layers=80, heads=64, kv_heads=8, head_size=128)
PLAIN_7B = Model(parameters_b=7, layers=32, heads=32, kv_heads=32, head_size=128)


def test_weights_are_two_bytes_a_parameter() -> None:
    assert LLAMA_70B.weights_gb == 140.0
    assert Model(parameters_b=70, layers=80, heads=64, kv_heads=8, head_size=128, weight_bytes=1).weights_gb == 70.0


def test_the_kv_cache_of_a_request_without_grouped_queries_is_by_the_hidden_size() -> None:
    """2 x layers x hidden x length x 2 bytes."""
    assert PLAIN_7B.kv_gb(2048) * 1e9 == 2 * 32 * 4096 * 2048 * 2


def test_grouped_queries_divide_the_kv_cache() -> None:
    assert LLAMA_70B.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2 == 327_680


def test_tensor_parallelism_divides_the_heads() -> None:
    assert [n for n in LLAMA_70B.tensor_parallel if n <= 8] == [1, 2, 4, 8]


def test_the_replica_gets_as_many_gpus_as_hold_it_and_divide_the_heads() -> None:
    found = answer(LLAMA_70B, Asked(tokens=4096, concurrent=32, gpu_gb=80))
    assert found["total_gb"] == pytest.approx((140 + 32 * 1.342177) * 1.15, rel=1e-6)
    assert (found["tensor_parallel"], found["gpus_per_replica"]) == (4, 4)  # 210 GB; 72 of each GPU are for it
    assert answer(LLAMA_70B, Asked(pipeline_parallel=2))["gpus_per_replica"] == 4


def test_throughput_is_that_of_a_replica_times_replicas() -> None:
    found = answer(LLAMA_70B, Asked(rate=50_000, rate_per_replica=50))
    assert (found["replicas"], found["gpus"]) == (1_000, 4_000)
    assert answer(LLAMA_70B, Asked(rate=101, rate_per_replica=50))["replicas"] == 3


def test_what_no_replica_holds_is_unknown_and_not_zero() -> None:
    found = answer(LLAMA_70B, Asked(tokens=1_000_000, concurrent=1_000, rate=1, rate_per_replica=1))
    assert (found["tensor_parallel"], found["gpus_per_replica"], found["gpus"]) == (None, None, None)


def test_a_models_own_file_is_enough_but_for_its_parameters(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192}
    path.write_text(json.dumps(fields))
    assert load_model(path, 70) == LLAMA_70B
    path.write_text(json.dumps({"text_config": fields}))
    assert load_model(path, 70) == LLAMA_70B


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json: not JSON"),
        ("[]", "config.json: layers: is missing; add it"),
        (
            '{"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8}',
            "do not share 4 KV heads",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_model(path, 7)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.json: No such file or directory; pass the path"):
        load_model(tmp_path / "no.json", 7)


def test_odd_options_are_named() -> None:
    with pytest.raises(ConfigError, match="options: concurrent: "):
        checked(Asked, {"concurrent": 0}, "options")


def test_the_command_says_it_in_words_or_by_name() -> None:
    options = [
        "capacity",
        "--parameters",
        "70",
        "--layers",
        "80",
        "--heads",
        "64",
        "--kv-heads",
        "8",
        "--head-size",
        "128",
    ]
    told = CliRunner().invoke(main, [*options, "--rate", "50000", "--rate-per-replica", "50"])
    assert told.exit_code == 0
    assert "weights              140.0 GB" in told.output
    assert "1,000 replicas of 50, 4,000 GPUs" in told.output
    assert json.loads(CliRunner().invoke(main, [*options, "--json"]).output)["gpus_per_replica"] == 4
    wrong = CliRunner().invoke(main, ["capacity", "--parameters", "7"])
    assert wrong.exit_code == 1
    assert "options: layers: is missing; add it" in wrong.output
