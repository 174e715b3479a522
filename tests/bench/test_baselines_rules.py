"""The numbers of each baseline, worked by hand from the published formula, and its thresholds on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from extproc.core.fleet import Member
from extproc.core.policies.base import Policy, Ranking, create
from extproc.core.prediction import Ask
from extproc.core.types import Blocks, Request, Sample
from tests.bench.baselines import installed
from tests.bench.baselines.active_blocks import ActiveBlocks
from tests.bench.baselines.sglang import Tree
from tests.bench.baselines.smg import owner
from tests.core.support import address, fill, first, members_of, put, rank, replicas


@pytest.fixture(autouse=True)
def _baselines() -> Iterator[None]:
    with installed():
        yield


def fleet(*in_flight: int) -> list[Member]:
    """Members with so many requests in flight, whose prefill is done."""
    members = members_of(replicas(len(in_flight)))
    for member, n in zip(members, in_flight, strict=True):
        for flight in fill(member, n):
            member.load.first_token(flight, 0.0)
    return members


def prompt(*hashes: int, block_bytes: int = 100, size: int | None = None) -> Request:
    """A prompt of these blocks, and a tail up to `size` bytes."""
    ends = tuple(block_bytes * (i + 1) for i in range(len(hashes)))
    return Request(blocks=Blocks(hashes, ends), prompt_bytes=size or (ends[-1] if ends else 0))


def scores(ranking: Ranking) -> dict[str, float]:
    return {m.address: score for score, m in ranking.order}


def firsts(name: str, members: Sequence[Member], **given: Any) -> Counter[str]:
    """Who is first, over many seeds."""
    return Counter(first(rank(name, members, seed=seed, **given)) for seed in range(60))


def held_by(where: Member, name: str, wanted: Request, tokens: int, *, prefilled: bool = True) -> None:
    """Put a flight with that prompt there, so many tokens long."""
    flight = put(where, name, prompt_tokens=tokens)
    flight.blocks, flight.prompt_bytes = wanted.blocks, wanted.prompt_bytes
    if prefilled:
        where.load.first_token(flight, 0.0)


# --- smg_prefix_hash --------------------------------------------------------------------------------------------------


def at_home(members: Sequence[Member], wanted: Request) -> bool:
    """Whether the first is the one that it is with an idle fleet."""
    return first(rank("smg_prefix_hash", members, wanted=wanted)) == first(
        rank("smg_prefix_hash", fleet(*(0 for _ in members)), wanted=wanted)
    )


def loaded(home: int, others: int, wanted: Request) -> list[Member]:
    """Four members; the one that the prompt belongs to has `home` in flight."""
    idle = fleet(0, 0, 0, 0)
    owned = first(rank("smg_prefix_hash", idle, wanted=wanted))
    return fleet(*(home if m.address == owned else others for m in idle))


@pytest.mark.parametrize(
    ("home", "others", "kept"),
    [
        (13, 0, True),  # mean (13 + 1) / 4 = 3.5: up to 3.5 + 10
        (14, 0, False),  # mean 3.75: up to 13.75
        (136, 100, True),  # mean 437 / 4 = 109.25: up to 1.25 times that, 136.56
        (137, 100, False),  # mean 109.5: up to 136.88
    ],
)
def test_smg_spills_only_above_both_bounds(home: int, others: int, kept: bool) -> None:
    wanted = prompt(1, 2, 3, 4)
    assert at_home(loaded(home, others, wanted), wanted) is kept


def test_smg_counts_the_new_request_in_the_mean_and_keeps_who_is_at_the_bound() -> None:
    wanted = prompt(1, 2, 3, 4)
    members = loaded(14, 0, wanted)
    assert not at_home(members, wanted)
    fill(next(m for m in members if not len(m.load)), 1)
    assert at_home(members, wanted)  # mean (15 + 1) / 4 = 4: up to 14


def test_smg_spills_to_the_least_loaded_the_first_of_equals() -> None:
    wanted = prompt(1, 2, 3, 4)
    members = loaded(40, 3, wanted)
    least = [m for m in members if len(m.load) == 3]
    ranking = rank("smg_prefix_hash", members, wanted=wanted)
    assert (ranking.order[0][1], ranking.reason) == (least[0], "spill")


def test_smg_hashes_the_first_256_tokens_and_no_more() -> None:
    members = fleet(*(0 for _ in range(8)))

    def homes(*prompts: Request) -> set[str]:
        return {first(rank("smg_prefix_hash", members, wanted=p)) for p in prompts}

    # 1,024 bytes are 256 tokens: four blocks of 256 bytes, of which the last is shared or not.
    assert len(homes(*(prompt(1, 2, 3, 4, n, block_bytes=256) for n in range(100, 140)))) == 1
    assert len(homes(*(prompt(1, 2, 3, n, 5, block_bytes=256) for n in range(100, 140)))) > 4
    assert len(homes(*(prompt(1, n, block_bytes=2048) for n in range(100, 140)))) == 1  # of longer blocks the first
    assert len(homes(*(prompt(n, 2, block_bytes=2048) for n in range(100, 140)))) > 4


def test_smg_without_a_prompt_takes_the_least_loaded() -> None:
    ranking = rank("smg_prefix_hash", fleet(2, 1, 1))
    assert (first(ranking), ranking.reason) == (address(1), "no_prefix")


def test_smg_spreads_keys_and_moves_only_those_of_who_left() -> None:
    addresses = tuple(address(i) for i in range(8))
    before = {key: addresses[owner(key, addresses)] for key in range(4000)}
    shares = Counter(before.values())
    assert min(shares.values()) > 350
    assert max(shares.values()) < 650
    left = addresses[1:]
    assert all(left[owner(key, left)] == where for key, where in before.items() if where != addresses[0])


# --- sglang_cache_aware -----------------------------------------------------------------------------------------------


def sent(policy: Policy, wanted: Request, where: Member) -> None:
    policy.took(Ask(wanted, 100, 50.0, {}), where)


def sglang(policy: Policy, members: Sequence[Member], wanted: Request) -> tuple[str, str]:
    """Who is first, and why."""
    ranking = policy.rank(Ask(wanted, 100, 50.0, {}), members, 0.0, Random(1))
    return first(ranking), ranking.reason


TEN = prompt(*range(10))
"""1,000 bytes."""


@pytest.mark.parametrize(("shared", "reason"), [(3, "no_match"), (4, "match")])
def test_sglang_follows_a_match_of_more_than_three_tenths(shared: int, reason: str) -> None:
    policy, members = create("sglang_cache_aware"), fleet(0, 0, 1)
    sent(policy, TEN, members[2])
    wanted = prompt(*range(shared), *range(50, 60 - shared))
    assert sglang(policy, members, wanted) == (address(2 if reason == "match" else 0), reason)


def test_sglang_counts_the_whole_prompt_and_its_tail() -> None:
    policy, members = create("sglang_cache_aware"), fleet(0, 1)
    sent(policy, TEN, members[1])
    assert sglang(policy, members, prompt(*range(4), size=1333))[1] == "match"
    assert sglang(policy, members, prompt(*range(4), size=1334))[1] == "no_match"


@pytest.mark.parametrize(
    ("loads", "reason"),
    [
        ((64, 0), "match"),
        ((65, 0), "imbalanced"),
        ((195, 130), "match"),  # 65 apart, but 195 is not more than 1.5 times 130
        ((196, 130), "imbalanced"),
    ],
)
def test_sglang_forgets_the_tree_above_both_thresholds(loads: tuple[int, int], reason: str) -> None:
    policy, members = create("sglang_cache_aware"), fleet(*loads)
    sent(policy, TEN, members[0])
    assert sglang(policy, members, TEN) == (address(0 if reason == "match" else 1), reason)


def test_sglang_keeps_a_prefix_with_whom_it_was_sent_to_first() -> None:
    policy, members = create("sglang_cache_aware"), fleet(3, 2, 1)
    sent(policy, TEN, members[1])
    sent(policy, TEN, members[2])
    assert sglang(policy, members, TEN)[0] == address(1)
    assert sglang(policy, [members[0], members[2]], TEN)[0] == address(2)
    assert sglang(policy, [members[0]], TEN) == (address(0), "no_match")
    sent(policy, prompt(*range(10), 10, 11), members[2])  # what comes after is its own
    assert sglang(policy, members, prompt(*range(10), 10, 11))[0] == address(2)


def test_sglang_takes_the_first_of_the_least_loaded() -> None:
    assert sglang(create("sglang_cache_aware"), fleet(1, 0, 0), TEN) == (address(1), "no_match")


def test_sglang_drops_the_tail_of_what_was_sent_longest_ago() -> None:
    tree = Tree()
    tree.insert(prompt(1, 2, 3, 4).blocks, "a", 800)
    tree.insert(prompt(7, 8, 9).blocks, "a", 800)
    assert tree.held_bytes == 700
    tree.insert(prompt(7, 8, 9, 10, 11, 12).blocks, "a", 800)
    assert tree.held_bytes == 800
    assert tree.match(prompt(1, 2, 3, 4).blocks) == (200, ("a",))
    assert tree.match(prompt(7, 8, 9, 10, 11, 12).blocks) == (600, ("a",))
    tree.insert(prompt(1, 2, 3, 4).blocks, "b", 800)  # a second worker brings room for as much
    assert (tree.held_bytes, len(tree)) == (1000, 10)
    assert tree.match(prompt(1, 2, 3, 4).blocks) == (400, ("b",))
    assert tree.match(prompt(1, 2, 99).blocks) == (200, ("a", "b"))


def test_sglang_keeps_all_of_what_was_sent_again() -> None:
    tree = Tree()
    for hashes in ((1, 2, 3), (4, 5, 6), (1, 2, 3), (7, 8)):
        tree.insert(prompt(*hashes).blocks, "a", 600)
    assert [tree.match(prompt(*hashes).blocks)[0] for hashes in ((1, 2, 3), (4, 5, 6), (7, 8))] == [300, 100, 200]


# --- epp_default ------------------------------------------------------------------------------------------------------


def sampled(*samples: tuple[int | None, float | None] | None) -> list[Member]:
    """Members that told so many waiting and that KV use at time 0, or nothing."""
    members = fleet(*(0 for _ in samples))
    for member, sample in zip(members, samples, strict=True):
        if sample is not None:
            member.sampled(Sample(waiting=sample[0], kv_usage=sample[1]), 0.0)
    return members


def test_epp_adds_queue_kv_and_prefix_by_their_weights() -> None:
    members = sampled((4, 0.5), (0, 0.9), (2, 0.2))
    ranking = rank("epp_default", members, prompt_tokens=640, hits={address(0): 512.0, address(2): 64.0})
    assert [m.address for _, m in ranking.order] == [address(0), address(2), address(1)]
    # 2 x 0 + 2 x 0.5 + 3 x 8/10; 2 x 1/2 + 2 x 0.8 + 3 x 1/10; 2 x 1 + 2 x 0.1.
    assert [-score for score, _ in ranking.order] == pytest.approx([3.4, 2.9, 2.2])


def test_epp_counts_equal_queues_as_empty() -> None:
    ranking = rank("epp_default", sampled((7, 0.25), (7, 0.75)))
    assert [-score for score, _ in ranking.order] == pytest.approx([3.5, 2.5])


def test_epp_counts_whole_blocks_of_64_and_the_last_of_the_prompt_as_one() -> None:
    members = sampled(None, None, None)
    hits = {address(0): 575.9, address(1): 576.0, address(2): 575.9999999}
    found = scores(rank("epp_default", members, prompt_tokens=641, hits=hits))
    assert found == pytest.approx({address(0): -3 * 8 / 11, address(1): -3 * 9 / 11, address(2): -3 * 9 / 11})


def test_epp_looks_at_no_more_than_the_first_131072_tokens() -> None:
    found = scores(rank("epp_default", sampled(None, None), prompt_tokens=262_144, hits={address(0): 200_000.0}))
    assert found == {address(0): -3.0, address(1): 0.0}


def test_epp_gives_nothing_for_what_it_has_not_been_told() -> None:
    members = sampled(None, (9, 0.5), (5, None), (None, 0.5))
    found = scores(rank("epp_default", members, prompt_tokens=640, hits={address(0): 640.0}))
    # The unknown queues do not count for the range, which is 5 to 9.
    assert found == pytest.approx({address(0): -3.0, address(1): -1.0, address(2): -2.0, address(3): -1.0})


def test_epp_takes_a_stale_sample_for_none() -> None:
    members = sampled((0, 0.0), (0, 0.0))
    members[1].sampled(Sample(waiting=3, kv_usage=0.9), 5.0)
    assert scores(rank("epp_default", members, now=12.0)) == pytest.approx({address(0): 0.0, address(1): -2.2})


def test_epp_never_goes_below_zero_for_a_scorer() -> None:
    assert scores(rank("epp_default", sampled((0, 1.25)))) == pytest.approx({address(0): -2.0})


def test_epp_knows_nothing_of_what_was_sent_since_the_sample() -> None:
    members = sampled((0, 0.1), (0, 0.2))
    fill(members[0], 50)
    assert first(rank("epp_default", members)) == address(0)


def test_epp_breaks_ties_by_lot() -> None:
    counts = firsts("epp_default", sampled((1, 0.5), (1, 0.5), (2, 0.5)), wanted=TEN)
    assert set(counts) == {address(0), address(1)}
    assert min(counts.values()) > 15


# --- epp_prefix_filter ------------------------------------------------------------------------------------------------


def queue(*tokens: int) -> list[Member]:
    """Members with one request each that waits for the prefill of so many tokens; 0 is none."""
    members = fleet(*(0 for _ in tokens))
    for member, n in zip(members, tokens, strict=True):
        if n:
            put(member, member.address, prompt_tokens=n, prefill_s=1000.0)
    return members


@pytest.mark.parametrize(("hit", "chosen"), [(512.0, 0), (511.0, 1)])
def test_the_filter_keeps_who_has_four_fifths_of_the_blocks(hit: float, chosen: int) -> None:
    ranking = rank("epp_prefix_filter", queue(5000, 0), prompt_tokens=640, hits={address(0): hit})
    assert (first(ranking), ranking.reason) == (address(chosen), "load" if chosen else "prefix")


@pytest.mark.parametrize(("backlog", "chosen"), [(286_704 + 100, 0), (286_705 + 100, 1)])
def test_the_filter_opens_beyond_18_s_of_prefill_at_15928_tokens_per_s(backlog: int, chosen: int) -> None:
    ranking = rank("epp_prefix_filter", queue(backlog, 100), prompt_tokens=640, hits={address(0): 640.0})
    assert (first(ranking), ranking.reason) == (address(chosen), "spill" if chosen else "prefix")


def test_the_filter_compares_the_best_of_both_sides() -> None:
    hits = {address(0): 640.0, address(1): 640.0}
    ranking = rank("epp_prefix_filter", queue(900_000, 200_000, 0), prompt_tokens=640, hits=hits)
    assert [m.address for _, m in ranking.order] == [address(1), address(0), address(2)]


def test_the_filter_can_be_told_never_to_open() -> None:
    members, hits = queue(900_000, 0), {address(0): 640.0}
    given = {"max_ttft_penalty_s": 0.0}
    assert first(rank("epp_prefix_filter", members, options=given, prompt_tokens=640, hits=hits)) == address(0)


def test_the_token_load_is_what_waits_and_what_comes() -> None:
    members = queue(1000, 0)
    found = scores(rank("epp_prefix_filter", members, prompt_tokens=640, hits={address(0): 320.0}))
    assert found == pytest.approx({address(0): 1320 / 4_194_304 - 1, address(1): 640 / 4_194_304 - 1})
    full = scores(rank("epp_prefix_filter", queue(4_194_304, 9_000_000), prompt_tokens=640))
    assert full == {address(0): 0.0, address(1): 0.0}


def test_a_request_with_its_first_token_waits_no_more() -> None:
    members = queue(1000, 500)
    members[0].load.first_token(next(iter(members[0].load)), 0.0)
    assert first(rank("epp_prefix_filter", members)) == address(0)


def test_the_filter_breaks_ties_by_lot() -> None:
    counts = firsts("epp_prefix_filter", queue(0, 0, 10), wanted=TEN)
    assert set(counts) == {address(0), address(1)}


# --- aibrix_prefix_cache ----------------------------------------------------------------------------------------------


def aibrix(members: Sequence[Member], hits: Mapping[int, float], **given: Any) -> tuple[str, str]:
    ranking = rank(
        "aibrix_prefix_cache", members, prompt_tokens=1000, hits={address(i): n for i, n in hits.items()}, options=given
    )
    return first(ranking), ranking.reason


def test_aibrix_takes_the_longest_match_then_the_fewest_requests() -> None:
    members = fleet(0, 2, 1)
    assert aibrix(members, {0: 300.0, 1: 700.0}) == (address(1), "match")
    assert aibrix(members, {1: 705.0, 2: 700.0}) == (address(2), "match")  # both are 70 %
    assert aibrix(members, {1: 710.0, 2: 709.9}) == (address(1), "match")


def test_aibrix_passes_over_who_has_more_than_mean_and_sigma() -> None:
    # 0, 2, 4: mean 2, sample deviation 2 (that of a population would be 1.63).
    assert aibrix(fleet(0, 2, 4), {2: 900.0}) == (address(2), "match")
    # 0, 2, 5: 2.33 + 2.52 = 4.85.
    assert aibrix(fleet(0, 2, 5), {2: 900.0}) == (address(0), "no_match")
    assert aibrix(fleet(0, 2, 5), {1: 100.0, 2: 900.0}) == (address(1), "match")


def test_aibrix_looks_only_at_the_idlest_beyond_a_gap_of_eight() -> None:
    assert aibrix(fleet(2, 9, 10, 10), {1: 900.0}) == (address(1), "match")
    assert aibrix(fleet(1, 9, 10, 10), {1: 900.0}) == (address(0), "no_match")
    assert aibrix(fleet(1, 1, 9, 10), {1: 10.0, 2: 900.0}) == (address(1), "match")


def test_aibrix_of_later_versions_asks_for_twice_the_mean_as_well() -> None:
    later = {"imbalance_gap": 7, "imbalance_factor": 2.0}
    assert aibrix(fleet(1, 9, 10, 10), {1: 900.0}, **later) == (address(1), "match")  # 10 is not above 2 x (7.5 + 1)
    assert aibrix(fleet(0, 4, 4, 12), {1: 900.0}, **later) == (address(1), "match")  # 12 is not above 2 x (5 + 1)
    assert aibrix(fleet(0, 1, 1, 8), {1: 900.0}, **later) == (address(0), "no_match")  # 8 is above 2 x (2.5 + 1)


def test_aibrix_counts_a_match_of_less_than_one_per_cent() -> None:
    assert aibrix(fleet(0, 1), {1: 5.0}) == (address(1), "match")


def test_aibrix_without_a_match_takes_the_fewest_requests_by_lot() -> None:
    assert set(firsts("aibrix_prefix_cache", fleet(1, 0, 0), wanted=TEN)) == {address(1), address(2)}
    tied = {address(1): 50.0, address(2): 50.0}
    assert set(firsts("aibrix_prefix_cache", fleet(0, 1, 1), wanted=TEN, hits=tied)) == {address(1), address(2)}


# --- dynamo -----------------------------------------------------------------------------------------------------------

EIGHT_HUNDRED = prompt(1, 2, 3, 4, block_bytes=800)
"""3,200 bytes for 800 tokens."""


def dynamo(members: Sequence[Member], name: str = "dynamo", **given: Any) -> dict[str, float]:
    return scores(rank(name, members, wanted=EIGHT_HUNDRED, prompt_tokens=800, **given))


def test_dynamo_adds_prefill_and_decode_in_blocks_of_16() -> None:
    members = queue(1600, 0)
    # (1600 + 800 - 320) / 16 + (1600 + 800) / 16; 800 / 16 twice.
    assert dynamo(members, hits={address(0): 320.0}) == {address(0): 130 + 150, address(1): 50 + 50}
    assert dynamo(members, "dynamo_prefill2", hits={address(0): 320.0}) == {address(0): 260 + 150, address(1): 150}


def test_dynamo_counts_a_prefilled_request_for_decode_alone() -> None:
    members = fleet(0, 0)
    held_by(members[0], "x", prompt(size=6400), 1600)
    assert dynamo(members)[address(0)] == 50 + 150


def test_dynamo_counts_blocks_in_flight_once() -> None:
    members = fleet(0, 0)
    held_by(members[0], "x", EIGHT_HUNDRED, 800)
    held_by(members[0], "y", prompt(1, 2, 3, 9, block_bytes=800), 800)
    # In flight 800 and 200 tokens more; of the new prompt's 800 all, and for another one 600, are there.
    assert dynamo(members) == {address(0): 50 + 62.5, address(1): 50 + 50}
    other = rank("dynamo", members, wanted=prompt(1, 2, 3, 8, block_bytes=800), prompt_tokens=800)
    assert scores(other)[address(0)] == 50 + 75


def test_dynamo_frees_blocks_with_the_last_request_that_has_them() -> None:
    active, (member,) = ActiveBlocks(), fleet(0)
    held_by(member, "x", EIGHT_HUNDRED, 800)
    held_by(member, "y", replace(EIGHT_HUNDRED, prompt_bytes=3300), 825)
    active.sync(member.load)
    x, y = member.load
    assert (len(active), active.active_bytes) == (2, 3300)
    member.load.close(x, 1.0)
    active.sync(member.load)
    assert (len(active), active.active_bytes) == (1, 3300)
    member.load.close(y, 1.0)
    active.sync(member.load)
    assert (len(active), active.active_bytes) == (0, 0)
    assert active.added_bytes(EIGHT_HUNDRED.blocks, 3200) == 3200


def test_dynamo_follows_what_comes_and_goes() -> None:
    policy, members = create("dynamo"), fleet(0, 0)
    ask = Ask(EIGHT_HUNDRED, 800, 50.0, {})

    def cost() -> float:
        return scores(policy.rank(ask, members, 0.0, Random(1)))[address(0)]

    assert cost() == 100
    held_by(members[0], "x", prompt(5, 6, block_bytes=1600), 800)
    policy.took(ask, members[0])
    assert cost() == 150
    # One ends and a smaller one comes between two rankings: as many in flight, but others.
    members[0].load.close(next(iter(members[0].load)), 1.0)
    held_by(members[0], "y", prompt(7, block_bytes=1600), 400)
    policy.took(ask, members[0])
    assert cost() == 125


def test_dynamo_weighs_prefill_against_decode() -> None:
    members = fleet(0, 0)
    held_by(members[0], "decoding", prompt(size=8000), 2000)
    held_by(members[1], "queued", prompt(size=3840), 960, prefilled=False)
    # 50 + 175 against 110 + 110; with twice the prefill 100 + 175 against 220 + 110.
    assert dynamo(members) == {address(0): 225, address(1): 220}
    assert dynamo(members, "dynamo_prefill2") == {address(0): 275, address(1): 330}


def test_dynamo_credit_never_makes_prefill_negative_and_requests_may_count() -> None:
    members = fleet(0, 1)
    given = {"overlap_score_credit": 2.0, "decode_active_request_weight": 7.0}
    found = dynamo(members, options=given, hits={address(0): 700.0})
    assert found == {address(0): 0 + 50, address(1): 50 + 50 + 62.5 + 7}


def test_dynamo_breaks_ties_by_lot() -> None:
    counts = firsts("dynamo", queue(0, 0, 16), wanted=EIGHT_HUNDRED, prompt_tokens=800)
    assert set(counts) == {address(0), address(1)}
    assert min(counts.values()) > 15


# --- lmetric and least_prefill ----------------------------------------------------------------------------------------


def test_lmetric_multiplies_work_by_requests() -> None:
    members = queue(500, 0)
    found = scores(rank("lmetric", members, prompt_tokens=1000, hits={address(0): 900.0}))
    assert found == {address(0): 600 * 2, address(1): 1000 * 1}


def test_lmetric_counts_requests_that_decode_in_the_second_factor_alone() -> None:
    found = scores(rank("lmetric", fleet(3, 0), prompt_tokens=1000, hits={address(0): 800.0}))
    assert found == {address(0): 200 * 4, address(1): 1000}


def test_the_last_token_of_a_prompt_is_never_cached() -> None:
    for name in ("lmetric", "least_prefill"):
        found = scores(rank(name, fleet(0, 0), prompt_tokens=1000, hits={address(0): 1000.0}))
        assert found == {address(0): 1.0, address(1): 1000.0}


def test_least_prefill_adds_what_waits_and_what_is_not_cached() -> None:
    members = queue(500, 0)
    found = scores(rank("least_prefill", members, prompt_tokens=1000, hits={address(0): 900.0}))
    assert found == {address(0): 600.0, address(1): 1000.0}


def test_least_prefill_counts_what_is_cached_of_the_queue_as_done() -> None:
    members = fleet(0, 0)
    put(members[0], "x", prompt_tokens=1000, cached=800)
    put(members[1], "y", prompt_tokens=300)
    assert scores(rank("least_prefill", members, prompt_tokens=100)) == {address(0): 300.0, address(1): 400.0}


def test_least_prefill_breaks_ties_by_requests_then_by_lot() -> None:
    assert set(firsts("least_prefill", fleet(2, 1, 1), wanted=TEN)) == {address(1), address(2)}
    assert set(firsts("lmetric", fleet(1, 0, 0), wanted=TEN)) == {address(1), address(2)}
