"""Replicas of one pool: who is a member, what each last said of itself, and who may be chosen now."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Final

from extproc.core.flights import Flight, Load
from extproc.core.health.progress import silence_s
from extproc.core.health.replica import Health, Report, untold
from extproc.core.health.settings import HealthSettings
from extproc.core.health.states import Reason, State
from extproc.core.lora import Held, Wanted
from extproc.core.peers import Others, Peers
from extproc.core.ranks import endpoint_of
from extproc.core.speed import Shared, Speed
from extproc.core.steptime import prior
from extproc.core.types import Add, Change, GpuSampled, PeerLoad, Probe, Remove, Replica, Reset, Sample, ScrapeFailure

FAILED_OPEN: Final = "failed_open"
"""The reason of decisions among replicas that are all out."""
TRIAL_S: Final = 1.0
"""A policy that knows cached prefixes elsewhere may never choose a replica that lost its own. Sooner would cost requests whose
cache is elsewhere; later keeps a well replica idle, and each trial waits so long."""
GPU_STALE_S: Final = 60.0
"""Exporters of GPU metrics look every 30 s by default (NVIDIA's dcgm-exporter), and twice that is too old to count."""
STRANGERS_S: Final = 10.0
"""Requests of others are averaged over about so many seconds. The last sample alone would be the same for all routers that
read it, and would send all of them to the same replica."""


class Member:
    """One replica with all that is known of it."""

    __slots__ = (
        "answered_at",
        "began_at",
        "cache_share",
        "engine",
        "gpu",
        "gpu_at",
        "health",
        "heard_at",
        "held_at_sample",
        "hit_trust",
        "joined_at",
        "late_scrapes",
        "latency_s",
        "load",
        "models",
        "opened_at_gpu",
        "opened_at_sample",
        "others",
        "parents",
        "replica",
        "sample",
        "sampled_at",
        "scraped",
        "speed",
        "stale_after_s",
        "strangers",
    )

    def __init__(
        self,
        replica: Replica,
        now: float,
        scraped: bool,
        stale_after_s: float,
        learned: Shared | None = None,
        settings: HealthSettings = HealthSettings(),  # noqa: B008  # nobody changes it
        slow_from: float = math.inf,
        report: Report = untold,
    ) -> None:
        """`learned`: what is learned together with the other members; None for one alone. The rest is for its health."""
        self.replica = replica
        self.scraped = scraped
        """Whether samples are to be expected at all."""
        self.stale_after_s = stale_after_s
        self.joined_at = self.began_at = now
        """When it became a member, and when the process that is there now was first heard of."""
        self.sample: Sample | None = None
        self.sampled_at: float | None = None
        self.late_scrapes = 0
        """Scrapes in a row that brought nothing, though something listens."""
        self.engine: str | None = None
        """What runs there, by its metrics; None while these say nothing of use, or nobody asked."""
        self.gpu: GpuSampled | None = None
        """How much its GPUs were used when last heard of, at `gpu_at`."""
        self.gpu_at = now
        self.opened_at_gpu = 0
        """Our own requests there then."""
        self.models: tuple[str, ...] = ()
        self.parents: Mapping[str, str] = {}
        """Of the LoRA adapters among its models: the base model."""
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
        """Requests that the replica has from others than us and those routers that tell us theirs, by its samples of the last
        seconds."""
        self.others: Others | None = None
        """What other routers told that they have there; None where there is no such router."""
        self.opened_at_sample = 0
        self.held_at_sample = 0.0
        """Our own requests and their tokens there when the sample came."""
        self.heard_at = now
        """Last sign of work: a byte, an answer, or a counter of tokens that moved."""
        self.health = Health(settings, now, scraped=scraped, drain=_drains(replica), slow_from=slow_from, report=report)

    def __repr__(self) -> str:
        age = "never sampled" if self.sampled_at is None else f"sampled at {self.sampled_at:.3f}"
        return f"<member {self.address} {self.health}, {len(self.load)} in flight, {age}>"

    @property
    def address(self) -> str:
        return self.replica.address

    def fresh(self, now: float) -> Sample | None:
        """The last sample unless it is too old to count."""
        if self.sampled_at is None or now - self.sampled_at > self.stale_after_s:
            return None
        return self.sample

    def state(self, now: float) -> State:
        """Whether and how much it may be chosen."""
        return self.health.state(now)

    def sampled(self, sample: Sample, now: float) -> bool:
        """Take in a scrape. True if its cache is empty since the last one: the engine restarted (a counter went back, or nothing
        listened), or slept.
        """
        before, elapsed_s = self.sample, math.inf if self.sampled_at is None else now - self.sampled_at
        self.sample, self.sampled_at = sample, now
        if before is not None:
            self.speed.fade(elapsed_s)
        restarts = self.health.restarts
        self.health.heard(now, other=before is not None and _went_back(before, sample))
        self.late_scrapes = 0
        if sample.running is not None and sample.waiting is not None:
            known = self.load.requests + (self.others.requests if self.others is not None else 0)
            strangers = max(0, sample.running + sample.waiting - known)
            self.strangers += (strangers - self.strangers) * (1.0 - math.exp(-elapsed_s / STRANGERS_S))
        self.opened_at_sample, self.held_at_sample = self.load.requests, self.load.held_tokens
        if before is not None and _moved(before, sample):
            self.worked(now)
        woke = self.health.slept(sample.awake is False, now)
        restarted = self.health.restarts != restarts
        if restarted:
            self._began(now)
        if sample.adapters is not None:
            if self.load.lora is None:
                self.load.lora = Held()
            self.load.lora.sampled(sample.adapters, now)
        return restarted or woke

    def identified(self, engine: str | None, now: float) -> bool:
        """What runs there is known. True if it is another engine than the one before, and so another process."""
        before, self.engine = self.engine, engine
        if engine is None or before is None or before == engine:
            return False
        restarts = self.health.restarts
        self.health.heard(now, other=True)
        return self._replaced(restarts, now)

    def gpu_sampled(self, fact: GpuSampled, now: float) -> None:
        """How much its GPUs are used came."""
        self.gpu, self.gpu_at, self.opened_at_gpu = fact, now, len(self.load)

    def gpu_use(self, now: float) -> float | None:
        """Share of the time with work on its GPUs; None where that is unknown, or was heard too long ago."""
        return None if self.gpu is None or now - self.gpu_at > GPU_STALE_S else self.gpu.use

    def not_sampled(self, why: ScrapeFailure, now: float) -> None:
        """A scrape failed. A late page leaves the sample to age; only a refused connection says that nobody is there."""
        if why is ScrapeFailure.REFUSED:
            self.health.refused(now)
        else:
            self.late_scrapes += 1

    def probed(self, probe: Probe, ok: bool, now: float) -> bool:
        """A check came back. True if another process is there than before."""
        restarts = self.health.restarts
        self.health.probed(probe, ok, now)
        if ok and probe is Probe.DEEP:
            self.worked(now)
        return self._replaced(restarts, now)

    def _replaced(self, restarts: int, now: float) -> bool:
        """Whether another process is there than when it had restarted so often."""
        if self.health.restarts == restarts:
            return False
        # The sample is of the process before: its counters would make the next page a restart again.
        self.sample = self.sampled_at = None
        self._began(now)
        return True

    def _began(self, now: float) -> None:
        """Another process is there, as of now."""
        self.began_at = now
        self.strangers = 0.0  # what others had there has ended with the process before
        if self.load.lora is not None:
            self.load.lora.restarted()

    def worked(self, now: float) -> None:
        """It gave a sign of work."""
        self.heard_at = now
        self.health.worked(now)

    def failed(self, now: float, flight: Flight | None = None) -> None:
        """A request that was sent there found no connection, a 5xx, or no end. `flight`: None for one sent just now."""
        since = self.health.failing_since
        working = self.heard_at > since and any(running.routed_at < since for running in self.load)
        self.health.failed(now if flight is None else flight.routed_at, now, working)

    def answered(self, duration_s: float, now: float, flight: Flight | None = None) -> bool:
        """A request that was sent there was answered, after `duration_s`. `flight`: None for one sent just now.

        True if another process is there than before.
        """
        self.latency_s = _average(self.latency_s, duration_s)
        self.answered_at = now
        self.worked(now)
        if flight is not None and flight.vouched:
            return False
        restarts = self.health.restarts
        self.health.succeeded(now if flight is None else flight.routed_at, now)
        return self._replaced(restarts, now)

    def began(self, flight: Flight, now: float) -> None:
        """The first token of a request came. On trial that counts as its success: the next need not wait for its last."""
        if self.health.trial == flight.id:
            flight.vouched = True
            self.health.released(flight.id)
            self.health.succeeded(flight.routed_at, now)

    def expire(self, now: float) -> None:
        """Notice what time has changed: states that end, and work that makes no progress."""
        if self.load.requests:
            # What the process before had will bring no byte, and says nothing of this one.
            # Nor does a stream whose prompt another computes, until its first token: there it stands in the legs. Where no first
            # token shows it may be either of them, and a sign of work for whichever request clears the one that is well.
            flights = [f for f in self.load if f.routed_at >= self.began_at and not (f.leg and f.shows_first_token)]
            legs = (leg if leg.shows_first_token else leg.whole for leg in self.load.legs)
            flights += [leg for leg in legs if leg is not None and leg.routed_at >= self.began_at]
            silent_s = silence_s(flights, self.heard_at, self._counted(now), self.health.settings, now)
            if silent_s:
                self.health.silent_for(silent_s, now)
        oldest = min((flight.routed_at for flight in self.load), default=None) if self.health.waits else None
        self.health.expire(now, oldest)

    def _counted(self, now: float) -> bool:
        """Whether its counters of tokens are known as of now."""
        sample = self.sample
        if (
            sample is None
            or self.sampled_at is None
            or sample.counted_at_end
            or (sample.generated_tokens is None and sample.prompt_tokens is None)
        ):
            return False
        return now - self.sampled_at <= self.health.settings.hang_s / 2

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

    def backlog_s(self, now: float) -> float:
        """Predicted seconds until all prefill queued there is done, ours and that of the routers that tell us theirs."""
        ours_s = self.load.backlog_s(now)
        if self.others is None or not (theirs_s := self.others.backlog_s(now)):
            return ours_s
        # Between ours, theirs may stand already; what they told last stands at least before whatever comes now.
        return max(ours_s, self.load.work_s(now) + theirs_s)

    def prefilling(self, now: float) -> int:
        """Requests there whose first token is still to come, as far as we know, are told, or believe."""
        ours = self.load.prefilling(now)
        return ours if self.others is None else ours + self.others.prefilling

    def has_slot(self, wanted: Wanted, now: float) -> bool:
        """Whether a request for the LoRA adapter could join the batch there, however long the queue."""
        held = self.load.lora
        return held is None or held.open_to(wanted, self.fresh(now) is not None)

    def awaiting_adapter(self, now: float) -> int:
        """Our requests there that wait for a slot for their LoRA adapter, and let others pass."""
        held = self.load.lora
        return 0 if held is None else held.waiting(self.fresh(now) is not None)

    def queued(self, now: float) -> int | None:
        """Requests waiting there: the last sample, and what we sent or saw end since. None without a fresh sample."""
        sample = self.fresh(now)
        if sample is None or sample.waiting is None:
            return None
        return max(0, sample.waiting + self.load.requests - self.opened_at_sample)


def _drains(replica: Replica) -> bool:
    return replica.drain or replica.labels.get("drain") == "true"


def _moved(before: Sample, after: Sample) -> bool:
    pairs = ((before.prompt_tokens, after.prompt_tokens), (before.generated_tokens, after.generated_tokens))
    return any(b is not None and a is not None and a > b for b, a in pairs)


def _went_back(before: Sample, after: Sample) -> bool:
    if before.counted_at_end is not after.counted_at_end:
        return False  # other counters of the same engine
    pairs = ((before.prompt_tokens, after.prompt_tokens), (before.generated_tokens, after.generated_tokens))
    return any(b is not None and a is not None and a < b for b, a in pairs)


def _average(before: float | None, value: float) -> float:
    return value if before is None else before + 0.2 * (value - before)


Changed = Callable[[str, State, State, Reason], None]
"""Takes an address, the state of its replica before and after, and why it changed."""


def _unheard(address: str, before: State, after: State, reason: Reason) -> None:
    """Changes of health that nobody wants to know of."""


class Fleet:
    """The members of one pool, in the order in which discovery named them."""

    def __init__(
        self,
        scraped: bool = True,
        stale_after_s: float = 10.0,
        health: HealthSettings = HealthSettings(),  # noqa: B008  # nobody changes it
        changed: Changed = _unheard,
    ) -> None:
        self._members: dict[str, Member] = {}
        self._learned = Shared()
        self._scraped = scraped
        self._stale_after_s = stale_after_s
        self._health = health
        self._changed = changed
        self._slow_from = math.inf
        self.trial_due: str | None = None
        """Who is on probation, and was not chosen for `TRIAL_S`: the next request goes there, whatever the policy says."""

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"<fleet {list(self._members.values())}>"

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def get(self, address: str) -> Member | None:
        return self._members.get(address)

    def configure(self, stale_after_s: float, health: HealthSettings | None = None) -> None:
        """Go on with other settings."""
        self._stale_after_s = stale_after_s
        self._health = health or self._health
        for member in self._members.values():
            member.stale_after_s = stale_after_s
            member.health.configure(self._health)

    def apply(self, change: Change, now: float) -> list[str]:
        """Take in a change of membership. Returns the addresses that left."""
        if not self._members:
            # Of those that join now nobody is new to the others: all get their full share as soon as they are heard of.
            self._slow_from = now + self._health.slow_start_s
        match change:
            case Add(replica=replica):
                self._join(replica, now)
                return []
            case Remove(address=address):
                return self._leave([address], now)
            case Reset(replicas=replicas):
                listed = {r.address for r in replicas}
                gone = self._leave([a for a in self._members if a not in listed], now)
                for replica in replicas:
                    self._join(replica, now)
                return gone

    def _join(self, replica: Replica, now: float) -> None:
        """A known address keeps its load and what was learned there, unless its labels say that it is other hardware."""
        member = self._members.get(replica.address)
        if member is None:
            self._members[replica.address] = Member(
                replica,
                now,
                self._scraped,
                self._stale_after_s,
                self._learned,
                self._health,
                self._slow_from,
                partial(self._changed, replica.address),
            )
            return
        if _hardware(member.replica) != _hardware(replica):
            member.speed = Speed(prior(replica.labels), self._learned)
        member.replica = replica
        member.health.listed(_drains(replica), now)

    def _leave(self, addresses: Collection[str], now: float) -> list[str]:
        left = [address for address in addresses if address in self._members]
        for address in left:
            self._members.pop(address).health.left(now)
        return left

    def loaded(self, peer: str, loads: Mapping[str, PeerLoad | None], at: float, now: float) -> None:
        """Another router has these loads on members since `at`; None for nothing."""
        for address, load in loads.items():
            member = self._members.get(address)
            if member is None:
                continue
            others = member.others = member.others or Others()
            others.put(peer, load, at, now)
            if not others:
                member.others = None

    def judged(self, addresses: Iterable[str], peers: Peers, now: float) -> None:
        """Other routers told what they have against these members."""
        for address in addresses:
            if (member := self._members.get(address)) is not None:
                against = peers.against(address)
                member.health.told(against.out, against.draining, against.ends_at, now)

    def expire(self, now: float, answers: Callable[[Member], bool] | None = None) -> None:
        """Notice what time has changed. To be called several times a second. `answers`: who gets requests; None for all."""
        for member in self._members.values():
            member.expire(now)
        due = (m.address for m in self._members.values() if _waits_for_trial(m, now) and (not answers or answers(m)))
        self.trial_due = next(due, None)

    def absent(self, now: float) -> bool:
        """Whether there is nobody that anything could be sent to: nothing listens on any member, or there is none."""
        return all(m.health.unreachable(now) for m in self._members.values())

    def candidates(
        self, now: float, subset: frozenset[str] | None = None, among: Callable[[Member], bool] | None = None
    ) -> list[Member]:
        """Who may be chosen, in the order of discovery; empty only when nobody is allowed, or nobody is left. The first of:

        1. Those that are ready, those that start slowly and have less than their share, and those on probation that have
           nobody on trial.
        2. Those of which nothing has been heard yet: right after our own start that is everyone.
        3. The least bad of the others, so fail open: better a try, and Envoy's retry, than an error for the whole fleet because
           of what may be our own blindness. Never one that is gone.

        `among`: the others are as if they were no members.
        """
        allowed: Collection[Member] = self._members.values()
        if among is not None:
            allowed = [m for m in allowed if among(m)]
        if subset is not None:
            allowed = [m for m in allowed if _named(endpoint_of(m.address), subset)]
        ready = [m for m in allowed if m.health.state(now) is State.READY]
        if len(ready) == len(allowed):
            return ready
        usual = sum(len(m.load) for m in ready) / len(ready) if ready else None
        if eligible := [m for m in allowed if _eligible(m, usual, now)]:
            return eligible
        if starting := [m for m in allowed if m.health.state(now) is State.STARTING]:
            return starting
        return _least_bad(allowed, now)


def _named(endpoint: str, subset: frozenset[str]) -> bool:
    return endpoint in subset or endpoint.rpartition(":")[0] in subset


def _waits_for_trial(member: Member, now: float) -> bool:
    state, _, since = member.health.why(now)
    return state is State.PROBATION and member.health.trial is None and now - since >= TRIAL_S


def _hardware(replica: Replica) -> dict[str, str]:
    return {key: value for key, value in replica.labels.items() if key != "drain"}


def _eligible(member: Member, usual: float | None, now: float) -> bool:
    """`usual`: requests in flight on a ready member, on average; None where none is ready."""
    match member.health.state(now):
        case State.READY:
            return True
        case State.SLOW_STARTING:
            return usual is None or len(member.load) < max(member.health.share(now) * usual, 1.0)
        case State.PROBATION:
            return member.health.trial is None
        case _:
            return False


def _badness(member: Member, now: float) -> int:
    """How little hope there is: 0 may well work, 1 failed, 2 works but shall not, 3 hangs or goes, 4 is not there or sleeps."""
    match member.health.why(now):
        case State.OPEN, Reason.REFUSED | Reason.ASLEEP, _:
            return 4
        case (State.OPEN, Reason.SILENT, _) | (State.DRAINING, Reason.SHUTTING_DOWN, _):
            return 3
        case State.DRAINING, _, _:
            return 2
        case State.OPEN, _, _:
            return 1
        case _:
            return 0


def _least_bad(allowed: Collection[Member], now: float) -> list[Member]:
    there = [(_badness(m, now), m) for m in allowed if m.health.state(now) is not State.GONE]
    least = min((badness for badness, _ in there), default=None)
    return [m for badness, m in there if badness == least]
