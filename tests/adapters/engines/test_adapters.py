"""LoRA adapters on vLLM's page."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.adapters.engines import ENGINES
from extproc.core.types import AdaptersSampled
from tests.adapters.engines.pages import parse_vllm, recorded

RUNNING = b"vllm:num_requests_running 0\n"


def line(slots: str, running: str, waiting: str, at: str) -> bytes:
    labels = f'max_lora="{slots}",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
    return b"vllm:lora_requests_info{%s} %s\n" % (labels.encode(), at.encode())


def told(page: bytes) -> AdaptersSampled | None:
    sample = parse_vllm(RUNNING + page)
    assert sample is not None
    return sample.adapters


def test_old_label_sets_stay_on_the_page_and_the_newest_counts() -> None:
    pressed = parse_vllm(recorded("metrics_kv_pressure.txt"))
    assert pressed is not None
    assert pressed.adapters == AdaptersSampled(2)  # seen idle 12 minutes after the last request for one
    loaded = parse_vllm(recorded("metrics_loaded_30req.txt"))
    assert loaded is not None
    assert loaded.adapters == AdaptersSampled(2, ("adapter-a", "adapter-b"), ("adapter-a", "adapter-b"))


def test_an_engine_without_adapters_tells_nothing_of_them() -> None:
    idle = parse_vllm(recorded("metrics_idle_fresh.txt"))
    assert idle is not None
    assert idle.adapters is None


def test_the_ranks_behind_one_address_cannot_be_told_apart_by_it() -> None:
    ranks = ENGINES["vllm"].parse_ranks(recorded("metrics_dp2_loaded.txt") + b"\n" + line("2", "a", "", "1e9"))
    assert [sample.adapters for sample in ranks.values()] == [None, None]


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (line("4", "a,b,a", " c ,", "7"), AdaptersSampled(4, ("a", "b"), ("c",))),
        (line("4", "a", "", "7") + line("4", "b", "", "8"), AdaptersSampled(4, ("b",))),
        (line("4", "a", "", "7") + line("4", "b", "", "NaN"), AdaptersSampled(4, ("a",))),
        (line("4", "a", "", "NaN"), None),
        (line("0", "a", "", "7"), None),
        (line("", "a", "", "7"), None),
        (line("9" * 30, "a", "", "7"), None),
        (b"vllm:lora_requests_info 7\n", None),
    ],
)
def test_odd_lines(page: bytes, expected: AdaptersSampled | None) -> None:
    assert told(page) == expected


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail(noise: bytes) -> None:
    parse_vllm(RUNNING + b"vllm:lora_requests_info{" + noise)
