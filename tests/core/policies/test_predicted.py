from __future__ import annotations

from collections import Counter

import pytest

from extproc.core.health.states import State
from extproc.core.types import Progressed, Replica

from ..support import (
    A100,
    H100,
    address,
    chosen,
    fill,
    first,
    member,
    members_of,
    ok,
    only,
    preferred,
    put,
    rank,
    replicas,
    request,
    route,
    router,
    sample,
    text,
    usage,
)

HOLDER = 2


def test_an_idle_holder_of_the_prefix_is_preferred() -> None:
    made = router(4)
    prompt = text(16_000, 1)
    verdict = route(made, request(prompt, subset=only(HOLDER), output=50))
    made.finish(verdict.flight, ok(address(HOLDER), ttft_s=0.1), 1.0)
    decision = route(made, request(prompt + text(500, 2), output=50), 2.0).decision
    assert (decision.endpoints[0], decision.reason) == (address(HOLDER), "prefix")
    assert decision.prediction.cached_tokens == pytest.approx(4000, rel=0.1)


def test_the_holder_is_preferred_while_its_backlog_is_below_the_saving_and_left_above() -> None:
    members = members_of(replicas(2))
    hits = {address(0): 8000.0}
    alone = members[0].speed.prior.prefill_s(10_000) - members[0].speed.prior.prefill_s(2000, 8000)
    # Not up to the whole saving: the one ahead stands still while this prompt is prefilled, and that counts too.
    for part, expected, reason in ((0.5, 0, "prefix"), (1.1, 1, "spill")):
        members = members_of(replicas(2))
        fill(members[0], 1, prefill_s=part * alone)
        ranking = rank("predicted", members, prompt_tokens=10_000, output_tokens=100, hits=hits)
        assert (first(ranking), ranking.reason) == (address(expected), reason)


def test_nobody_holds_it_is_called_cost() -> None:
    assert rank("predicted", members_of(replicas(2))).reason == "cost"


def test_a_long_prompt_goes_to_the_faster_gpu() -> None:
    made = router((Replica(address(0), A100), Replica(address(1), H100)))
    assert preferred(made, request(text(32_000), output=100)) == address(1)


def test_the_slower_gpu_gets_its_smaller_share_under_load() -> None:
    made = router((Replica(address(0), A100), Replica(address(1), H100)))
    counts = Counter(chosen(made, request(text(8000, n), output=100)) for n in range(40))
    assert 5 <= counts[address(0)] < counts[address(1)]


def test_ten_arrivals_in_the_same_instant_spread_over_equal_replicas() -> None:
    made = router(5)
    counts = Counter(chosen(made, request(text(4000, n), output=100)) for n in range(10))
    assert counts == {address(i): 2 for i in range(5)}


def test_costs_closer_than_a_millisecond_are_equal_and_go_by_the_head_of_the_prompt() -> None:
    for wait_s, expected in ((0.0005, {address(0), address(1)}), (0.0015, {address(1)})):
        made = router(2)
        put(member(made, 0), "waiting", prefill_s=wait_s, prompt_tokens=1, output_tokens=0.0)
        put(member(made, 1), "waiting", prefill_s=0.0, prompt_tokens=1, output_tokens=0.0)
        assert {preferred(made, request(text(2000, n), output=0)) for n in range(20)} == expected


def test_siblings_of_one_instant_do_not_all_pile_up_on_one() -> None:
    for siblings, replicas_used in ((10, 2), (200, 4)):
        made = router(5)
        counts = Counter(chosen(made, request(text(40_000, 1), output=100)) for _ in range(siblings))
        assert len(counts) >= replicas_used


def test_the_turns_of_a_session_stay_and_spill_under_load() -> None:
    made, said, now = router(4), text(20_000, 1), 0.0
    home = chosen(made, request(said, output=100), now)
    for n in range(5):
        now += 20.0
        said += text(2000, 10 + n)
        verdict = route(made, request(said, output=100), now)
        assert verdict.endpoints[0] == home
        expected = verdict.decision.prediction
        made.finish(verdict.flight, ok(home, ttft_s=expected.ttft_s, duration_s=2.0), now + 2.0)
    now += 20.0
    i = next(i for i in range(4) if address(i) == home)
    for n in range(6):
        route(made, request(text(60_000, 100 + n), output=100, subset=only(i)), now)
    decision = route(made, request(said + text(2000, 20), output=100), now).decision
    assert decision.endpoints[0] != home
    assert decision.reason == "spill"


def test_a_replica_without_a_sample_does_not_look_free_beside_others() -> None:
    made = router(2, scraped=True)
    sample(made, 1, running=20, waiting=3)
    assert member(made, 0).state(0.0) is State.STARTING
    assert preferred(made, request(text(4000))) == address(1)


def test_a_fleet_without_any_sample_is_used() -> None:
    made = router(3, scraped=True)
    counts = Counter(chosen(made, request(text(4000, n), output=100)) for n in range(9))
    assert counts == {address(i): 3 for i in range(3)}


def test_samples_that_tell_nothing_do_no_harm() -> None:
    made = router(2, scraped=True)
    for i in range(2):
        sample(made, i)
    assert route(made, request(text(4000), output=100)).decision.reason == "cost"


def test_a_stale_sample_is_ignored() -> None:
    made = router(2, scraped=True)
    sample(made, 0, running=60, waiting=30, now=0.0)
    sample(made, 1, running=0, waiting=0, now=0.0)
    flight = route(made, request(subset=only(0)), 0.0).flight
    made.finish(flight, ok(address(0), duration_s=10.0), 1.0)
    busy, idle = member(made, 0), member(made, 1)
    wanted = request(text(4000), output=100)
    assert preferred(made, wanted, 2.0) == idle.address
    decision = route(made, wanted, 60.0).decision
    costs = {c.address: c.score for c in decision.candidates}
    assert costs[busy.address] == pytest.approx(costs[idle.address])


def test_a_replica_that_hangs_is_left_alone_though_its_own_page_says_idle() -> None:
    made = router(2, scraped=True)
    for i in range(2):
        sample(made, i, running=0, waiting=0)
    flight = route(made, request(text(4000), subset=only(0), output=100)).flight
    for second in range(1, 6):
        sample(made, 0, running=0, waiting=0, now=float(second))
        sample(made, 1, running=0, waiting=0, now=float(second))
        made.learn(Progressed(flight, None, None, 0), float(second))
    assert preferred(made, request(text(4000, 5), output=100), 5.0) == address(1)


def test_hits_that_never_come_are_no_longer_believed() -> None:
    made, now = router(2), 0.0
    prompt = text(16_000, 1)
    for _ in range(40):
        now += 10.0
        verdict = route(made, request(prompt, subset=only(0), output=50), now)
        made.finish(verdict.flight, ok(address(0), usage=usage(4000, 50, 0)), now + 1.0)
    decision = route(made, request(prompt, subset=only(0), output=50), now + 5.0).decision
    assert decision.prediction.cached_tokens < 100
