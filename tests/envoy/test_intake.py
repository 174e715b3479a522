from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from extproc.config import Config, EnvoyConfig
from extproc.core.types import Api, End, Outcome, Refusal, Reject, Request, Route
from extproc.envoy.exchange import Head, Refuse, Steer
from extproc.envoy.intake import MAX_PRIORITY, FakeRouter, Intake, Ready
from tests.envoy.setup import CHAT, prompt, route

KEY = b"k" * 32
POST = Head("POST", CHAT)


def configured(pools: int = 1, ask: bool = True, **requests: Any) -> Config:
    names = ("a", "b")[:pools]
    return Config.model_validate(
        {
            "pools": [
                {"name": n, "models": [n], "replicas": [f"10.0.0.{i}:80"], "usage": {"ask": ask}}
                for i, n in enumerate(names, 1)
            ],
            "requests": requests,
        }
    )


def arrived(head: Head, body: bytes | None = None, **requests: Any) -> Request:
    router = FakeRouter([route(1)])
    Intake(router, configured(**requests), KEY).decide(head, body if body is not None else prompt(5), now=3.0)
    ((request, now),) = router.arrived
    assert now == 3.0
    return request


def steer(body: bytes, rewritable: bool = True, **config: Any) -> Steer:
    answer = Intake(FakeRouter([route(1, 2)]), configured(**config)).decide(POST, body, 0.0, rewritable)
    assert isinstance(answer, Steer)
    return answer


def with_headers(**headers: str) -> Head:
    return replace(POST, headers={k.replace("_", "-"): v for k, v in headers.items()})


# --- what the router is told ------------------------------------------------------------------------------------------


def test_the_body_is_read() -> None:
    request = arrived(POST, prompt(5, max_tokens=7))
    assert (request.api, request.model, request.max_output_tokens) == (Api.CHAT, "m", 7)


def test_an_unread_body_is_known_by_its_size() -> None:
    router = FakeRouter([route(1)])
    Intake(router, configured()).decide(replace(POST, content_length=99), None, 0.0)
    assert router.arrived[0][0].prompt_bytes == 99


def test_the_session_header_wins_over_the_body() -> None:
    body = prompt(5, session_id="body")
    assert arrived(POST, body).session == "body"
    assert arrived(with_headers(x_session_id="head"), body).session == "head"
    assert arrived(with_headers(x_session_id="x" * 257), body).session == "body"


def test_the_session_header_can_be_named() -> None:
    assert arrived(with_headers(x_conversation="c"), session_header="X-Conversation").session == "c"


def test_a_tenant_is_a_keyed_hash() -> None:
    head = with_headers(authorization="Bearer secret")
    tenant = arrived(head, tenant_header="Authorization").tenant
    assert tenant is not None
    assert len(tenant) == 16
    assert "secret" not in tenant
    assert arrived(head, tenant_header="Authorization").tenant == tenant
    assert arrived(with_headers(authorization="Bearer other"), tenant_header="Authorization").tenant != tenant


def test_without_a_given_key_the_hash_differs_between_processes() -> None:
    def tenant() -> str | None:
        router = FakeRouter([route(1)])
        config = configured(tenant_header="x-key")
        Intake(router, config).decide(with_headers(x_key="k"), prompt(5), 0.0)
        return router.arrived[0][0].tenant

    assert tenant() != tenant()


def test_no_tenant_unless_configured() -> None:
    assert arrived(with_headers(authorization="Bearer secret")).tenant is None


@pytest.mark.parametrize(
    ("text", "priority"),
    [("3", 3), ("-2", -2), (" 1 ", 1), ("x", 0), ("", 0), ("1.5", 0), ("9" * 15, MAX_PRIORITY), ("9" * 30, 0)],
)
def test_priority_header(text: str, priority: int) -> None:
    assert arrived(with_headers(x_request_priority=text)).priority == priority


def test_the_priority_of_the_body_stands_where_the_header_is_wrong() -> None:
    body = prompt(5, priority=-4)  # lower goes first in the engine, higher goes first here
    assert arrived(with_headers(x_request_priority="x"), body).priority == 4
    assert arrived(with_headers(x_request_priority="0"), body).priority == 0


@pytest.mark.parametrize("subset", [None, frozenset[str](), frozenset({"10.0.0.1"})])
def test_the_subset_hint_goes_on(subset: frozenset[str] | None) -> None:
    assert arrived(replace(POST, subset=subset)).subset == subset


def test_the_headers_asked_for() -> None:
    headers = Intake(FakeRouter(), configured(tenant_header="X-Key", session_header="X-S")).headers
    assert headers == {"x-key", "x-s", "x-request-priority", "x-slo-ttft-ms", "x-quality"}


# --- what comes back --------------------------------------------------------------------------------------------------


def test_a_route_becomes_a_list_of_endpoints() -> None:
    assert steer(prompt(5)) == Steer("f1", "127.0.0.1:1,127.0.0.1:2")


def test_for_a_gateway_that_takes_one_address_it_is_the_best() -> None:
    config = configured().model_copy(update={"envoy": EnvoyConfig(endpoints=1)})
    answer = Intake(FakeRouter([route(1, 2)]), config).decide(POST, prompt(5), 0.0, True)
    assert answer == Steer("f1", "127.0.0.1:1")


def test_who_computes_the_prompt_goes_along() -> None:
    split = route(1, 2)
    split = replace(split, decision=replace(split.decision, prefiller="127.0.0.1:9"))
    answer = Intake(FakeRouter([split]), configured()).decide(POST, prompt(5), 0.0, True)
    assert answer == Steer("f1", "127.0.0.1:1,127.0.0.1:2", prefiller="127.0.0.1:9")


PAIRED = {"protocol": "sglang", "local_prefill": False}


def mirroring(**envoy: Any) -> Config:
    pool = {"name": "a", "models": ["m"], "replicas": ["10.0.0.1:80"], "disaggregation": PAIRED}
    return Config.model_validate({"pools": [pool], "envoy": envoy})


@pytest.mark.parametrize("prefiller", ["127.0.0.1:9", "[2001:db8::1]:9"])
def test_two_engines_that_get_one_request_are_told_where_they_meet(prefiller: str) -> None:
    split = replace(route(1, 2), patience_s=3.0)
    split = replace(split, decision=replace(split.decision, prefiller=prefiller, bootstrap_port=8_998))
    body = prompt(5, stream=True)
    answer = Intake(FakeRouter([split]), mirroring()).decide(replace(POST, mirrors=True), body, 0.0, True)
    assert isinstance(answer, Steer)
    assert (answer.mirror, answer.retries, answer.prefiller, answer.patience_s) == (prefiller, 1, "", None)
    assert answer.body is not None
    sent = json.loads(answer.body)
    assert 0 < sent["bootstrap_room"] < 2**63
    fields = {"bootstrap_host": prefiller[:-2], "bootstrap_port": 8_998, "bootstrap_room": sent["bootstrap_room"]}
    assert sent == {**json.loads(body), **fields, "stream_options": {"include_usage": True}}


def test_of_those_that_decode_no_more_are_tried_than_configured() -> None:
    split = replace(route(1, 2), decision=replace(route(1, 2).decision, prefiller="127.0.0.1:9", bootstrap_port=1))
    intake = Intake(FakeRouter([split]), mirroring(retries=0))
    answer = intake.decide(replace(POST, mirrors=True), prompt(5), 0.0, True)
    assert isinstance(answer, Steer)
    assert answer.retries == 0


@pytest.mark.parametrize("mirrors", [True, False])
@pytest.mark.parametrize("rewritable", [True, False])
@pytest.mark.parametrize("config", [mirroring(), configured()], ids=["sglang", "other"])
def test_only_what_the_proxy_can_copy_may_be_split(mirrors: bool, rewritable: bool, config: Config) -> None:
    router = FakeRouter([route(1)])
    Intake(router, config).decide(replace(POST, mirrors=mirrors), prompt(5), 0.0, rewritable)
    ((request, _),) = router.arrived
    assert request.mirrorable is (mirrors and rewritable and config == mirroring())


def test_what_a_person_asks_about_is_taken_to_be_copied() -> None:
    ready = Intake(FakeRouter(), mirroring()).asked(POST, prompt(5))
    assert isinstance(ready, Ready)
    assert ready.request.mirrorable


def test_a_rank_goes_apart_from_the_addresses() -> None:
    ranked = route(1, 2)
    ranked = replace(ranked, endpoints=tuple(f"{e}/3" for e in ranked.endpoints))
    answer = Intake(FakeRouter([ranked]), configured()).decide(POST, prompt(5), 0.0, True)
    assert answer == Steer("f1", "127.0.0.1:1,127.0.0.1:2", rank=3)


def test_usage_is_asked_for_in_a_stream() -> None:
    answer = steer(prompt(5, stream=True))
    assert answer.strip_usage
    assert answer.body is not None
    assert json.loads(answer.body)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("body", "rewritable", "ask"),
    [
        (prompt(5), True, True),
        (prompt(5, stream=True), False, True),
        (prompt(5, stream=True), True, False),
        (prompt(5, stream=True, stream_options={"include_usage": True}), True, True),
    ],
    ids=["not a stream", "too late", "switched off", "asked for already"],
)
def test_the_body_stays_as_it_is(body: bytes, rewritable: bool, ask: bool) -> None:
    answer = steer(body, rewritable, ask=ask)
    assert (answer.body, answer.strip_usage) == (None, False)


def test_the_pool_is_named_where_there_are_several() -> None:
    assert steer(prompt(5)).pool is None
    assert steer(prompt(5), pools=2).pool == "a"


def test_a_refusal_is_an_error_for_the_client() -> None:
    answer = Intake(FakeRouter([Reject(Refusal.NO_REPLICAS)]), configured()).decide(POST, prompt(5), 0.0)
    assert isinstance(answer, Refuse)
    assert answer.error.status == 503
    assert dict(answer.error.headers)["retry-after"]


def test_a_broken_body_never_reaches_the_router() -> None:
    router = FakeRouter([route(1)])
    answer = Intake(router, configured()).decide(POST, b"{", 0.0)
    assert isinstance(answer, Refuse)
    assert answer.error.status == 400
    assert router.arrived == []


def test_an_abandoned_flight_ends_as_the_clients_doing() -> None:
    router = FakeRouter()
    Intake(router, configured()).abandon("f9", 4.0)
    assert router.finished == [("f9", Outcome(End.CLIENT_GONE), 4.0)]


def test_a_mistake_after_the_decision_ends_its_flight() -> None:
    """The request then passes unrouted, without the mark by which its end would be reported."""
    verdict = route(1)
    broken = Route(verdict.flight, (None,), verdict.decision)  # type: ignore[arg-type]
    router = FakeRouter([broken])
    with pytest.raises(TypeError):
        Intake(router, configured()).decide(POST, prompt(5), 0.0)
    assert router.finished == [(verdict.flight, Outcome(End.CLIENT_GONE), 0.0)]


def test_the_rules_for_streams() -> None:
    rules = Intake(FakeRouter(), configured(max_body_bytes=4096)).rules
    assert rules.max_body_bytes == 4096
    assert rules.too_large.status == 413
    assert rules.reads(POST)
    assert not rules.reads(Head("POST", "/tokenize"))
    assert not rules.reads(Head("GET", CHAT))


@pytest.mark.parametrize(
    ("envoy", "patience_s"),
    [({}, 7.0), ({"retries": 0}, None), ({"retry_resets": False}, None)],
    ids=["default", "no retries", "no resets"],
)
def test_patience_ends_only_where_another_replica_is_asked(envoy: dict[str, Any], patience_s: float | None) -> None:
    whole = configured()
    config = whole.model_copy(update={"envoy": whole.envoy.model_copy(update=envoy)})
    router = FakeRouter([replace(route(1, 2), patience_s=7.0)])
    answer = Intake(router, config).decide(POST, prompt(5), 0.0)
    assert isinstance(answer, Steer)
    assert answer.patience_s == patience_s
