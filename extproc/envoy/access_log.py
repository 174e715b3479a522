"""Envoy's gRPC access log: how flights go and how they ended.

Entries without a flight of ours are requests that passed while we did not answer; they are counted and otherwise ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from extproc.core.record import record
from extproc.core.types import End, Fact, Outcome, Progressed, Usage
from extproc.envoy.codec import LogEntry

STARTED, PERIODIC = 4, 5
"""AccessLogType of entries that come before the end. Everything else with a flight is its end."""

CLIENT_GONE = frozenset({"downstream_connection_termination", "downstream_remote_reset"})
TIMEOUT = frozenset(
    {
        "upstream_request_timeout",
        "stream_idle_timeout",
        "duration_timeout",
        "upstream_max_stream_duration_reached",
    }
)
UNREACHABLE = frozenset(
    {
        "upstream_connection_failure",
        "no_healthy_upstream",
        "upstream_overflow",
        "no_route_found",
        "no_cluster_found",
        "dns_resolution_failure",
    }
)
BROKEN = frozenset(
    {"upstream_remote_reset", "upstream_connection_termination", "upstream_protocol_error", "local_reset"}
)
"""The replica had the request, and did not finish the response."""


@record
class Finished:
    """The last entry of a flight."""

    flight: str
    outcome: Outcome


def read_entry(entry: LogEntry) -> Finished | Progressed | None:
    """What an entry says of a flight; None where it says nothing (yet)."""
    if entry.flight is None or entry.kind == STARTED:
        return None
    if entry.kind == PERIODIC or entry.intermediate:
        ttft, replica_ttft = _seconds(entry.ttft_us), _seconds(entry.replica_ttft_us)
        return Progressed(entry.flight, ttft, replica_ttft, entry.response_bytes, entry.served)
    outcome = Outcome(
        end=end_of(entry.flags, entry.status, entry.broken),
        status=entry.status,
        served=entry.served,
        attempts=entry.attempts or 1,
        ttft_s=_seconds(entry.ttft_us),
        replica_ttft_s=_seconds(entry.replica_ttft_us),
        duration_s=entry.duration_s,
        response_bytes=entry.response_bytes,
        usage=_usage(entry),
        broken=entry.broken,
    )
    return Finished(entry.flight, outcome)


def end_of(flags: tuple[str, ...], status: int | None, broken: bool = False) -> End:
    """How a flight ended, by what the proxy noted and the status the client got. The first that applies:

    1. DC, DR        the client left: nothing is known of the replica
    2. UT, SI, DT, UMSDR   it took too long
    3. UF, UH, UO, NR, NC, DF   no connection to a replica, after all retries
    4. UR, UC, UPE, LR, or broken   the replica broke off, or said so, even where a status 200 was already sent
    5. no status     the proxy itself gave up before any response
    6. 5xx and 4xx   what the replica said, then anything below

    Retry limit (URX) alone decides nothing: it comes with the flag or the status of the last attempt.
    """
    noted = frozenset(flags)
    if noted & CLIENT_GONE:
        return End.CLIENT_GONE
    if noted & TIMEOUT:
        return End.TIMEOUT
    if noted & UNREACHABLE:
        return End.UNREACHABLE
    if noted & BROKEN or broken or status is None or status >= 500:
        return End.UPSTREAM_ERROR
    return End.CLIENT_ERROR if status >= 400 else End.OK


def _seconds(tag: str | None) -> float | None:
    """Microseconds as Envoy prints them; `-` while there is nothing to measure."""
    return int(tag) / 1e6 if tag and tag.isdecimal() else None


def _usage(entry: LogEntry) -> Usage | None:
    counts = (entry.prompt_tokens, entry.completion_tokens, entry.cached_tokens)
    return None if counts == (None, None, None) else Usage(*counts)


# --- what is done with it ---------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Who wants to know; the router."""

    def finish(self, flight_id: str, outcome: Outcome, now: float) -> object:
        """A flight ended."""

    def learn(self, fact: Fact, now: float) -> object:
        """A flight got on."""


@dataclass(slots=True)
class LogCounts:
    """Access log entries by what they were."""

    finished: int = 0
    progressed: int = 0
    foreign: int = 0
    """Without a flight of ours: requests that passed while this process did not answer, or that we refused."""
    unreadable: int = 0
    """Messages that do not parse."""
    failed: int = 0
    """Messages given up half-way by a mistake of ours."""


def deliver(entries: list[LogEntry], sink: Sink, counts: LogCounts, now: float) -> None:
    """Tell the sink what the entries say."""
    for entry in entries:
        reading = read_entry(entry)
        if isinstance(reading, Finished):
            counts.finished += 1
            sink.finish(reading.flight, reading.outcome, now)
        elif reading is not None:
            counts.progressed += 1
            sink.learn(reading, now)
        elif entry.flight is None:
            counts.foreign += 1
