"""Limits of tenants: requests and tokens a minute, requests in flight, the longest prompt; by tier, tenant and model.

A request is checked when it comes, before it is placed or held, and counted once it is. What it may take in tokens is estimated then and
settled when it has ended. Counting is keyed by the id of the flight, or the ticket while it waits, so that every end finds what it has to
undo, whatever the path. A refused request counts for nothing.

Alone, a router keeps all meters itself. Among several it spends leases beside that (`leases.py`): its own meters then bound what this
router lets pass, whatever the others do, and are all there is while the store is away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum
from math import ceil
from typing import Final

from extproc.core.account import Account, Allowance, Quota, Rate
from extproc.core.admission.gcra import Meter, quota
from extproc.core.admission.in_flight import InFlight
from extproc.core.admission.leases import TTL_S, Ask, Key, Lease, Told, credit
from extproc.core.record import record
from extproc.core.types import End, Outcome, Refusal, Reject, Request

FORGOTTEN: Final = 1000
"""Leases looked at in each sweep for whether they may be forgotten. All at once would be 10 ms for ten thousand tenants."""
MAX_METERS: Final = 200_000
"""Meters kept, two for each tenant as a rule and 300 bytes each. Beyond, the one not used for longest is forgotten, and its tenant starts anew."""

NOTHING: Final[Mapping[Key, int]] = {}
Rated = tuple[tuple[Key, Rate], float]
"""A meter and a cost."""


class Loss(StrEnum):
    """What holds while the store of shared limits is away."""

    OPEN = "open"  # the router's own meters alone: each router lets pass what all may together
    CLOSED = "closed"  # nothing of who has such limits


@record
class Sharing:
    """How limits are kept with other routers."""

    ttl_s: float = TTL_S
    """Seconds for which a lease is good."""
    loss: Loss = Loss.OPEN
    strict: bool = False
    """No credit, and nothing is leased ahead: who has no lease is to ask first, and what is not needed is nowhere missing."""


@record
class Charge:
    """What one request was counted as."""

    account: Account
    tokens: float
    """As estimated."""


@record
class Tally:
    """Requests of one tier, or of a tenant that is named in metrics, by what became of them."""

    tier: str
    label: str
    result: str
    """`admitted`, or the refusal."""


class Limits:
    """What tenants have taken, and whether more is allowed."""

    def __init__(self) -> None:
        self._meters: dict[Key, Meter] = {}  # in the order of last use
        self.in_flight = InFlight()
        self._charges: dict[str, Charge] = {}
        self._leases: dict[Key, Lease] = {}
        self._stirred: set[Key] = set()
        """Leases of which something became different since the last ask."""
        self._restless: set[Key] = set()
        """Those that may have something to ask when time has passed."""
        self._unexamined: list[Key] = []
        """Those that are still to be looked at for whether they may be forgotten."""
        self.sharing: Sharing | None = None
        """None where this router is alone."""
        self.away = True
        """The store has not answered yet, or no longer does. Matters only with `sharing`."""
        self.routers: Callable[[], int] = lambda: 1
        """How many share the limits, this one included."""
        self.wake: Callable[[], None] = lambda: None
        """Called when the store should be asked."""
        self.results: Counter[Tally] = Counter()
        self.tokens: Counter[tuple[str, str]] = Counter()
        """By tier and label: tokens used, as far as settled."""

    def __repr__(self) -> str:
        shared = "" if self.sharing is None else f", {len(self._leases)} leases{' away' if self.away else ''}"
        return f"<limits {len(self._charges)} counted, {len(self._meters)} meters{shared}>"

    def __contains__(self, counted: str) -> bool:
        return counted in self._charges

    @property
    def counted(self) -> Iterable[str]:
        """Ids of the flights and tickets that are counted."""
        return self._charges.keys()

    # --- requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request, prompt_tokens: int, output_tokens: float, now: float) -> Reject | None:
        """The refusal, if the request exceeds a limit; counts nothing. Estimates in tokens; `request.account` must be there."""
        account = request.account
        assert account is not None
        reject = self.would_refuse(request, prompt_tokens, output_tokens, now)
        if reject is None:
            return None
        self.results[Tally(account.tier, account.label, reject.refusal.value)] += 1
        if reject.refusal is Refusal.CONCURRENCY:
            self._moved(_in_flight(account))
        for key, _ in _rates(account):
            self._meter(key)  # it is in use
            lease = self._leases.get(key)
            if lease is not None and lease.refused(now):
                self._stir(key)
        return reject

    def would_refuse(self, request: Request, prompt_tokens: int, output_tokens: float, now: float) -> Reject | None:
        """As `check`, and changes nothing."""
        account = request.account
        assert account is not None
        refusal, wait_s = self._exceeds(account, prompt_tokens, prompt_tokens + output_tokens, now)
        if refusal is None:
            return None
        left = self.allowance(account, now)
        return Reject(refusal, request.model, retry_after_s=wait_s, allowance=left, limit=_limit(account, refusal))

    def take(self, counted: str, account: Account, tokens: float, now: float) -> None:
        """Count a request that was placed or held under this id."""
        self._charges[counted] = Charge(account, tokens)
        self.results[Tally(account.tier, account.label, "admitted")] += 1
        if account.in_flight is not None:
            self.in_flight.began(_in_flight(account))
            self._moved(_in_flight(account))
        for (key, rate), cost in _costs(account, tokens):
            self._meter(key).take(cost, rate, now)
            if self.sharing is not None:
                self._spend(key, rate, cost)

    def turned(self, ticket: str, flight: str) -> None:
        """A held request was placed: from now on its flight is what ends."""
        if (charge := self._charges.pop(ticket, None)) is not None:
            self._charges[flight] = charge

    def refund(self, counted: str) -> None:
        """It was refused or left before it was placed: as if it had not come."""
        if (charge := self._charges.pop(counted, None)) is not None:
            self._gone(charge.account)
            self._settle(charge, back=1.0, tokens=0.0)

    def settle(self, flight: str, outcome: Outcome, prompt_tokens: int, output_tokens: float | None) -> None:
        """The flight ended. `prompt_tokens` are those estimated, `output_tokens` those reported or estimated by size."""
        if (charge := self._charges.pop(flight, None)) is None:
            return
        account = charge.account
        self._gone(account)
        used = _used(outcome, prompt_tokens, output_tokens)
        self._settle(charge, back=1.0 if used == 0 and _in_vain(outcome) else 0.0, tokens=used)
        self.tokens[(account.tier, account.label)] += round(charge.tokens if used is None else used)

    def allowance(self, account: Account, now: float) -> Allowance:
        """What is left, as far as this router knows."""
        quotas = {key[1]: self._quota(key, rate, now) for key, rate in _rates(account)}
        return Allowance(quotas.get("requests"), quotas.get("tokens"))

    # --- sharing ------------------------------------------------------------------------------------------------------

    def lacks(self, accounts: Iterable[Account], now: float) -> list[Key]:
        """The leases without which requests for these accounts would have to run into debt."""
        rated = dict(pair for account in accounts for pair in _rates(account))
        return [key for key, rate in rated.items() if self._lease(key, rate).lacks(now)]

    def asks(self, now: float, wanted: Mapping[Key, int] = NOTHING, sweep: bool = False) -> list[Ask]:
        """What to tell the store now. `wanted` says how many requests wait for a unit of each.

        `sweep` looks also at those that may have ended by time, and forgets some of the idle; otherwise only at those of which
        something became different.
        """
        routers = max(self.routers(), 1)
        for key, waiting in wanted.items():
            if (lease := self._leases.get(key)) is not None:
                lease.wanted = waiting
                self._stirred.add(key)
        looked, self._stirred = self._stirred, set()
        if sweep:
            self._forget(now)
            looked |= self._restless
        asks = []
        for key in looked:
            lease = self._leases.get(key)
            if lease is not None and lease.due(now):
                asks.append(lease.ask(routers, now))
            if lease is None or lease.quiet:
                self._restless.discard(key)
            else:
                self._restless.add(key)
        return asks

    def told(self, answers: Iterable[Told], now: float) -> None:
        """The store answered what `asks` gave."""
        assert self.sharing is not None
        self.away = False
        for each in answers:
            self._leases[each.key].told(each, now, self.sharing.ttl_s)
            self._stirred.add(each.key)

    def unheard(self, asks: Iterable[Ask]) -> None:
        """It did not."""
        self.away = True
        for each in asks:
            self._leases[each.key].unheard()
            self._stirred.add(each.key)

    # --- parts --------------------------------------------------------------------------------------------------------

    def _exceeds(
        self, account: Account, prompt_tokens: int, tokens: float, now: float
    ) -> tuple[Refusal | None, float | None]:
        """The first limit in the way, and when to come again."""
        if (longest := account.max_prompt_tokens) is not None and prompt_tokens > longest:
            return Refusal.PROMPT_TOO_LONG, None
        if account.tokens is not None and prompt_tokens > account.tokens.burst:
            return Refusal.PROMPT_TOO_LONG, None  # it would have to wait for ever
        most = account.in_flight
        if most is not None and self.in_flight.of(_in_flight(account), now) >= most.count:
            return Refusal.CONCURRENCY, None
        if self.sharing is not None and self.away and self.sharing.loss is Loss.CLOSED and _rates(account):
            return Refusal.LIMITS_UNKNOWN, None
        waits = [(self._wait_s(key, rate, cost, now), key[1]) for (key, rate), cost in _costs(account, tokens)]
        wait_s, kind = max(waits, default=(0.0, ""))
        if wait_s <= 0:
            return None, None
        return Refusal.RATE_LIMITED if kind == "requests" else Refusal.TOKENS_LIMITED, wait_s

    def _wait_s(self, key: Key, rate: Rate, cost: float, now: float) -> float:
        wait_s = (self._meters.get(key) or Meter()).wait_s(cost, rate, now)
        if self.sharing is None or self.away:
            return wait_s
        allowed = 0.0 if self.sharing.strict else credit(rate, max(self.routers(), 1))
        lease = self._leases.get(key) or Lease(key, rate)
        return max(wait_s, lease.wait_s(allowed, now))

    def _quota(self, key: Key, rate: Rate, now: float) -> Quota:
        ours = (self._meters.get(key) or Meter()).quota(rate, now)
        lease = self._leases.get(key)
        if lease is None or self.away:
            return ours
        everybodys = quota(rate, max(lease.whole_at - now, 0.0))
        spendable = everybodys.remaining + max(ceil(lease.left), 0)  # leased units are charged already
        shared = replace(everybodys, remaining=min(spendable, int(rate.burst)))
        return min(ours, shared, key=lambda q: (q.remaining, -q.reset_s))

    def _meter(self, key: Key) -> Meter:
        meter = self._meters.pop(key, None) or Meter()
        self._meters[key] = meter  # last used, last forgotten
        if len(self._meters) > MAX_METERS:
            del self._meters[next(iter(self._meters))]
        return meter

    def _lease(self, key: Key, rate: Rate) -> Lease:
        lease = self._leases.get(key)
        if lease is None:
            lease = Lease(key, rate, ahead=self.sharing is None or not self.sharing.strict)
            if len(self._leases) >= MAX_METERS:
                return lease  # lives on credit, which is not remembered; its own meter still holds
            self._leases[key] = lease
        lease.rate = rate
        return lease

    def _forget(self, now: float) -> None:
        """Some of the leases of which nothing is left to do; all are looked at in turn."""
        if not self._unexamined:
            self._unexamined = list(self._leases)
        for key in self._unexamined[-FORGOTTEN:]:
            lease = self._leases.get(key)
            if lease is not None and lease.rests and now >= lease.whole_at:
                del self._leases[key]
        del self._unexamined[-FORGOTTEN:]

    def _spend(self, key: Key, rate: Rate, cost: float) -> None:
        lease = self._lease(key, rate)
        lease.spend(cost)
        self._stir(key)

    def _stir(self, key: Key) -> None:
        self._stirred.add(key)
        self.wake()

    def _settle(self, charge: Charge, back: float, tokens: float | None) -> None:
        """Correct the count: `back` requests, and `tokens` used instead of those estimated, where that is known."""
        for (key, rate), cost in _costs(charge.account, charge.tokens):
            over = back if key[1] == "requests" else cost - (cost if tokens is None else tokens)
            if over == 0:
                continue
            if (meter := self._meters.get(key)) is not None:
                meter.give_back(over, rate)
            if self.sharing is not None:
                lease = self._lease(key, rate)
                if over > 0:
                    lease.regain(over)
                else:
                    lease.spend(-over)
                self._stir(key)

    def _gone(self, account: Account) -> None:
        if account.in_flight is None:
            return
        self.in_flight.ended(_in_flight(account))
        self._moved(_in_flight(account))

    def _moved(self, key: Key) -> None:
        """The others are to know how many are in flight here, or this router of them."""
        if self.sharing is not None:
            self.in_flight.stir(key)
            self.wake()

    def check_books(self) -> None:
        """Raises AssertionError where what runs is not what was counted."""
        counted = Counter(_in_flight(c.account) for c in self._charges.values() if c.account.in_flight is not None)
        assert counted == self.in_flight.here, (counted, self.in_flight)


def _rates(account: Account) -> list[tuple[Key, Rate]]:
    """The meters of an account."""
    found: list[tuple[Key, Rate]] = []
    for kind, rate in (("requests", account.requests), ("tokens", account.tokens)):
        if rate is not None:
            found.append(((account.tenant, kind, rate.model or ""), rate))
    return found


def _costs(account: Account, tokens: float) -> list[Rated]:
    """What one request takes of each. A token estimate above the burst is counted as the burst, and the rest at the end."""
    return [((key, rate), 1.0 if key[1] == "requests" else min(tokens, rate.burst)) for key, rate in _rates(account)]


def _in_flight(account: Account) -> Key:
    assert account.in_flight is not None
    return (account.tenant, "in_flight", account.in_flight.model or "")


def _limit(account: Account, refusal: Refusal) -> int | None:
    """The number that was exceeded."""
    if refusal is Refusal.CONCURRENCY and account.in_flight is not None:
        return account.in_flight.count
    if refusal is Refusal.PROMPT_TOO_LONG:
        rate = None if account.tokens is None else int(account.tokens.burst)
        limits = [n for n in (account.max_prompt_tokens, rate) if n is not None]
        return min(limits, default=None)
    rate_of = account.requests if refusal is Refusal.RATE_LIMITED else account.tokens
    return None if rate_of is None else int(rate_of.per_minute)


def _used(outcome: Outcome, prompt_tokens: int, output_tokens: float | None) -> float | None:
    """Tokens that the request came to; None where nobody knows, and the estimate stands."""
    usage = outcome.usage
    if usage is not None and usage.prompt_tokens is not None:
        return usage.prompt_tokens + (usage.completion_tokens or 0)
    if outcome.end is End.LOST:
        return None
    if outcome.end is End.CLIENT_ERROR or (not outcome.response_bytes and outcome.end is not End.OK):
        # Nothing was generated for it. One that its client gave up on a replica did occupy that.
        served = outcome.end is End.CLIENT_GONE and outcome.served is not None
        return float(prompt_tokens) if served else 0.0
    return None if output_tokens is None else prompt_tokens + output_tokens


def _in_vain(outcome: Outcome) -> bool:
    """Whether the request failed by no fault of its client, or never reached a replica."""
    if outcome.end is End.CLIENT_GONE:
        return outcome.served is None
    return outcome.end in (End.UNREACHABLE, End.UPSTREAM_ERROR, End.TIMEOUT)
