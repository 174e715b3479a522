"""The HTTP port answers, refuses what is wrong, and changes nothing."""

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
from extproc.core.router import PoolSettings, Router
from extproc.core.types import Api, Replica, Request, Reset

CHAT = {"model": "m", "messages": [{"role": "user", "content": "What costs least?"}]}


class Port:
    """The admin application over a router of two replicas."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recorder = Recorder(10)
        self.why: str | None = None
        observers = Several(RouterMetrics(self.registry), self.recorder)
        self.router = Router([PoolSettings("p", ("m",), scraped=False)], Random(1), observers)
        self.router.learn(Reset("p", (Replica("10.0.0.1:1", {"gpu": "h100"}), Replica("10.0.0.2:1"))), 0.0)
        self.client: TestClient[Any, Any]


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    port = Port()
    admin = Admin(port.router, port.recorder, port.registry, lambda: 1.0, lambda: port.why, 10_000)
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
    first, second = await (await port.client.get("/debug/replicas")).json()
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


async def test_the_page_links_to_everything(port: Port) -> None:
    text = await (await port.client.get("/")).text()
    for path in ("/metrics", "/debug/replicas", "/debug/decisions", "/debug/explain"):
        assert path in text
