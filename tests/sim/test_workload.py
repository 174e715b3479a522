from __future__ import annotations

import json
from collections import Counter

import pytest
from pydantic import ValidationError

from extproc.sim.workload import Conversation, Lengths, Turn, Workload, sessions


def made(**changes: object) -> Workload:
    return Workload.model_validate({"sessions": 30, **changes})


def test_the_same_seed_gives_the_same_sessions() -> None:
    assert list(sessions(made(seed=7))) == list(sessions(made(seed=7)))


def test_another_seed_gives_others() -> None:
    one, other = list(sessions(made(seed=7))), list(sessions(made(seed=8)))
    assert [s.turns[0].text for s in one] != [s.turns[0].text for s in other]


def test_other_turns_leave_arrivals_and_groups_as_they_were() -> None:
    plain = list(sessions(made()))
    changed = list(sessions(made(user_tokens=Lengths(median=300, max=900), turns=9)))
    assert [(s.starts_s, s.group) for s in plain] == [(s.starts_s, s.group) for s in changed]


def test_arrivals_come_at_the_rate_asked_for() -> None:
    last = list(sessions(made(sessions=2000, sessions_per_s=5.0, turns=1)))[-1]
    assert last.starts_s == pytest.approx(400, rel=0.1)


def test_groups_share_one_system_prompt_within_the_range() -> None:
    found = list(sessions(made(system_tokens=(50, 90))))
    for group in {s.group for s in found}:
        (system,) = {s.system for s in found if s.group == group}
        assert 50 * 4 <= len(system.encode()) <= 90 * 4


def test_popular_groups_follow_zipf() -> None:
    count = Counter(s.group for s in sessions(made(sessions=4000, turns=1, groups=3, group_skew=1.0)))
    assert count[0] / count[1] == pytest.approx(2, rel=0.15)
    assert count[0] / count[2] == pytest.approx(3, rel=0.2)


def test_lengths_have_the_median_asked_for_and_never_pass_the_maximum() -> None:
    lengths = Lengths(median=100, sigma=0.8, max=300)
    drawn = sorted(len(t.text) // 4 for s in sessions(made(sessions=500, user_tokens=lengths)) for t in s.turns)
    assert drawn[len(drawn) // 2] == pytest.approx(100, rel=0.1)
    assert drawn[-1] == 300


def test_a_token_of_user_text_is_four_bytes() -> None:
    fixed = Lengths(median=25, sigma=0, max=25)
    assert {len(t.text.encode()) for s in sessions(made(user_tokens=fixed)) for t in s.turns} == {100}


def test_the_first_turn_comes_without_a_pause() -> None:
    for session in sessions(made(think_s=3.0)):
        assert session.turns[0].think_s == 0
        assert all(turn.think_s > 0 for turn in session.turns[1:])


def test_a_conversation_grows_by_what_was_really_answered() -> None:
    session = next(sessions(made()))
    chat = Conversation(session)
    chat.answered(session.turns[0], "so it is")
    body = json.loads(chat.request(session.turns[1], "m"))
    assert body["messages"] == [
        {"role": "system", "content": session.system},
        {"role": "user", "content": session.turns[0].text},
        {"role": "assistant", "content": "so it is"},
        {"role": "user", "content": session.turns[1].text},
    ]


def test_a_request_asks_for_a_stream_of_limited_length_and_not_for_usage() -> None:
    session = next(sessions(made(system_tokens=(0, 0))))
    body = json.loads(Conversation(session).request(Turn("hi", 17, 0.0), "m"))
    expected = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 17, "stream": True}
    assert body == expected


def test_a_request_that_failed_leaves_no_trace_in_the_next() -> None:
    session = next(sessions(made()))
    chat = Conversation(session)
    chat.request(session.turns[0], "m")
    assert len(json.loads(chat.request(session.turns[1], "m"))["messages"]) == 2


def test_a_range_the_wrong_way_round_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"400 to 100 is no range; write \[shortest, longest\]"):
        made(system_tokens=(400, 100))
