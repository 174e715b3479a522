"""Tenants through the real Envoy: who is known, who is refused, and what is told of what is left."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from extproc.adapters import keys
from extproc.envoy import names
from tests.e2e.stack import Json, Stack, chat, stack
from tests.support.backend import Backend
from tests.support.waiting import until

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

SECRET = b"0123456789abcdef"
LATE_S = 10.0
"""Envoy keeps its log entries back for longer here, where it batches them."""


@dataclass
class Scene:
    running: Stack
    member: Backend
    keys_file: Path

    def key(self, tenant: str, tier: str | None = None) -> str:
        """A new key, written to the file."""
        made = keys.new_key()
        keys.add(self.keys_file, SECRET, made, tenant, tier)
        return made

    async def known(self, tenant: str, tier: str | None = None) -> dict[str, str]:
        """Headers of a client whose key extproc has read."""
        made, before = self.key(tenant, tier), len(self.file)
        await until(lambda: len(self.file) > before)
        return {"authorization": f"Bearer {made}"}

    @property
    def file(self) -> keys.KeyFile:
        found = self.running.app._tenancy.keys
        assert found is not None
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    at = tmp_path_factory.mktemp("tenants")
    (at / "secret").write_bytes(SECRET)
    keys_file = at / "keys.yaml"
    keys_file.write_text("keys: []\n")
    tenants = {
        "secret_file": str(at / "secret"),
        "keys_file": str(keys_file),
        "send_cache_salt": True,
        "tiers": {"metered": {"tokens_per_minute": 60_000, "max_prompt_tokens": 2000}, "single": {"in_flight": 1}},
    }
    async with AsyncExitStack() as exits:
        member = await exits.enter_async_context(Backend())
        pool = {"engine": "none", "models": ["sim"], "replicas": [member.address]}
        async with stack(at, pool, tenants=tenants, envoy={"log_flush_interval_s": 3 * LATE_S}) as running:
            yield Scene(running, member, keys_file)


async def test_the_eleventh_request_of_tier_free_is_refused(scene: Scene) -> None:
    client = await scene.known("free rider")
    left = []
    for _ in range(10):
        async with scene.running.post(headers=client) as response:
            assert response.status == 200, await response.text()
            assert response.headers.getall("x-ratelimit-limit-requests") == ["10"]
            left.append(int(response.headers["x-ratelimit-remaining-requests"]))
            assert "x-ratelimit-limit-tokens" not in response.headers, "it has no such limit"
    assert left[0] == 9
    assert left == sorted(left, reverse=True)
    async with scene.running.post(headers=client) as response:
        answer, headers = await response.json(), response.headers
    assert response.status == 429
    assert answer["error"]["code"] == "rate_limit_exceeded"
    assert answer["error"]["type"] == "requests"
    assert 1 <= int(headers["retry-after"]) <= 6
    assert headers["x-ratelimit-limit-requests"] == "10"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    labels = {"tier": "free", "tenant": "", "result": "rate_limited"}
    assert scene.running.metric("extproc_tenant_requests_total", **labels) == 1


async def test_another_tenant_has_limits_of_its_own(scene: Scene) -> None:
    client = await scene.known("payer", "paid")
    async with scene.running.post(headers=client) as response:
        assert (response.status, response.headers["x-ratelimit-remaining-requests"]) == (200, "59")


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer sk-nobody"}, {"x-api-key": "sk-nobody"}, {"authorization": "Basic YTpi"}],
    ids=["none", "bearer", "x-api-key", "basic"],
)
async def test_an_unknown_key_is_refused(scene: Scene, headers: dict[str, str]) -> None:
    before = len(scene.member.received)
    async with scene.running.post(headers=headers) as response:
        answer = await response.json()
        assert response.status == 401
        assert response.headers["www-authenticate"] == "Bearer"
    assert answer["error"]["code"] == "invalid_api_key"
    assert "sk-" not in answer["error"]["message"]
    assert len(scene.member.received) == before


async def test_a_key_counts_as_soon_as_it_is_in_the_file_and_no_longer(scene: Scene) -> None:
    before = scene.keys_file.read_text()
    client = await scene.known("guest", "enterprise")
    async with scene.running.post(headers=client) as response:
        assert response.status == 200
        assert not [name for name in response.headers if name.startswith("x-ratelimit")], "no limit, no header"
    kept = len(scene.file)
    scene.keys_file.write_text(before)
    await until(lambda: len(scene.file) < kept)
    async with scene.running.post(headers=client) as response:
        assert response.status == 401


async def test_tokens_are_counted_by_the_actual_usage(scene: Scene) -> None:
    client = await scene.known("writer", "metered")
    async with scene.running.post(chat("x" * 400), headers=client) as response:
        await response.read()
        assert response.headers["x-ratelimit-limit-tokens"] == "60000"
        assert int(response.headers["x-ratelimit-remaining-tokens"]) < 60_000
        assert "x-ratelimit-limit-requests" not in response.headers
    await scene.running.ended()
    used = scene.running.metric("extproc_tenant_tokens_total", tier="metered", tenant="")
    assert used > 0


async def test_who_may_have_one_request_in_flight_may_send_one_after_the_other(scene: Scene) -> None:
    """The end of each is told at once, and not with those of others."""
    client = await scene.known("one by one", "single")
    for _ in range(20):
        async with scene.running.post(headers=client) as response:
            await response.read()
            assert response.status == 200, await response.text()
        await until(lambda: scene.running.app.router.in_flight == 0, timeout_s=LATE_S)


async def test_a_prompt_above_the_limit_of_the_tier_is_refused(scene: Scene) -> None:
    client = await scene.known("novelist", "metered")
    async with scene.running.post(chat("word " * 20_000), headers=client) as response:
        answer = await response.json()
    assert (response.status, answer["error"]["code"]) == (400, "context_length_exceeded")


async def test_engines_are_told_of_tenants_by_a_salt(scene: Scene) -> None:
    salts: list[str] = []
    for tenant in ("red", "blue", "red"):
        client = await scene.known(tenant, "enterprise")
        async with scene.running.post(chat("the same"), headers=client) as response:
            assert response.status == 200
        body: Json = json.loads(scene.member.received[-1].body)
        salts.append(body["cache_salt"])
    assert salts[0] == salts[2] != salts[1]


async def test_a_large_body_is_no_way_around(scene: Scene) -> None:
    """It is read in another process."""
    large = chat("word " * 60_000)
    before = len(scene.member.received)
    async with scene.running.post(large, headers={"authorization": "Bearer sk-nobody"}) as response:
        assert response.status == 401
    assert len(scene.member.received) == before
    client = await scene.known("green", "enterprise")
    async with scene.running.post(large, headers=client) as response:
        assert response.status == 200
    body: Json = json.loads(scene.member.received[-1].body)
    assert body["messages"] == large["messages"]
    assert body["cache_salt"]
    rider = await scene.known("novel rider", "metered")
    async with scene.running.post(large, headers=rider) as response:
        assert response.status == 400


async def test_a_client_cannot_give_itself_headers_of_limits(scene: Scene) -> None:
    """They stand in responses; a request with them changes nothing."""
    client = await scene.known("liar", "paid")
    forged = {**client, **dict.fromkeys(names.RATELIMIT_HEADERS, "999")}
    async with scene.running.post(headers=forged) as response:
        assert response.headers["x-ratelimit-limit-requests"] == "60"


async def test_explain_says_what_identity_and_limits_would_answer_and_takes_nothing(scene: Scene) -> None:
    client = await scene.known("curious")

    async def explained(headers: dict[str, str], query: str = "") -> tuple[int, Json]:
        url = f"{scene.running.admin}/debug/explain{query}"
        async with scene.running.client.post(url, json=chat(), headers=headers) as response:
            return response.status, await response.json()

    for _ in range(12):
        status, record = await explained(client)
        assert (status, record["tier"]) == (200, "free"), record
        assert record["left"]["requests"]["remaining"] == 10
    by_name = await explained({}, "?tenant=curious")
    assert by_name[1]["tenant"] == record["tenant"]
    assert (await explained({}, "?tenant=curious&tier=paid"))[1]["left"]["requests"]["limit"] == 60
    assert (await explained({}))[0] == 401
    for _ in range(10):
        async with scene.running.post(headers=client) as response:
            assert response.status == 200
    status, refused = await explained(client)
    assert (status, refused["error"]["code"]) == (429, "rate_limit_exceeded")


# --- claims, by Envoy's own filter ------------------------------------------------------------------------------------

JWT_SECRET = b"a secret of thirty-two bytes ...."


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(**claims: object) -> dict[str, str]:
    """An authorization header, signed with HMAC-SHA256 (RFC 7515, appendix A.1)."""
    parts = [{"alg": "HS256", "typ": "JWT"}, {"iss": "tests", **claims}]
    signed = ".".join(encoded(json.dumps(part).encode()) for part in parts)
    signature = hmac.digest(JWT_SECRET, signed.encode(), "sha256")
    return {"authorization": f"Bearer {signed}.{encoded(signature)}"}


def with_jwt_filter(rendered: Json) -> None:
    """As docs/tenants.md says: before ext_proc."""
    [listener] = rendered["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    key_set = {"keys": [{"kty": "oct", "alg": "HS256", "k": encoded(JWT_SECRET)}]}
    provider = {
        "issuer": "tests",
        "payload_in_metadata": "jwt_payload",
        "forward": True,
        "local_jwks": {"inline_string": json.dumps(key_set)},
    }
    config = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        "providers": {"tests": provider},
        "rules": [{"match": {"prefix": "/v1/"}, "requires": {"provider_name": "tests"}}],
    }
    filters.insert(0, {"name": names.JWT_NAMESPACE, "typed_config": config})


async def test_claims_that_envoy_verified_name_tenant_and_tier(tmp_path: Path) -> None:
    async with AsyncExitStack() as exits:
        member = await exits.enter_async_context(Backend())
        pool = {"engine": "none", "models": ["sim"], "replicas": [member.address]}
        tenants = {"jwt": {"tenant_claim": "org.id", "tier_claim": "plan"}}
        running = await exits.enter_async_context(stack(tmp_path, pool, change=with_jwt_filter, tenants=tenants))
        async with running.post(headers=token(org={"id": "acme"}, plan="paid")) as response:
            assert response.status == 200, await response.text()
            assert response.headers["x-ratelimit-limit-requests"] == "60"
            assert response.headers["x-ratelimit-remaining-requests"] == "59"
        async with running.post(headers=token(org={"id": "other"})) as response:
            assert (response.status, response.headers["x-ratelimit-limit-requests"]) == (200, "10")
        async with running.post(headers=token(sub="no organisation")) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (401, "invalid_api_key")
