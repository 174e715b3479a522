"""Replicas of one pool: who is a member, what each last said of itself, and who may be chosen now."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from extproc.core.flights import Load
from extproc.core.speed import Shared, Speed
from extproc.core.steptime import prior
from extproc.core.types import Add, Change, Remove, Replica, Reset, Sample, ScrapeFailure

SUSPECT_S = 2.0
"""After a failed connection or a 5xx a replica is passed over for so long, or until a scrape answers: a scrape comes within that time."""


STRANGERS_S: Final = 10.0
"""Requests of others are averaged over about so many seconds. The last sample alone would be the same for all routers that
read it, and would send all of them to the same replica."""


class Readiness(StrEnum):
    """Whether a member may be chosen; also a metric label."""

    READY = "ready"
    UNSAMPLED = "unsampled"  # its metrics were never read: it may still be loading its model
    SUSPECT = "suspect"  # the last request we sent there failed
    DOWN = "down"  # nothing listens there


class Member:
    """One replica with all that is known of it."""

    __slots__ = (
        "_stale_after_s",
        "answered_at",
        "cache_share",
        "down",
        "heard_at",
        "held_at_sample",
        "hit_trust",
        "joined_at",
        "late_scrapes",
        "latency_s",
        "load",
        "models",
        "opened_at_sample",
        "replica",
        "sample",
        "sampled_at",
        "scraped",
        "speed",
        "strangers",
        "suspect_until",
    )

    def __init__(
        self, replica: Replica, now: float, scraped: bool, stale_after_s: float, learned: Shared | None = None
    ) -> None:
        """`learned`: what is learned together with the other members; None for one alone."""
        self.replica = replica
        self.scraped = scraped
        """Whether samples are to be expected at all."""
        self._stale_after_s = stale_after_s
        self.joined_at = now
        self.sample: Sample | None = None
        self.sampled_at: float | None = None
        self.late_scrapes = 0
        """Scrapes in a row that brought nothing, though something listens."""
        self.down = False
        self.suspect_until = now
        self.models: tuple[str, ...] = ()
        self.load = Load()
        self.speed = Speed(prior(replica.labels), learned)
        self.latency_s: float | None = None
        """Moving average of response times; None before the first."""
        self.answered_at = now
        """When the last of these came."""
        self.cache_share = 1.0
        """Of its KV cache, what acts as a cache for what we send: running answers and requests of others take the rest."""
        self.hit_trust = 1.0
        """Actual over predicted prefix hits, smoothed: 0 where prefix caching is off."""
        self.strangers = 0.0
        """Requests that the replica has from others than us, by its samples of the last seconds."""
        self.opened_at_sample = 0
        self.held_at_sample = 0.0
        """Our own requests and their tokens there when the sample came."""
        self.heard_at = now
        """Last sign of work: a byte, an answer, or a counter of tokens that moved."""

    def __repr__(self) -> str:
        age = "never sampled" if self.sampled_at is None else f"sampled at {self.sampled_at:.3f}"
        return f"<member {self.address} {len(self.load)} in flight, {age}{', down' if self.down else ''}>"

    @property
    def address(self) -> str:
        return self.replica.address

    def fresh(self, now: float) -> Sample | None:
        """The last sample unless it is too old to count."""
        if self.sampled_at is None or now - self.sampled_at > self._stale_after_s:
            return None
        return self.sample

    def readiness(self, now: float) -> Readiness:
        if self.down:
            return Readiness.DOWN
        if now < self.suspect_until:
            return Readiness.SUSPECT
        if self.scraped and self.sample is None:
            return Readiness.UNSAMPLED
        return Readiness.READY

    def sampled(self, sample: Sample, now: float) -> bool:
        """Take in a scrape. True if the engine restarted since the last one: a counter went back, or nothing listened."""
        before, elapsed_s = self.sample, math.inf if self.sampled_at is None else now - self.sampled_at
        self.sample, self.sampled_at = sample, now
        if before is not None:
            self.speed.fade(elapsed_s)
        restarted = self.down or (before is not None and _went_back(before, sample))
        self.down, self.late_scrapes, self.suspect_until = False, 0, now
        if sample.running is not None and sample.waiting is not None:
            strangers = max(0, sample.running + sample.waiting - len(self.load))
            self.strangers += (strangers - self.strangers) * (1.0 - math.exp(-elapsed_s / STRANGERS_S))
        self.opened_at_sample, self.held_at_sample = len(self.load), self.load.held_tokens
        if before is not None and _moved(before, sample):
            self.heard_at = now
        return restarted

    def not_sampled(self, why: ScrapeFailure) -> None:
        """A scrape failed. A late page leaves the sample to age; only a refused connection says that nobody is there."""
        if why is ScrapeFailure.REFUSED:
            self.down = True
        else:
            self.late_scrapes += 1

    def failed(self, now: float) -> None:
        """A request sent there found no connection or a 5xx."""
        self.suspect_until = now + SUSPECT_S

    def answered(self, duration_s: float, now: float) -> None:
        """A request sent there was answered, after `duration_s`."""
        self.latency_s = _average(self.latency_s, duration_s)
        self.answered_at = self.heard_at = now
        self.suspect_until = now

    def hit(self, predicted_tokens: float, actual_tokens: int) -> None:
        """Compare a predicted prefix hit with the actual one."""
        if predicted_tokens < 1:
            return
        found = min(actual_tokens / predicted_tokens, 1.0)
        self.hit_trust += 0.1 * (found - self.hit_trust)
        # What we believed there and is not was pushed out: down by as much at once, and up again slowly. It settles where
        # about one prediction in twenty-five fails.
        if found < 0.95:
            self.cache_share = max(self.cache_share * (1.0 - 0.05 * (1.0 - found)), 0.05)
        else:
            self.cache_share = min(self.cache_share + 0.002, 1.0)

    def queued(self, now: float) -> int | None:
        """Requests waiting there: the last sample, and what we sent or saw end since. None without a fresh sample."""
        sample = self.fresh(now)
        if sample is None or sample.waiting is None:
            return None
        return max(0, sample.waiting + len(self.load) - self.opened_at_sample)


def _moved(before: Sample, after: Sample) -> bool:
    pairs = ((before.prompt_tokens, after.prompt_tokens), (before.generated_tokens, after.generated_tokens))
    return any(b is not None and a is not None and a > b for b, a in pairs)


def _went_back(before: Sample, after: Sample) -> bool:
    pairs = ((before.prompt_tokens, after.prompt_tokens), (before.generated_tokens, after.generated_tokens))
    return any(b is not None and a is not None and a < b for b, a in pairs)


def _average(before: float | None, value: float) -> float:
    return value if before is None else before + 0.2 * (value - before)


class Fleet:
    """The members of one pool, in the order in which discovery named them."""

    def __init__(self, scraped: bool = True, stale_after_s: float = 10.0) -> None:
        self._members: dict[str, Member] = {}
        self._learned = Shared()
        self._scraped = scraped
        self._stale_after_s = stale_after_s

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"<fleet {list(self._members.values())}>"

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def get(self, address: str) -> Member | None:
        return self._members.get(address)

    def apply(self, change: Change, now: float) -> list[str]:
        """Take in a change of membership. Returns the addresses that left."""
        match change:
            case Add(replica=replica):
                self._join(replica, now)
                return []
            case Remove(address=address):
                return [address] if self._members.pop(address, None) else []
            case Reset(replicas=replicas):
                listed = {r.address for r in replicas}
                gone = [a for a in self._members if a not in listed]
                for address in gone:
                    del self._members[address]
                for replica in replicas:
                    self._join(replica, now)
                return gone

    def _join(self, replica: Replica, now: float) -> None:
        """A known address keeps its load and what was learned there, unless its labels say that it is other hardware."""
        member = self._members.get(replica.address)
        if member is None:
            self._members[replica.address] = Member(replica, now, self._scraped, self._stale_after_s, self._learned)
            return
        if member.replica.labels != replica.labels:
            member.speed = Speed(prior(replica.labels), self._learned)
        member.replica = replica

    def candidates(self, now: float, subset: frozenset[str] | None = None) -> list[Member]:
        """Who may be chosen, in the order of discovery; empty only when no member is allowed at all.

        1. Ready members. 2. If there is none, those not yet sampled: right after our own start that is everyone.
        3. If there is none either, everyone: better a try, and Envoy's retry, than an error for the whole fleet because
           of what may be our own blindness.
        """
        allowed: Iterable[Member] = self._members.values()
        if subset is not None:
            allowed = [m for m in allowed if m.address in subset or m.address.rpartition(":")[0] in subset]
        by_readiness: dict[Readiness, list[Member]] = {}
        for member in allowed:
            by_readiness.setdefault(member.readiness(now), []).append(member)
        if ready := by_readiness.get(Readiness.READY):
            return ready
        if unsampled := by_readiness.get(Readiness.UNSAMPLED):
            return unsampled
        return [m for members in by_readiness.values() for m in members]
