"""vLLM's page: recorded ones, older forms, data parallel ranks, and odd bytes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.adapters.engines import ENGINES
from extproc.adapters.engines.parser import MOST_LINES
from extproc.core.types import AdaptersSampled, Sample
from tests.adapters.engines.pages import RECORDED, parse_vllm, recorded


def sample(text: str) -> Sample:
    parsed = parse_vllm(text.encode())
    assert parsed is not None
    return parsed


class TestRecordedPages:
    def test_a_loaded_engine(self) -> None:
        assert parse_vllm(recorded("metrics_loaded_30req.txt")) == Sample(
            running=8,
            waiting=22,
            kv_usage=0.5628140703517588,
            block_size=32,
            num_blocks=200,
            prompt_tokens=3779.0,
            generated_tokens=244.0,
            prefix_queries=3779.0,
            prefix_hits=192.0,
            preemptions=0.0,
            adapters=AdaptersSampled(2, ("adapter-a", "adapter-b"), ("adapter-a", "adapter-b")),
            awake=True,
        )

    def test_an_engine_that_can_sleep_says_whether_it_does(self) -> None:
        page = recorded("metrics_dp2_fresh.txt")
        awake = parse_vllm(page)
        asleep = parse_vllm(
            page.replace(
                b'engine="1",model_name="tiny",sleep_state="awake"} 1.0',
                b'engine="1",model_name="tiny",sleep_state="awake"} 0.0',
            )
        )
        assert awake is not None
        assert asleep is not None
        assert (awake.awake, asleep.awake) == (True, False)

    def test_an_engine_under_cache_pressure(self) -> None:
        parsed = parse_vllm(recorded("metrics_kv_pressure.txt"))
        assert parsed is not None
        assert (parsed.running, parsed.waiting, parsed.kv_capacity_tokens) == (4, 7, 6400)
        assert parsed.kv_usage == 0.7035175879396984

    def test_a_fresh_engine_says_zero_not_unknown(self) -> None:
        parsed = parse_vllm(recorded("metrics_idle_fresh.txt"))
        assert parsed is not None
        assert (parsed.running, parsed.waiting, parsed.kv_usage, parsed.prompt_tokens) == (0, 0, 0.0, 0.0)

    @given(st.sampled_from(RECORDED), st.integers())
    def test_the_order_of_the_lines_does_not_matter(self, name: str, seed: int) -> None:
        page = recorded(name)
        lines = page.splitlines(keepends=True)
        random.Random(seed).shuffle(lines)
        assert parse_vllm(b"".join(lines)) == parse_vllm(page)


class TestOlderVersions:
    @pytest.mark.parametrize("name", ["metrics_0.9_tokens.txt", "metrics_0.8_blocks.txt"])
    def test_the_old_names_mean_the_same_in_tokens(self, name: str) -> None:
        assert parse_vllm(recorded(name, "vllm-older")) == Sample(
            running=3,
            waiting=1,
            kv_usage=0.25,
            block_size=16,
            num_blocks=1000,
            prompt_tokens=6500.0,
            generated_tokens=900.0,
            prefix_queries=6400.0,
            prefix_hits=1600.0,
            preemptions=2.0,
        )

    def test_a_counter_of_blocks_is_unknown_while_the_block_size_is(self) -> None:
        page = recorded("metrics_0.8_blocks.txt", "vllm-older").replace(b'{block_size="16"', b'{block_size="None"')
        parsed = parse_vllm(page)
        assert parsed is not None
        assert (parsed.prefix_queries, parsed.prefix_hits) == (None, None)

    def test_an_old_name_beside_the_new_one_is_not_added_to_it(self) -> None:
        parsed = parse_vllm(recorded("metrics_0.10_both_names.txt", "vllm-older"))
        assert parsed == Sample(running=2, kv_usage=0.5, prefix_queries=320.0)

    def test_only_the_old_name_ever_counted_blocks(self) -> None:
        page = recorded("metrics_0.8_blocks.txt", "vllm-older") + b"vllm:prefix_cache_queries_total 6400.0\n"
        parsed = parse_vllm(page)
        assert parsed is not None
        assert parsed.prefix_queries == 6400.0


class TestRanks:
    PAGE = """
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 5.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.2
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.6
vllm:cache_config_info{engine="0",num_gpu_blocks="220",hash_block_size="8",block_size="16"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks_override="7",num_gpu_blocks="220"} 1.0
"""

    def test_work_adds_up_usage_is_the_mean_and_each_tells_the_blocks_of_all(self) -> None:
        parsed = sample(self.PAGE)
        assert (parsed.running, parsed.num_blocks, parsed.block_size) == (8, 220, 16)
        assert parsed.kv_usage == pytest.approx(0.4)

    def test_a_rank_that_has_not_counted_its_blocks_makes_the_sum_unknown(self) -> None:
        parsed = sample(self.PAGE.replace('7",num_gpu_blocks="220"', '7",num_gpu_blocks="None"'))
        assert (parsed.num_blocks, parsed.block_size, parsed.kv_capacity_tokens) == (None, 16, None)

    def test_ranks_with_different_block_sizes_have_none_in_common(self) -> None:
        assert sample(self.PAGE.replace('block_size="16",engine', 'block_size="32",engine')).block_size is None

    def test_a_recorded_engine_with_two_ranks_of_200_blocks(self) -> None:
        page = recorded("metrics_dp2_loaded.txt")
        ranks = ENGINES["vllm"].parse_ranks(page)
        assert {rank: (s.running, s.waiting, s.num_blocks) for rank, s in ranks.items()} == {
            0: (8, 0, 200),
            1: (3, 0, 200),
        }
        whole = ENGINES["vllm"].parse(page)
        assert whole is not None
        assert (whole.running, whole.kv_capacity_tokens) == (11, 400 * 32)

    def test_a_recorded_engine_with_two_front_ends_has_no_gauges_before_its_first_request(self) -> None:
        ranks = ENGINES["vllm"].parse_ranks(recorded("metrics_dp2_fresh.txt"))
        assert {rank: (s.running, s.prompt_tokens, s.num_blocks) for rank, s in ranks.items()} == {
            0: (None, 0.0, 200),
            1: (None, 0.0, 200),
        }

    def test_each_rank_is_told_apart_as_well(self) -> None:
        ranks = ENGINES["vllm"].parse_ranks(self.PAGE.encode())
        assert ranks == {
            0: Sample(running=3, kv_usage=0.2, block_size=16, num_blocks=110),
            1: Sample(running=5, kv_usage=0.6, block_size=16, num_blocks=110),
        }

    def test_a_page_without_numbers_of_ranks_has_none(self) -> None:
        assert ENGINES["vllm"].parse_ranks(b"vllm:num_requests_running 3.0") == {}

    def test_a_rank_that_uses_more_than_there_is_makes_the_mean_unknown(self) -> None:
        assert sample(self.PAGE.replace("} 0.6", "} 1.5")).kv_usage is None

    def test_an_unreadable_rank_makes_the_sum_unknown_and_leaves_other_fields(self) -> None:
        parsed = sample(self.PAGE.replace("} 5.0", "} NaN"))
        assert parsed.running is None
        assert parsed.num_blocks == 220


class TestOddPages:
    @pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-1", "1e300", "x", "1.0.0", '"8"', "0x8"])
    def test_a_value_that_counts_nothing_is_unknown(self, value: str) -> None:
        parsed = sample(f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 4\n")
        assert (parsed.running, parsed.waiting) == (None, 4)

    @pytest.mark.parametrize("value", ["1.01", "-0.1", "70"])
    def test_a_share_outside_0_to_1_is_unknown(self, value: str) -> None:
        assert sample(f"vllm:kv_cache_usage_perc {value}").kv_usage is None

    @pytest.mark.parametrize("size", ["None", "", "0", "-16", "16.5", "9" * 5000])
    def test_a_block_size_that_is_no_size_is_unknown(self, size: str) -> None:
        assert sample(f'vllm:cache_config_info{{block_size="{size}",num_gpu_blocks="9"}} 1.0').block_size is None

    def test_a_label_value_that_looks_like_a_label_is_not_one(self) -> None:
        page = 'vllm:cache_config_info{a="x,block_size=\\"99\\"",b="block_size=",block_size="16"} 1.0'
        assert sample(page).block_size == 16

    def test_braces_spaces_and_a_timestamp_do_not_confuse_the_value(self) -> None:
        assert sample('vllm:num_requests_running{model_name="a} {b"} 6 1395066363000').running == 6

    def test_names_that_begin_alike_are_other_metrics(self) -> None:
        assert parse_vllm(b'vllm:num_requests_running_max{a="b"} 3\nvllm:prompt_tokens_created 1.0\n') is None

    @pytest.mark.parametrize(
        "page", [b"", b"\n", b"<html>", b"# HELP vllm:num_requests_running x\n", b"process_cpu 1\n"]
    )
    def test_a_page_without_any_wanted_line_is_no_sample(self, page: bytes) -> None:
        assert parse_vllm(page) is None

    def test_a_first_and_a_last_line_count_without_line_breaks_around(self) -> None:
        assert sample("vllm:num_requests_running 1\nvllm:num_requests_waiting 2") == Sample(running=1, waiting=2)

    def test_more_lines_than_an_engine_has_are_no_page_and_not_a_part_of_one(self) -> None:
        line = b'vllm:num_requests_running{engine="0"} 1\n'
        most = parse_vllm(line * MOST_LINES)
        assert most == Sample(running=MOST_LINES)
        assert parse_vllm(line * (MOST_LINES + 1)) is None
        assert ENGINES["vllm"].parse_ranks(line * (MOST_LINES + 1)) == {}

    def test_ranks_are_numbered_to_99(self) -> None:
        page = b"".join(b'vllm:num_requests_running{engine="%d"} 1\n' % rank for rank in range(200))
        assert list(ENGINES["vllm"].parse_ranks(page)) == list(range(100))

    FRAGMENTS = st.sampled_from(
        b'\n|vllm:|num_requests_running|kv_cache_usage_perc|cache_config_info|{|}| |"|block_size=|,|1|nan|-|e308|\xff|\x00|_|.'.split(
            b"|"
        )
    )

    @given(st.binary(max_size=300) | st.lists(FRAGMENTS, max_size=60).map(b"".join))
    def test_no_bytes_make_it_raise(self, page: bytes) -> None:
        parsed = parse_vllm(page)
        if parsed is not None and parsed.kv_usage is not None:
            assert 0.0 <= parsed.kv_usage <= 1.0
