from __future__ import annotations

import json
from typing import Any

import pytest

from extproc.config import Config, parse
from extproc.core.account import Account, Most, Rate
from extproc.core.types import Request
from extproc.envoy.exchange import Head, Refuse, Steer
from extproc.envoy.identity import claim
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.tenants import Plans
from extproc.openai.keys import KeyEntry, key_hash, presented
from tests.envoy.setup import CHAT, prompt, route

SECRET = b"0123456789abcdef"
KEY = "sk-of-acme"


class Known:
    """Keys in memory."""

    def __init__(self, **keys: KeyEntry) -> None:
        self._keys = {key_hash(SECRET, key.replace("_", "-")): entry for key, entry in keys.items()}

    def find(self, digest: str) -> KeyEntry | None:
        return self._keys.get(digest)


KEYS = Known(sk_of_acme=KeyEntry("acme"), sk_of_rich=KeyEntry("rich", "enterprise"))
BY_KEY = {"secret_file": "/s", "keys_file": "/k"}
BY_HEADER: dict[str, Any] = {"requests": {"tenant_header": "X-Tenant"}}


def configured(tenants: dict[str, Any], **sections: Any) -> Config:
    return parse(json.dumps({"pools": [{"name": "a", "replicas": ["10.0.0.1:80"]}], "tenants": tenants, **sections}))


def head(claims: dict[str, Any] | None = None, **headers: Any) -> Head:
    return Head("POST", CHAT, headers={k.replace("_", "-"): v for k, v in headers.items()}, claims=claims)


def intake(tenants: dict[str, Any], **sections: Any) -> tuple[Intake, FakeRouter]:
    router = FakeRouter([route(1)])
    config = configured(tenants, **sections)
    keys = KEYS if config.tenants is not None and config.tenants.keys_file else None
    return Intake(router, config, SECRET, keys), router


def arrived(asked: Head, tenants: dict[str, Any], body: bytes | None = None, **sections: Any) -> Request:
    made, router = intake(tenants, **sections)
    answer = made.decide(asked, body or prompt(5), 0.0)
    assert isinstance(answer, Steer), answer
    return router.arrived[0][0]


def account(request: Request) -> Account:
    assert request.account is not None
    return request.account


def status(asked: Head, tenants: dict[str, Any], **sections: Any) -> int:
    answer = intake(tenants, **sections)[0].decide(asked, prompt(5), 0.0)
    return answer.error.status if isinstance(answer, Refuse) else 200


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({}, None),
        ({"authorization": "Bearer a"}, "a"),
        ({"authorization": "bearer  a "}, "a"),
        ({"x-api-key": "b"}, "b"),
        ({"authorization": "Bearer a", "x-api-key": "b"}, "a"),
        ({"authorization": "Basic YTpi"}, ""),
        ({"authorization": "a"}, ""),
        ({"authorization": "", "x-api-key": "b"}, ""),
        ({"authorization": "Bearer " + "a" * 513}, ""),
    ],
)
def test_a_key_is_what_stands_after_bearer(headers: dict[str, str], key: str | None) -> None:
    assert presented(headers) == key


def test_a_key_names_a_tenant_and_perhaps_its_tier() -> None:
    assert account(arrived(head(authorization=f"Bearer {KEY}"), BY_KEY)).tier == "free"
    assert account(arrived(head(x_api_key="sk-of-rich"), BY_KEY)).tier == "enterprise"


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer sk-other"}, {"x_api_key": ""}])
def test_who_has_no_known_key_is_refused_or_anonymous_as_configured(headers: dict[str, Any]) -> None:
    assert status(head(**headers), BY_KEY) == 401
    anonymous = arrived(head(**headers), {**BY_KEY, "unknown": "anonymous", "anonymous_tier": "paid"})
    assert account(anonymous).tier == "paid"


def test_with_keys_the_header_of_a_tenant_counts_for_nothing() -> None:
    assert status(head(x_tenant="acme"), BY_KEY, **BY_HEADER) == 401
    request = arrived(head(x_tenant="rich", authorization=f"Bearer {KEY}"), BY_KEY, **BY_HEADER)
    assert request.tenant == arrived(head(authorization=f"Bearer {KEY}"), BY_KEY).tenant


def test_the_hash_of_a_key_needs_the_secret() -> None:
    assert key_hash(SECRET, KEY) == "541e181209f2fb754ab57690eb8331c036a10e3b", "files of keys have to last"
    assert key_hash(SECRET, KEY) != key_hash(SECRET + b"x", KEY)


def test_nothing_of_a_key_is_in_what_the_router_is_told() -> None:
    request = arrived(head(authorization=f"Bearer {KEY}"), BY_KEY)
    assert KEY not in repr(request)
    assert "acme" not in repr(request)


# --- claims -----------------------------------------------------------------------------------------------------------

BY_CLAIM = {"jwt": {"tenant_claim": "org.id", "tier_claim": "plan"}}


def test_verified_claims_name_a_tenant_and_its_tier() -> None:
    told = {"jwt_payload": {"org": {"id": "acme"}, "plan": "paid"}}
    assert account(arrived(head(claims=told), BY_CLAIM)).tier == "paid"


@pytest.mark.parametrize(
    "claims",
    [
        None,
        {},
        {"jwt_payload": {}},
        {"jwt_payload": "x"},
        {"jwt_payload": {"org": {"id": 7}}},
        {"other": {"org": {"id": "a"}}},
    ],
)
def test_without_them_a_client_is_unknown(claims: dict[str, Any] | None) -> None:
    assert status(head(claims=claims, x_tenant="acme"), BY_CLAIM, **BY_HEADER) == 401


def test_a_tier_that_does_not_exist_is_none() -> None:
    told = {"jwt_payload": {"org": {"id": "acme"}, "plan": "admin"}}
    assert account(arrived(head(claims=told), BY_CLAIM)).tier == "free"


def test_where_both_are_configured_a_key_will_do_as_well() -> None:
    both = {**BY_CLAIM, **BY_KEY}
    assert account(arrived(head(authorization=f"Bearer {KEY}"), both)).tier == "free"
    told = {"jwt_payload": {"org": {"id": "x"}, "plan": "paid"}}
    assert account(arrived(head(claims=told, authorization="Bearer ey.a.token"), both)).tier == "paid"


def test_claims_are_found_by_name_or_path() -> None:
    claims = {"a.b": "1", "a": {"c": "2", "d": 3}}
    assert [claim(claims, path) for path in ("a.b", "a.c", "a.d", "a", "z.z")] == ["1", "2", None, None, None]


# --- headers ----------------------------------------------------------------------------------------------------------


def test_a_gateway_in_front_may_name_both() -> None:
    tenants = {"tier_header": "X-Tier"}
    request = arrived(head(x_tenant="acme", x_tier="paid"), tenants, **BY_HEADER)
    assert account(request).tier == "paid"
    assert account(request).tenant == request.tenant
    assert status(head(), tenants, **BY_HEADER) == 401
    assert status(head(x_tenant="x" * 257), tenants, **BY_HEADER) == 401


def test_only_what_is_configured_is_read_of_the_headers() -> None:
    assert not {"authorization", "x-api-key"} & intake({"unknown": "anonymous"})[0].headers
    assert {"authorization", "x-api-key"} <= intake(BY_KEY)[0].headers


def test_without_tenants_nobody_has_an_account() -> None:
    router = FakeRouter([route(1)])
    config = parse("pools: [{replicas: ['10.0.0.1:80']}]")
    Intake(router, config).decide(head(authorization="Bearer x"), prompt(5), 0.0)
    assert router.arrived[0][0].account is None
    assert router.arrived[0][0].tenant is None


# --- what a plan does to a request ------------------------------------------------------------------------------------

ANYBODY = {"unknown": "anonymous", "tiers": {"free": {"priority": 5, "slo_ttft_s": 2.0}}}


def test_a_client_may_lower_its_priority_but_not_raise_it() -> None:
    def priority(value: str | None, **body: Any) -> int:
        headers: dict[str, Any] = {} if value is None else {"x_request_priority": value}
        return arrived(head(**headers), ANYBODY, prompt(5, **body)).priority

    assert [priority(v) for v in (None, "3", "-7", "5", "9")] == [5, 3, -7, 5, 5]
    assert priority(None, priority=2) == -2, "vLLM's counts the other way round"
    assert priority(None, priority=-50) == 5
    assert arrived(head(x_request_priority="9"), {"unknown": "anonymous"}).priority == 0


def test_the_time_to_the_first_token_is_the_tiers_where_the_client_is_silent() -> None:
    assert arrived(head(), ANYBODY).slo_ttft_s == 2.0
    assert arrived(head(x_slo_ttft_ms="500"), ANYBODY).slo_ttft_s == 0.5


def test_what_generates_nothing_is_not_counted() -> None:
    made, router = intake({"unknown": "anonymous"})
    made.decide(Head("GET", "/v1/models", headers={}), None, 0.0)
    assert router.arrived[0][0].account is None
    made.decide(Head("POST", "/rerank", headers={}), None, 0.0)
    assert router.arrived[1][0].account is not None


def test_prompts_of_two_tenants_never_match_unless_that_is_wanted() -> None:
    def hashes(tenant: str, isolate: bool = True) -> tuple[int, ...]:
        body = prompt(5000)
        found = arrived(head(x_tenant=tenant), {"isolate_prefixes": isolate}, body, **BY_HEADER).blocks.hashes
        assert found
        return found

    assert not set(hashes("red")) & set(hashes("blue"))
    assert hashes("red") == hashes("red")
    assert hashes("red", isolate=False) == hashes("blue", isolate=False)


def test_the_engines_salt_is_the_tenants_and_cannot_be_that_of_another() -> None:
    def salt(tenant: str, **body: Any) -> str:
        made, _ = intake({"send_cache_salt": True}, **BY_HEADER)
        answer = made.decide(head(x_tenant=tenant), prompt(5, **body), 0.0, rewritable=True)
        assert isinstance(answer, Steer)
        assert answer.body is not None
        found: str = json.loads(answer.body)["cache_salt"]
        return found

    red = salt("red")
    assert salt("red") == red
    assert len({red, salt("blue"), salt("red", cache_salt="own"), salt("blue", cache_salt="own")}) == 4
    assert salt("blue", cache_salt=red) != red
    streamed = json.loads(salted_stream())
    assert streamed["stream_options"] == {"include_usage": True}
    assert streamed["cache_salt"] == red


def salted_stream(**body: Any) -> bytes:
    made, _ = intake({"send_cache_salt": True}, **BY_HEADER)
    answer = made.decide(head(x_tenant="red"), prompt(5, stream=True, **body), 0.0, rewritable=True)
    assert isinstance(answer, Steer)
    assert answer.body is not None
    assert answer.strip_usage is not bool(body), "what the client asked for itself is left to it"
    return answer.body


def test_a_client_that_asked_for_usage_gets_it_beside_a_salt() -> None:
    body = json.loads(salted_stream(stream_options={"include_usage": True}))
    assert body["stream_options"] == {"include_usage": True}
    assert body["cache_salt"]


# --- plans ------------------------------------------------------------------------------------------------------------


def plans(**tenants: Any) -> Plans:
    found = configured({"unknown": "anonymous", **tenants}).tenants
    assert found is not None
    return Plans(found)


def test_the_tiers_that_there_are() -> None:
    made = plans()
    limits = [made.of("x", tier).account("t", "m").requests for tier in ("free", "paid", "enterprise")]
    assert limits == [Rate(10, 10), Rate(60, 60), None]


def test_a_tenant_takes_over_what_it_does_not_name() -> None:
    made = plans(
        tiers={"free": {"in_flight": 4, "tokens_per_minute": 100}},
        named={
            "acme": {"requests_per_minute": 20, "tokens_per_minute": None},
            "vip": {"tier": "paid", "metrics": True},
        },
    )
    acme = made.of("acme", None).account("t", None)
    assert (acme.requests, acme.tokens, acme.in_flight, acme.label) == (Rate(20, 20), None, Most(4), "")
    assert (made.of("vip", None).tier, made.of("vip", None).label) == ("paid", "vip")
    assert made.of("vip", "free").tier == "free", "a key or claim says so"


def test_a_model_with_limits_of_its_own_is_counted_apart() -> None:
    big = {"big": {"requests_per_minute": 2, "max_prompt_tokens": 50}}
    plan = plans(tiers={"paid": {"requests_per_minute": 60, "in_flight": 9, "models": big}}, default_tier="paid").of(
        "x", None
    )
    found = plan.account("t", "big")
    assert (found.requests, found.max_prompt_tokens, found.in_flight) == (Rate(2, 2, "big"), 50, Most(9))
    assert plan.account("t", "small").requests == Rate(60, 60)
    assert len(plan.accounts("t")) == 2


def test_a_burst_is_never_more_than_a_minutes() -> None:
    tiers = {
        "free": {"requests_per_minute": 10, "requests_burst": 1},
        "paid": {"requests_per_minute": 10, "requests_burst": 99},
    }
    made = plans(tiers=tiers)
    assert made.of("x", "free").account("t", None).requests == Rate(10, 1)
    assert made.of("x", "paid").account("t", None).requests == Rate(10, 10)
