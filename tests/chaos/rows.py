"""PURE: from what clients, Envoy and extproc saw of one fault to its row of the table; the targets.

All times are seconds of one monotonic clock, which the processes of a machine share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any, Final

DEAD_S: Final = 1.0
HUNG_S: Final = 5.0
HUNG_FACTOR: Final = 3.0
"""A hung replica gets nothing new after HUNG_S, or so many times its predicted TTFT, whichever is later."""
FALLBACK_S: Final = 1.5
UNHURRIED_S: Final = 1.0
"""A TTFT up to this, or up to twice the median before the fault, is normal after an overload."""


class Kind(StrEnum):
    """What a fault does, and so what its times mean; see docs/chaos.md."""

    NOTHING = "nothing"
    DEAD = "dead"  # nothing listens there
    HUNG = "hung"  # connections are accepted, nothing comes out
    FAILING = "failing"  # a replica answers, but not as it should
    LEAVING = "leaving"  # a replica is drained
    JOINING = "joining"  # a replica is added
    EXTPROC = "extproc"
    LOAD = "load"  # too much of it
    AROUND = "around"  # nothing that takes anybody out


@dataclass(slots=True)
class Sent:
    """One request as its client saw it."""

    id: str
    tenant: str
    stream: bool
    sent_at: float
    status: int | None = None
    began_at: float | None = None
    """The response headers came."""
    replica: str | None = None
    """Who answered, by `x-extproc-replica`."""
    first_at: float | None = None
    """The first text of a stream."""
    ended_at: float | None = None
    error: str | None = None
    """What went wrong; None for a whole answer."""
    left: bool = False
    """The client went away on purpose, before the end."""

    @property
    def well(self) -> bool:
        return self.status == 200 and self.error is None and self.ended_at is not None

    @property
    def ttft_s(self) -> float | None:
        """Of a stream; one that failed waited at least until then. None for others, and for those refused or left."""
        if not self.stream or self.left or self.status == 429 or self.ended_at is None:
            return None
        return (self.ended_at if self.first_at is None else self.first_at) - self.sent_at


@dataclass(frozen=True, slots=True)
class Decided:
    """One decision of extproc."""

    at: float
    first: str
    """The replica chosen; alternates follow it."""
    predicted_ttft_s: float = 0.0


@dataclass(slots=True)
class Marks:
    """What happened when, told by the fault while it runs."""

    at: float | None = None
    """It breaks."""
    returning: float | None = None
    """Its return begins: extproc may know of it before we do."""
    over: float | None = None
    """It is whole again."""
    victims: tuple[str, ...] = ()
    last_begin: Mapping[str, float] = field(default_factory=dict)
    """Replica -> a stream that had begun by then cannot be saved from it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One row's material."""

    sent: Sequence[Sent]
    decided: Mapping[str, Decided] = field(default_factory=dict)
    """By request id: what extproc decided, of what it remembers."""
    by_fallback: frozenset[str] = frozenset()
    """Ids of requests that Envoy routed without extproc."""
    how: Mapping[str, str] = field(default_factory=dict)
    """By request id: what Envoy says of its end."""
    accepted: Sequence[float] = ()
    """When completions reached the victims, as far as they can tell."""
    leftover: int = 0


class Verdict(StrEnum):
    """What a request counts as."""

    WELL = "well"
    LEFT = "left"
    REFUSED = "refused"
    UNAVOIDABLE = "unavoidable"
    AVOIDABLE = "avoidable"


def verdict(sent: Sent, marks: Marks) -> Verdict:
    """A client that left on purpose has no complaint; 429 is an answer; a stream that had begun on a replica that then broke is lost."""
    if sent.left:
        return Verdict.LEFT
    if sent.status == 429:
        return Verdict.REFUSED
    if sent.well:
        return Verdict.WELL
    return Verdict.UNAVOIDABLE if _had_begun(sent, marks) else Verdict.AVOIDABLE


def _had_begun(sent: Sent, marks: Marks) -> bool:
    last = marks.last_begin.get(sent.replica or "")
    if last is None or marks.at is None or not sent.stream or sent.status != 200 or sent.began_at is None:
        return False
    return sent.began_at <= last and (sent.ended_at is None or sent.ended_at >= marks.at)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; None where a column has no meaning for the fault, or what it asks for never came."""

    fault: str
    sent: int
    errors: int
    unavoidable: int
    refused: int
    detect_s: float | None
    recover_s: float | None
    worst_ttft_s: float | None
    leftover: int


def row(fault: str, kind: Kind, marks: Marks, seen: Seen) -> Row:
    """See docs/chaos.md for the columns."""
    verdicts = Counter(verdict(sent, marks) for sent in seen.sent)
    worst = max((s.ttft_s for s in seen.sent if s.ttft_s is not None), default=None)
    return Row(
        fault=fault,
        sent=len(seen.sent),
        errors=verdicts[Verdict.UNAVOIDABLE] + verdicts[Verdict.AVOIDABLE],
        unavoidable=verdicts[Verdict.UNAVOIDABLE],
        refused=verdicts[Verdict.REFUSED],
        detect_s=_rounded(detect_s(kind, marks, seen)),
        recover_s=_rounded(recover_s(kind, marks, seen)),
        worst_ttft_s=_rounded(worst),
        leftover=seen.leftover,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


# --- time to detect ----------------------------------------------------------------------------------------------------


def detect_s(kind: Kind, marks: Marks, seen: Seen) -> float | None:
    """Replicas: from the fault to the last new request for one; extproc: to the first answer without it. None for the rest."""
    if marks.at is None or marks.returning is None:
        return None
    if kind in (Kind.DEAD, Kind.HUNG, Kind.FAILING, Kind.LEAVING):
        chosen = (d.at for d in seen.decided.values() if d.first in marks.victims)
        late = [at for at in (*chosen, *seen.accepted) if marks.at < at < marks.returning]
        return max(late, default=marks.at) - marks.at
    if kind is Kind.EXTPROC:
        answers = [s.began_at for s in _without_extproc(seen) if s.began_at is not None and s.sent_at >= marks.at]
        return min(answers) - marks.at if answers else None
    return None


def _without_extproc(seen: Seen) -> Iterator[Sent]:
    return (sent for sent in seen.sent if sent.id in seen.by_fallback)


def hung_limit_s(marks: Marks, seen: Seen) -> float:
    """What a hung replica is allowed, by what was predicted for requests sent there before or while it hung."""
    predicted = (d.predicted_ttft_s for d in seen.decided.values() if d.first in marks.victims)
    return max(HUNG_S, HUNG_FACTOR * max(predicted, default=0.0))


# --- time to recover ---------------------------------------------------------------------------------------------------


def recover_s(kind: Kind, marks: Marks, seen: Seen) -> float | None:
    """Replicas: from the end of the fault to the first good answer of a request routed after it; see docs/chaos.md for the rest."""
    if marks.over is None or kind in (Kind.NOTHING, Kind.AROUND):
        return None
    if kind is Kind.EXTPROC:
        return _since(marks.over, (s.sent_at for s in _without_extproc(seen)))
    if kind is Kind.LOAD:
        return _since(marks.over, _slow(marks, seen))
    served = [_routed_at(s, seen) for s in seen.sent if s.well and s.replica in marks.victims]
    after = [at for at in served if at >= marks.over]
    return min(after) - marks.over if after else None


def _since(over: float, times: Iterable[float]) -> float:
    """From `over` to the last of them; 0 when none is later."""
    return max(0.0, max(times, default=over) - over)


def _slow(marks: Marks, seen: Seen) -> Iterator[float]:
    """When streams were sent whose first token came late."""
    assert marks.at is not None
    before = [s.ttft_s for s in seen.sent if s.ttft_s is not None and s.sent_at < marks.at]
    limit = max(UNHURRIED_S, 2 * median(before)) if before else UNHURRIED_S
    return (s.sent_at for s in seen.sent if s.ttft_s is not None and s.ttft_s > limit)


def _routed_at(sent: Sent, seen: Seen) -> float:
    """Held requests are routed later than they are sent."""
    decided = seen.decided.get(sent.id)
    return decided.at if decided else sent.sent_at


# --- what else is worth a look ------------------------------------------------------------------------------------------


def details(kind: Kind, marks: Marks, seen: Seen) -> dict[str, Any]:
    """What failed and why; how many went without extproc; TTFT by tenant; what the hung replica was allowed."""
    found: dict[str, Any] = {
        "errors": _why(marks, seen),
        "by_fallback": len(seen.by_fallback),
        "ttft_s": _by_tenant(seen.sent),
    }
    if kind is Kind.HUNG:
        found["detect_limit_s"] = round(hung_limit_s(marks, seen), 2)
    return found


def _why(marks: Marks, seen: Seen) -> dict[str, dict[str, Any]]:
    """Of each sort of error: how many, and after how long at the least and at the most. The commonest ten."""
    waits: dict[str, list[float]] = {}
    for one in seen.sent:
        if (found := verdict(one, marks)) in (Verdict.AVOIDABLE, Verdict.UNAVOIDABLE) and one.ended_at is not None:
            what = f"{found}: {one.status}: {one.error} [{seen.how.get(one.id, 'not in the log')}]"
            waits.setdefault(what, []).append(one.ended_at - one.sent_at)
    common = sorted(waits.items(), key=lambda item: -len(item[1]))[:10]
    return {what: {"count": len(w), "after_s": [round(min(w), 2), round(max(w), 2)]} for what, w in common}


def _by_tenant(sent: Iterable[Sent]) -> dict[str, list[float]]:
    """Median and worst TTFT of each tenant's streams."""
    times: dict[str, list[float]] = {}
    for one in sent:
        if one.ttft_s is not None:
            times.setdefault(one.tenant, []).append(one.ttft_s)
    return {name: [round(median(each), 2), round(max(each), 2)] for name, each in sorted(times.items())}


# --- targets ------------------------------------------------------------------------------------------------------------


def missed(one: Row, kind: Kind, hung_limit: float = HUNG_S) -> Iterator[str]:
    """What the row should have been and is not."""
    if one.errors > one.unavoidable:
        yield f"{one.errors - one.unavoidable} avoidable errors"
    if one.leftover:
        yield f"{one.leftover} in flight or queued left over"
    limit = {Kind.DEAD: DEAD_S, Kind.HUNG: hung_limit, Kind.EXTPROC: FALLBACK_S}.get(kind)
    if limit is not None and (one.detect_s is None or one.detect_s > limit):
        yield f"detected after {_shown(one.detect_s)}, not {limit:g} s"
    if kind is Kind.EXTPROC and (one.recover_s is None or one.recover_s > FALLBACK_S):
        yield f"routed by fallback for {_shown(one.recover_s)} after its return, not {FALLBACK_S:g} s"
    if kind not in (Kind.NOTHING, Kind.AROUND) and one.recover_s is None:
        yield "did not recover while the load ran"


def _shown(seconds: float | None) -> str:
    return "no time at all" if seconds is None else f"{seconds:.2f} s"
