"""The circuit breaker of one replica: what the ends of requests say of it, and how long it stays out after they failed.

Closed, it counts failures; open, nothing is sent; when its time out is over it is half open, and the next requests are trials.
Requests sent before it last opened or closed say nothing: they met another replica than the one there is now.
"""

from __future__ import annotations

import math
from typing import Final

from extproc.core.health.settings import HealthSettings
from extproc.core.health.states import Reason

BUCKETS: Final = 10
"""Of a window: it forgets in steps of a tenth of its length."""


class Window:
    """Successes and failures of the last seconds, in a ring of buckets."""

    __slots__ = ("_failed", "_good", "_newest", "_width_s")

    def __init__(self, window_s: float) -> None:
        self._width_s = window_s / BUCKETS
        self._newest = 0
        self.clear()

    def clear(self) -> None:
        self._good, self._failed = [0] * BUCKETS, [0] * BUCKETS

    def count(self, good: bool, now: float) -> None:
        """One request ended."""
        self._turn(now)
        (self._good if good else self._failed)[self._newest % BUCKETS] += 1

    def failed_of(self, now: float) -> tuple[int, int]:
        """Failures, and requests in all."""
        self._turn(now)
        failed = sum(self._failed)
        return failed, failed + sum(self._good)

    def _turn(self, now: float) -> None:
        newest = int(now // self._width_s)
        for number in range(max(self._newest, newest - BUCKETS) + 1, newest + 1):
            self._good[number % BUCKETS] = self._failed[number % BUCKETS] = 0
        self._newest = max(self._newest, newest)


class Breaker:
    """Closed while `reason` is None; else open until `until`, and half open from then on."""

    __slots__ = (
        "_closed_at",
        "_successes",
        "_timeout_s",
        "_window",
        "failing_since",
        "failures",
        "held",
        "reason",
        "settings",
        "since",
        "until",
    )

    def __init__(self, settings: HealthSettings) -> None:
        self.settings = settings
        self._window = Window(settings.window_s)
        self._timeout_s = settings.open_s
        self._closed_at = -math.inf
        self._successes = 0
        self.held = False
        """Open for as long as the work lasts that it had when it opened."""
        self.reason: Reason | None = None
        self.until = -math.inf
        self.since = -math.inf
        """When it last opened or closed."""
        self.failures = 0
        """In a row."""
        self.failing_since = -math.inf
        """When the first of them came."""

    def __repr__(self) -> str:
        if self.reason is None:
            return f"<breaker closed, {self.failures} failures in a row>"
        return f"<breaker {self.reason} until {self.until:.3f}, {self._successes} successes since>"

    def half_open(self, now: float) -> bool:
        """Whether its time out is over."""
        return self.reason is not None and now >= self.until

    def succeeded(self, sent_at: float, now: float) -> bool:
        """A request was answered well. True if that closed the breaker."""
        if sent_at < self.since:
            return False
        if self.reason is None:
            self._window.count(True, now)
            # A process that shuts down finishes what it has, and refuses what is new: only the new ones say that it is well.
            if self.failures and sent_at >= self.failing_since:
                self.failures = 0
            return False
        self._successes += 1
        if self._successes < self.settings.successes:
            return False
        self.close(now)
        return True

    def failed(self, sent_at: float, now: float) -> Reason | None:
        """A request failed. Returns why the replica is to be taken out now; None if it is not, or is already."""
        if sent_at < self.since:
            return None
        if self.reason is not None:
            self._successes = 0
            return Reason.REQUESTS_FAILED if now >= self.until else None
        if self.failures == 0:
            self.failing_since = now
        self.failures += 1
        self._window.count(False, now)
        if self.failures >= self.settings.failures:
            return Reason.REQUESTS_FAILED
        failed, of = self._window.failed_of(now)
        too_many = of >= self.settings.min_requests and failed > self.settings.failure_rate * of
        return Reason.FAILURE_RATE if too_many else None

    def open(self, reason: Reason, now: float, hold_s: float | None = None) -> None:
        """Take the replica out, for twice as long as the last time unless it has been well since for a whole window.

        `hold_s`: out for as long as the work lasts that it has (`let_go`), but no longer than this.
        """
        longer = self.reason is not None or now - self._closed_at < self.settings.window_s
        self._timeout_s = (
            min(2.0 * self._timeout_s, self.settings.max_open_s)
            if longer
            else min(self.settings.open_s, self.settings.max_open_s)
        )
        self.reason, self.since = reason, now
        self.held = hold_s is not None
        self.until = now + (self._timeout_s if hold_s is None else hold_s)
        self._successes = 0

    def let_go(self, now: float) -> None:
        """The work is gone for which it was held open: its time out runs from now."""
        if self.held:
            self.held, self.until = False, min(self.until, now + self._timeout_s)

    def close(self, now: float) -> None:
        """The replica is well."""
        self.reason, self.since, self._closed_at = None, now, now
        self._begin()

    def reset(self, now: float) -> None:
        """Another process is there now."""
        self.reason, self.since, self._closed_at = None, now, -math.inf
        self._begin()

    def _begin(self) -> None:
        self.until = -math.inf
        self.held = False
        self.failures = self._successes = 0
        self._window.clear()
