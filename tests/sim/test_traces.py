"""Traces: each format, detection, and what is generated from a seed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from extproc.sim.traces import Generate, Starts, Trace, TraceError, Turn, generate, load

AT_ONCE = Starts(sessions_per_s=1e9)


def written(directory: Path, *rows: object) -> Path:
    path = directory / "trace"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def mooncake(at_ms: int = 0, prompt: int = 1100, output: int = 5, ids: object = (0, 1, 2)) -> dict[str, object]:
    return {"timestamp": at_ms, "input_length": prompt, "output_length": output, "hash_ids": ids}


def agentic(
    at: float, think: float | None, session: str = "a", depth: int = 0, answer: float | None = 1.0
) -> dict[str, object]:
    row = {"session": session, "depth": depth, "t": at, "in": 200, "out": 7, "type": "n"}
    return row | {"think": think, "api": answer, "h": [[1, 3]]}


def waits(trace: Trace) -> list[tuple[int | None, float]]:
    """What each turn waits for: the turn, and the pause after it in whole tenths."""
    return [(t.after, round(t.delay_s, 1)) for t in trace.turns]


# --- formats ----------------------------------------------------------------------------------------------------------


def test_mooncake_starts_by_the_clock_and_leaves_the_partial_block_out(tmp_path: Path) -> None:
    trace = load(written(tmp_path, mooncake(), mooncake(2500, 1024, 9, [0, 7])))
    assert (trace.name, trace.block_size) == ("mooncake", 512)
    assert trace.turns == (Turn(1100, 5, 0.0, runs=((0, 2),)), Turn(1024, 9, 2.5, runs=((0, 1), (7, 1))))


def test_azure_knows_times_and_lengths_alone(tmp_path: Path) -> None:
    rows = ("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:16:00,5,0")
    trace = load(written(tmp_path, *rows))
    assert [(t.prompt_tokens, t.output_tokens, t.runs) for t in trace.turns] == [(374, 44, ()), (5, 1, ())]
    assert trace.turns[1].delay_s == pytest.approx(13.31941)


def test_a_session_goes_on_after_each_answer_and_shares_nothing_with_others(tmp_path: Path) -> None:
    rows = (agentic(0, 0), agentic(9, 8), agentic(0, 0, "b"))
    trace = load(written(tmp_path, *rows), starts=AT_ONCE)
    assert waits(trace) == [(None, 0), (0, 8), (None, 0)]
    assert trace.turns[0].hashes() == trace.turns[1].hashes()
    assert not set(trace.turns[0].hashes()) & set(trace.turns[2].hashes())
    assert [t.session for t in trace.turns] == ["a", "a", "b"]


def test_a_turn_waits_for_the_sub_agent_that_was_done_within_its_pause(tmp_path: Path) -> None:
    sub = (agentic(0, 0, depth=1), agentic(5, 4, depth=1, answer=2.0))
    trace = load(written(tmp_path, agentic(0, 0), *sub, agentic(31, 30)), starts=AT_ONCE)
    assert waits(trace) == [(None, 0), (0, 0), (1, 4), (2, 23)]


def test_a_turn_does_not_wait_for_a_sub_agent_in_the_background(tmp_path: Path) -> None:
    sub = (agentic(0, 0, depth=1), agentic(50, 49, depth=1))
    trace = load(written(tmp_path, agentic(0, 0), *sub, agentic(11, 10), agentic(15, 3)), starts=AT_ONCE)
    assert waits(trace) == [(None, 0), (0, 0), (1, 49), (0, 10), (3, 3)]


def test_sub_agents_of_one_turn_run_beside_each_other(tmp_path: Path) -> None:
    subs = (agentic(0, 0, depth=1), agentic(6, 5, depth=1), agentic(0, 0, depth=1))
    trace = load(written(tmp_path, agentic(0, 0), *subs, agentic(21, 20)), starts=AT_ONCE)
    assert waits(trace) == [(None, 0), (0, 0), (1, 5), (0, 0), (2, 13)]


def test_a_pause_that_was_not_recorded_follows_from_the_times(tmp_path: Path) -> None:
    trace = load(written(tmp_path, agentic(0, 0, answer=2.0), agentic(9, None)), starts=AT_ONCE)
    assert waits(trace) == [(None, 0), (0, 7)]


def test_sessions_can_be_few_and_their_pauses_short(tmp_path: Path) -> None:
    path = written(tmp_path, agentic(0, 0), agentic(500, 499), agentic(0, 0, "b"), agentic(0, 0, "c"))
    trace = load(path, starts=Starts(sessions_per_s=0.5, sessions=2, max_pause_s=60))
    assert [t.session for t in trace.turns] == ["a", "a", "b"]
    assert trace.turns[1].delay_s == 60
    assert trace.turns[2].delay_s > 0
    assert trace == load(path, starts=Starts(sessions_per_s=0.5, sessions=2, max_pause_s=60))


@pytest.mark.parametrize("row", [mooncake(), agentic(0, 0)], ids=["mooncake", "agentic"])
def test_a_line_may_have_a_priority(row: dict[str, object], tmp_path: Path) -> None:
    trace = load(written(tmp_path, row, row | {"priority": 3}, row | {"priority": -1}), starts=AT_ONCE)
    assert [t.priority for t in trace.turns] == [0, 3, -1]


# --- what cannot be read ----------------------------------------------------------------------------------------------


def test_a_missing_file_is_answered_with_where_to_get_one() -> None:
    with pytest.raises(TraceError) as error:
        load(Path("/nowhere/trace"))
    for source in ("kvcache-ai/Mooncake", "callanjfox/kv-cache-tester", "Azure/AzurePublicDataset", "--generate"):
        assert source in str(error.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["hello"], "none of the known formats (mooncake, agentic, azure)"),
        ([], "none of the known formats"),
        ([mooncake(), "{"], ":2: not JSON"),
        ([mooncake(), "[]"], ":2: not a JSON object"),
        ([mooncake(), {"timestamp": 1}], ":2: 'input_length' is None, not a number"),
        ([mooncake(ids=["x"])], ":1: 'hash_ids' is no list of whole numbers"),
        ([agentic(0, 0) | {"h": [[1]]}], ":1: 'h' is no list of [start, length]"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "soon,1,1"], ":2: TIMESTAMP 'soon' is no date and time"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46,x,1"], ":2: ContextTokens 'x' is no whole"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, rows: list[object], said: str) -> None:
    with pytest.raises(TraceError) as error:
        load(written(tmp_path, *rows))
    assert said in str(error.value)


# --- changes ----------------------------------------------------------------------------------------------------------


def test_faster_moves_arrivals_and_leaves_pauses_alone() -> None:
    trace = Trace("t", 64, (Turn(1, 1, 8.0), Turn(1, 1, 8.0, after=0))).faster(4)
    assert waits(trace) == [(None, 2), (0, 8)]


def test_blocks_split_into_smaller_ones() -> None:
    assert Turn(1, 1, 0.0, runs=((5, 1), (8, 1))).hashes(3) == (15, 16, 17, 24, 25, 26)


# --- generated --------------------------------------------------------------------------------------------------------

SPEC = Generate(sessions=200, tenants=5)


def test_the_seed_decides() -> None:
    assert generate(SPEC, 1) == generate(SPEC, 1)
    assert generate(SPEC, 1) != generate(SPEC, 2)


def test_each_turn_repeats_what_was_said_and_answered_before() -> None:
    turns = generate(SPEC, 1).turns
    later = [t for t in turns if t.after is not None]
    assert len(later) > 200
    for turn in later:
        assert turn.after is not None
        before = turns[turn.after]
        assert turn.session == before.session
        assert turn.prompt_tokens > before.prompt_tokens + before.output_tokens
        assert turn.hashes()[: len(before.hashes())] == before.hashes()


def test_tenants_share_nothing_and_the_first_is_the_busiest() -> None:
    blocks: dict[str | None, set[int]] = defaultdict(set)
    sessions: dict[str | None, set[str | None]] = defaultdict(set)
    for turn in generate(SPEC, 1).turns:
        blocks[turn.tenant].update(turn.hashes())
        sessions[turn.tenant].add(turn.session)
    assert len(blocks) == 5
    assert sum(len(ids) for ids in blocks.values()) == len(set[int]().union(*blocks.values()))
    assert max(sessions, key=lambda t: len(sessions[t])) == "t0"


def test_siblings_begin_together_and_share_more_than_the_system_prompt() -> None:
    spec = Generate(sessions=32, siblings=8, burst_share=1.0, burst_s=0.1, tenants=1, groups=1)
    firsts = [t for t in generate(spec, 1).turns if t.after is None]
    burst, other = firsts[:8], firsts[8]
    assert max(t.delay_s for t in burst) <= 0.1
    common = set.intersection(*(set(t.hashes()) for t in burst))
    assert len(common) > len(common & set(other.hashes())) > 0


def test_no_prompt_passes_the_limit_but_a_first_one() -> None:
    turns = generate(Generate(sessions=50, turns=50, max_tokens=3000), 1).turns
    assert max(t.prompt_tokens for t in turns if t.after is not None) <= 3000


def test_a_generator_is_described_in_one_text() -> None:
    assert Generate.from_text("sessions=7, think_s=0.5") == Generate(sessions=7, think_s=0.5)
    assert Generate.from_text("") == Generate()
    with pytest.raises(TraceError, match=r"(?s)--generate: sessions.*--generate: nonsense"):
        Generate.from_text("sessions=many,nonsense=1")
