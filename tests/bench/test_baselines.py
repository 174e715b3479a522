"""The baselines as a family: selectable only on demand, sane with whatever is known, and fit to drive a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from extproc.core.policies.base import REGISTRY, create, options
from extproc.core.prediction import Ask
from extproc.core.types import Decision, End, Remove, Request, Sample
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.fleet_spec import Group, nodes
from extproc.sim.simulate_report import digest
from extproc.sim.traces import Generate, generate
from tests.bench.baselines import BASELINES, installed
from tests.core.support import POOL, address, members_of, ok, put, rank, replicas, request, route, router, text

PRODUCT = frozenset(REGISTRY)
"""As the imports above left it."""
NAMES = sorted(BASELINES)
TRACE = generate(Generate(sessions=60, sessions_per_s=6.0), 1)


@pytest.fixture
def baselines() -> Iterator[None]:
    with installed():
        yield


# --- the registry -----------------------------------------------------------------------------------------------------


def test_the_rows_of_the_benchmark_are_there() -> None:
    assert NAMES == [
        "aibrix_prefix_cache",
        "dynamo",
        "dynamo_prefill2",
        "epp_default",
        "epp_prefix_filter",
        "least_prefill",
        "least_request",
        "lmetric",
        "power_of_two",
        "round_robin",
        "sglang_cache_aware",
        "smg_prefix_hash",
    ]
    assert all(cls.name == name for name, cls in BASELINES.items())


def test_importing_them_adds_nothing_to_the_product() -> None:
    assert frozenset(BASELINES) & PRODUCT == {"least_request", "power_of_two", "round_robin"}


def test_the_three_that_the_product_has_are_the_products_own() -> None:
    assert all(BASELINES[name] is REGISTRY[name] for name in ("least_request", "power_of_two", "round_robin"))


def test_they_are_selectable_inside_and_gone_after() -> None:
    with installed():
        assert frozenset(REGISTRY) == PRODUCT | frozenset(BASELINES)
        with installed():
            pass
        assert create("dynamo").name == "dynamo"
    assert frozenset(REGISTRY) == PRODUCT


def test_a_failure_inside_leaves_the_registry_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError), installed():
        _ = 1 // 0
    assert frozenset(REGISTRY) == PRODUCT


@pytest.mark.usefixtures("baselines")
@pytest.mark.parametrize("name", NAMES)
def test_each_is_made_by_its_name_with_its_defaults(name: str) -> None:
    made = create(name)
    assert made.name == name
    assert {key: getattr(made, key) for key in options(BASELINES[name])} == options(BASELINES[name])


# --- what every policy must do ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("baselines")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_candidate_is_ranked_once_whatever_is_unknown(name: str, count: int) -> None:
    """No sample at all, then of some replicas only, then one without fields; no prompt, then a prompt that is cached."""
    members = members_of(replicas(count))
    everyone = sorted(m.address for m in members)
    wanted = request(text(4000))
    hits = {address(0): 900.0}
    put(members[-1], "busy", prompt_tokens=500)
    for sample in (None, Sample(), Sample(running=3, waiting=2, kv_usage=0.4)):
        if sample is not None:
            members[0].sampled(sample, 0.0)
        for ranking in (
            rank(name, members),
            rank(name, members, wanted=wanted, prompt_tokens=1000, hits=hits, now=5.0),
            rank(name, members, wanted=wanted, prompt_tokens=1000, hits=hits, now=60.0),  # the sample is stale
        ):
            assert sorted(m.address for _, m in ranking.order) == everyone
            assert ranking.reason
            assert all(isinstance(score, float) for score, _ in ranking.order)


@pytest.mark.usefixtures("baselines")
@pytest.mark.parametrize("name", NAMES)
def test_terms_are_numbers_or_unknown(name: str) -> None:
    members = members_of(replicas(2))
    members[0].sampled(Sample(running=3, waiting=2, kv_usage=0.4), 0.0)
    ask = Ask(Request(), 100, 50.0, {address(1): 50.0})
    for member in members:
        assert all(value is None or isinstance(value, float) for value in create(name).terms(ask, member, 0.0).values())


@pytest.mark.usefixtures("baselines")
@pytest.mark.parametrize("name", NAMES)
def test_ranking_changes_nothing(name: str) -> None:
    made = router(4, name)
    flights = []
    rng = Random(7)
    for n in range(40):
        wanted = request(text(3000, n % 3) + text(1000, n))
        explained = [made.explain(wanted, 0.1 * n) for _ in range(2)]
        decision = route(made, wanted, 0.1 * n).decision
        for each in explained:
            assert isinstance(each, Decision)
            assert (each.endpoints, each.reason) == (decision.endpoints, decision.reason)
        flights.append((decision.flight, decision.endpoints[0]))
        if n % 2:
            flight, where = flights.pop(rng.randrange(len(flights)))
            made.finish(flight, ok(where), 0.1 * n)


@pytest.mark.usefixtures("baselines")
@pytest.mark.parametrize("name", NAMES)
def test_a_replica_that_leaves_is_never_chosen_again(name: str) -> None:
    made = router(3, name)
    for n in range(12):
        route(made, request(text(3000, n % 2)))
    made.learn(Remove(POOL, address(0)), 1.0)
    for n in range(12):
        assert address(0) not in route(made, request(text(3000, n % 2)), 1.0).endpoints


# --- in a cluster -----------------------------------------------------------------------------------------------------


def run(name: str) -> Result:
    fleet = nodes([Group(gpu="h100", count=4)], "8b", TRACE.block_size, 0.002)
    return Cluster(Scenario(TRACE, fleet), name).run()  # checks the books of router and engines at its end


@pytest.mark.usefixtures("baselines")
@pytest.mark.parametrize("name", NAMES)
def test_a_cluster_serves_every_turn_and_two_runs_are_the_same(name: str) -> None:
    one, other = run(name), run(name)
    assert sorted(s.turn for s in one.served) == list(range(len(TRACE.turns)))
    assert {s.end for s in one.served} == {End.OK}
    assert all(s.output_tokens == TRACE.turns[s.turn].output_tokens for s in one.served)
    assert all(s.queue_s is not None and s.ttft_s is not None and s.queue_s < s.ttft_s <= s.e2e_s for s in one.served)
    assert {s.replica for s in one.served} == {node.address for node in one.nodes}
    assert digest(one.served) == digest(other.served)


@pytest.mark.usefixtures("baselines")
def test_no_two_of_them_are_the_same_rule() -> None:
    assert len({digest(run(name).served) for name in NAMES}) == len(NAMES)


@pytest.mark.usefixtures("baselines")
def test_those_that_know_of_prefixes_find_more_of_them_than_those_that_do_not() -> None:
    found = {name: sum(s.cached_tokens or 0 for s in run(name).served) for name in NAMES}
    blind = max(found.pop(name) for name in ("round_robin", "least_request", "power_of_two"))
    assert min(found.values()) > blind
