"""What the configuration says of LoRA adapters reaches the core."""

from __future__ import annotations

import pytest

from extproc.config import ConfigError, parse
from extproc.core.settings import LoraSettings
from extproc.settings import settings

POOL = "pools: [{replicas: ['10.0.0.1:8000']%s}]"


def test_settings_of_a_pool() -> None:
    given = parse(POOL % ", lora: {load_s: 2, slots: 3}").pools[0]
    assert settings(given).lora == LoraSettings(2.0, 3)


def test_the_defaults_are_those_of_the_core() -> None:
    assert settings(parse(POOL % "").pools[0]).lora == LoraSettings()


@pytest.mark.parametrize("section", ["{load_s: -1}", "{slots: 0}", "{slot: 1}"])
def test_what_makes_no_sense_is_refused(section: str) -> None:
    with pytest.raises(ConfigError, match=r"pools\[0\]\.lora"):
        parse(POOL % f", lora: {section}")
