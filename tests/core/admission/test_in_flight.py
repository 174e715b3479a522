"""Requests in flight on several routers: what one hears of the others counts, until it lapses."""

from __future__ import annotations

from extproc.core.account import Account, Most
from extproc.core.admission.in_flight import REFRESH_S, TOLD_S, Held, InFlight
from extproc.core.admission.limits import Limits, Sharing
from extproc.core.types import End, Outcome, Refusal, Request

KEY = ("t", "in_flight", "")
TWO = Account("t", "free", in_flight=Most(2))


class Store:
    """What a store of the routers' counts does, without its expiry."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def exchange(self, name: str, made: InFlight, now: float) -> None:
        reports = made.reports(now)
        self.counts |= dict.fromkeys([name] if reports else [], sum(report.count for report in reports))
        made.told(reports, [sum(n for who, n in self.counts.items() if who != name) for _ in reports], now)


def routers() -> tuple[Limits, Limits]:
    made = Limits(), Limits()
    for each in made:
        each.sharing, each.away = Sharing(), False
    return made


def ask(limits: Limits, flight: str, now: float) -> Refusal | None:
    reject = limits.check(Request(account=TWO), 1, 0.0, now)
    if reject is None:
        limits.take(flight, TWO, 1.0, now)
    return None if reject is None else reject.refusal


def end(limits: Limits, flight: str) -> None:
    limits.settle(flight, Outcome(End.OK), 1, 1.0)


def test_what_the_others_have_counts() -> None:
    a, b = routers()
    store = Store()
    assert [ask(a, "1", 0.0), ask(a, "2", 0.0)] == [None, None]
    store.exchange("a", a.in_flight, 0.0)
    assert ask(b, "3", 0.0) is None, "it has not heard of the others' yet"
    store.exchange("b", b.in_flight, 0.0)
    end(b, "3")
    store.exchange("b", b.in_flight, 0.1)
    assert ask(b, "4", 0.1) is Refusal.CONCURRENCY
    end(a, "1")
    store.exchange("a", a.in_flight, 0.2)
    assert ask(b, "5", 0.2) is Refusal.CONCURRENCY, "which makes it ask again"
    store.exchange("b", b.in_flight, 0.2)
    assert ask(b, "6", 0.2) is None
    assert ask(b, "7", 0.2) is Refusal.CONCURRENCY


def test_the_word_of_a_router_that_is_gone_lapses() -> None:
    made = InFlight()
    made.stir(KEY)
    made.told(made.reports(0.0), [5], 0.0)
    assert made.of(KEY, TOLD_S - 0.01) == 5
    assert made.of(KEY, TOLD_S) == 0
    made.reports(TOLD_S)
    assert repr(made) == "<in flight 0 here, of 0 told by others>", "nothing is kept of it"


def test_what_runs_on_is_told_again_and_what_ended_once() -> None:
    made = InFlight()
    made.began(KEY)
    made.stir(KEY)
    assert made.reports(0.0) == [Held(KEY, 1)]
    assert made.reports(REFRESH_S / 2) == []
    assert made.reports(REFRESH_S) == [Held(KEY, 1)]
    made.ended(KEY)
    made.stir(KEY)
    assert made.reports(REFRESH_S) == [Held(KEY, 0)]
    assert made.reports(5 * REFRESH_S) == []


def test_while_the_store_is_away_only_what_runs_is_kept_to_be_told() -> None:
    made = InFlight()
    other = ("other", "in_flight", "")
    made.began(KEY)
    for key in (KEY, other):
        made.stir(key)
    made.unheard(made.reports(0.0))
    assert made.reports(0.0) == [Held(KEY, 1)]


def test_a_router_alone_keeps_nothing_to_tell() -> None:
    alone = Limits()
    assert [ask(alone, str(i), 0.0) for i in range(3)] == [None, None, Refusal.CONCURRENCY]
    end(alone, "0")
    assert ask(alone, "3", 0.0) is None
    assert alone.in_flight._stirred == set()
