from __future__ import annotations

from collections import Counter

import pytest

from extproc.core.fleet import GPU_STALE_S
from extproc.core.policies.base import PolicyError, create
from extproc.core.router import Router
from extproc.core.types import GpuSampled, Replica, Sample

from ..support import (
    A100,
    H100,
    POOL,
    address,
    chosen,
    fill,
    first,
    member,
    members_of,
    ok,
    only,
    preferred,
    rank,
    replicas,
    request,
    route,
    router,
    sample,
    text,
)

# --- least_request ----------------------------------------------------------------------------------------------------


def test_least_connections_takes_the_fewest_active_each_time_while_the_counts_stand() -> None:
    """gpu-0 30 of 100, gpu-1 70 of 100, gpu-2 50 of 150 active."""
    made = router(3, "least_request")
    for i, active in enumerate((30, 70, 50)):
        for _ in range(active):
            made.arrive(request(subset=only(i)), 0.0)
    assert [preferred(made, request(text(2000, n))) for n in range(10)] == [address(0)] * 10


def test_least_connections_evens_the_counts_out() -> None:
    made = router(3, "least_request")
    for _ in range(30):
        made.arrive(request(subset=only(1)), 0.0)
    for n in range(60):
        route(made, request(text(1000, n)))
    assert [len(member(made, i).load) for i in range(3)] == [30, 30, 30]


# --- least_queue ------------------------------------------------------------------------------------------------------


def test_least_queued_takes_the_shortest_waiting_queue() -> None:
    made = router(3, "least_queue", scraped=True)
    for i, waiting in enumerate((5, 0, 3)):
        sample(made, i, running=10, waiting=waiting)
    assert preferred(made, request(text(1000))) == address(1)


def test_least_queued_does_not_herd_between_two_samples() -> None:
    made = router(3, "least_queue", scraped=True)
    for i in range(3):
        sample(made, i, running=10, waiting=2)
    counts = Counter(chosen(made, request(text(1000, n))) for n in range(30))
    assert counts == {address(i): 10 for i in range(3)}


def test_an_unknown_queue_is_not_a_short_one() -> None:
    made = router(2, "least_queue")
    sample(made, 1, running=50, waiting=40)
    decision = route(made, request(text(1000))).decision
    assert decision.endpoints[0] == address(1)
    assert decision.candidates[1].terms["waiting"] is None


def test_a_stale_queue_is_an_unknown_one() -> None:
    made = router(2, "least_queue")
    sample(made, 0, running=1, waiting=0, now=0.0)
    sample(made, 1, running=1, waiting=9, now=20.0)
    assert preferred(made, request(text(1000)), now=20.0) == address(1)


def test_without_any_sample_the_fleet_is_balanced_by_our_own_requests() -> None:
    made = router(3, "least_queue")
    counts = Counter(chosen(made, request(text(1000, n))) for n in range(30))
    assert counts == {address(i): 10 for i in range(3)}
    assert made.explain(request(text(1000)), 0.0).reason == "unknown"  # type: ignore[union-attr]


# --- least_kv ---------------------------------------------------------------------------------------------------------


def test_least_kv_takes_the_emptiest_cache() -> None:
    made = router(3, "least_kv")
    for i, usage in enumerate((0.9, 0.2, 0.5)):
        sample(made, i, kv_usage=usage)
    assert preferred(made, request(text(1000))) == address(1)


@pytest.mark.parametrize("size", [{}, {"block_size": 16, "num_blocks": 25_000}])
def test_least_kv_does_not_herd_between_two_samples(size: dict[str, int]) -> None:
    made = router(3, "least_kv")
    for i in range(3):
        sample(made, i, kv_usage=0.5, **size)
    counts = Counter(chosen(made, request(text(4000, n), output=100)) for n in range(30))
    assert counts == {address(i): 10 for i in range(3)}


def test_least_kv_counts_what_ended_since_the_sample() -> None:
    members = members_of(replicas(2))
    flights = fill(members[0], 10, prompt_tokens=1000)
    for each in members:
        each.sampled(Sample(kv_usage=0.5, block_size=16, num_blocks=2000), 0.0)
    for flight in flights:
        members[0].load.close(flight, 1.0)
    assert first(rank("least_kv", members, now=1.0)) == address(0)


# --- least_latency ----------------------------------------------------------------------------------------------------


def served(made_i: int, seconds: float, n: int, policy_router: object) -> None:
    """Replica i answered n requests, each after that time, and has none left."""
    from extproc.core.router import Router

    assert isinstance(policy_router, Router)
    for k in range(n):
        flight = route(policy_router, request(text(500, k), subset=only(made_i))).flight
        policy_router.finish(flight, ok(address(made_i), duration_s=seconds), 0.0)


def test_least_latency_prefers_the_faster_gpus_of_a_mixed_fleet() -> None:
    made = router((Replica(address(0), A100), Replica(address(1), H100)), "least_latency")
    served(0, 3.0, 5, made)
    served(1, 1.0, 5, made)
    assert preferred(made, request(text(1000))) == address(1)
    counts = Counter(chosen(made, request(text(1000, n))) for n in range(40))
    assert counts == {address(0): 10, address(1): 30}


def test_least_latency_tries_a_replica_that_has_answered_nothing() -> None:
    made = router(3, "least_latency")
    served(0, 0.1, 3, made)
    decision = route(made, request(text(1000))).decision
    assert decision.reason == "untried"
    assert decision.endpoints[0] in (address(1), address(2))


def test_least_latency_leaves_a_replica_that_never_answered_while_it_owes_an_answer() -> None:
    made = router(2, "least_latency")
    served(0, 5.0, 3, made)
    made.arrive(request(subset=only(1)), 0.0)
    assert preferred(made, request(text(1000))) == address(0)


def test_least_latency_tries_a_replica_that_was_slow_long_ago() -> None:
    made = router(2, "least_latency")
    served(0, 60.0, 3, made)
    served(1, 1.0, 3, made)
    assert preferred(made, request(text(1000)), now=0.0) == address(1)
    for _ in range(2):
        made.arrive(request(subset=only(1)), 400.0)
    assert preferred(made, request(text(1000)), now=400.0) == address(0)


# --- power_of_two -----------------------------------------------------------------------------------------------------


def test_power_of_two_takes_the_less_loaded_of_the_two_drawn() -> None:
    members = members_of(replicas(2))
    fill(members[0], 3)
    assert {first(rank("power_of_two", members, seed=s)) for s in range(20)} == {address(1)}


def test_power_of_two_never_takes_the_most_loaded_and_reaches_all_others() -> None:
    members = members_of(replicas(5))
    for i, each in enumerate(members):
        fill(each, i)
    firsts = Counter(first(rank("power_of_two", members, seed=s)) for s in range(400))
    assert set(firsts) == {address(i) for i in range(4)}
    # The least loaded wins whenever it is drawn: 4 of 10 pairs.
    assert firsts[address(0)] == pytest.approx(160, abs=40)


def test_power_of_two_lists_the_least_loaded_of_the_rest_as_alternates() -> None:
    members = members_of(replicas(4))
    for i, each in enumerate(members):
        fill(each, i)
    ranking = rank("power_of_two", members, seed=1)
    rest = [score for score, _ in ranking.order[2:]]
    assert rest == sorted(rest)


# --- gpu_utilization --------------------------------------------------------------------------------------------------


def gpu(made: Router, i: int, use: float | None, now: float = 0.0) -> None:
    made.learn(GpuSampled(POOL, address(i), use), now)


def test_gpu_utilization_takes_the_least_used_gpus() -> None:
    made = router(3, "gpu_utilization")
    for i, use in enumerate((0.9, 0.45, 0.7)):
        gpu(made, i, use)
    assert preferred(made, request(text(1000))) == address(1)


def test_gpu_utilization_does_not_herd_between_two_looks() -> None:
    made = router(2, "gpu_utilization")
    gpu(made, 0, 0.5)
    gpu(made, 1, 0.6)
    counts = Counter(chosen(made, request(text(1000, n))) for n in range(20))
    assert set(counts.values()) == {9, 11}


def test_gpu_utilization_takes_of_gpus_alike_the_one_with_fewer_requests() -> None:
    """As where all are full: utilization says no more then."""
    made = router(2, "gpu_utilization")
    for i, running in enumerate((3, 2)):
        for _ in range(running):
            made.arrive(request(subset=only(i)), 0.0)
        gpu(made, i, 1.0, now=1.0)
    assert [preferred(made, request(text(1000, n)), now=1.0) for n in range(5)] == [address(1)] * 5


def test_gpu_utilization_looks_anew_at_what_was_sent_before() -> None:
    made = router(2, "gpu_utilization")
    for _ in range(10):
        made.arrive(request(subset=only(0)), 0.0)
    gpu(made, 0, 0.2, now=1.0)
    gpu(made, 1, 0.3, now=1.0)
    assert preferred(made, request(text(1000)), now=1.0) == address(0)


def test_unknown_gpus_are_not_idle_ones_and_old_news_is_unknown() -> None:
    made = router(3, "gpu_utilization")
    gpu(made, 0, 0.99)
    gpu(made, 1, None)
    assert preferred(made, request(text(1000))) == address(0)
    gpu(made, 2, 1.0, now=GPU_STALE_S + 1.0)
    assert preferred(made, request(text(1000)), now=GPU_STALE_S + 1.0) == address(2)


def test_gpu_utilization_has_a_sensible_option() -> None:
    with pytest.raises(PolicyError, match="per_request must be from 0 to 1"):
        create("gpu_utilization", {"per_request": -0.1})
