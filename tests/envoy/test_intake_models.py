"""The intake with a catalog: names rewritten together with all else that changes in a body, the list of models, providers."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from extproc.config import Config, parse
from extproc.core.admission.settings import QueueSettings
from extproc.core.catalog.listing import Listed
from extproc.core.router import PoolSettings, Router
from extproc.core.types import CatalogConfigured, End, Outcome, Replica, Request, Reset, Route, Serves, Usage, Wait
from extproc.envoy.exchange import Head, Refuse, Reply, Steer
from extproc.envoy.identity import hashed
from extproc.envoy.intake import FakeRouter, Hold, Intake
from extproc.envoy.models import catalog_settings
from extproc.openai.reading import perform
from tests.envoy.setup import CHAT, prompt

KEY = b"k" * 32
UNHELD = QueueSettings(enabled=False)
A, B = "10.0.0.1:80", "10.0.0.2:80"
POST = Head("POST", CHAT, headers={})
TEXT = """
pools:
- {name: a, replicas: ["10.0.0.1:80"], queue: {enabled: false}, engine: none}
- {name: b, replicas: ["10.0.0.2:80"], queue: {enabled: false}, engine: none}
providers: [{name: cloud, host: api.example.com, model: gpt-4o}]
models:
- name: chat
  aliases: [gpt]
  targets:
  - {pool: a, model: llama-8b, when: {prompt_tokens_below: 500, quality_not: high}}
  - {pool: b, model: llama-70b}
- {name: same, targets: [{pool: a}]}
- {name: far, targets: [{provider: cloud}]}
"""


def made(text: str = TEXT, **sections: Any) -> tuple[Intake, Router]:
    """The real router under the intake."""
    config: Config = parse(text + "".join(f"\n{key}: {json.dumps(value)}" for key, value in sections.items()))
    router = Router([PoolSettings(p.name, p.models, scraped=False, queue=UNHELD) for p in config.pools], Random(1))
    for pool in config.pools:
        router.learn(Reset(pool.name, tuple(Replica(r.address) for r in pool.replicas)), 0.0)
    intake = Intake(router, config, KEY)
    router.learn(CatalogConfigured(catalog_settings(config, intake.hashed)), 0.0)
    return intake, router


def steered(intake: Intake, body: bytes, head: Head = POST, rewritable: bool = True) -> Steer:
    answer = intake.decide(head, body, 0.0, rewritable)
    assert isinstance(answer, Steer), answer
    return answer


def sent(answer: Steer) -> dict[str, Any]:
    assert answer.body is not None
    body: dict[str, Any] = json.loads(answer.body)
    return body


@pytest.mark.parametrize("name", ["chat", "gpt"])
@pytest.mark.parametrize(
    ("size", "quality", "pool", "engine"),
    [(500, None, "a", "llama-8b"), (5000, None, "b", "llama-70b"), (500, "high", "b", "llama-70b")],
)
def test_the_body_names_the_model_as_its_target_does(
    name: str, size: int, quality: str | None, pool: str, engine: str
) -> None:
    intake, _ = made()
    head = replace(POST, headers={"x-quality": quality} if quality else {})
    answer = steered(intake, prompt(size, model=name), head)
    assert (answer.pool, answer.destination) == (pool, A if pool == "a" else B)
    assert answer.body == prompt(size, model=engine)
    assert not answer.strip_usage


@pytest.mark.parametrize("word", ["a", "word", "responsibilities", "\u00e9t\u00e9"])
@pytest.mark.parametrize(
    ("words", "quality", "engine"),
    [
        (10, None, "8b"),
        (384, None, "8b"),
        (385, None, "70b"),
        (5000, None, "70b"),
        (10, "high", "70b"),
        (10, "low", "8b"),
    ],
)
def test_the_estimate_is_words_times_1_3_where_that_is_wanted(
    word: str, words: int, quality: str | None, engine: str
) -> None:
    """Under 500 and not high quality to the 8B model, else 70B: whatever the words, and whatever usage has shown."""
    intake, router = made(TEXT.replace("- name: chat", "- name: chat\n  estimate: words"))
    for _ in range(50):
        route = router.arrive(Request(model="gpt", prompt_bytes=400), 0.0)
        assert isinstance(route, Route)
        router.finish(route.flight, Outcome(End.OK, status=200, usage=Usage(prompt_tokens=400)), 1.0)
    messages = [{"role": "system", "content": word}, {"role": "user", "content": " ".join([word] * (words - 1))}]
    head = replace(POST, headers={"x-quality": quality} if quality else {})
    assert (
        sent(steered(intake, json.dumps({"model": "gpt", "messages": messages}).encode(), head))["model"]
        == f"llama-{engine}"
    )


def test_a_model_that_keeps_its_name_keeps_its_body() -> None:
    assert steered(made()[0], prompt(5, model="same")).body is None


def test_all_changes_are_made_in_one_pass() -> None:
    tenants = {"unknown": "anonymous", "send_cache_salt": True}
    intake, _ = made(tenants=tenants)
    answer = steered(intake, b'{"stream":true,"seed":12345678901234567890123,"model":"gpt","messages":[]}')
    assert answer.strip_usage
    assert answer.body is not None
    head, _, salted = answer.body.partition(b',"cache_salt":')
    assert head == (
        b'{"stream":true,"seed":12345678901234567890123,"model":"llama-8b","messages":[],"stream_options":{"include_usage":true}'
    )
    assert salted.endswith(b'"}')


def test_a_provider_gets_its_name_usage_and_no_salt() -> None:
    intake, router = made(tenants={"unknown": "anonymous", "send_cache_salt": True})
    answer = steered(intake, prompt(5, model="far", stream=True))
    assert (answer.destination, answer.pool, answer.patience_s) == ("", "cloud", None)
    assert sent(answer) == {
        **json.loads(prompt(5, model="gpt-4o", stream=True)),
        "stream_options": {"include_usage": True},
    }
    router.finish(answer.flight, Outcome(End.OK), 1.0)
    assert router.in_flight == 0


def test_where_the_body_cannot_be_changed_a_renamed_model_is_refused_and_its_flight_ends() -> None:
    intake, router = made()
    answer = intake.decide(POST, prompt(5, model="chat"), 0.0, rewritable=False)
    assert isinstance(answer, Refuse)
    assert answer.error.status == 500
    assert router.in_flight == 0
    assert steered(intake, prompt(5, model="same"), rewritable=False).body is None


def test_where_the_name_is_not_found_the_request_is_refused_and_its_flight_ends() -> None:
    intake, router = made()
    body = prompt(300_000, model="gpt")
    task = intake.task(POST, rewritable=True)
    assert not isinstance(task, Refuse)
    reading = replace(perform(task, body), model=None)
    answer = intake.decide_read(POST, body.replace(b'"model"', b'"other"'), reading, 0.0, True)
    assert isinstance(answer, Refuse)
    assert (answer.error.status, router.in_flight) == (400, 0)


def test_a_body_that_is_being_read_when_models_come_is_renamed_all_the_same() -> None:
    intake, _ = made()
    with_models = parse(TEXT)
    intake.configure(with_models.model_copy(update={"models": ()}))
    body = prompt(300_000, model="gpt")
    task = intake.task(POST, rewritable=True)
    assert not isinstance(task, Refuse)
    reading = perform(task, body)
    intake.configure(with_models)
    answer = intake.decide_read(POST, memoryview(body), reading, 0.0, True)
    assert isinstance(answer, Steer)
    assert sent(answer)["model"] == "llama-70b"


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_that_was_read_elsewhere_is_changed_alike(stream: bool) -> None:
    intake, _ = made()
    body = prompt(300_000, model="gpt", stream=stream, tools=[{"model": "x"}])
    task = intake.task(POST, rewritable=True)
    assert not isinstance(task, Refuse)
    answer = intake.decide_read(POST, memoryview(body), perform(task, body), 0.0, True)
    assert isinstance(answer, Steer)
    assert answer == replace(steered(intake, body), flight=answer.flight)
    assert sent(answer)["model"] == "llama-70b"
    assert sent(answer)["tools"] == [{"model": "x"}]


def test_who_waited_is_renamed_when_its_turn_comes() -> None:
    config = parse(TEXT)
    _, router = made()
    route = router.arrive(Request(model="gpt", prompt_bytes=40), 0.0)
    assert not isinstance(route, Wait)
    held = Intake(FakeRouter([Wait("w1", 9.0)]), config, KEY).decide(POST, prompt(5, model="gpt"), 0.0, True)
    assert isinstance(held, Hold)
    answer = made()[0].resume(held, route)
    assert isinstance(answer, Steer)
    assert sent(answer)["model"] == "llama-8b"


# --- who asks, and for what -------------------------------------------------------------------------------------------


def test_quality_tier_and_tenant_reach_the_rules() -> None:
    config = parse(TEXT + "\ntenants: {unknown: anonymous}\nrequests: {tenant_header: x-tenant}")
    router = FakeRouter([Wait("w1", 9.0)])
    intake = Intake(router, config, KEY)
    intake.decide(replace(POST, headers={"x-quality": "q" * 99, "x-tenant": "acme"}), prompt(5, model="gpt"), 0.0)
    ((request, _),) = router.arrived
    assert request.quality == "q" * 64
    assert request.tier == "free"
    assert request.prompt_words is None, "nobody wants to know"
    assert request.tenant == intake.hashed("acme")
    settings = catalog_settings(
        parse(TEXT.replace("quality_not: high", "tenants: acme") + "\nrequests: {tenant_header: x-tenant}"),
        intake.hashed,
    )
    assert settings.models[0].targets[0].when.tenants == {request.tenant}


def test_without_models_quality_is_not_looked_at_and_names_seed_the_chain() -> None:
    router = FakeRouter([Wait("w1", 9.0)])
    plain = parse('pools: [{replicas: ["10.0.0.1:80"]}]')
    intake = Intake(router, plain, KEY)
    head = replace(POST, headers={"x-quality": "high"})
    intake.decide(head, prompt(3000, model="x"), 0.0)
    intake.decide(head, prompt(3000, model="y"), 0.0)
    intake.configure(parse(TEXT))
    intake.decide(head, prompt(3000, model="x"), 0.0)
    intake.decide(head, prompt(3000, model="y"), 0.0)
    one, two, three, four = (request for request, _ in router.arrived)
    assert one.quality is None
    assert one.blocks != two.blocks
    assert three.quality == "high"
    assert three.blocks == four.blocks


@pytest.mark.parametrize(
    ("path", "what"),
    [(CHAT, "The model `llama-8b`"), ("/tokenize", "What you ask for"), ("/v1/rerank", "What you ask for")],
)
def test_who_may_not_have_a_model_does_not_get_it_by_another_way(path: str, what: str) -> None:
    text = TEXT.replace("{prompt_tokens_below: 500, quality_not: high}", "{tiers: paid}").replace(
        "- {name: same, targets: [{pool: a}]}\n", ""
    )
    intake, router = made(text, tenants={"unknown": "anonymous"})
    router.learn(Serves("a", A, ("llama-8b",)), 0.0)
    answer = intake.decide(replace(POST, path=path), prompt(5, model="llama-8b"), 0.0, True)
    assert isinstance(answer, Refuse)
    error = json.loads(answer.error.body)["error"]
    assert (answer.error.status, error["code"]) == (404, "model_not_found")
    assert error["message"].startswith(
        f"{what} does not exist or you do not have access to it. Available: chat, gpt, far."
    )


def test_a_limit_of_a_model_holds_for_its_aliases() -> None:
    tiers = {"free": {"models": {"chat": {"requests_per_minute": 3}}}}
    config = parse(TEXT + f"\ntenants: {json.dumps({'unknown': 'anonymous', 'tiers': tiers})}")
    router = FakeRouter([Wait("w1", 9.0)])
    intake = Intake(router, config, KEY)
    for name in ("chat", "gpt", "same"):
        intake.decide(POST, prompt(5, model=name), 0.0)
    rates = [request.account.requests for request, _ in router.arrived if request.account is not None]
    assert [rate.per_minute if rate else None for rate in rates] == [3, 3, None]


# --- the list ------------------------------------------------------------------------------------------------------------


def test_models_are_listed_by_us_where_there_is_a_catalog_or_several_pools() -> None:
    intake, router = made()
    get = Head("GET", "/v1/models", headers={})
    answer = intake.decide(get, None, 0.0)
    assert isinstance(answer, Reply)
    assert [m["id"] for m in json.loads(answer.response.body)["data"]] == ["chat", "gpt", "same", "far"]
    one = intake.decide(replace(get, path="/v1/models/gpt"), None, 0.0)
    assert isinstance(one, Reply)
    assert json.loads(one.response.body)["root"] == "chat"
    assert router.in_flight == 0


def test_of_one_pool_a_replica_is_asked() -> None:
    router = FakeRouter([Wait("w1", 9.0)])
    intake = Intake(router, parse('pools: [{replicas: ["10.0.0.1:80"]}]'), KEY)
    assert isinstance(intake.decide(Head("GET", "/v1/models", headers={}), None, 0.0), Hold)


def test_the_list_is_for_who_asks() -> None:
    config = parse(TEXT + "\ntenants: {unknown: anonymous}\nrequests: {tenant_header: x-tenant}")
    router = FakeRouter(models=(Listed("m", "m"),))
    intake = Intake(router, config, KEY)
    intake.decide(Head("GET", "/v1/models", headers={"x-tenant": "acme"}), None, 3.0)
    ((who, now),) = router.asked_for
    assert (who.tenant, who.tier, now) == (intake.hashed("acme"), "free", 3.0)


def test_whoever_is_not_known_gets_no_list() -> None:
    config = parse(TEXT + "\ntenants: {}\nrequests: {tenant_header: x-tenant}")
    answer = Intake(FakeRouter(), config, KEY).decide(Head("GET", "/v1/models", headers={}), None, 0.0)
    assert isinstance(answer, Refuse)
    assert answer.error.status == 401


def test_a_tenants_name_is_hashed_as_in_requests() -> None:
    intake, _ = made()
    assert intake.hashed("acme") == hashed("acme", intake._key)
