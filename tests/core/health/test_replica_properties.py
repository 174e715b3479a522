"""What holds whatever is seen of a replica, in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.fleet import Fleet, Member
from extproc.core.health.replica import Health
from extproc.core.health.states import Reason, State
from extproc.core.types import Add, Probe, Remove, Replica, Reset, Sample, ScrapeFailure
from tests.core.support import POOL, address, put, replicas

from .watch import S, Watched

Evidence = Callable[[Health, float], Any]

LEGAL: Final[dict[State, set[Reason]]] = {
    State.STARTING: {Reason.JOINED, Reason.RESTARTED},
    State.READY: {Reason.ANSWERS},
    State.SLOW_STARTING: {Reason.JOINED, Reason.RESTARTED, Reason.ANSWERS},
    State.SUSPECT: {Reason.REQUEST_FAILED, Reason.SILENT, Reason.CHECKS_FAILED, Reason.NO_MODEL},
    State.OPEN: {
        Reason.REFUSED,
        Reason.ASLEEP,
        Reason.CHECKS_FAILED,
        Reason.NO_MODEL,
        Reason.REQUESTS_FAILED,
        Reason.FAILURE_RATE,
        Reason.SILENT,
    },
    State.PROBATION: {Reason.TRIAL},
    State.DRAINING: {Reason.ASKED, Reason.NOTICE, Reason.SHUTTING_DOWN},
    State.GONE: {Reason.LEFT, Reason.NOTICE},
}

flags = st.booleans()
ages = st.floats(0.0, 20.0)
evidence: st.SearchStrategy[Evidence] = st.one_of(
    st.just(Health.heard),
    st.just(Health.refused),
    st.just(lambda h, now: h.heard(now, other=True)),
    st.just(Health.worked),
    st.just(Health.drain_ended),
    st.builds(lambda probe, ok: lambda h, now: h.probed(probe, ok, now), st.sampled_from(Probe), flags),
    st.builds(lambda asleep: lambda h, now: h.slept(asleep, now), flags),
    st.builds(lambda age: lambda h, now: h.succeeded(now - age, now), ages),
    st.builds(lambda age, working: lambda h, now: h.failed(now - age, now, working), ages, flags),
    st.just(lambda h, now: h.failed(now, now)),
    st.builds(lambda silence: lambda h, now: h.silent_for(silence, now), ages),
    st.builds(lambda within: lambda h, now: h.drain(within, now), st.one_of(st.none(), ages)),
    st.builds(lambda drain: lambda h, now: h.listed(drain, now), flags),
    st.builds(lambda oldest: lambda h, now: h.expire(now, oldest), st.one_of(st.none(), ages)),
    st.builds(lambda name: lambda h, now: h.tried(name, now), st.sampled_from("ab")),
    st.builds(lambda name: lambda h, _: h.released(name), st.sampled_from("ab")),
)
scripts = st.lists(st.tuples(evidence, st.floats(0.0, 5.0)), max_size=60)


def played(script: list[tuple[Evidence, float]], scraped: bool, slow_from: float) -> tuple[Watched, float]:
    made, now = Watched(scraped=scraped, slow_from=slow_from), 0.0
    for seen, wait in script:
        now += wait
        seen(made.health, now)
        check(made, now)
    return made, now


def check(made: Watched, now: float) -> None:
    state, reason, since = made.health.why(now)
    assert reason in LEGAL[state]
    assert made.health.state(now) is state
    assert since <= now
    assert 0.0 <= made.health.share(now) <= 1.0
    assert made.health.trial is None or made.last is State.PROBATION


@settings(max_examples=300, deadline=None)
@given(script=scripts, scraped=flags, slow_from=st.sampled_from([0.0, 10.0]))
def test_the_state_is_always_legal_and_each_change_told_once(
    script: list[tuple[Evidence, float]], scraped: bool, slow_from: float
) -> None:
    """That transitions join up, and none goes nowhere, is checked by `Watched` as they are told."""
    made, now = played(script, scraped, slow_from)
    made.health.expire(now, None)
    assert made.last is made.health.state(now), "all that has changed was told"
    made.news()
    made.health.expire(now, None)
    assert made.news() == [], "and nothing twice"


@settings(max_examples=300, deadline=None)
@given(script=scripts, scraped=flags, wait=st.floats(0.0, 2 * S.max_open_s))
def test_successes_in_a_row_always_bring_it_back(
    script: list[tuple[Evidence, float]], scraped: bool, wait: float
) -> None:
    made, now = played(script, scraped, 0.0)
    now += wait
    made.health.listed(False, now)
    made.health.drain_ended(now)
    made.health.expire(now, None)  # those that held it are gone
    now += 2 * S.max_open_s
    for _ in range(S.successes):
        now += 0.1
        made.health.heard(now)
        made.health.slept(False, now)
        for probe in Probe:
            made.health.probed(probe, ok=True, now=now)
        made.health.worked(now)
    assert made.health.state(now) in (State.READY, State.SLOW_STARTING)
    made.health.expire(now + S.slow_start_s, None)
    assert made.last is State.READY


@settings(max_examples=200, deadline=None)
@given(script=scripts, scraped=flags, later=st.floats(0.0, 100.0))
def test_reading_ahead_is_what_will_be_told(script: list[tuple[Evidence, float]], scraped: bool, later: float) -> None:
    """`state` and `expire` agree, and reading changes nothing."""
    made, now = played(script, scraped, 0.0)
    made.news()
    foreseen = made.health.state(now + later)
    assert made.news() == []
    if not made.health.waits:  # else the end of its work, which `expire` is told of, comes in between
        made.health.expire(now + later, None)
        assert made.last is foreseen


# --- of several -------------------------------------------------------------------------------------------------------

Deed = Callable[[Member, float], Any]
deeds: st.SearchStrategy[Deed] = st.one_of(
    st.builds(lambda seen: lambda m, now: seen(m.health, now), evidence),
    st.builds(lambda why: lambda m, now: m.not_sampled(why, now), st.sampled_from(ScrapeFailure)),
    st.builds(lambda n: lambda m, now: m.sampled(Sample(generated_tokens=n), now), st.floats(0.0, 10.0)),
    st.builds(lambda: lambda m, now: put(m, f"{now}-{len(m.load)}", now)),
    st.builds(lambda: lambda m, now: m.expire(now)),
)
MEMBERS = 4


@settings(max_examples=200, deadline=None)
@given(
    script=st.lists(st.tuples(st.integers(0, MEMBERS - 1), deeds, st.floats(0.0, 5.0)), max_size=60),
    scraped=flags,
    subset=st.one_of(st.none(), st.frozensets(st.integers(0, MEMBERS - 1).map(address))),
)
def test_somebody_may_be_chosen_while_anybody_is_left_and_the_gone_never_are(
    script: list[tuple[int, Deed, float]], scraped: bool, subset: frozenset[str] | None
) -> None:
    fleet, now = Fleet(scraped, health=S), 0.0
    fleet.apply(Reset(POOL, replicas(MEMBERS)), now)
    for which, deed, wait in script:
        now += wait
        deed(fleet.members[which], now)
        allowed = [m for m in fleet.members if subset is None or m.address in subset]
        chosen = fleet.candidates(now, subset)
        assert [m for m in allowed if m in chosen] == chosen, "in the order of discovery"
        assert all(m.state(now) is not State.GONE for m in chosen)
        assert bool(chosen) == any(m.state(now) is not State.GONE for m in allowed)
        assert len({m.health.passed_over(now) for m in chosen}) <= 1, "all are out, or none of them is"
        if any(m.state(now) is State.READY for m in allowed):
            assert not chosen[0].health.passed_over(now)


@given(changes=st.lists(st.tuples(st.integers(0, 3), flags, st.floats(0.0, 5.0)), max_size=30))
@settings(max_examples=50, deadline=None)
def test_who_joins_is_told_and_who_leaves(changes: list[tuple[int, bool, float]]) -> None:
    known = {address(i): State.GONE for i in range(4)}

    def hear(where: str, before: State, after: State, reason: Reason) -> None:
        assert known[where] is before
        known[where] = after

    fleet, now = Fleet(False, health=S, changed=hear), 0.0
    for which, join, wait in changes:
        now += wait
        where = address(which)
        fleet.apply(Add(POOL, Replica(where)) if join else Remove(POOL, where), now)
        fleet.expire(now)
        assert {a for a, state in known.items() if state is not State.GONE} == {m.address for m in fleet.members}
