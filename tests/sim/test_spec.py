from __future__ import annotations

from pathlib import Path

import pytest

from extproc.config import ConfigError
from extproc.core.steptime import prior
from extproc.sim.spec import BackendSpec, load_specs


def write(folder: Path, text: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(text)
    return path


def test_a_fleet_is_read_from_a_list(tmp_path: Path) -> None:
    specs = load_specs(write(tmp_path, "- {port: 8000, labels: {gpu: h100, tp: 4}}\n- {port: 8001, hang: true}\n"))
    assert specs == [BackendSpec(port=8000, labels={"gpu": "h100", "tp": "4"}), BackendSpec(port=8001, hang=True)]


def test_options_become_labels() -> None:
    spec = BackendSpec.from_options(
        host="127.0.0.1", port=8000, model="m", gpu="a100", tp=4, model_size="70b", time_scale=2.0
    )
    assert spec.engine_config().step_time == prior({"gpu": "a100", "tp": "4", "model_size": "70b"})
    assert (spec.model, spec.time_scale) == ("m", 2.0)


def test_a_request_of_the_greatest_length_fits_the_cache() -> None:
    assert BackendSpec(num_blocks=10, block_size=16).engine_config().max_model_len == 160


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {porto: 1}", "[0].porto: no such key; did you mean port?"),
        ("- {}\n- {time_scale: 0}", "[1].time_scale: input should be greater than 0"),
        ("- {max_num_batched_tokens: 10}", "[0]: max_num_batched_tokens must be at least max_num_seqs"),
        ("port: 1", "input should be a valid list"),
        ("- [", "not YAML"),
    ],
)
def test_mistakes_are_named_by_their_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_specs(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass --config"):
        load_specs(tmp_path / "none.yaml")


def test_bad_options_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="options: port"):
        BackendSpec.from_options(gpu="h100", tp=1, model_size="8b", port=70_000)
