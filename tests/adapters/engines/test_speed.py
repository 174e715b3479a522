"""What a page costs, against the general parser. Run with `-s` to see the figures."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from extproc.adapters.engines import CHOICES, detect
from tests.adapters.engines.pages import RECORDED, parse_vllm, recorded


def best_ms(call: Callable[[], object], repeats: int) -> float:
    """The least of several runs, in milliseconds: noise only ever adds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best * 1000


@pytest.mark.parametrize("name", RECORDED)
def test_a_page_costs_a_small_part_of_what_a_full_parse_does(name: str) -> None:
    page = recorded(name)
    ours = best_ms(lambda: parse_vllm(page), 200)
    full = best_ms(lambda: list(text_string_to_metric_families(page.decode())), 5)
    found = best_ms(lambda: detect(page, CHOICES["auto"]), 200)
    print(f"{name}: {len(page)} bytes, {ours:.3f} ms, found out {found:.3f} ms, prometheus_client {full:.2f} ms")
    assert ours < full / 20


def braces(times: int) -> bytes:
    return b"\nvllm:num_requests_running{" + b"} " * times + b"\n"


def spaces(times: int) -> bytes:
    return b"\nvllm:num_requests_running{}" + b"  " * times + b"\n"


@pytest.mark.parametrize("hostile", [braces, spaces])
def test_a_hostile_page_costs_no_more_than_its_length(hostile: Callable[[int], bytes]) -> None:
    """Braces without end make a careless pattern quadratic: 4 MB would then take hours."""
    short, long = (hostile(times) for times in (125_000, 1_000_000))
    assert best_ms(lambda: parse_vllm(long), 3) < 32 * best_ms(lambda: parse_vllm(short), 3)  # quadratic: 64
