"""What simulated replicas tell of their caches: all of it, in order, late, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.cli import main
from extproc.core.prefix.exact import UNIT, ExactIndex, Ignored
from extproc.core.types import BlocksRemoved, BlocksStored, CacheChanged, CacheCleared, CacheUnknown, End, PrefixSource
from extproc.sim.blocks import Stored
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.engine import Engine, EngineConfig, EngineRequest
from extproc.sim.fleet_spec import Group, nodes
from extproc.sim.incidents import checked, incident
from extproc.sim.kv_events import CacheFact, Events, Telling, token_blocks
from extproc.sim.sidecar import NO_QUEUE, POOL, Wiring
from extproc.sim.timeline import Timeline
from extproc.sim.traces import Generate, Trace, generate
from tests.sim.test_cluster_node import STEP

REPLICA = "10.0.0.1:8000"
TRACE = generate(Generate(sessions=60, sessions_per_s=8.0, block_size=UNIT, think_s=1.0), 1)


class Heard:
    """One replica's telling, and all that came of it."""

    def __init__(self, size: int = UNIT, **how: float) -> None:
        self.timeline = Timeline()
        self.facts: list[tuple[float, CacheFact]] = []
        self.index = ExactIndex()
        self.telling = Telling(Events(**how), POOL, {REPLICA: size}, self.timeline, self._hear, 1)

    def _hear(self, fact: CacheFact) -> None:
        self.facts.append((self.timeline.now, fact))
        if isinstance(fact, CacheChanged):
            self.index.apply(fact.address, fact.changes, self.timeline.now, fact.whole)
        else:
            self.index.forget(fact.address)
        self.index.check()


# --- an engine and the index --------------------------------------------------------------------------------------------


PROMPTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=2, max_size=7).map(tuple),  # blocks
        st.integers(0, UNIT - 1),  # tokens of the prompt's tail
        st.integers(1, 40),  # tokens generated
        st.integers(0, 12),  # steps before the next
    ),
    min_size=1,
    max_size=25,
)


def hashes_of(content: Sequence[int]) -> tuple[int, ...]:
    """Chained ids of blocks with this content, small enough to make tokens of."""
    return tuple(sum(3**n * (c + 1) for n, c in enumerate(content[: i + 1])) * 8 + i for i in range(len(content)))


@settings(max_examples=150, deadline=None)
@given(PROMPTS, st.sampled_from([12, 20, 60]), st.booleans(), st.sampled_from([UNIT, 2 * UNIT]))
def test_the_index_knows_an_engines_cache_to_the_block(
    requests: list[tuple[tuple[int, ...], int, int, int]], num_blocks: int, ahead: bool, size: int
) -> None:
    """Through evictions, preemptions, copies and generated blocks; bisection included, for it must equal the engine's walk."""
    heard = Heard(size, lag_s=0.0)
    config = EngineConfig(STEP, num_blocks, size, 8 * size, 4, async_scheduling=ahead)
    engine = Engine(config, journal=True)
    for number, (content, tail, output, pause) in enumerate(requests):
        engine.add(EngineRequest(number, len(content) * size + tail, output, hashes_of((*content, *content))))
        for _ in range(pause):
            take_step(engine, heard)
    while engine.running or engine.waiting:
        take_step(engine, heard)
    for content, *_ in requests:
        wanted = hashes_of((*content, *content))
        held = len(engine.pool.leading(wanted, len(wanted)))
        assert heard.index.match(token_blocks(wanted, size).hashes).get(REPLICA, 0) == held * size // UNIT
    assert heard.index.ignored[Ignored.ORPHAN] == heard.index.ignored[Ignored.UNKNOWN] == 0


def take_step(engine: Engine, heard: Heard) -> None:
    step = engine.start_step()
    if step is not None:
        engine.finish_step(step)
        if notes := engine.notes():
            heard.telling.tell(REPLICA, notes)


def test_an_engine_that_nobody_asks_keeps_no_notes() -> None:
    engine = Engine(EngineConfig(STEP, 20, UNIT, 64, 4))
    engine.add(EngineRequest(1, 2 * UNIT, 1, (1, 2)))
    step = engine.start_step()
    assert step is not None
    engine.finish_step(step)
    assert engine.notes() == []
    assert engine.pool.journal is None


# --- telling ----------------------------------------------------------------------------------------------------------


def test_changes_come_in_their_order_and_a_new_process_begins_with_an_empty_cache() -> None:
    heard = Heard(lag_s=0.0)
    heard.telling.tell(REPLICA, [Stored((1, 2), None), 7, 8, Stored((3,), 2), 2])
    ((_, fact),) = heard.facts
    assert isinstance(fact, CacheChanged)
    kinds = [type(change) for change in fact.changes]
    assert kinds == [CacheCleared, BlocksStored, BlocksRemoved, BlocksStored, BlocksRemoved]
    assert (fact.changes[1].ids, fact.changes[2].ids) == ((1, 2), (7, 8))  # type: ignore[union-attr]
    assert fact.whole
    heard.telling.tell(REPLICA, [1])
    heard.telling.restarted(REPLICA)
    heard.telling.tell(REPLICA, [Stored((1,), None)])
    again = heard.facts[2][1]
    assert isinstance(again, CacheChanged)
    assert isinstance(again.changes[0], CacheCleared)


def test_what_is_told_comes_late() -> None:
    heard = Heard(lag_s=0.25)
    heard.timeline.at(1.0, lambda _: heard.telling.tell(REPLICA, [Stored((1,), None)]))
    while len(heard.timeline):
        heard.timeline.step()
    assert [at for at, _ in heard.facts] == [1.25]


def test_after_a_loss_the_cache_is_not_known_until_there_is_another_process() -> None:
    heard = Heard(lag_s=0.0, loss=1.0)
    heard.telling.tell(REPLICA, [Stored((1,), None)])
    assert heard.facts == [(0.0, CacheUnknown(POOL, REPLICA))]
    heard.telling._events = Events(0.0)
    heard.telling.tell(REPLICA, [Stored((2,), None)])
    assert not heard.index.knows(REPLICA)
    heard.telling.restarted(REPLICA)
    heard.telling.tell(REPLICA, [Stored((2,), None)])
    assert heard.index.knows(REPLICA)


@pytest.mark.parametrize("size", [8, 24])
def test_blocks_must_be_of_whole_units(size: int) -> None:
    with pytest.raises(ValueError, match=rf"a multiple of it, not of {size}"):
        Heard(size)


# --- a cluster --------------------------------------------------------------------------------------------------------


def run(
    trace: Trace = TRACE, lag_s: float | None = 0.0, kv_tokens: int = 60_000, befall: tuple[str, ...] = (), **how: Any
) -> Result:
    fleet = nodes([Group(count=3, kv_tokens=kv_tokens)], "8b", UNIT, 0.002)
    events = None if lag_s is None else Events(lag_s, how.pop("loss", 0.0))
    wiring = Wiring(queue=NO_QUEUE, events=events, log_flush_interval_s=0.0)
    incidents = checked(map(incident, befall), 3)
    return Cluster(Scenario(trace, fleet, wiring=wiring, incidents=incidents, **how), "predicted").run()


def right(result: Result) -> float:
    """Share of answers whose cached tokens were predicted to the token."""
    good = [s for s in result.served if s.end is End.OK]
    return sum(s.predicted_cached_tokens == s.cached_tokens for s in good) / len(good)


def test_with_events_hits_are_predicted_to_the_token() -> None:
    assert right(run(lag_s=None)) < 0.9
    for lag_s in (0.0, 0.002):
        result = run(lag_s=lag_s)
        assert right(result) > 0.99
        (sidecar,) = result.sidecars
        exact = sidecar.router.pools[POOL].caches.exact
        assert exact.ignored.total() == 0
        assert {s.prefix_source for s in result.served[20:]} == {PrefixSource.EXACT}


def test_without_events_nothing_is_tokenized() -> None:
    result = run(lag_s=None)
    assert {s.prefix_source for s in result.served} == {PrefixSource.APPROXIMATE}
    assert len(result.sidecars[0].router.pools[POOL].caches.exact) == 0


def test_the_later_events_come_the_less_is_right() -> None:
    assert right(run(lag_s=3.0)) < right(run(lag_s=0.0))


@pytest.mark.parametrize("lag_s", [0.0, 0.5])
def test_it_goes_on_through_restarts(lag_s: float) -> None:
    result = run(lag_s=lag_s, befall=("3:2:dies", "5:2:joins", "8:1:dies", "11:1:joins"))
    exact = result.sidecars[0].router.pools[POOL].caches.exact
    assert exact.ignored.total() == 0
    assert all(exact.knows(node.address) for node in result.nodes)
    assert right(result) > (0.97 if not lag_s else 0.6)


def test_it_goes_on_with_losses_and_several_routers() -> None:
    result = run(lag_s=0.01, loss=0.02, routers=2)
    assert {PrefixSource.APPROXIMATE, PrefixSource.EXACT} == {s.prefix_source for s in result.served}


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_takes_the_lag() -> None:
    small = ["simulate", "--generate", "sessions=20", "--replica", "count=2", "--policy", "predicted"]
    result = CliRunner().invoke(main, [*small, "--events", "0.01", "--events-loss", "0.1"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, [*small, "--events", "0", "--block-size", "8"])
    assert "--events tells of blocks of 16 tokens or a multiple of it; --block-size is 8" in result.output
    assert result.exit_code == 1


def test_equal_ids_have_equal_tokens_and_others_do_not() -> None:
    rng = Random(1)
    ids = [rng.randrange(1 << 50) for _ in range(50)]
    whole = token_blocks(ids, 64).hashes
    assert whole[: 40 * 4] == token_blocks(ids[:40], 64).hashes
    assert len(set(whole)) == len(whole) == 200
