from __future__ import annotations

import logging

import pytest

from extproc.adapters.health_log import LINES, WINDOW_S, HealthLog
from extproc.core.health.states import Reason, State
from extproc.core.observers import HealthChanged


class Told:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "extproc.adapters.health_log")
        self._caplog = caplog
        self.now = 0.0
        self._log = HealthLog(lambda: self.now)

    def __call__(self, before: State, after: State, reason: Reason, address: str = "a") -> list[str]:
        """What is said of a change."""
        self._caplog.clear()
        self._log.health_changed(HealthChanged("p", address, before, after, reason))
        return [each.getMessage() for each in self._caplog.records if each.name == "extproc.adapters.health_log"]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    return Told(caplog)


def test_out_and_back_are_said_and_what_lies_between_is_not(told: Told) -> None:
    assert told(State.READY, State.SUSPECT, Reason.REQUEST_FAILED) == []
    assert told(State.SUSPECT, State.OPEN, Reason.REFUSED) == ["replica a of pool p is out: open (refused)"]
    assert told(State.OPEN, State.OPEN, Reason.REQUESTS_FAILED) == []
    assert told(State.OPEN, State.PROBATION, Reason.TRIAL) == []
    assert told(State.PROBATION, State.OPEN, Reason.REQUESTS_FAILED) == []
    back = told(State.OPEN, State.SLOW_STARTING, Reason.RESTARTED)
    assert back == ["replica a of pool p is back: slow_starting (restarted)"]
    assert told(State.SLOW_STARTING, State.READY, Reason.ANSWERS) == []


def test_a_member_that_leaves_is_out_and_forgotten(told: Told) -> None:
    assert told(State.GONE, State.READY, Reason.ANSWERS) == []
    assert told(State.READY, State.DRAINING, Reason.ASKED) == ["replica a of pool p is out: draining (asked)"]
    assert told(State.DRAINING, State.GONE, Reason.LEFT) == ["replica a of pool p is out: gone (left)"]
    assert told(State.GONE, State.STARTING, Reason.JOINED) == []
    assert told(State.STARTING, State.READY, Reason.ANSWERS) == []


def test_a_fleet_that_flaps_does_not_fill_the_log(told: Told) -> None:
    lines = [told(State.READY, State.OPEN, Reason.REFUSED, f"r{i}") for i in range(LINES + 20)]
    assert sum(map(len, lines)) == LINES + 1
    assert "many replicas" in lines[LINES][0]
    told.now = WINDOW_S
    assert told(State.OPEN, State.READY, Reason.ANSWERS, "r0") == ["replica r0 of pool p is back: ready (answers)"]
