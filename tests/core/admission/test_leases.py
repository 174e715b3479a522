from __future__ import annotations

from random import Random

import pytest

from extproc.adapters.leasing import FakeStore
from extproc.core.account import Account, Rate
from extproc.core.admission.leases import AGAIN_S, TTL_S, Lease, Told, credit, overshoot
from extproc.core.admission.limits import FORGOTTEN, Limits, Loss, Sharing
from extproc.core.types import End, Outcome, Refusal, Request, Usage

KEY = ("t", "requests", "")
RATE = Rate(600, 600)


def routers(count: int, **sharing: object) -> list[Limits]:
    """So many that share a store which has answered."""
    made = []
    for _ in range(count):
        limits = Limits()
        limits.sharing = Sharing(**sharing)  # type: ignore[arg-type]
        limits.routers = lambda: count
        limits.away = False
        made.append(limits)
    return made


def request(limits: Limits, account: Account, now: float, tokens: float = 10.0) -> Refusal | None:
    """Admit it if it may; else why not."""
    reject = limits.check(Request(account=account), int(tokens), 0.0, now)
    if reject is not None:
        return reject.refusal
    limits.take(f"f{now}-{len(list(limits.counted))}", account, tokens, now)
    return None


def exchange(limits: Limits, store: FakeStore, now: float, sweep: bool = True) -> None:
    """A round trip that takes no time."""
    store.now = now
    asks = limits.asks(now, sweep=sweep)
    limits.told([store._lease(ask) for ask in asks], now)


ACCOUNT = Account("t", "free", requests=RATE)


def test_without_a_lease_a_little_passes_on_credit_and_with_one_the_rest() -> None:
    [limits] = routers(1)
    store = FakeStore()
    allowed = credit(RATE, 1)
    passed = sum(request(limits, ACCOUNT, 0.0) is None for _ in range(100))
    assert passed == allowed == 18
    exchange(limits, store, 0.0)
    assert store.calls == 0
    assert sum(request(limits, ACCOUNT, 0.0) is None for _ in range(1000)) == 300 + 18, "half a burst was leased"
    exchange(limits, store, 0.0)
    assert sum(request(limits, ACCOUNT, 0.0) is None for _ in range(1000)) == 600 - 300 - 18 - 18


def test_debts_are_charged_even_if_nothing_is_left() -> None:
    a, b = routers(2)
    store, small = FakeStore(), Account("t", "free", requests=Rate(10, 10))
    while request(a, small, 0.0) is None:
        exchange(a, store, 0.0)
    assert request(b, small, 0.0) is None, "it does not know yet"
    exchange(b, store, 0.0)
    assert request(b, small, 0.0) is Refusal.RATE_LIMITED
    assert store.tats[("t", "requests", "")] == pytest.approx(66.0), "eleven were taken"
    assert request(b, small, 6.1) is Refusal.RATE_LIMITED, "the eleventh is paid for first"


def test_a_refusal_says_when_something_is_there_again() -> None:
    [limits] = routers(1)
    store, account = FakeStore(), Account("t", "free", requests=Rate(10, 10))
    while request(limits, account, 0.0) is None:
        exchange(limits, store, 0.0)
    reject = limits.check(Request(account=account), 1, 0.0, 2.0)
    assert reject is not None
    assert reject.retry_after_s == pytest.approx(4.0)
    assert reject.allowance is not None
    assert reject.allowance.requests is not None
    assert reject.allowance.requests.remaining == 0


def test_what_is_not_spent_goes_back_in_time_for_others() -> None:
    a, b = routers(2)
    store, account = FakeStore(), Account("t", "free", requests=Rate(10, 10))
    assert request(a, account, 0.0) is None
    exchange(a, store, 0.0)  # and a leases half of the rest
    passed = 0
    while request(b, account, 0.1) is None:
        passed += 1
        exchange(b, store, 0.1)
    assert passed < 9
    exchange(a, store, TTL_S)
    assert request(b, account, TTL_S) is Refusal.RATE_LIMITED, "but now it asks again"
    exchange(b, store, TTL_S)
    while request(b, account, TTL_S + 0.2) is None:
        passed += 1
        exchange(b, store, TTL_S + 0.2)
    assert passed == 9


def test_a_lease_that_ended_is_not_spent() -> None:
    lease = Lease(KEY, RATE)
    lease.spend(1.0)
    ask = lease.ask(1, 0.0)
    lease.told(Told(KEY, ask.want, 0.0), 0.0, TTL_S)
    assert lease.wait_s(1.0, 0.5) == 0.0
    assert lease.left == 300
    assert lease.wait_s(0.0, TTL_S) == AGAIN_S
    assert (lease.left, lease.back) == (0.0, 300.0)


def test_a_lease_does_not_live_longer_because_another_came_on_top() -> None:
    lease = Lease(KEY, RATE)
    for at in (0.0, 0.6):
        lease.spend(200.0)
        ask = lease.ask(1, at)
        lease.told(Told(KEY, ask.want, 0.0), at, TTL_S)
    assert lease.left > 0
    assert lease.until == TTL_S


def test_tokens_that_were_not_needed_go_back_to_all() -> None:
    [limits] = routers(1)
    store, account = FakeStore(), Account("t", "free", tokens=Rate(6000, 6000))
    limits.take("f", account, 500.0, 0.0)
    exchange(limits, store, 0.0)
    lease = limits._leases["t", "tokens", ""]
    left = lease.left
    limits.settle("f", Outcome(End.OK, usage=Usage(100, 50)), 100, 50.0)
    assert lease.left == left, "here they might be spent too late"
    [ask] = limits.asks(0.1)
    assert ask.charge == -350.0


def test_an_answer_that_never_came_leaves_the_debt() -> None:
    lease = Lease(KEY, RATE)
    lease.spend(3.0)
    assert lease.ask(1, 0.0).charge == 3.0
    assert lease.wait_s(3.0, 0.0) == AGAIN_S, "a debt under way is still one"
    lease.unheard()
    assert lease.ask(1, 0.0).charge == 3.0


def test_while_the_store_is_away_each_router_has_its_own_meter_or_lets_nobody_in() -> None:
    [opened], [closed] = routers(1, loss=Loss.OPEN), routers(1, loss=Loss.CLOSED)
    small = Account("t", "free", requests=Rate(10, 10))
    opened.unheard([])
    closed.unheard([])
    assert [request(opened, small, 0.0) for _ in range(11)] == [None] * 10 + [Refusal.RATE_LIMITED]
    assert request(closed, small, 0.0) is Refusal.LIMITS_UNKNOWN
    assert request(closed, Account("t", "free"), 0.0) is None, "without limits there is nothing to know"


def test_idle_leases_are_forgotten() -> None:
    [limits] = routers(1)
    store = FakeStore()
    request(limits, ACCOUNT, 0.0)
    for t in (0.0, 1.0, 2.0, 70.0, 71.0):
        exchange(limits, store, t)
    assert "0 leases" in repr(limits)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("per_minute", [10, 100, 1200])
@pytest.mark.parametrize("seed", range(4))
def test_no_window_has_more_than_is_promised(count: int, per_minute: int, seed: int) -> None:
    """Routers that are flooded in turn or together, an answer of the store now and then lost or late."""
    rng, rate = Random(f"{count} {per_minute} {seed}"), Rate(per_minute, per_minute)
    account = Account("t", "free", requests=rate)
    members, store = routers(count), FakeStore()
    passed: list[float] = []
    under_way: list[tuple[float, Limits, object]] = []
    now, victim = 0.0, members[0]
    while now < 30.0:
        now += rng.expovariate(500)
        if rng.random() < 0.01:
            victim = rng.choice(members)
        if request(rng.choice((victim, rng.choice(members))), account, now) is None:
            passed.append(now)
        limits = rng.choice(members)
        if asks := limits.asks(now, sweep=rng.random() < 0.2):
            store.now = now
            under_way.append((now + rng.expovariate(100), limits, [store._lease(ask) for ask in asks]))
        for due in [each for each in under_way if each[0] <= now]:
            under_way.remove(due)
            due[1].told(due[2], now)  # type: ignore[arg-type]
    most, debts = overshoot(rate, count) * per_minute, count * credit(rate, count)
    assert debts <= most
    first = 0
    for i, last in enumerate(passed):
        while passed[first] < last - 10.0:
            first += 1
        for start in (0, first):
            allowed = rate.burst + (last - passed[start]) / rate.interval_s
            assert i - start + 1 <= allowed + most + 1e-6
    assert len(passed) > 0.9 * (rate.burst + 30.0 / rate.interval_s) - 1, "nor is much less given"


def test_the_bound_is_five_percent_for_limits_that_are_not_tiny() -> None:
    assert overshoot(Rate(1200, 1200), 4) < 0.05
    assert overshoot(Rate(140, 140), 4) < 0.05
    assert overshoot(Rate(10, 10), 4) == pytest.approx(1 / 60 + 0.4), "one request for each router"


def test_a_lease_that_ends_by_time_is_given_back_by_a_sweep() -> None:
    [limits] = routers(1)
    store = FakeStore()
    assert request(limits, ACCOUNT, 0.0) is None
    exchange(limits, store, 0.0, sweep=False)
    assert limits.asks(0.5, sweep=True) == [], "it is still good"
    [ask] = limits.asks(TTL_S, sweep=True)
    assert ask.charge == -300, "all that was leased"
    limits.told([store._lease(ask)], TTL_S)
    assert limits.asks(TTL_S + 1.0, sweep=True) == [], "nothing is left to give back"


def test_leases_that_rest_are_forgotten_though_not_all_at_once() -> None:
    [limits] = routers(1)
    store = FakeStore()
    for i in range(count := 2 * FORGOTTEN + 1):
        assert request(limits, Account(f"t{i}", "free", requests=RATE), 0.0) is None
    left = []
    for now in range(20):
        exchange(limits, store, float(now))
        left.append(len(limits._leases))
    assert any(0 < n < count for n in left), left
    assert left[-1] == 0, left


def test_an_explanation_asks_for_nothing() -> None:
    [limits] = routers(1)
    asked = Request(account=ACCOUNT)
    limits.would_refuse(asked, 1, 0.0, 0.0)
    limits.allowance(ACCOUNT, 0.0)
    assert limits.asks(0.0, sweep=True) == []
    assert (limits._leases, limits._meters) == ({}, {})


def test_strict_limits_lease_what_is_waited_for_and_nothing_ahead() -> None:
    a, b = routers(2, strict=True)
    store = FakeStore()
    small = Account("t", "free", requests=Rate(10, 10))

    def ask(limits: Limits, waiting: int) -> list[Refusal | None]:
        """So many requests at once, each after it waited for a lease."""
        while keys := limits.lacks([small], 0.0):
            asks = limits.asks(0.0, dict.fromkeys(keys, waiting))
            limits.told([store._lease(each) for each in asks], 0.0)
            assert asks, "it would wait for ever"
        return [request(limits, small, 0.0) for _ in range(waiting)]

    assert ask(a, 1) == [None]
    assert a.lacks([small], 0.0) == [KEY], "nothing is left here that would be missing there"
    assert ask(b, 4) == [None] * 4
    assert [ask(a, 1) for _ in range(5)] == [[None]] * 5
    assert ask(a, 1) == ask(b, 1) == [Refusal.RATE_LIMITED]
    assert request(a, small, TTL_S) is Refusal.RATE_LIMITED
    [asked] = a.asks(TTL_S)
    assert asked.want == 0, "it only asks whether others gave something back"
