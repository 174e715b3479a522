"""The configuration file: the shelf of bad files with their exact messages, and what a good one becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from extproc.config import Config, ConfigError, load, parse

SHELF = Path(__file__).parent / "bad_config"


@pytest.mark.parametrize("path", sorted(SHELF.glob("*.yaml")), ids=lambda p: p.stem)
def test_bad_file_is_refused_with_its_exact_message(path: Path) -> None:
    expected = [
        line.removeprefix("# expect: ") for line in path.read_text().splitlines() if line.startswith("# expect: ")
    ]
    assert expected, "a bad file names the message that it expects"
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).splitlines() == [f"{path}: {line}" for line in expected]


def test_missing_file_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file or directory; pass --config"):
        load(Path("nowhere.yaml"))


def test_shortest_file_is_complete() -> None:
    config = parse("pools: [{replicas: [10.0.0.1:8000]}]")
    assert config.pools[0].replicas[0].address == "10.0.0.1:8000"
    assert config.pools[0].policy == "predicted"
    assert config.listen.grpc == "127.0.0.1:9002"


def test_pool_labels_reach_replicas_and_own_labels_win() -> None:
    config = parse(
        "pools: [{labels: {gpu: h100, tp: 1}, replicas: [10.0.0.1:8000, {address: 10.0.0.2:8000, labels: {tp: 4}}]}]"
    )
    assert [r.labels for r in config.pools[0].replicas] == [{"gpu": "h100", "tp": "1"}, {"gpu": "h100", "tp": "4"}]


def test_relative_paths_are_taken_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("pools: [{discovery: {file: {path: members.yaml}}}]\nenvoy: {endpoints_file: eds.json}")
    config = load(path)
    assert config.pools[0].discovery
    assert config.pools[0].discovery.file
    assert config.pools[0].discovery.file.path == tmp_path / "members.yaml"
    assert config.envoy.endpoints_file == tmp_path / "eds.json"


@pytest.mark.parametrize(
    ("written", "kept"), [("10.0.0.1:08000", "10.0.0.1:8000"), ("[::1]:80", "[::1]:80"), ("[0:0::1]:80", "[::1]:80")]
)
def test_addresses_are_kept_in_the_form_that_envoy_reports(written: str, kept: str) -> None:
    assert parse(f"pools: [{{replicas: ['{written}']}}]").pools[0].replicas[0].address == kept


def test_configuration_is_frozen() -> None:
    config = parse("pools: [{replicas: [10.0.0.1:8000]}]")
    with pytest.raises(ValueError, match="frozen"):
        config.listen = Config.model_fields["listen"].default
