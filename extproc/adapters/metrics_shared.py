"""Prometheus metrics of what routers share: read from its state when a scrape comes. No samples where nothing is to be shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.adapters.shared.board import Trouble
from extproc.adapters.shared.sharing import Sharing

IGNORED = ("version", "unreadable")


class SharedCollector(Collector):
    """Whether it works, who is there, what it costs."""

    def __init__(self, sharing: Sharing, clock: Callable[[], float]) -> None:
        self._sharing, self._clock = sharing, clock

    def collect(self) -> Iterator[Metric]:
        """All families, without samples while nothing is to be shared: an alert on 0 must not fire there."""
        for family in (*self._health(), *self._peers(), *self._traffic()):
            if not self._sharing.state.on:
                family.samples.clear()
            yield family

    def _health(self) -> Iterator[Metric]:
        state = self._sharing.state
        yield _gauge("up", "1 if the last beat published and read all that it should.", state.up)
        yield _counter("beats", "Beats begun.", state.beats)
        errors = {trouble.value: state.errors[trouble] for trouble in Trouble}
        yield _counters("errors", "Beats that failed, or of which a part was refused.", "reason", errors)
        yield _gauge("pushing", "1 if pushes of all routers reach all others.", state.pushing)
        push_errors = {trouble.value: state.push_errors[trouble] for trouble in Trouble}
        yield _counters("push_errors", "Failures to publish pushes, or to listen to them.", "reason", push_errors)
        age = GaugeMetricFamily("extproc_shared_read_age_seconds", "Seconds since the other routers were last read.")
        if state.read_at is not None:
            age.add_metric((), self._clock() - state.read_at)
        yield age

    def _peers(self) -> Iterator[Metric]:
        yield _gauge("peers", "Other routers that are there, for all that is known.", self._sharing.peers)
        yield _gauge("peer_requests", "Requests that they have in flight.", self._sharing.peer_requests)

    def _traffic(self) -> Iterator[Metric]:
        state = self._sharing.state
        sizes = {"sent": state.sent_bytes, "received": state.received_bytes}
        yield _counters("bytes", "Bytes of what was published and read; keys and protocol aside.", "direction", sizes)
        pushes = {"sent": state.pushes_sent, "received": state.pushes_received, "lost": state.pushes_lost}
        text = "Pushes, told and heard of; lost: of others, that did not arrive or came out of order."
        yield _counters("pushes", text, "what", pushes)
        placements = {
            "sent": state.placements_sent,
            "received": state.placements_received,
            "left_out": state.placements_left_out,
        }
        text = "Placements of prompts, told and heard of; left_out: more than one beat takes, or lost to a failed one."
        yield _counters("placements", text, "what", placements)
        ignored = {why: state.ignored[why] for why in IGNORED}
        yield _counters("ignored", "Messages of others passed over: of another release, or unreadable.", "why", ignored)


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(f"extproc_shared_{name}", text)
    family.add_metric((), float(value))
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    family = CounterMetricFamily(f"extproc_shared_{name}", text)
    family.add_metric((), value)
    return family


def _counters(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"extproc_shared_{name}", text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family
