"""Priorities and tenants that are put onto a trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from extproc.sim.traces import Generate, Trace, Turn, flooded, generate, prioritized
from extproc.sim.traces.marks import FLOODING, MODEST, URGENT

SESSIONS = generate(Generate(sessions=1000, turns=3), 1)
SINGLE = Trace("single", 64, tuple(Turn(100, 5, float(i), priority=-1) for i in range(1000)))


@pytest.mark.parametrize("trace", [SESSIONS, SINGLE], ids=lambda t: t.name)
def test_a_share_of_the_sessions_is_urgent_and_the_rest_stays_as_it_was(trace: Trace) -> None:
    marked = prioritized(trace, 0.2, 1)
    priority = {t.session or i: t.priority for i, t in enumerate(marked.turns)}
    assert Counter(priority.values())[URGENT] == pytest.approx(0.2 * len(priority), rel=0.2)
    assert {t.priority for t in marked.turns} == {URGENT, trace.turns[0].priority}
    assert all(t.priority == priority[t.session or i] for i, t in enumerate(marked.turns))
    assert [replace(t, priority=0) for t in marked.turns] == [replace(t, priority=0) for t in trace.turns]


def test_nobody_or_all_can_be_urgent() -> None:
    assert prioritized(SINGLE, 0.0, 1) == SINGLE
    assert {t.priority for t in prioritized(SINGLE, 1.0, 1).turns} == {URGENT}


@pytest.mark.parametrize("trace", [SESSIONS, SINGLE], ids=lambda t: t.name)
def test_one_tenant_sends_so_many_times_what_the_other_does(trace: Trace) -> None:
    tenants = {t.session or i: t.tenant for i, t in enumerate(flooded(trace, 5.0, 1).turns)}
    count = Counter(tenants.values())
    assert set(count) == {FLOODING, MODEST}
    assert count[FLOODING] / count[MODEST] == pytest.approx(5.0, rel=0.25)


def test_marks_depend_on_the_seed_and_not_on_the_speed_or_on_each_other() -> None:
    one = prioritized(SESSIONS, 0.3, 1)
    assert one == prioritized(SESSIONS, 0.3, 1)
    assert one != prioritized(SESSIONS, 0.3, 2)
    assert one.faster(3.0) == prioritized(SESSIONS.faster(3.0), 0.3, 1)
    both = flooded(one, 1.0, 1)
    assert [t.priority for t in both.turns] == [t.priority for t in one.turns]
    urgent = [t.tenant == FLOODING for t in both.turns if t.priority]
    assert 0.35 < sum(urgent) / len(urgent) < 0.65
