"""The parts of the run that need no fleet: clients, wire, bootstrap, page."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from extproc.envoy.names import LOG_CLUSTER
from extproc.sim.spec import BackendSpec
from tests.chaos import load
from tests.chaos.faults import FAULTS
from tests.chaos.page import page
from tests.chaos.replica import Breakable
from tests.chaos.rows import Row, Sent
from tests.chaos.run import Results, envoys_ends
from tests.chaos.settings import Settings
from tests.chaos.stack import with_log_through
from tests.support.backend import Backend, Handler, stream
from tests.support.ports import free_port
from tests.support.relay import Relay
from tests.support.waiting import until

ROOT = Path(__file__).parent.parent.parent
DELTA = b'data: {"choices":[{"delta":{"content":"Hi"}}]}\n\n'
DONE = b"data: [DONE]\n\n"

# --- clients ------------------------------------------------------------------------------------------------------------


def whole(reason: str = "stop") -> bytes:
    return json.dumps({"choices": [{"message": {"content": "Hi"}, "finish_reason": reason}]}).encode()


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (whole(), None),
        (whole("length"), None),
        (whole("abort"), "aborted by the engine"),
        (b'{"choices":[]}', "no choices"),
        (b'{"error":{}}', "no chat completion: b'{\"error\":{}}'"),
        (b"<html>", "no chat completion: b'<html>'"),
        (b"[]", "no chat completion: b'[]'"),
    ],
)
def test_a_whole_answer_is_read(body: bytes, wrong: str | None) -> None:
    assert load.mistake(body) == wrong


async def one(handler: Handler, leaves_after_s: float | None = None, **settings: Any) -> Sent:
    """What the client has to say of one request."""
    asked = Settings(stream_share=1.0, **settings)
    async with Backend(handler) as replica:
        clients = load.Load(f"http://{replica.address}", asked)
        clients.send(replace(load.Requests(asked).steady(), leaves_after_s=leaves_after_s))
        await clients.finished()
        await clients.close()
        [received] = replica.received
        assert received.headers["x-request-id"] == clients.sent[0].id
        return clients.sent[0]


def answers(*pieces: bytes, gap_s: float = 0.0) -> Handler:
    return lambda request: stream(request, pieces, gap_s=gap_s)


async def test_a_stream_is_whole_with_its_done() -> None:
    sent = await one(answers(DELTA, DONE))
    assert sent.well
    assert sent.ttft_s is not None
    assert (await one(answers(DELTA))).error == "broke off before [DONE]"
    assert (await one(answers(b'data: {"error":{"code":500}}\n\n', DONE))).error


async def test_patience_ends() -> None:
    sent = await one(answers(DELTA, DONE, gap_s=5), request_timeout_s=0.1)
    assert (sent.status, sent.error, sent.left) == (200, "no end within 0.1 s", False)


async def test_a_client_that_leaves_says_so() -> None:
    sent = await one(answers(DELTA, DONE, gap_s=5), 0.2)
    assert sent.left


async def test_a_client_that_would_have_left_complains_of_an_error_before_that() -> None:
    async def fails(_: web.Request) -> web.Response:
        return web.Response(status=500, text="broken")

    sent = await one(fails, 20.0)
    assert (sent.status, sent.error, sent.left) == (500, "broken", False)


async def test_a_closed_port_is_an_error_without_status() -> None:
    clients = load.Load(f"http://127.0.0.1:{free_port()}", Settings())
    clients.send(load.Requests(Settings()).steady())
    await clients.finished()
    await clients.close()
    assert clients.sent[0].status is None
    assert "Cannot connect" in (clients.sent[0].error or "")


async def test_arrivals_wait_for_nobody_but_are_bounded() -> None:
    async with Backend(answers(DELTA, gap_s=60)) as replica:
        clients = load.Load(f"http://{replica.address}", Settings(max_open=5))
        requests = load.Requests(Settings())
        async with clients.at(1000.0, requests.steady):
            await until(lambda: clients.open == 5)
            clients.paused = True
            await asyncio.sleep(0.02)
        assert (clients.open, len(clients.sent)) == (5, 5)
        await clients.close()


def test_the_same_seed_asks_the_same() -> None:
    first, again, other = (load.Requests(Settings(seed=seed)) for seed in (1, 1, 2))
    assert [first.steady() for _ in range(5)] == [again.steady() for _ in range(5)]
    assert first.steady() != other.steady()


def test_some_clients_leave_before_they_have_sent_all() -> None:
    requests = load.Requests(Settings())
    vanishing = [requests.vanishing() for _ in range(40)]
    assert all(ask.leaves_after_s is not None and ask.leaves_after_s < 1 for ask in vanishing)
    assert {len(ask.body) > 2**20 for ask in vanishing} == {True, False}


def test_most_share_a_prefix_and_some_share_none() -> None:
    requests = load.Requests(Settings(alone_share=0.25))
    heads = [json.loads(requests.steady().body)["messages"][0]["content"] for _ in range(200)]
    assert 30 < sum(heads.count(head) == 1 for head in heads) < 70


def test_a_large_body_is_as_large_as_said() -> None:
    assert 10 * 2**20 < len(load.Requests(Settings()).large().body) < 11 * 2**20


# --- what they go through -----------------------------------------------------------------------------------------------


async def test_a_wire_breaks_and_is_mended() -> None:
    async with Backend() as replica, Relay(replica.address) as wire, aiohttp.ClientSession() as http:

        async def through() -> bool:
            try:
                async with http.get(f"http://127.0.0.1:{wire.port}/") as response:
                    return await response.text() == replica.address
            except aiohttp.ClientError:
                return False

        assert await through()
        await wire.cut()
        assert not await through()
        await wire.mend()
        assert await through()


async def test_a_cut_breaks_what_runs_through_it() -> None:
    handler = answers(DELTA, DONE, gap_s=30)
    async with Backend(handler) as replica, Relay(replica.address) as wire, aiohttp.ClientSession() as http:
        response = await http.get(f"http://127.0.0.1:{wire.port}/")
        await response.content.readany()
        await wire.cut()
        with pytest.raises(aiohttp.ClientError):
            await response.read()


def test_the_log_goes_through_another_port_and_the_rest_does_not() -> None:
    rendered = yaml.safe_load((ROOT / "envoy" / "single.yaml").read_text())
    text = yaml.safe_dump(with_log_through(rendered, 4711))
    clusters = {c["name"]: c for c in rendered["static_resources"]["clusters"]}
    assert "port_value: 4711" in yaml.safe_dump(clusters[LOG_CLUSTER])
    assert "port_value: 4711" not in yaml.safe_dump(clusters["extproc"])
    assert text.count(f"cluster_name: {LOG_CLUSTER}\n") == 2  # the log and the cluster itself
    assert text.count("cluster_name: extproc\n") == 2  # ext_proc and the cluster itself
    with pytest.raises(ValueError, match="no gRPC access log"):
        with_log_through({"static_resources": {"clusters": []}}, 4711)


async def test_a_replica_does_as_its_door_says() -> None:
    door = free_port()
    body = {"model": "sim", "prompt": "Hello", "max_tokens": 1}
    async with Breakable(BackendSpec(port=free_port())) as replica, aiohttp.ClientSession() as http:
        serving = asyncio.create_task(replica.serve_door(door))

        async def tell(**state: Any) -> int:
            async with http.post(f"http://127.0.0.1:{door}/set", json=state) as response:
                return response.status

        async def complete() -> int:
            async with http.post(f"http://{replica.address}/v1/completions", json=body) as response:
                await response.read()
                return response.status

        async def opened() -> bool:
            try:
                return await tell() == 200
            except aiohttp.ClientError:
                return False

        await until(opened)
        statuses = [await complete()]
        for state in ({"draining": True}, {"draining": False, "fail_with": 503}, {"fail_with": None}):
            assert await tell(**state) == 200
            statuses.append(await complete())
        assert statuses == [200, 500, 503, 200]
        assert await tell(metrics_garbage=True) == 200
        async with http.get(f"http://{replica.address}/metrics") as response:
            assert b"<html>" in await response.read()
        async with http.get(f"http://127.0.0.1:{door}/accepted") as response:
            assert len(await response.json()) == 4
        assert await tell(engine=None) == 400
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


# --- what comes out -----------------------------------------------------------------------------------------------------


def test_the_last_word_of_envoy_counts(tmp_path: Path) -> None:
    def entry(i: str, flight: str | None, attempts: int | None = 1) -> str:
        told = {"request_id": i, "flight": flight, "details": "via_upstream", "flags": "-", "attempts": attempts}
        return json.dumps(told)

    log = tmp_path / "access.log"
    lines = [entry("a", None), entry("a", "f1"), entry("b", None), entry("c", None, None)]
    log.write_text("\n".join([*lines, '{"request_id": "d", "fl']))
    ends = envoys_ends(log)
    # c got its answer from extproc, or left before there was any.
    assert {i: end.without_extproc for i, end in ends.items()} == {"a": False, "b": True, "c": False}
    assert (ends["a"].flight, ends["b"].how) == ("f1", "via_upstream, -, 1 attempts")


def test_the_page_has_every_row_and_what_was_missed() -> None:
    results = Results(Settings(), [Row(name, 100, 3, 1, 2, 0.5, None, 1.25, 0) for name in FAULTS])
    texts = {fault.name: fault.text for fault in FAULTS.values()}
    met = page(results.view(), texts)
    assert all(f"| {name} | 100 | 3 (1) | 2 | 0.50 s |  | 1.25 s | 0 |" in met for name in FAULTS)
    assert all(f"| {name} | {text} |" in met and text for name, text in texts.items())
    assert "All targets were met" in met
    results.missed.append("replica hangs: 3 avoidable errors")
    assert "* replica hangs: 3 avoidable errors\n" in page(results.view(), texts)
    assert "met in this run" not in page(results.view(), texts)


def test_the_figures_have_the_columns_that_others_read() -> None:
    [row] = Results(Settings(), [Row("f", 1, 0, 0, 0, None, None, None, 0)]).view()["rows"]
    assert list(row) == [
        "fault", "sent", "errors", "unavoidable", "refused", "detect_s", "recover_s", "worst_ttft_s", "leftover",
    ]  # fmt: skip
    assert json.loads(json.dumps(asdict(Settings())))["replicas"] == 6


def test_every_fault_of_the_issue_has_a_row() -> None:
    assert len(FAULTS) >= 20
