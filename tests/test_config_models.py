"""The sections `models` and `providers`: what a good file becomes, in the configuration and in the core."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from extproc.config import ConfigError, load, parse
from extproc.core.catalog.settings import ProviderSettings, Sticky, Target, When
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
    assert found.providers == (ProviderSettings("openai", 2.5, 10.0, daily_dollars=50.0),)


def test_a_target_that_does_not_say_what_the_model_is_called_takes_the_providers_name_or_its_own() -> None:
    text = POOLS + (
        "providers: [{name: c, host: c.example, model: gpt}, {name: d, host: d.example}]\n"
        "models: [{name: m, aliases: [n], targets: [{pool: a}, {pool: b, model: x}], fallback: [{provider: c}, {provider: d}]}]"
    )
    (model,) = catalog_settings(parse(text), str).models
    assert [target.engine for target in (*model.targets, *model.fallback)] == ["m", "x", "gpt", "m"]


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


@pytest.mark.parametrize(
    ("prefix", "good"), [("", True), ("/openai", True), ("/a/b", True), ("/a/", False), ("a", False)]
)
def test_a_path_prefix_begins_with_a_slash_and_ends_without(prefix: str, good: bool) -> None:
    text = f"pools: [{{replicas: ['10.0.0.1:1']}}]\nproviders: [{{name: c, host: c.example, path_prefix: '{prefix}'}}]"
    if good:
        assert parse(text).providers[0].path_prefix == prefix
    else:
        with pytest.raises(ConfigError, match=r"providers\[0\]\.path_prefix"):
            parse(text)


def test_the_answer_names_a_cluster_where_there_is_more_than_one() -> None:
    one = "pools: [{replicas: ['10.0.0.1:1']}]\n"
    assert not parse(one).names_cluster
    assert parse(one + "providers: [{name: c, host: c.example}]").names_cluster
