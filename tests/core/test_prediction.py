from __future__ import annotations

import pytest

from extproc.core.fleet import Member
from extproc.core.prediction import Ask, capacity_wait_s, company, cost_s, predict
from extproc.core.traffic import Prices
from extproc.core.types import Blocks, Request, Sample

from .support import A100, H100, address, fill, members_of, put, replicas


def one(labels: dict[str, str] = H100) -> Member:
    (made,) = members_of(replicas(1, labels))
    return made


def ask(
    prompt: int = 1000, output: float = 100.0, hit: float = 0.0, prices: Prices | None = None, **fields: int
) -> Ask:
    hits = {address(0): hit} if hit else {}
    return Ask(Request(**fields), prompt, output, hits, prices or Prices())  # type: ignore[arg-type]


def test_an_idle_replica_costs_the_own_prefill_and_decode_alone() -> None:
    replica = one()
    p = predict(ask(), replica, 0.0)
    assert p.queue_s == replica.speed.base_s
    assert p.prefill_s == pytest.approx(replica.speed.prior.prefill_s(1000))
    assert p.decode_s == pytest.approx(99 * replica.speed.prior.decode_step_s(1, 1000))
    assert (p.delay_s, p.crowding_s, p.cached_tokens) == (0.0, 0.0, 0)
    assert p.cost_s == pytest.approx(p.ttft_s + 0.1 * p.decode_s)


def test_the_cost_is_that_of_the_prediction() -> None:
    replica = one()
    fill(replica, 3)
    assert cost_s(ask(), replica, 0.5) == predict(ask(), replica, 0.5).cost_s


def test_decode_counts_at_its_price_for_this_request_and_for_the_others() -> None:
    costs = []
    for price in (0.0, 0.5):
        replica = one()
        for flight in fill(replica, 10, prefill_s=0.0):
            replica.load.first_token(flight, 0.0)
        p = predict(ask(prices=Prices(decode=price)), replica, 0.0)
        costs.append(p.cost_s)
        assert p.delay_s > 0.0
        assert p.cost_s == pytest.approx(p.ttft_s + p.crowding_s + price * (p.decode_s + p.delay_s))
    assert costs[0] < costs[1]


def test_each_second_of_prefill_delays_those_to_come() -> None:
    p = predict(ask(8000, prices=Prices(later=1.5)), one(), 0.0)
    assert p.crowding_s == pytest.approx(1.5 * p.prefill_s)


def test_a_prompt_behind_short_ones_fills_up_their_step_and_they_wait_for_it() -> None:
    replica = one()
    fill(replica, 1, prompt_tokens=8000, prefill_s=0.3)  # under way
    behind_one = predict(ask(6000), replica, 0.1).crowding_s
    for name in "abc":
        put(replica, name, now=0.1, prompt_tokens=1000, prefill_s=0.03)
    p = predict(ask(6000), replica, 0.1)
    assert behind_one == 0.0
    assert p.crowding_s == pytest.approx(3 * replica.speed.fill_s(8192 - 3000, 0))
    assert predict(ask(100), replica, 0.1).crowding_s == pytest.approx(3 * replica.speed.fill_s(100, 0))


def test_requests_of_others_stand_for_prefill_that_nobody_tells_of_here_and_there() -> None:
    replica = one()
    replica.sampled(Sample(running=8, waiting=0), 0.0)
    seen = predict(ask(), replica, 0.0)
    unseen = predict(ask(prices=Prices(unseen_s=0.02, unseen_rate=0.5)), replica, 0.0)
    assert unseen.queue_s == pytest.approx(seen.queue_s + 8 * 0.02)
    assert unseen.crowding_s == pytest.approx(8 * 0.5 * 0.5 * seen.prefill_s**2)


def test_queued_prefill_counts_in_full() -> None:
    replica = one()
    fill(replica, 3, prefill_s=0.7)
    assert predict(ask(), replica, 0.0).queue_s == pytest.approx(2.1 + replica.speed.base_s)


def test_a_cached_prefix_saves_its_prefill_and_never_the_last_token() -> None:
    replica = one()
    assert predict(ask(8000), replica, 0.0).prefill_s > 2 * predict(ask(8000, hit=6000), replica, 0.0).prefill_s
    full = predict(ask(8000, hit=9000), replica, 0.0)
    assert full.cached_tokens == 7999
    assert full.prefill_s > 0.0


def test_a_replica_that_does_not_cache_loses_our_trust() -> None:
    replica = one()
    for _ in range(100):
        replica.hit(1000, 0)
    assert predict(ask(8000, hit=6000), replica, 0.0).cached_tokens == 0


def test_decoding_neighbours_are_delayed_by_the_prefill_and_by_longer_steps() -> None:
    quiet, busy = one(), one()
    for flight in fill(busy, 10, prefill_s=0.0):
        busy.load.first_token(flight, 0.0)
    alone, among = predict(ask(8000), quiet, 0.0), predict(ask(8000), busy, 0.0)
    assert among.delay_s > 9 * alone.prefill_s
    assert among.decode_s > alone.decode_s


def test_twice_the_neighbours_are_twice_the_stall() -> None:
    few, many = one(), one()
    for replica, n in ((few, 5), (many, 10)):
        for flight in fill(replica, n, prefill_s=0.0):
            replica.load.first_token(flight, 0.0)
    assert predict(ask(8000, 1), many, 0.0).delay_s == pytest.approx(
        2 * predict(ask(8000, 1), few, 0.0).delay_s, rel=0.1
    )


def test_a_learned_speed_scales_the_prediction() -> None:
    replica = one()
    for _ in range(200):
        replica.speed.learn_ttft(0.2, 0.41)
        replica.speed.learn_ttft(0.02, 0.05)
    prior = replica.speed.prior.prefill_s(8000)
    assert predict(ask(8000), replica, 0.0).prefill_s == pytest.approx(2 * prior, rel=0.1)


def test_strangers_count_as_company() -> None:
    replica = one()
    replica.sampled(Sample(running=8, waiting=0), 0.0)
    assert company(replica, 0.0) == (8.0, 8 * 1024.0)
    assert predict(ask(), replica, 0.0).delay_s > 0.0
    put(replica, "a", prompt_tokens=500, output_tokens=0.0, prefill_s=0.0)
    assert company(replica, 0.0) == (9.0, 9 * 500.0)


def test_strangers_of_a_stale_sample_do_not_count() -> None:
    replica = one()
    replica.sampled(Sample(running=8, waiting=0), 0.0)
    assert company(replica, 10.1) == (0.0, 0.0)


def test_one_sample_among_many_moves_the_count_of_strangers_a_little() -> None:
    """All routers read the same sample: if each went where it shows few, all would go there."""
    replica = one()
    for n in range(100):
        replica.sampled(Sample(running=8, waiting=0), float(n))
    replica.sampled(Sample(running=0, waiting=0), 100.0)
    assert 7.0 < company(replica, 100.0)[0] < 7.5


def test_a_queue_for_places_waits_for_them_to_become_free() -> None:
    """By Little's law: 20 before us, 40 places, each for 10 s."""
    replica = one()
    replica.answered(10.0, 0.0)
    replica.sampled(Sample(running=40, waiting=20), 0.0)
    assert capacity_wait_s(ask(), replica, 0.0) == pytest.approx(5.0)
    assert predict(ask(), replica, 0.0).queue_s == pytest.approx(5.0 + replica.speed.base_s)


def test_what_waits_for_prefill_is_not_counted_as_waiting_for_a_place() -> None:
    replica = one()
    replica.answered(10.0, 0.0)
    fill(replica, 8, prefill_s=0.2)
    replica.sampled(Sample(running=20, waiting=8), 0.0)
    assert capacity_wait_s(ask(), replica, 0.0) == 0.0
    assert predict(ask(), replica, 0.0).queue_s == pytest.approx(1.6 + replica.speed.base_s)


def test_a_full_kv_cache_waits_for_tokens_to_become_free() -> None:
    replica = one()
    replica.answered(10.0, 0.0)
    replica.sampled(Sample(running=9, waiting=0, block_size=16, num_blocks=625), 0.0)
    for flight in fill(replica, 9, prompt_tokens=1000, output_tokens=0.0, prefill_s=0.0):
        replica.load.first_token(flight, 0.0)
    assert capacity_wait_s(ask(1000), replica, 0.0) == 0.0
    assert capacity_wait_s(ask(1900), replica, 0.0) == pytest.approx(1.0)


def test_stale_samples_say_nothing_of_capacity() -> None:
    replica = one()
    replica.answered(10.0, 0.0)
    replica.sampled(Sample(running=40, waiting=20), 0.0)
    assert capacity_wait_s(ask(), replica, 10.1) == 0.0


def test_without_a_response_time_there_is_no_wait_to_tell() -> None:
    replica = one()
    replica.sampled(Sample(running=40, waiting=20), 0.0)
    assert capacity_wait_s(ask(), replica, 0.0) == 0.0


def test_predictions_are_made_once_for_each_request_and_replica() -> None:
    replica, asked = one(), ask()
    before = predict(asked, replica, 0.0)
    fill(replica, 3)
    assert predict(asked, replica, 0.0) == before


def test_a_faster_gpu_costs_less() -> None:
    assert cost_s(ask(8000), one(H100), 0.0) < cost_s(ask(8000), one(A100), 0.0) / 2


def test_the_key_of_ties_is_the_block_at_one_kilobyte_or_the_last() -> None:
    def key(n: int) -> int | None:
        hashes = tuple(range(100, 100 + n))
        return Ask(Request(blocks=Blocks(hashes, tuple(256 * (i + 1) for i in range(n)))), 1, 0.0, {}).tie_key

    assert [key(n) for n in (0, 1, 3, 4, 9)] == [None, 100, 102, 103, 103]
