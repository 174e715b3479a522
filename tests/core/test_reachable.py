"""Where a request for a model may go at all, and what a prompt that was tokenized here teaches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.core.catalog.settings import ProviderSettings
from extproc.core.types import Request, Serves
from tests.core.catalog.support import at, catalog, chat, model, placed, pools, target
from tests.core.support import ok, text, usage


def test_a_model_that_is_listed_goes_to_its_pool() -> None:
    made = pools("a", "b", models=())
    made.learn(Serves("a", at("a"), ("base",)), 0.0)
    made.learn(Serves("b", at("b"), ("other", "adapter"), {"adapter": "other"}), 0.0)
    assert made.reachable("base") == [("a", None)]
    assert made.reachable("other") == [("b", None)]
    assert made.reachable("adapter") == [("b", "adapter")]
    assert made.reachable("nobody's") == []
    assert made.reachable(None) == [("a", None)]


def test_a_model_of_the_catalog_may_go_to_all_its_targets_under_their_names() -> None:
    of = model(target("a"), target("b", engine="adapter"), fallback=(target("a"), target("cloud")), aliases=("alias",))
    made = pools("a", "b", configured=catalog(of, providers=[ProviderSettings("cloud")]))
    made.learn(Serves("b", at("b"), ("adapter",), {"adapter": "base"}), 0.0)
    assert made.reachable("chat") == made.reachable("alias") == [("a", None), ("b", "adapter"), ("a", None)]


@pytest.mark.parametrize(("tokenized", "learned"), [(True, True), (False, False)])
def test_text_that_was_tokenized_here_still_teaches_how_long_tokens_are(tokenized: bool, learned: bool) -> None:
    made = pools("a")
    wanted: Request = replace(chat(text(4000)), model="m", prompt_tokens=2000, tokenized=tokenized)
    before = made.pools["a"].prompt_tokens.bytes_per_token("m")
    for i in range(5):
        flight = placed(made, wanted, float(i)).flight
        assert made.ledger.get(flight) is not None
        made.finish(flight, ok(at("a"), usage=usage(2000)), i + 0.5)
    after = made.pools["a"].prompt_tokens.bytes_per_token("m")
    assert (after < before) is learned
