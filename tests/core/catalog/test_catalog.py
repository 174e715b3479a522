"""Names, rules and shares: which targets a request gets, and in what order."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.catalog.catalog import Catalog, aimed, known_as
from extproc.core.catalog.rules import meets
from extproc.core.catalog.settings import CatalogSettings, Estimate, Model, Sticky, Target, When
from extproc.core.catalog.shares import Group
from extproc.core.prefix.blocks import chain
from extproc.core.types import Request
from tests.core.catalog.support import chat, model, target
from tests.core.support import request, text

SMALL = target("small", when=When(prompt_tokens_below=500, quality_not=frozenset({"high"})))
LARGE = target("large")


def order(of: Model, wanted: Request = Request(), size: tuple[float, float] = (100, 100), seed: int = 0) -> list[str]:  # noqa: B008  # nobody changes it
    rng = Random(seed)
    made = Catalog(CatalogSettings((of,)))
    return [t.to for t in made.targets(of, wanted, lambda _: size, lambda: rng.getrandbits(64))]


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_model_is_found_by_name_and_alias_alone() -> None:
    made = Catalog(CatalogSettings((model(target("a"), aliases=("gpt-4o", "default")),)))
    assert made.find("gpt-4o") is made.find("chat") is made.models[0]
    assert made.find("engine-a") is None
    assert made.find(None) is None


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "fields", "size", "met"),
    [
        (When(), {}, (1, 1), True),
        (When(prompt_tokens_below=500), {}, (499, 1), True),
        (When(prompt_tokens_below=500), {}, (500, 1), False),
        (When(prompt_tokens_at_least=500), {}, (500, 1), True),
        (When(prompt_tokens_at_least=500), {}, (499, 1), False),
        (When(output_tokens_below=100), {}, (9999, 99.5), True),
        (When(output_tokens_below=100), {}, (1, 100), False),
        (When(output_tokens_at_least=100), {}, (1, 99.9), False),
        (When(tools=True), {"tools": True}, (1, 1), True),
        (When(tools=True), {}, (1, 1), False),
        (When(tools=False), {"tools": True}, (1, 1), False),
        (When(images=True), {"media": True}, (1, 1), True),
        (When(images=False), {"media": True}, (1, 1), False),
        (When(tenants=frozenset({"t1"})), {"tenant": "t1"}, (1, 1), True),
        (When(tenants=frozenset({"t1"})), {"tenant": "t2"}, (1, 1), False),
        (When(tenants=frozenset({"t1"})), {}, (1, 1), False),
        (When(tiers=frozenset({"paid"})), {"tier": "paid"}, (1, 1), True),
        (When(tiers=frozenset({"paid"})), {"tier": "free"}, (1, 1), False),
        (When(tiers=frozenset({"paid"}), tenants=frozenset({"t1"})), {"tier": "free", "tenant": "t1"}, (1, 1), True),
        (When(quality=frozenset({"high"})), {"quality": "high"}, (1, 1), True),
        (When(quality=frozenset({"high"})), {}, (1, 1), False),
        (When(quality_not=frozenset({"high"})), {}, (1, 1), True),
        (When(quality_not=frozenset({"high"})), {"quality": "high"}, (1, 1), False),
        (When(tools=True, prompt_tokens_below=5), {"tools": True}, (5, 1), False),
    ],
)
def test_a_rule_is_met_when_all_that_it_names_holds(
    when: When, fields: dict[str, object], size: tuple[float, float], met: bool
) -> None:
    assert meets(when, Request(**fields), lambda: size) is met  # type: ignore[arg-type]


def test_a_rule_that_names_no_size_asks_for_none() -> None:
    def unknown() -> tuple[float, float]:
        raise AssertionError("asked")

    assert not meets(When(tools=True, prompt_tokens_below=5), Request(), unknown)
    assert meets(When(tools=False), Request(), unknown)


@pytest.mark.parametrize(
    ("tokens", "quality", "to"),
    [
        (499, None, "small"),
        (500, None, "large"),
        (499, "high", "large"),
        (499, "low", "small"),
        (5000, "high", "large"),
    ],
)
def test_the_first_rule_that_is_met_decides(tokens: int, quality: str | None, to: str) -> None:
    assert order(model(SMALL, LARGE), Request(quality=quality), (tokens, 10)) == [to]


@pytest.mark.parametrize(
    ("estimate", "words", "to"),
    [
        (Estimate.WORDS, 999, "small"),
        (Estimate.WORDS, 1000, "large"),
        (Estimate.WORDS, None, "small"),
        (Estimate.LEARNED, 1000, "small"),
    ],
)
def test_words_count_where_that_is_wanted_and_they_are_known(estimate: Estimate, words: int | None, to: str) -> None:
    """1,300 tokens are a thousand words; by what was learned the prompt has 100."""
    of = model(target("small", when=When(prompt_tokens_below=1300)), LARGE, fallback=(LARGE,), estimate=estimate)
    assert order(of, Request(prompt_words=words))[0] == to


def test_who_meets_no_rule_has_nowhere_to_go() -> None:
    assert order(model(SMALL, fallback=(LARGE,)), Request(), (500, 1)) == []


# --- shares -----------------------------------------------------------------------------------------------------------


def test_targets_with_the_same_rule_share_wherever_they_stand_and_the_others_come_next() -> None:
    of = model(target("a"), SMALL, target("b"), fallback=(target("z"),))
    seen = {tuple(order(of, Request(quality="high"), seed=i)) for i in range(50)}
    assert seen == {("a", "b", "z"), ("b", "a", "z")}


def test_a_target_without_weight_gets_nothing_and_is_no_alternative() -> None:
    of = model(target("a", 0.0), target("b"))
    assert {tuple(order(of, seed=i)) for i in range(20)} == {("b",)}


def test_a_fallback_has_rules_too() -> None:
    of = model(target("a"), fallback=(target("b", when=When(tiers=frozenset({"paid"}))), target("c")))
    assert order(of, Request(tier="free")) == ["a", "c"]
    assert order(of, Request(tier="paid")) == ["a", "b", "c"]


def test_a_target_that_is_a_fallback_too_is_asked_once_and_without_weight_is_a_way_back() -> None:
    ways = (target("a"), target("b"))
    assert order(model(*ways, fallback=ways), Request(session="x")) in (["a", "b"], ["b", "a"])
    assert order(model(target("a", 0.0), target("b"), fallback=ways)) == ["b", "a"]


def first(targets: list[Target], key: int) -> str:
    return Group(targets).ranked(str(key).encode())[0].to


@pytest.mark.parametrize("weights", [(95.0, 5.0), (99.5, 0.5), (1.0, 1.0), (3.0, 2.0, 1.0), (0.9, 0.05, 0.05)])
def test_shares_come_out_within_what_chance_allows(weights: tuple[float, ...]) -> None:
    n = 20_000
    targets = [target(f"p{i}", weight) for i, weight in enumerate(weights)]
    got = Counter(first(targets, key) for key in range(n))
    for each in targets:
        share = each.weight / sum(weights)
        # Five standard deviations of the binomial: one run in a million fails by chance, and the keys are always the same.
        assert abs(got[each.to] - n * share) < 5 * math.sqrt(n * share * (1 - share))


def test_a_growing_share_moves_only_what_it_must() -> None:
    n = 20_000
    before = [target("stable", 95.0), target("canary", 5.0)]
    after = [target("stable", 90.0), target("canary", 10.0)]
    moves = Counter((first(before, key), first(after, key)) for key in range(n))
    assert ("canary", "stable") not in moves
    assert abs(moves[("stable", "canary")] / n - 0.05) < 0.008


@given(
    st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(0, 4), st.floats(1.0, 20), st.integers(0, 2**32)
)
def test_who_moves_when_one_weight_grows_moves_to_that_target(
    weights: list[float], which: int, factor: float, key: int
) -> None:
    which %= len(weights)
    before = [target(f"p{i}", weight) for i, weight in enumerate(weights)]
    after = [target(f"p{i}", w * factor if i == which else w) for i, w in enumerate(weights)]
    was, now = first(before, key), first(after, key)
    assert now in (was, f"p{which}")


def test_a_new_label_moves_nobody_and_another_model_divides_otherwise() -> None:
    one = [target("a", 1.0), target("b", 1.0)]
    relabelled = [Target("chat", t.to, t.engine, 1.0, "v9") for t in one]
    other = [target("a", model="code"), target("b", model="code")]
    same = [first(one, k) for k in range(500)]
    assert same == [first(relabelled, k) for k in range(500)]
    assert 200 < sum(a == first(other, k) for k, a in enumerate(same)) < 300


# --- what stays together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sticky", "wanted"),
    [
        (Sticky.SESSION, Request(session="s1")),
        (Sticky.TENANT, Request(tenant="t1")),
        (Sticky.REQUEST, chat(text(2000))),
    ],
)
def test_the_same_key_always_goes_the_same_way(sticky: Sticky, wanted: Request) -> None:
    of = model(target("a"), target("b"), sticky=sticky)
    assert len({tuple(order(of, wanted, seed=i)) for i in range(50)}) == 1


@pytest.mark.parametrize("sticky", Sticky)
def test_what_has_no_key_is_drawn_one_by_one(sticky: Sticky) -> None:
    of = model(target("a"), target("b"), sticky=sticky)
    got = Counter(order(of, Request(), seed=i)[0] for i in range(1000))
    assert 400 < got["a"] < 600


def test_requests_that_begin_alike_stay_together() -> None:
    of = model(target("a"), target("b"), sticky=Sticky.REQUEST)
    head = text(2000)
    ways = {order(of, chat(head + text(i * 300, seed=i)))[0] for i in range(20)}
    assert len(ways) == 1


# --- by the name that the engine knows --------------------------------------------------------------------------------


def test_an_alias_has_the_blocks_of_the_model_that_it_stands_for() -> None:
    prompt = text(3000)
    one = aimed(chat(prompt), target("a", engine="llama"))
    other = aimed(chat(prompt, model="gpt-4o"), Target("gpt-4o", "a", "llama"))
    assert one.model == other.model == "llama"
    assert one.blocks == other.blocks == known_as(chain(b"", prompt), "llama")


def test_another_model_has_other_blocks() -> None:
    prompt = text(3000)
    a, b = (aimed(chat(prompt), target("p", engine=name)) for name in ("llama", "qwen"))
    assert not set(a.blocks.hashes) & set(b.blocks.hashes)


def test_who_is_aimed_again_is_as_if_aimed_there_at_once() -> None:
    wanted = chat(text(3000))
    assert aimed(aimed(wanted, target("a")), target("b")) == aimed(wanted, target("b"))


def test_a_prompt_without_blocks_stays_without() -> None:
    assert aimed(request("short", seed=b""), target("a")).blocks.hashes == ()


# --- after a wait -----------------------------------------------------------------------------------------------------


def test_after_a_wait_come_the_others_by_weight_then_the_fallbacks() -> None:
    a, b, c, z = target("a", 5.0), target("b", 1.0), target("c", 9.0), target("z")
    of = model(a, b, c, target("x", when=When(tools=True)), fallback=(z,))
    made = Catalog(CatalogSettings((of,)))

    def after(waited: Target) -> list[str]:
        return [t.to for t in made.after(waited, Request(), lambda _: (1, 1))]

    assert after(b) == ["c", "a", "z"]
    assert after(z) == ["c", "a", "b"], "what could not take it when it came may do so now"
    assert after(target("gone", 1.0)) == ["c", "a", "b", "z"], "as after a reload"
    assert after(target("b", 0.0)) == after(b)
    assert Catalog().after(b, Request(), lambda _: (1, 1)) == []
