"""The sections `models` and `providers`: what a good file becomes, in the configuration and in the core."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config import ConfigError, WhenConfig, load, parse
from extproc.core.catalog.settings import Estimate, ProviderSettings, Sticky, Target, When
from extproc.envoy.models import catalog_settings

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
POOLS = "pools: [{name: a, replicas: ['10.0.0.1:1']}, {name: b, replicas: ['10.0.0.2:1']}]\n"


def test_the_example_of_the_page_is_good_and_means_what_it_says() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found = catalog_settings(parse(example), lambda name: f"#{name}")
    (chat,) = found.models
    assert (chat.name, chat.aliases, chat.sticky) == ("chat", ("gpt-4o", "default"), Sticky.SESSION)
    small = When(prompt_tokens_below=500, quality_not=frozenset({"high"}))
    assert chat.targets == (
        Target("chat", "small", "llama-8b", when=small),
        Target("chat", "large", "llama-70b", 95.0, "v1"),
        Target("chat", "large-next", "llama-70b", 5.0, "v2"),
    )
    assert chat.fallback == (
        Target("chat", "backup", "llama-70b"),
        Target("chat", "openai", "gpt-4o", when=When(tiers=frozenset({"paid", "enterprise"}))),
    )
    assert found.providers == (ProviderSettings("openai", 2.5, 10.0, daily_dollars=50.0, tenant_dollars=5.0),)


def test_a_target_that_does_not_say_what_the_model_is_called_takes_the_providers_name_or_its_own() -> None:
    text = POOLS + (
        "providers: [{name: c, host: c.example, model: gpt}, {name: d, host: d.example}]\n"
        "models: [{name: m, aliases: [n], targets: [{pool: a}, {pool: b, model: x}], fallback: [{provider: c}, {provider: d}]}]"
    )
    (model,) = catalog_settings(parse(text), str).models
    assert [target.engine for target in (*model.targets, *model.fallback)] == ["m", "x", "gpt", "m"]


def test_the_old_version_may_be_a_way_back_whichever_has_the_weight() -> None:
    for weights in ((1, 0), (0, 1)):
        targets = f"[{{pool: a, weight: {weights[0]}}}, {{pool: b, weight: {weights[1]}}}]"
        (model,) = parse(
            POOLS + f"models: [{{name: m, targets: {targets}, fallback: [{{pool: a}}, {{pool: b}}]}}]"
        ).models
        assert [target.pool for target in model.fallback] == ["a", "b"]


def test_one_place_may_be_a_fallback_by_several_rules() -> None:
    fallback = "[{pool: b, when: {tools: true}}, {pool: b, when: {images: true}}]"
    (model,) = parse(POOLS + f"models: [{{name: m, targets: [{{pool: a}}], fallback: {fallback}}}]").models
    assert len(model.fallback) == 2


def test_rules_that_say_the_same_share_however_they_are_written() -> None:
    text = "models: [{name: m, targets: [{pool: a, weight: 0, when: {quality: [x, y]}}, {pool: b, when: {quality: [' y ', x]}}]}]"
    (model,) = catalog_settings(parse(POOLS + text), str).models
    assert model.targets[0].when == model.targets[1].when


def test_every_key_of_a_rule_and_of_a_model_reaches_the_core() -> None:
    rule = {
        "prompt_tokens_below": 9,
        "prompt_tokens_at_least": 1,
        "output_tokens_below": 8,
        "output_tokens_at_least": 2,
        "tools": True,
        "images": False,
        "tenants": ["t"],
        "tiers": ["free"],
        "quality": ["q"],
        "quality_not": ["n"],
    }
    model = {
        "name": "m",
        "estimate": "words",
        "sticky": "tenant",
        "targets": [{"pool": "a", "when": rule}, {"pool": "b"}],
    }
    (found,) = catalog_settings(
        parse(POOLS + yaml.safe_dump({"models": [model], "tenants": {"unknown": "anonymous"}})), str
    ).models
    when = found.targets[0].when
    assert rule.keys() == WhenConfig.model_fields.keys()
    assert {k: [*v] if isinstance(v := getattr(when, k), frozenset) else v for k in rule} == rule
    assert (found.estimate, found.sticky) == (Estimate.WORDS, Sticky.TENANT)


def test_tenants_of_a_rule_are_hashed() -> None:
    text = (
        POOLS
        + "requests: {tenant_header: x-t}\nmodels: [{name: m, targets: [{pool: a, when: {tenants: [x, y]}}, {pool: b}]}]"
    )
    (model,) = catalog_settings(parse(text), lambda name: f"#{name}").models
    assert model.targets[0].when.tenants == {"#x", "#y"}


def test_a_pool_that_is_a_target_needs_no_models_and_two_may_run_the_same() -> None:
    config = parse(POOLS + "models: [{name: m, targets: [{pool: a, model: x}, {pool: b, model: x}]}]")
    assert [pool.models for pool in config.pools] == [(), ()]


def test_paths_of_a_provider_are_taken_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(POOLS.replace("[{name: a", "[{name: a, models: [x]").replace("{name: b", "{name: b, models: [y]"))
    with path.open("a") as file:
        file.write("providers: [{name: c, host: c.example, api_key_file: key, ca_file: /ca.pem}]")
    (provider,) = load(path).providers
    assert (provider.api_key_file, provider.ca_file) == (tmp_path / "key", Path("/ca.pem"))


def provider(**section: Any) -> Any:
    text = yaml.safe_dump({"providers": [{"name": "c", "host": "c.example", **section}]})
    return parse(f"pools: [{{replicas: ['10.0.0.1:1']}}]\n{text}").providers[0]


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("base_path", ("", "/v1", "/api/v3", "/openai/deployments/gpt-4.1"), ("/", "/a/", "a", "/a//b", "/a?b=c")),
        ("query", ("", "api-version=2024-10-21", "a=&b=c"), ("?a=b", "a", "a=b#c", "a=b'", "a=b\n")),
        (
            "host",
            ("c", "a.b-c.example", "10.0.0.1", "my_service"),
            ("", "https://c", "c/v1", "c:443", "c.", "é.example"),
        ),
    ],
)
def test_parts_of_a_providers_url(key: str, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    for value in good:
        assert getattr(provider(**{key: value}), key) == value
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^.*providers\[0\]\.{key}: .* is not "):
            provider(**{key: value})


def test_a_tenants_budget_wants_tenants() -> None:
    with pytest.raises(ConfigError, match=r"providers\[0\]\.budget: nothing tells who asks; add tenants"):
        provider(budget={"tenant_dollars": 1})


def test_the_answer_names_a_cluster_where_there_is_more_than_one() -> None:
    one = "pools: [{replicas: ['10.0.0.1:1']}]\n"
    assert not parse(one).names_cluster
    assert parse(one + "providers: [{name: c, host: c.example}]").names_cluster
