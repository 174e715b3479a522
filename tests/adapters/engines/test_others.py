"""Engines other than vLLM, by pages in the forms that their documentation and sources give; what they lack is None, never 0."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.adapters.engines import CHOICES, ENGINES, detect, health_paths
from extproc.adapters.engines.parser import Engine, told
from extproc.adapters.engines.table import Figure, Table
from extproc.config import PoolConfig
from extproc.core.types import Sample
from tests.adapters.engines.pages import documented, recorded

SAMPLES = {
    "sglang_0.4.txt": (
        "sglang",
        Sample(
            running=16,
            waiting=20,
            kv_usage=0.28,
            prompt_tokens=4.5e6,
            generated_tokens=1.25e6,
            prefix_queries=4.5e6,
            counted_at_end=True,
        ),
    ),
    "sglang_0.5.txt": (
        "sglang",
        Sample(
            running=5,
            waiting=4,
            kv_usage=0.25,
            block_size=64,
            num_blocks=1024,
            cache_tokens=65536,
            prompt_tokens=10_000.0,
            generated_tokens=900.0,
            prefix_queries=8000.0,
            prefix_hits=3200.0,
            preemptions=2.0,
        ),
    ),
    "tgi_3.txt": (
        "tgi",
        Sample(running=4, waiting=7, prompt_tokens=5120.0, generated_tokens=1234.0, counted_at_end=True),
    ),
    "trtllm_1.2.txt": (
        "trtllm",
        Sample(
            running=6,
            waiting=2,
            kv_usage=0.6,
            block_size=32,
            num_blocks=5000,
            prompt_tokens=9000.0,
            generated_tokens=2000.0,
            prefix_queries=12_800.0,
            prefix_hits=3200.0,
            counted_at_end=True,
        ),
    ),
    "trtllm_1.0.txt": ("trtllm", Sample(kv_usage=0.125)),
    "triton_trtllm.txt": (
        "triton_trtllm",
        Sample(running=4, waiting=2, kv_usage=0.1, block_size=64, num_blocks=6251),
    ),
    "triton_trtllm_23.11.txt": ("triton_trtllm", Sample(running=4, block_size=64, num_blocks=6251)),
    "triton.txt": ("triton", Sample(waiting=4)),
    "triton_vllm.txt": (
        "vllm",
        Sample(running=2, waiting=1, kv_usage=0.2, prompt_tokens=10.0, generated_tokens=16.0),
    ),
    "ray_node_a.txt": (
        "ray",
        Sample(
            running=3,
            waiting=1,
            kv_usage=0.2,
            block_size=16,
            num_blocks=1000,
            prompt_tokens=1000.0,
            generated_tokens=200.0,
        ),
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_page_is_known_and_read(name: str) -> None:
    engine, sample = SAMPLES[name]
    found = detect(documented(name), CHOICES["auto"])
    assert found is not None
    assert (found[0].name, found[1]) == (engine, sample)


@pytest.mark.parametrize("name", SAMPLES)
def test_what_a_page_leaves_out_is_never_zero(name: str) -> None:
    """No figure of these pages is 0, so that a 0 would be made up."""
    engine = ENGINES[SAMPLES[name][0]]
    lines = documented(name).splitlines(keepends=True)
    for left_out in range(len(lines)):
        sample = engine.parse(b"".join(lines[:left_out] + lines[left_out + 1 :]))
        figures = () if sample is None else (sample.running, sample.kv_usage, sample.prompt_tokens, sample.num_blocks)
        assert 0 not in figures


def test_a_recorded_page_of_vllm_is_vllms() -> None:
    found = detect(recorded("metrics_loaded_30req.txt"), CHOICES["auto"])
    assert found is not None
    assert found[0].name == "vllm"


class TestSglang:
    def test_ranks_add_up_copies_of_tensor_parallel_ranks_and_parts_by_priority_do_not(self) -> None:
        page = documented("sglang_0.5_ranks.txt")
        sample = ENGINES["sglang"].parse(page)
        assert sample is not None
        assert (sample.running, sample.waiting, sample.cache_tokens, sample.num_blocks) == (5, 2, 2000, 2000)
        assert sample.kv_usage == pytest.approx(0.3)

    def test_each_data_parallel_rank_is_told_apart(self) -> None:
        ranks = ENGINES["sglang"].parse_ranks(documented("sglang_0.5_ranks.txt"))
        assert {rank: (s.running, s.waiting, s.kv_usage) for rank, s in ranks.items()} == {
            0: (4, 2, 0.5),
            1: (1, 0, 0.1),
        }

    @pytest.mark.parametrize(
        "queue", ["prefill_bootstrap", "prefill_prealloc", "decode_prealloc", "decode_transfer", "grammar"]
    )
    def test_each_queue_of_an_engine_that_prefills_or_decodes_alone_counts(self, queue: str) -> None:
        page = b"sglang:num_queue_reqs 2\nsglang:num_%s_queue_reqs 3\n" % queue.encode()
        assert ENGINES["sglang"].parse(page) == Sample(waiting=5)

    @pytest.mark.parametrize("label", ["tp_rank", "pp_rank", "moe_ep_rank"])
    def test_what_the_parts_of_one_engine_tell_alike_counts_once(self, label: str) -> None:
        page = b"".join(b'sglang:num_running_reqs{%s="%d"} 4\n' % (label.encode(), rank) for rank in (0, 1))
        assert ENGINES["sglang"].parse(page) == Sample(running=4)

    def test_before_the_first_prefill_a_part_of_the_live_counter_is_not_the_whole(self) -> None:
        page = b'# TYPE\nsglang:realtime_tokens_total{mode="prefill_cache"} 7\nsglang:num_running_reqs 1\n'
        assert ENGINES["sglang"].parse(page) == Sample(running=1)

    def test_a_cache_of_no_pages_has_not_been_looked_at(self) -> None:
        assert ENGINES["sglang"].parse(b"sglang:num_pages 0\nsglang:max_total_num_tokens 0\n") == Sample()

    def test_the_size_of_its_cache_may_stand_in_labels(self) -> None:
        page = b'sglang:cache_config_info{num_pages="128",page_size="64"} 1\n'
        assert ENGINES["sglang"].parse(page) == Sample(block_size=64, num_blocks=128)

    def test_an_unreadable_copy_leaves_the_other(self) -> None:
        page = documented("sglang_0.5_ranks.txt").replace(
            b'priority="",tp_rank="1"} 4.0', b'priority="",tp_rank="1"} NaN'
        )
        sample = ENGINES["sglang"].parse(page)
        assert sample is not None
        assert sample.running == 5

    def test_counters_that_move_with_each_step_go_before_those_that_move_at_the_end(self) -> None:
        page = documented("sglang_0.5.txt")
        live = ENGINES["sglang"].parse(page)
        older = ENGINES["sglang"].parse(page.replace(b"realtime_tokens", b"other_tokens"))
        assert live is not None
        assert older is not None
        assert (live.generated_tokens, live.counted_at_end) == (900.0, False)
        assert (older.generated_tokens, older.counted_at_end) == (600.0, True)

    def test_before_the_first_token_the_live_counter_is_unknown_and_no_other_takes_its_place(self) -> None:
        page = b"\n".join(line for line in documented("sglang_0.5.txt").split(b"\n") if b'mode="decode"' not in line)
        sample = ENGINES["sglang"].parse(page)
        assert sample is not None
        assert (sample.prompt_tokens, sample.generated_tokens, sample.counted_at_end) == (10_000.0, None, False)


def test_pages_of_several_nodes_of_ray_add_up() -> None:
    joined = b"\n".join([documented("ray_node_a.txt"), documented("ray_node_b.txt")])
    sample = ENGINES["ray"].parse(joined)
    assert sample is not None
    assert (sample.running, sample.waiting, sample.num_blocks) == (8, 1, 2000)
    assert sample.kv_usage == pytest.approx(0.3)


def test_ranks_of_ray_are_not_told_apart_for_no_header_reaches_them() -> None:
    assert ENGINES["ray"].parse_ranks(documented("ray_node_a.txt")) == {}


def test_names_of_older_releases_of_ray_keep_the_colon_of_vllm() -> None:
    page = documented("ray_node_a.txt")
    older = page.replace(b"ray_vllm_", b"ray_vllm:").replace(b"kv_cache_usage", b"gpu_cache_usage")
    found = detect(older, CHOICES["auto"])
    assert found == (ENGINES["ray"], ENGINES["ray"].parse(page))


@pytest.mark.parametrize("ending", ["", "_total"])
def test_counters_of_ray_are_known_with_and_without_their_ending(ending: str) -> None:
    told = {"prompt_tokens": 9, "generation_tokens": 5, "prefix_cache_queries": 8, "prefix_cache_hits": 4}
    page = "".join(f"ray_vllm_{name}{ending} {n}\n" for name, n in {**told, "num_preemptions": 1}.items())
    assert ENGINES["ray"].parse(page.encode()) == Sample(
        prompt_tokens=9.0, generated_tokens=5.0, prefix_queries=8.0, prefix_hits=4.0, preemptions=1.0
    )


class TestDetection:
    @pytest.mark.parametrize(
        "page",
        [
            b"",
            b"<html>",
            b"process_cpu_seconds_total 1\n",
            documented("trtllm_iterations.json"),
            documented("dcgm_4.txt"),
            b"vllm:num_requests_running NaN\n",
            b"nv_inference_count 3\n",
        ],
    )
    def test_a_page_that_says_nothing_of_use_is_nobodys(self, page: bytes) -> None:
        assert detect(page, CHOICES["auto"]) is None

    def test_who_reads_the_most_is_right(self) -> None:
        """Triton's own series stand beside those of its backends."""
        page = documented("triton_trtllm.txt")
        assert ENGINES["triton"].parse(page) == Sample(waiting=1)
        found = detect(page, CHOICES["auto"])
        assert found is not None
        assert found[0] is ENGINES["triton_trtllm"]

    def test_only_those_allowed_are_looked_for(self) -> None:
        assert detect(documented("sglang_0.5.txt"), CHOICES["vllm"]) is None

    def test_the_configuration_offers_what_there_is(self) -> None:
        assert set(get_args(PoolConfig.model_fields["engine"].annotation)) == set(CHOICES)
        assert {engine.name for engines in CHOICES.values() for engine in engines} == set(ENGINES)

    @given(st.sampled_from(sorted(SAMPLES)), st.integers(0, 5000), st.binary(max_size=20))
    def test_no_bytes_make_it_raise(self, name: str, at: int, noise: bytes) -> None:
        page = documented(name)
        found = detect(page[:at] + noise + page[at:], CHOICES["auto"])
        if found is not None and found[1].kv_usage is not None:
            assert 0.0 <= found[1].kv_usage <= 1.0


class TestTables:
    @pytest.mark.parametrize("selector", ["", "a b", 'a{b="c}', "a[b", "a{b}", "a:b"])
    def test_a_selector_that_is_none_is_an_error_at_once(self, selector: str) -> None:
        with pytest.raises(ValueError, match="is no selector"):
            Engine(Table("x", "x_", running=(Figure(selector),)))

    def test_where_each_engine_tells_how_it_is(self) -> None:
        assert [(p.live, p.ready) for p in health_paths(CHOICES["auto"])] == [
            ("/health", None),
            ("/-/healthz", None),
            ("/v2/health/live", "/v2/health/ready"),
            ("/health/ready", None),
        ]

    def test_a_sample_counts_what_it_knows(self) -> None:
        assert told(Sample()) == 0
        assert told(Sample(running=0, kv_usage=0.0)) == 2
