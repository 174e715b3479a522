"""Responses that go through us, as gateways with an endpoint picker send them: what our own Envoy would write into its access log.

Their end is the end of the flight, and no other is reported. While they run each is told of every `EVERY_S`, bytes or none: an answer that comes
as a whole is silent for as long as it is generated, and nobody else would say that it is still awaited.
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
    told_at: float
    ttft_s: float | None = None
    response_bytes: int = 0
    served: str | None = None


class Responses:
    """Turns what streams hear of responses into facts for the router. Holds one entry for each stream whose response is awaited or under way."""

    def __init__(self, sink: Sink, clock: Callable[[], float]) -> None:
        self._sink = sink
        self._clock = clock
        self._followed: dict[str, _Followed] = {}  # the one that was told of longest ago comes first

    def __len__(self) -> int:
        return len(self._followed)

    def begin(self, flight: str) -> None:
        """The pick goes to the proxy; exactly one report that is `over` follows."""
        now = self._clock()
        self._followed[flight] = _Followed(now, now)

    def take(self, report: Report) -> None:
        """Tell the router. Times to the first token are from the answer on, for what the client waited before is the proxy's to know."""
        now = self._clock()
        followed = self._followed[report.flight]
        followed.response_bytes, followed.served = report.response_bytes, report.served
        first = followed.ttft_s is None and report.response_bytes > 0
        if first:
            followed.ttft_s = now - followed.began
        if report.over:
            del self._followed[report.flight]
            self._sink.finish(report.flight, _outcome(report, followed, now), now)
        elif first or now >= followed.told_at + EVERY_S:
            self._tell(report.flight, followed, now)

    def remind(self) -> None:
        """Tell of those that were not told of for `EVERY_S`."""
        now = self._clock()
        while self._followed:
            flight, followed = next(iter(self._followed.items()))
            if now < followed.told_at + EVERY_S:
                break
            self._tell(flight, followed, now)

    def _tell(self, flight: str, followed: _Followed, now: float) -> None:
        followed.told_at = now
        self._followed[flight] = self._followed.pop(flight)
        ttft_s = followed.ttft_s
        self._sink.learn(Progressed(flight, ttft_s, ttft_s, followed.response_bytes, followed.served), now)


def _outcome(report: Report, followed: _Followed, now: float) -> Outcome:
    return Outcome(
        end=_end(report),
        status=report.status,
        served=report.served,
        ttft_s=followed.ttft_s,
        replica_ttft_s=followed.ttft_s,
        duration_s=now - followed.began,
        response_bytes=report.response_bytes,
        usage=report.usage,
        broken=report.broken,
    )


def _end(report: Report) -> End:
    """1. The proxy ended the stream before the end of the response: the client left, as a rule, and nothing is held against the replica.
    2. It sent no headers of the response, but its end: it is not told to, and every replica would look broken.
    """
    if report.cut:
        return End.CLIENT_GONE
    if report.status is None and not report.broken:
        return End.OK
    return end_of((), report.status, report.broken)
