"""The states of a replica, and why it is in one."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Whether and how much a replica may be chosen; also a metric label."""

    STARTING = "starting"  # a member of which nothing has been heard: its model may still be loading
    READY = "ready"
    SLOW_STARTING = "slow_starting"  # new or back: its share grows
    SUSPECT = "suspect"  # the last thing heard was a failure; passed over while others are there
    OPEN = "open"  # taken out
    PROBATION = "probation"  # one request at a time on trial
    DRAINING = "draining"  # finishes what it has
    GONE = "gone"  # no member, or past the deadline of its drain


class Reason(StrEnum):
    """What brought a replica into its state; also a metric label."""

    JOINED = "joined"  # a new member
    RESTARTED = "restarted"  # another process at the same address: its cache is empty
    ANSWERS = "answers"  # checks and requests succeed
    REFUSED = "refused"  # nothing listens there
    CHECKS_FAILED = "checks_failed"
    NO_MODEL = "no_model"  # the process answers, the model is not listed
    ASLEEP = "asleep"  # by its own word (vLLM's sleep mode): what is sent there waits until it is woken
    REQUEST_FAILED = "request_failed"  # one request
    REQUESTS_FAILED = "requests_failed"  # several in a row
    FAILURE_RATE = "failure_rate"  # too large a share of them
    SILENT = "silent"  # work is there, and nothing moves
    TRIAL = "trial"  # its time out is over
    SHUTTING_DOWN = "shutting_down"  # its own 500 or 503 says so
    ASKED = "asked"  # by label, file or admin call
    NOTICE = "notice"  # it will be taken away at a known time
    PEERS = "peers"  # other routers have taken it out
    LEFT = "left"  # discovery no longer lists it
