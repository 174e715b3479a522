"""Entries recorded from a real Envoy 1.40 (`python -m tests.envoy.record`), and the rules that they do not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from extproc.core.types import End, Outcome, Progressed, Usage
from extproc.envoy.access_log import Finished, LogCounts, deliver, end_of, read_entry
from extproc.envoy.codec import LogEntry, log_entries
from extproc.envoy.intake import FakeRouter
from extproc.pb.envoy.data.accesslog.v3.accesslog_pb2 import ResponseFlags
from tests.envoy.replicas import USAGE

FIXTURES = Path(__file__).parents[1] / "fixtures" / "access_log"
REPLICA = "127.0.0.1:21211"
USED = Usage(21, 3, 16)


def recorded(name: str) -> list[Finished | Progressed | None]:
    return [read_entry(entry) for entry in log_entries((FIXTURES / f"{name}.bin").read_bytes())]


def outcome(name: str) -> Outcome:
    *_, last = recorded(name)
    assert isinstance(last, Finished)
    assert last.flight == "f1"
    return last.outcome


@pytest.mark.parametrize("name", ["json", "sse", "periodic"])
def test_a_whole_response_tells_usage_and_times(name: str) -> None:
    seen = outcome(name)
    assert (seen.end, seen.status, seen.served, seen.attempts, seen.usage) == (End.OK, 200, REPLICA, 1, USED)
    assert seen.response_bytes
    assert seen.ttft_s is not None
    assert seen.replica_ttft_s is not None
    assert seen.duration_s is not None
    assert 0 < seen.replica_ttft_s < seen.ttft_s <= seen.duration_s < 1


def test_a_running_response_tells_first_token_and_bytes() -> None:
    """The first chunk came after 0.35 s, an entry every 0.1 s."""
    progress = [r for r in recorded("periodic") if isinstance(r, Progressed)]
    before = [p for p in progress if p.ttft_s is None]
    after = [p for p in progress if p.ttft_s is not None]
    assert len(before) == 3
    assert all(p == Progressed("f1", None, None, 0, p.served) for p in before)
    assert {p.served for p in progress} == {progress[0].served} != {None}
    assert all(p.ttft_s and 0.35 <= p.ttft_s < 0.5 for p in after)
    sizes = [p.response_bytes for p in after]
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] < sizes[-1]


@pytest.mark.parametrize(
    ("name", "end", "status", "attempts"),
    [
        ("client_gone", End.CLIENT_GONE, 200, 1),
        ("retried", End.OK, 200, 2),
        ("unreachable", End.UNREACHABLE, 503, 3),
        ("broken", End.UPSTREAM_ERROR, 200, 1),
        ("status_500", End.UPSTREAM_ERROR, 500, 1),
        ("status_404", End.CLIENT_ERROR, 404, 1),
    ],
)
def test_how_it_ended(name: str, end: End, status: int, attempts: int) -> None:
    seen = outcome(name)
    assert (seen.end, seen.status, seen.attempts) == (end, status, attempts)
    assert (seen.usage is not None) == (end is End.OK)


def test_nobody_reachable_has_no_first_token() -> None:
    assert outcome("unreachable").ttft_s is None


def test_a_request_that_we_refused_has_no_flight() -> None:
    assert recorded("refused") == [None]


def test_the_sink_hears_all_and_the_rest_is_counted() -> None:
    router, counts = FakeRouter(), LogCounts()
    for name in ("periodic", "refused"):
        deliver(log_entries((FIXTURES / f"{name}.bin").read_bytes()), router, counts, now=5.0)
    assert (counts.finished, counts.progressed, counts.foreign) == (1, 7, 1)
    assert [(flight, o.end, now) for flight, o, now in router.finished] == [("f1", End.OK, 5.0)]
    assert [now for _, now in router.learned] == [5.0] * 7


# --- rules ------------------------------------------------------------------------------------------------------------

FLAGS = {
    "DC": "downstream_connection_termination",
    "DR": "downstream_remote_reset",
    "UT": "upstream_request_timeout",
    "SI": "stream_idle_timeout",
    "DT": "duration_timeout",
    "UMSDR": "upstream_max_stream_duration_reached",
    "UF": "upstream_connection_failure",
    "UH": "no_healthy_upstream",
    "UO": "upstream_overflow",
    "NR": "no_route_found",
    "NC": "no_cluster_found",
    "DF": "dns_resolution_failure",
    "UR": "upstream_remote_reset",
    "UC": "upstream_connection_termination",
    "UPE": "upstream_protocol_error",
    "LR": "local_reset",
    "URX": "upstream_retry_limit_exceeded",
    "DPE": "downstream_protocol_error",
    "OM": "overload_manager",
}


@pytest.mark.parametrize(
    ("flags", "status", "end"),
    [
        ("DC", None, End.CLIENT_GONE),
        ("DC UC", 200, End.CLIENT_GONE),
        ("DR", 200, End.CLIENT_GONE),
        ("UT", 504, End.TIMEOUT),
        ("SI", 200, End.TIMEOUT),
        ("DT", 504, End.TIMEOUT),
        ("UMSDR", 504, End.TIMEOUT),
        ("UF URX", 503, End.UNREACHABLE),
        ("UH", 503, End.UNREACHABLE),
        ("UO", 503, End.UNREACHABLE),
        ("NR", 404, End.UNREACHABLE),
        ("NC", 503, End.UNREACHABLE),
        ("DF", 503, End.UNREACHABLE),
        ("UR", 503, End.UPSTREAM_ERROR),
        ("UC", 200, End.UPSTREAM_ERROR),
        ("UPE", 502, End.UPSTREAM_ERROR),
        ("LR", 503, End.UPSTREAM_ERROR),
        ("URX", 503, End.UPSTREAM_ERROR),
        ("URX", 200, End.OK),
        ("DPE", 400, End.CLIENT_ERROR),
        ("OM", 503, End.UPSTREAM_ERROR),
        ("", 499, End.CLIENT_ERROR),
        ("", 500, End.UPSTREAM_ERROR),
        ("", 302, End.OK),
        ("", None, End.UPSTREAM_ERROR),
    ],
)
def test_flags_and_status_to_end(flags: str, status: int | None, end: End) -> None:
    assert end_of(tuple(FLAGS[f] for f in flags.split()), status) is end


def test_each_flag_that_we_declare_is_tried() -> None:
    assert set(FLAGS.values()) == set(ResponseFlags.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("tag", [None, "", "-", "x", "-5"])
def test_a_time_that_is_not_there_is_unknown(tag: str | None) -> None:
    reading = read_entry(LogEntry("f", ttft_us=tag, replica_ttft_us=tag))
    assert isinstance(reading, Finished)
    assert (reading.outcome.ttft_s, reading.outcome.replica_ttft_s) == (None, None)


def test_the_entry_at_the_start_says_nothing_yet() -> None:
    assert read_entry(LogEntry("f", kind=4)) is None


def test_an_intermediate_entry_of_an_older_proxy_is_progress() -> None:
    assert isinstance(read_entry(LogEntry("f", intermediate=True)), Progressed)


def test_usage_is_unknown_unless_a_number_came() -> None:
    reading = read_entry(LogEntry("f", completion_tokens=0))
    assert isinstance(reading, Finished)
    assert reading.outcome.usage == Usage(None, 0, None)
    silent = read_entry(LogEntry("f"))
    assert isinstance(silent, Finished)
    assert silent.outcome.usage is None


def test_the_fixtures_are_of_the_replicas_that_record_them() -> None:
    assert (USAGE["prompt_tokens"], USAGE["completion_tokens"]) == (USED.prompt_tokens, USED.completion_tokens)


@pytest.mark.parametrize(
    ("flags", "end"),
    [((), End.UPSTREAM_ERROR), (("downstream_connection_termination",), End.CLIENT_GONE)],
    ids=["whole", "client gone"],
)
def test_a_response_that_failed_under_200_is_an_error_of_the_replica(flags: tuple[str, ...], end: End) -> None:
    """An engine also aborts what it generates for a client that left."""
    reading = read_entry(LogEntry("f", status=200, flags=flags, broken=True))
    assert isinstance(reading, Finished)
    assert (reading.outcome.end, reading.outcome.broken) == (end, True)
