"""What the bootstrap says of providers. That Envoy does it is for tests/e2e/test_providers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config import Config, parse
from extproc.envoy import bootstrap
from tests.envoy.steering import http_filters, manager

Json = dict[str, Any]


def config(*providers: Json, **sections: Any) -> Config:
    raw = {"pools": [{"name": "large", "replicas": ["127.0.0.1:1"]}], "providers": list(providers), **sections}
    return parse(yaml.safe_dump(raw), base=Path("/etc/extproc"))


def clusters(rendered: Json) -> dict[str, Json]:
    return {each["name"]: each for each in rendered["static_resources"]["clusters"]}


def routes(rendered: Json) -> dict[str, Json]:
    [host] = manager(rendered)["route_config"]["virtual_hosts"]
    return {each["name"]: each for each in host["routes"]}


def tls_of(rendered: Json, name: str = "provider_p") -> Json:
    context: Json = clusters(rendered)[name]["transport_socket"]["typed_config"]
    return context


@pytest.mark.parametrize(
    ("section", "host", "prefix"),
    [
        ({}, "api.example", "/v1/"),
        ({"port": 8443}, "api.example:8443", "/v1/"),
        ({"port": 80, "tls": False}, "api.example", "/v1/"),
        ({"tls": False}, "api.example:443", "/v1/"),
        ({"base_path": "/openai/deployments/x"}, "api.example", "/openai/deployments/x/"),
        ({"base_path": ""}, "api.example", "/"),
    ],
)
def test_host_and_path_are_those_of_the_provider(section: Json, host: str, prefix: str) -> None:
    rendered = bootstrap.render(config({"name": "p", "host": "api.example", **section}))
    route = routes(rendered)["provider p"]
    assert (route["route"]["host_rewrite_literal"], route["route"]["prefix_rewrite"]) == (host, prefix)
    assert route["match"]["prefix"] == "/v1/", "and nothing else goes there"


def test_nobody_else_is_asked_for_a_provider() -> None:
    action = routes(bootstrap.render(config({"name": "p", "host": "api.example"})))["provider p"]["route"]
    assert action["retry_policy"]["num_retries"] == 1
    never_sent = {"connect-failure", "refused-stream", "reset-before-request"}
    assert set(action["retry_policy"]["retry_on"].split(",")) == never_sent, "all else may be paid for twice"
    assert "retry_host_predicate" not in action["retry_policy"]
    assert action["hedge_policy"] == {}


def test_the_certificate_is_verified_for_the_host() -> None:
    rendered = bootstrap.render(config({"name": "p", "host": "api.example"}))
    assert tls_of(rendered)["sni"] == "api.example"
    verified = tls_of(rendered)["common_tls_context"]["validation_context"]
    assert verified["match_typed_subject_alt_names"] == [{"san_type": "DNS", "matcher": {"exact": "api.example"}}]
    assert verified["trusted_ca"] == {"filename": "/etc/ssl/certs/ca-certificates.crt"}


def test_an_address_is_verified_as_one_and_is_no_server_name() -> None:
    rendered = bootstrap.render(config({"name": "p", "host": "10.0.0.9", "ca_file": "ca.pem"}))
    assert "sni" not in tls_of(rendered)
    verified = tls_of(rendered)["common_tls_context"]["validation_context"]
    assert verified["match_typed_subject_alt_names"] == [{"san_type": "IP_ADDRESS", "matcher": {"exact": "10.0.0.9"}}]
    assert verified["trusted_ca"] == {"filename": "/etc/extproc/ca.pem"}


def test_without_tls_there_is_none() -> None:
    rendered = bootstrap.render(config({"name": "p", "host": "api.example", "tls": False}))
    assert "transport_socket" not in clusters(rendered)["provider_p"]
    assert "scheme_header_transformation" not in manager(rendered)


def test_keys_are_injected_in_the_cluster_alone() -> None:
    rendered = bootstrap.render(config({"name": "p", "host": "api.example", "api_key_file": "p.key"}))
    [options] = clusters(rendered)["provider_p"]["typed_extension_protocol_options"].values()
    filters = [each["name"].rpartition(".")[2] for each in options["http_filters"]]
    assert filters == ["lua", "credential_injector", "upstream_codec"]
    assert not [each for each in http_filters(rendered) if "credential" in each["name"]]


def test_a_connection_that_all_requests_share_is_pinged() -> None:
    rendered = bootstrap.render(config({"name": "p", "host": "api.example"}))
    [options] = clusters(rendered)["provider_p"]["typed_extension_protocol_options"].values()
    pings = options["auto_config"]["http2_protocol_options"]["connection_keepalive"]
    assert pings == {"interval": "30s", "timeout": "15s"}


@pytest.mark.parametrize(
    ("providers", "statuses"), [([], {503}), ([{"name": "p", "host": "api.example"}], {502, 503, 504})]
)
def test_who_has_a_provider_is_told_to_come_again(providers: list[Json], statuses: set[int]) -> None:
    mappers = manager(bootstrap.render(config(*providers)))["local_reply_config"]["mappers"]
    told = {
        each["filter"]["status_code_filter"]["comparison"]["value"]["default_value"]
        for each in mappers
        if "headers_to_add" in each
    }
    assert told == statuses


def test_the_tenants_header_stays_here() -> None:
    section = {"name": "p", "host": "api.example"}
    rendered = bootstrap.render(config(section, requests={"tenant_header": "X-Team"}))
    removed = routes(rendered)["provider p"]["request_headers_to_remove"]
    assert {"x-team", "authorization", "cookie", "x-api-key"} <= set(removed)


def test_with_a_provider_one_pool_is_named_too() -> None:
    rendered = bootstrap.render(config({"name": "p", "host": "api.example"}))
    assert list(routes(rendered))[-3:] == ["pool large", "provider p", "default"]
    assert routes(rendered)["default"]["route"]["cluster"] == "pool_large"
    [ext_proc] = [each for each in http_filters(rendered) if each["name"].endswith("ext_proc")]
    assert "route_cache_action" not in ext_proc["typed_config"], "DEFAULT: our answer may clear it"


def test_a_baseline_sends_nothing_there() -> None:
    rendered = bootstrap.render(config({"name": "p", "host": "api.example"}), baseline="random")
    assert [name for name in (*clusters(rendered), *routes(rendered)) if "provider" in name] == []


def test_the_script_has_all_values_put_in() -> None:
    rendered = bootstrap.render(config({"name": "p", "host": "api.example", "query": "api-version=1"}))
    [options] = clusters(rendered)["provider_p"]["typed_extension_protocol_options"].values()
    source = options["http_filters"][0]["typed_config"]["default_source_code"]["inline_string"]
    assert "@" not in source
    assert "local QUERY = '?api-version=1'" in source
    assert '["content-type"] = true' in source


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"timeout_s": 1e-5}, "providers[0].timeout_s: Envoy counts whole milliseconds; set 0.001 or more"),
        (
            {"api_key_header": "host"},
            "providers[0].api_key_header: 'host' belongs to HTTP itself; use authorization, or api-key",
        ),
    ],
)
def test_what_envoy_could_not_do_is_named(section: Json, message: str) -> None:
    with pytest.raises(bootstrap.BootstrapError) as error:
        bootstrap.render(config({"name": "p", "host": "api.example", **section}))
    assert str(error.value) == message
