"""The HTTP port answers, refuses what is wrong, and changes nothing but drains."""

from __future__ import annotations

from collections.abc import AsyncIterator
from random import Random
from typing import Any

import orjson
import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from extproc.adapters.admin import Admin
from extproc.adapters.metrics import RouterMetrics
from extproc.adapters.recorder import Recorder
from extproc.core.observers import Several
from extproc.core.ranks import expanded
from extproc.core.router import PoolSettings, Router
from extproc.core.types import Api, DrainAsked, DrainEnded, Fact, Replica, Request, Reset

CHAT = {"model": "m", "messages": [{"role": "user", "content": "What costs least?"}]}


class Port:
    """The admin application over a router of two replicas."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recorder = Recorder(10)
        self.why: str | None = None
        observers = Several(RouterMetrics(self.registry), self.recorder)
        self.router = Router(
            [PoolSettings(n, (m,), scraped=False) for n, m in (("p", "m"), ("q", "x"))], Random(1), observers
        )
        self.router.learn(Reset("p", (Replica("10.0.0.1:1", {"gpu": "h100"}), Replica("10.0.0.2:1"))), 0.0)
        self.router.learn(Reset("q", (Replica("10.0.0.2:1"),)), 0.0)
        self.told: list[Fact] = []
        self.client: TestClient[Any, Any]

    def learn(self, fact: Fact) -> None:
        self.told.append(fact)
        self.router.learn(fact, 1.0)

    async def post(self, path: str, **options: Any) -> tuple[int, Any]:
        """Status and what the JSON says."""
        answer = await self.client.post(path, **options)
        assert answer.content_type == "application/json"
        return answer.status, await answer.json()


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    port = Port()
    admin = Admin(port.router, port.recorder, port.registry, lambda: 1.0, lambda: port.why, 10_000, port.learn)
    port.client = TestClient(TestServer(admin.application()))
    await port.client.start_server()
    yield port
    await port.client.close()


async def test_probes_tell_live_from_ready(port: Port) -> None:
    assert (await port.client.get("/readyz")).status == 200
    port.why = "pool p has no members"
    answer = await port.client.get("/readyz")
    assert (answer.status, await answer.text()) == (503, "pool p has no members\n")
    assert (await port.client.get("/livez")).status == 200


async def test_metrics_are_for_prometheus(port: Port) -> None:
    answer = await port.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "extproc_decisions_total" in await answer.text()


async def test_replicas_show_unknown_as_null(port: Port) -> None:
    first, second, _ = await (await port.client.get("/debug/replicas")).json()
    assert (first["replica"], first["labels"], first["state"]) == ("10.0.0.1:1", {"gpu": "h100"}, "ready")
    assert (first["sample"], first["sample_age_s"]) == (None, None)
    assert second["in_flight"] == 0


async def test_explain_gives_the_decision_that_the_request_would_get(port: Port) -> None:
    answer = await port.client.post("/debug/explain", json=CHAT)
    record = await answer.json()
    assert answer.status == 200
    assert {c["replica"] for c in record["candidates"]} == {"10.0.0.1:1", "10.0.0.2:1"}
    assert record["candidates"][0]["terms"].keys() >= {"queue_s", "prefill_s", "decode_s", "delay_s", "crowding_s"}
    assert port.router.in_flight == 0
    assert port.recorder.last(5) == []


async def test_explain_takes_the_api_from_the_keys_of_the_body(port: Port) -> None:
    for body, api in (({"model": "m", "prompt": "x"}, "completions"), ({"model": "m", "input": "x"}, "responses")):
        assert (await (await port.client.post("/debug/explain", json=body)).json())["api"] == api
    given = await port.client.post("/debug/explain?path=/v1/embeddings", json={"model": "m", "input": "x"})
    assert (await given.json())["api"] == "embeddings"


@pytest.mark.parametrize(
    ("body", "status"), [(b"{", 400), (b"[]", 400), (b'{"messages": []}', 400), (b'{"model":"n","messages":[]}', 404)]
)
async def test_explain_answers_bad_bodies_as_a_client_would_see_it(port: Port, body: bytes, status: int) -> None:
    answer = await port.client.post("/debug/explain", data=body)
    assert answer.status == status
    assert orjson.loads(await answer.read())["error"].keys() == {"message", "type", "param", "code"}


async def test_explain_refuses_a_body_above_the_limit(port: Port) -> None:
    assert (await port.client.post("/debug/explain", data=b"x" * 20_000)).status == 413


async def test_decisions_are_listed_and_a_wrong_count_is_refused(port: Port) -> None:
    port.router.arrive(Request(Api.CHAT, "m", prompt_bytes=10), 1.0)
    listed = await (await port.client.get("/debug/decisions?n=5")).json()
    assert [d["pool"] for d in listed] == ["p"]
    wrong = await port.client.get("/debug/decisions?n=all")
    assert (wrong.status, await wrong.json()) == (400, {"error": "n must be a number, not 'all'"})


async def test_the_page_shows_the_state_of_each_replica(port: Port) -> None:
    await port.post("/replicas/drain?replica=10.0.0.1:1&within_s=120")
    text = await (await port.client.get("/")).text()
    assert "<tr><td>p<td>10.0.0.1:1<td>draining<td>notice<td>0<td>120<td>0" in text
    assert text.count("<td>10.0.0.2:1<td>") == 2


async def test_the_page_links_to_everything(port: Port) -> None:
    text = await (await port.client.get("/")).text()
    for path in (
        "/metrics",
        "/debug/replicas",
        "/debug/decisions",
        "/debug/explain",
        "/replicas/drain",
        "/replicas/undrain",
    ):
        assert path in text


class TestDrain:
    async def test_a_drain_is_learned_and_the_new_state_answered(self, port: Port) -> None:
        status, (told,) = await port.post("/replicas/drain?replica=10.0.0.1:1")
        assert (status, told["pool"], told["replica"], told["in_flight"]) == (200, "p", "10.0.0.1:1", 0)
        assert (told["state"], told["reason"], told["since_s"], told["drain_left_s"]) == (
            "draining",
            "asked",
            0.0,
            None,
        )
        (shown,) = (v for v in await (await port.client.get("/debug/replicas")).json() if v["replica"] == "10.0.0.1:1")
        assert {key: shown[key] for key in told} == told
        assert port.told == [DrainAsked("p", "10.0.0.1:1")]

    async def test_a_spot_notice_has_a_deadline(self, port: Port) -> None:
        for within_s in (120, 0, 0.5):
            status, (told,) = await port.post(f"/replicas/drain?replica=10.0.0.1:1&within_s={within_s}")
            assert (status, told["drain_left_s"]) == (200, within_s)
        assert port.told == [DrainAsked("p", "10.0.0.1:1", s) for s in (120.0, 0.0, 0.5)]

    async def test_it_ends(self, port: Port) -> None:
        await port.post("/replicas/drain?replica=10.0.0.1:1")
        port.told.clear()
        status, (told,) = await port.post("/replicas/undrain?replica=10.0.0.1:1")
        assert (status, told["drain_left_s"]) == (200, None)
        assert told["state"] in ("ready", "slow_starting")
        assert port.told == [DrainEnded("p", "10.0.0.1:1")]

    async def test_a_replica_of_several_pools_is_drained_in_all_or_in_the_one_named(self, port: Port) -> None:
        _, told = await port.post("/replicas/drain?replica=10.0.0.2:1")
        assert [view["pool"] for view in told] == ["p", "q"]
        _, told = await port.post("/replicas/undrain?replica=10.0.0.2:1&pool=q")
        assert [view["pool"] for view in told] == ["q"]
        assert port.told == [*(DrainAsked(p, "10.0.0.2:1") for p in "pq"), DrainEnded("q", "10.0.0.2:1")]

    async def test_an_address_is_every_rank_behind_it_and_a_name_with_a_rank_is_one(self, port: Port) -> None:
        port.router.learn(Reset("q", expanded((Replica("10.0.0.3:1"), Replica("10.0.0.3:11")), 2)), 1.0)
        _, told = await port.post("/replicas/drain?replica=10.0.0.3:1&within_s=9")
        assert [(v["replica"], v["state"]) for v in told] == [(f"10.0.0.3:1/{r}", "draining") for r in (0, 1)]
        _, told = await port.post("/replicas/undrain?replica=10.0.0.3:1/1")
        assert [v["replica"] for v in told] == ["10.0.0.3:1/1"]
        assert port.told == [
            *(DrainAsked("q", f"10.0.0.3:1/{r}", 9.0) for r in (0, 1)),
            DrainEnded("q", "10.0.0.3:1/1"),
        ]
        assert (await port.post("/replicas/drain?replica=10.0.0.3:1/2"))[0] == 404

    @pytest.mark.parametrize(
        ("query", "status", "error"),
        [
            ("replica=10.0.0.9:1", 404, "no replica '10.0.0.9:1' in any pool; GET /debug/replicas lists them"),
            ("replica=10.0.0.1:1&pool=q", 404, "no replica '10.0.0.1:1' in a pool 'q'; GET /debug/replicas lists them"),
            ("", 400, "replica is missing; add ?replica=ip:port"),
            *(
                (f"replica=10.0.0.1:1&within_s={n}", 400, f"within_s must be a number of seconds, 0 or more, not {n!r}")
                for n in ("soon", "-1", "nan", "inf", "")
            ),
        ],
    )
    async def test_what_is_wrong_is_named_and_nothing_learned(
        self, port: Port, query: str, status: int, error: str
    ) -> None:
        assert await port.post(f"/replicas/drain?{query}") == (status, {"error": error})
        assert port.told == []

    @pytest.mark.parametrize("path", ["/replicas/drain", "/replicas/undrain"])
    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9003", ""])
    async def test_a_browser_is_refused_whatever_page_it_shows(self, port: Port, path: str, origin: str) -> None:
        status, answer = await port.post(f"{path}?replica=10.0.0.1:1", headers={"Origin": origin})
        assert (status, answer) == (403, {"error": "not for browsers; use curl, or extproc drain"})
        assert port.told == []

    @pytest.mark.parametrize("path", ["/replicas/drain", "/replicas/undrain"])
    async def test_a_get_changes_nothing(self, port: Port, path: str) -> None:
        assert (await port.client.get(f"{path}?replica=10.0.0.1:1")).status == 405
        assert port.told == []
