from __future__ import annotations

from random import Random
from typing import Any

import pytest

from extproc.core.policies import REGISTRY, PolicyError, create, options
from extproc.core.policies.base import order, rendezvous
from extproc.core.prediction import Ask
from extproc.core.types import Blocks, Request

from ..support import address, members_of, rank, replicas

ALL = sorted(REGISTRY)


def test_the_registry_has_every_policy_that_the_documentation_names() -> None:
    assert ALL == [
        "gpu_utilization",
        "least_kv",
        "least_latency",
        "least_queue",
        "least_request",
        "power_of_two",
        "predicted",
        "prefix_affinity",
        "random",
        "round_robin",
        "session_affinity",
        "token_aware",
        "weighted",
    ]


@pytest.mark.parametrize("name", ALL)
def test_a_policy_is_made_by_its_name_with_its_defaults(name: str) -> None:
    made = create(name)
    assert made.name == name
    assert {k: getattr(made, k) for k in options(REGISTRY[name])} == options(REGISTRY[name])


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        PolicyError, match="no policy is called 'least'; there are gpu_utilization, least_kv, least_latency"
    ):
        create("least")


@pytest.mark.parametrize(
    ("name", "given_", "message"),
    [
        ("predicted", {"weight": 1}, "policy 'predicted' has no option 'weight'; it has none"),
        (
            "token_aware",
            {"limits": 1},
            "has no option 'limits'; it has prompt_weight, decode_weight, limit, tokens_per_s",
        ),
        ("token_aware", {"limit": "high"}, "option 'limit' of policy 'token_aware' must be like 0.95, not 'high'"),
        ("token_aware", {"limit": True}, "must be like 0.95, not True"),
        ("weighted", {"by": 3}, "option 'by' of policy 'weighted' must be like 'weight', not 3"),
        ("weighted", {"by": "gpu"}, "policy 'weighted': by must be weight or free_capacity, not 'gpu'"),
        ("token_aware", {"tokens_per_s": 0}, "policy 'token_aware': tokens_per_s must be above 0, not 0"),
        ("least_latency", {"fade_s": -1.0}, "policy 'least_latency': fade_s must be above 0, not -1.0"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_the_remedy(name: str, given_: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        create(name, given_)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_every_policy_ranks_every_candidate_once(name: str) -> None:
    members = members_of(replicas(5))
    ranking = rank(name, members)
    assert sorted(m.address for _, m in ranking.order) == sorted(m.address for m in members)
    assert ranking.reason


@pytest.mark.parametrize("name", ALL)
def test_every_policy_can_choose_from_one(name: str) -> None:
    members = members_of(replicas(1))
    assert [m.address for _, m in rank(name, members).order] == [address(0)]


@pytest.mark.parametrize("name", ALL)
def test_terms_are_numbers_or_unknown(name: str) -> None:
    ask = Ask(Request(), 100, 50.0, {})
    for member in members_of(replicas(2)):
        for value in create(name).terms(ask, member, 0.0).values():
            assert value is None or isinstance(value, float)


def test_ties_go_by_the_head_of_the_prompt_whatever_the_router_or_the_order() -> None:
    members = members_of(replicas(8))
    ask = Ask(Request(blocks=Blocks((7, 8), (256, 512))), 100, 50.0, {})
    one = order(ask, members, lambda _: 1.0, Random(1))
    other = order(ask, members[::-1], lambda _: 1.0, Random(2))
    assert [m.address for _, m in one] == [m.address for _, m in other]


def test_ties_without_a_prompt_go_by_chance() -> None:
    members, rng = members_of(replicas(4)), Random(1)
    ask = Ask(Request(), 1, 0.0, {})
    firsts = {order(ask, members, lambda _: 1.0, rng)[0][1].address for _ in range(100)}
    assert len(firsts) == 4


def test_only_those_level_with_the_best_change_places() -> None:
    members = members_of(replicas(6))
    scores = {m.address: float(i // 2) for i, m in enumerate(members)}
    ranked = order(Ask(Request(), 1, 0.0, {}), members, lambda m: scores[m.address], Random(3))
    assert [score for score, _ in ranked] == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


def test_rendezvous_spreads_keys_and_moves_only_those_of_who_left() -> None:
    names = [address(i) for i in range(10)]

    def owner(key: int, among: list[str]) -> str:
        return max(among, key=lambda a: rendezvous(key, a))

    before = {key: owner(key, names) for key in range(5000)}
    counts = [sum(o == n for o in before.values()) for n in names]
    assert min(counts) > 400
    assert max(counts) < 600
    after = {key: owner(key, names[1:]) for key in range(5000)}
    assert all(after[k] == o for k, o in before.items() if o != names[0])
