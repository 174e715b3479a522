"""Responses that go through us, as gateways with an endpoint picker send them: their end is the end of the flight, and no other is reported.

Nothing is read of them but their status and how many bytes came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from extproc.core.types import End, Outcome, Progressed
from extproc.envoy.access_log import Sink, end_of
from extproc.envoy.exchange import Report

EVERY_S = 1.0
"""Between two words on one response, as by the access log's periodic entries."""


@dataclass(slots=True)
class _Followed:
    began: float
    """When the pick was answered."""
    ttft_s: float | None = None
    told_at: float = float("-inf")


class Responses:
    """Turns what streams hear of responses into facts for the router. Holds one entry for each stream whose response is under way."""

    def __init__(self, sink: Sink, clock: Callable[[], float]) -> None:
        self._sink = sink
        self._clock = clock
        self._followed: dict[str, _Followed] = {}

    def __len__(self) -> int:
        return len(self._followed)

    def begin(self, flight: str) -> None:
        """The pick goes to the proxy; exactly one report that is `over` follows."""
        self._followed[flight] = _Followed(self._clock())

    def take(self, report: Report) -> None:
        """Tell the router. Times to the first token are from the answer on, for what the client waited before is the proxy's to know."""
        now = self._clock()
        followed = self._followed[report.flight]
        if followed.ttft_s is None and report.response_bytes:
            followed.ttft_s = now - followed.began
        if report.over:
            del self._followed[report.flight]
            self._sink.finish(report.flight, _outcome(report, followed, now), now)
        elif now >= followed.told_at + EVERY_S:
            followed.told_at = now
            ttft_s = followed.ttft_s
            self._sink.learn(Progressed(report.flight, ttft_s, ttft_s, report.response_bytes, report.served), now)


def _outcome(report: Report, followed: _Followed, now: float) -> Outcome:
    """A stream that the proxy ended before the end of the response: the client left, as a rule, and nothing is held against the replica."""
    return Outcome(
        end=End.CLIENT_GONE if report.cut else end_of((), report.status),
        status=report.status,
        served=report.served,
        ttft_s=followed.ttft_s,
        replica_ttft_s=followed.ttft_s,
        duration_s=now - followed.began,
        response_bytes=report.response_bytes,
    )
