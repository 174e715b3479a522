"""Simulated replicas that prefill for others, and what travels between them."""

from __future__ import annotations

from statistics import fmean

import pytest

from extproc.config import ConfigError
from extproc.core.settings import DisaggregationSettings
from extproc.core.types import End
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.disaggregation import Link, Links
from extproc.sim.engine import Engine, EngineConfig, EngineRequest
from extproc.sim.fleet_spec import Group, disaggregation, nodes
from extproc.sim.incidents import checked, incident
from extproc.sim.sidecar import Wiring
from extproc.sim.traces import Generate, Trace, Turn, generate

LINK = Link()
FORCED = DisaggregationSettings(local_prefill=False)
TRACE = generate(Generate(sessions=40, sessions_per_s=4.0), 1)
PREFILL, DECODE = "10.0.0.1:8000", "10.0.0.2:8000"


def cluster(
    trace: Trace, *roles: str, incidents: tuple[str, ...] = (), link: Link = LINK, **changes: object
) -> Cluster:
    groups = [Group(role=role) for role in roles]  # type: ignore[arg-type]
    fleet = nodes(groups, "8b", 64, 0.002)
    wiring = Wiring(disaggregation=FORCED)
    befall = checked(map(incident, incidents), len(fleet))
    return Cluster(Scenario(trace, fleet, wiring=wiring, link=link, incidents=befall, **changes), "predicted")  # type: ignore[arg-type]


def run(trace: Trace, *roles: str, **changes: object) -> Result:
    return cluster(trace, *roles, **changes).run()  # type: ignore[arg-type]


def one(prompt: int = 6400, output: int = 20) -> Trace:
    return Trace("one", 64, (Turn(prompt, output, 0.0),))


# --- the engine -------------------------------------------------------------------------------------------------------


def first_step(request: EngineRequest) -> tuple[Engine, list[tuple[int, int]]]:
    config = EngineConfig(nodes([Group()], "8b", 16, 0.0)[0].engine.step_time, async_scheduling=False)
    engine = Engine(config)
    assert engine.add(request) is None
    step = engine.start_step()
    assert step is not None
    return engine, step.chunks


def test_of_a_prompt_that_was_brought_only_the_last_token_is_computed() -> None:
    engine, chunks = first_step(EngineRequest(1, 1000, 10, range(62), brought_tokens=1000))
    assert chunks == [(1, 999)]
    engine.check()
    assert engine.pool.used == 63


def test_a_part_that_was_brought_is_not_computed_again() -> None:
    assert first_step(EngineRequest(1, 1000, 10, range(62), brought_tokens=600))[1] == [(400, 600)]


def test_what_was_brought_is_cached_like_any() -> None:
    engine, _ = first_step(EngineRequest(1, 1000, 10, range(62), brought_tokens=1000))
    assert engine.cached_tokens(range(62), 1000) == 62 * 16
    assert (engine.counters.prefix_queries, engine.counters.prefix_hits) == (1000, 0)


# --- the way ----------------------------------------------------------------------------------------------------------


def test_transfers_of_one_replica_follow_each_other() -> None:
    links = Links(Link(bytes_per_token=1.0, bandwidth_bytes_per_s=100.0, latency_s=0.5))
    assert links.arrives_at("a", 100, 1.0) == 2.5
    assert links.arrives_at("a", 100, 1.0) == 3.5
    assert links.arrives_at("b", 100, 1.0) == 2.5
    assert links.arrives_at("a", 0, 1.0) == 1.0


def test_the_first_token_waits_for_prefill_and_transfer() -> None:
    near = run(one(), "prefill", "decode", link=Link(latency_s=0.0)).served[0]
    far = run(one(), "prefill", "decode", link=Link(latency_s=2.0)).served[0]
    assert near.ttft_s is not None
    assert far.ttft_s is not None
    assert far.ttft_s - near.ttft_s == pytest.approx(2.0, abs=0.02)
    assert near.reason == far.reason == "split"


def test_each_replica_does_its_part() -> None:
    result = run(one(), "prefill", "decode")
    prefill, decode = (node.totals for node in result.nodes)
    assert (prefill.generated_tokens, decode.generated_tokens) == (1, 20)
    assert result.served[0].replica == DECODE
    assert result.served[0].cached_tokens == 0


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [("prefill", "decode", "decode"), ("prefill", "both"), ("both", "decode", "both")])
def test_every_request_ends_once_and_the_books_balance(roles: tuple[str, ...]) -> None:
    result = run(TRACE, *roles)
    assert {s.end for s in result.served} == {End.OK}
    for served in result.served:
        assert served.output_tokens == TRACE.turns[served.turn].output_tokens


@pytest.mark.parametrize("what", ["3:1:dies", "3:2:dies", "3:1:hangs", "3:1:errors", "3:1:slows=4", "3:1:drains"])
def test_whatever_befalls_them(what: str) -> None:
    result = run(TRACE, "prefill", "decode", "prefill", "decode", incidents=(what,))
    assert len(result.served) == len(TRACE.turns)
    assert sum(s.end is End.OK for s in result.served) > 0.8 * len(TRACE.turns)


def test_what_slow_links_cost_is_learned() -> None:
    slow = Link(bandwidth_bytes_per_s=FORCED.bandwidth_bytes_per_s / 8)
    found = cluster(TRACE, "prefill", "prefill", "decode", "decode", link=slow)
    served = [s for s in found.run().served if s.ttft_s is not None]
    served.sort(key=lambda s: s.arrived_s)
    off = [s.predicted_ttft_s / s.ttft_s for s in served if s.predicted_ttft_s and s.ttft_s]
    assert fmean(off[:4]) < 0.6
    assert 0.8 < fmean(off[-60:]) < 1.25


def test_roles_of_a_fleet() -> None:
    assert disaggregation([Group()], "8b") is None
    split = disaggregation([Group(role="prefill"), Group(role="decode")], "70b")
    assert split is not None
    assert split.kv_bytes_per_token == pytest.approx(327_680)
    with pytest.raises(ConfigError, match="nobody answers"):
        disaggregation([Group(role="prefill")], "8b")
    assert nodes([Group(role="decode"), Group()], "8b", 64, 0.0)[0].replica.labels["role"] == "decode"
    assert "role" not in nodes([Group()], "8b", 64, 0.0)[0].replica.labels
