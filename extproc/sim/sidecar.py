"""One router of a simulated cluster, with what the service puts around it in production: scrapes, checks and the access log.

The router is the one that serves. Facts reach it at the moments at which they would there: samples at the scraper's pace,
checks of health at theirs, ends and progress when the proxy flushes its access log, lost flights by the tick. As in the
service it is asked for turns after each of them, and at the moment that it names itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Final

from extproc.config import EnvoyConfig, Health, Requests, Scrape
from extproc.core.admission.settings import QueueSettings
from extproc.core.health.settings import HealthSettings
from extproc.core.observers import Ended, Quiet
from extproc.core.router import PoolSettings, Router
from extproc.core.scaling.settings import ScalingSettings
from extproc.core.settings import DisaggregationSettings, LoraSettings
from extproc.core.types import (
    Add,
    Decision,
    DrainAsked,
    DrainEnded,
    End,
    Fact,
    NotSampled,
    Outcome,
    PeerReported,
    Probe,
    Probed,
    Progressed,
    Remove,
    Replica,
    Request,
    Reset,
    Sample,
    Sampled,
    ScrapeFailure,
    Serves,
    Turn,
    Verdict,
)
from extproc.sim.kv_events import CacheFact, Events
from extproc.sim.node import Node
from extproc.sim.sharing import Sharing, Store, Word, push, word
from extproc.sim.timeline import Timeline

POOL: Final = "default"
MODEL: Final = "sim"
TICK_S: Final = 0.25
"""As often as the service sweeps."""
SOONEST_S: Final = 0.001
"""The service's timer never fires sooner: a router that names the present moment again and again must not stop time."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """How soon a router learns what; the defaults are those of the service's configuration."""

    scrape_interval_s: float = Scrape().interval_s
    scrape_idle_interval_s: float = Scrape().idle_interval_s
    scrape_age_s: float = 0.0
    """From the moment of which a sample tells to the moment at which it arrives."""
    stale_after_s: float = Scrape().stale_after_s
    log_flush_interval_s: float = EnvoyConfig().log_flush_interval_s
    """The proxy sends its access log so often; 0 sends each entry at once."""
    completion_delay_s: float = 0.0
    """How much later entries of the access log arrive."""
    progress_interval_s: float | None = EnvoyConfig().progress_interval_s
    """Between the entries of a request that runs; None for none."""
    flight_ttl_s: float = Requests().flight_ttl_s
    scaling: ScalingSettings | None = None
    """How many replicas the router says there should be; None where it says nothing."""
    disaggregation: DisaggregationSettings | None = None
    """What it takes transfers of KV caches for; None where every replica answers alone."""
    queue: QueueSettings = field(default_factory=QueueSettings)
    """What the router holds requests by; `NO_QUEUE` places each at once."""
    health: HealthSettings = field(default_factory=HealthSettings)
    health_interval_s: float = Health().interval_s
    """Between checks of a replica that seems well."""
    doubt_interval_s: float = Health().doubt_interval_s
    """Between checks of one that does not."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """What it knows of LoRA adapters beforehand."""
    lists_parents: bool = True
    """Replicas tell that their adapters are such. Without, the router takes each for a model like any other."""
    sharing: Sharing | None = None
    """How it talks with the other routers; None where they do not."""
    events: Events | None = None
    """How replicas tell of their KV caches; None where they do not, and prompts are not tokenized."""
    prior_error: float = 1.0
    """The router begins with step times wrong by this factor."""
    prior_error_every: int = 1
    """Only those of every n-th replica are wrong so, in the order of the fleet: with 2 those of the second, the fourth and so on.
    What is wrong alike for all hardly changes who seems best; this does. The router takes them for one kind with the others, as
    it does where equal labels hide that a replica is slower."""
    estimate_error: float = 0.0
    """Each prompt seems longer or shorter to the router by a log-normal factor with this sigma and median 1: what its token
    estimates are off by. Shares of the prompt, such as a prefix hit, stay right."""


NO_QUEUE: Final = QueueSettings(enabled=False)
"""Every request is placed as it comes, and waits in the engine."""


@dataclass(slots=True)
class _Watched:
    """The scrapes of one replica."""

    node: Node
    due: float = math.inf
    has_work: bool = False
    refused: int = 0


class _Waker(Quiet):
    """As in the service: a replica is scraped soon after it was given work, or failed."""

    def __init__(self, hurry: Callable[[str], None], tell: Callable[[str, bool], None]) -> None:
        """`tell` gets the replica whose load changed, and whether it is by a new request."""
        self._hurry, self._tell = hurry, tell

    def decided(self, decision: Decision) -> None:
        self._hurry(decision.endpoints[0])
        self._tell(decision.endpoints[0], True)
        if decision.prefiller is not None:
            self._hurry(decision.prefiller)
            self._tell(decision.prefiller, True)

    def ended(self, ended: Ended) -> None:
        self._tell(ended.flight.address, False)
        if ended.moved or ended.outcome.end in (End.UNREACHABLE, End.UPSTREAM_ERROR):
            self._hurry(ended.flight.address)


class Sidecar:
    """A router and its wiring."""

    def __init__(
        self,
        number: int,
        nodes: Mapping[str, Node],
        members: tuple[Replica, ...],
        policy: str,
        options: Mapping[str, float | int | str | bool],
        wiring: Wiring,
        timeline: Timeline,
        seed: int,
        turned: Callable[[int, Turn], object],
        store: Store | None = None,
    ) -> None:
        """`nodes`: every replica that is or will be; `members`: those known at the start.

        `turned` is told this router's number and the end of each wait. `store`: where it meets the others; None for nowhere.
        """
        self.wiring = wiring
        self.alive = True
        self._store = store
        self._beats = Random(f"{seed}/beats/{number}")
        self._words = 0
        self._changed: set[str] = set()
        """Replicas whose load is another than it was at the last word."""
        self._pushes_at = math.inf
        """When the next push is due, if one is."""
        self._pushed_at = -math.inf
        self._timeline = timeline
        self._number = number
        self._turned = turned
        self._wakes_at = math.inf
        """When the router is asked for turns next, if nothing else happens."""
        self._rng = Random(f"{seed}/scrapes/{number}")
        self._phases = Random(f"{seed}/checks/{number}")
        self._nodes = nodes
        self._places = {address: place for place, address in enumerate(nodes, 1)}
        pool = _pool(policy, options, wiring)
        rng = Random(f"{seed}/router/{number}")
        self.router = Router([pool], rng, _Waker(self._hurry, self._tell), wiring.flight_ttl_s)
        self._watched: dict[str, _Watched] = {}
        self._entries: list[tuple[str, Outcome] | Progressed] = []
        self._learn(Reset(POOL, members))
        for member in members:
            self._distrust(member.address)
            self._watch(member.address)
        timeline.at(TICK_S, self._tick)
        if store is not None and wiring.sharing is not None:
            timeline.at(self._beats.random() * wiring.sharing.beat_s, self._beat, wiring.sharing)
            store.listen(number, partial(self._hear_soon, wiring.sharing.delay_s))

    def __repr__(self) -> str:
        return f"<sidecar {self.router!r} {len(self._entries)} entries to flush>"

    # --- requests -----------------------------------------------------------------------------------------------------

    def arrive(self, request: Request) -> Verdict:
        """The router's verdict."""
        return self.router.arrive(request, self._timeline.now)

    def ask_turns(self) -> None:
        """Hand out the waits that end now. To be called after whatever may free a place or take one."""
        if not self.alive:
            return
        for turn in self.router.turns(self._timeline.now):
            self._turned(self._number, turn)
        named = self.router.next_wakeup() if self.router.holding else None
        at = math.inf if named is None else max(named, self._timeline.now + SOONEST_S)
        if at < self._wakes_at:
            self._wakes_at = at
            self._timeline.at(at, self._wake, at)

    def _wake(self, planned_at: float) -> None:
        if planned_at == self._wakes_at:  # a sooner one was planned since, otherwise
            self._wakes_at = math.inf
            self.ask_turns()

    def log(self, entry: tuple[str, Outcome] | Progressed) -> None:
        """The proxy writes an access log entry: the end of a flight, or how it goes."""
        if not self.alive:
            return
        if not self._entries:
            self._timeline.at(self._next_flush(), self._flushed)
        self._entries.append(entry)

    def _next_flush(self) -> float:
        interval, now = self.wiring.log_flush_interval_s, self._timeline.now
        return (math.floor(now / interval) + 1) * interval if interval else now

    def _flushed(self, _: object) -> None:
        entries, self._entries = self._entries, []
        if self.wiring.completion_delay_s:
            self._timeline.at(self._timeline.now + self.wiring.completion_delay_s, self._deliver, entries)
        else:
            self._deliver(entries)

    def _deliver(self, entries: list[tuple[str, Outcome] | Progressed]) -> None:
        now = self._timeline.now
        for entry in entries:
            if isinstance(entry, Progressed):
                self.router.learn(entry, now)
            else:
                self.router.finish(*entry, now)
        self.ask_turns()

    # --- membership ---------------------------------------------------------------------------------------------------

    def joined(self, replica: Replica) -> None:
        """Discovery tells of a new member, or of one that is back; a drain that was asked for is over."""
        self._learn(Add(POOL, replica))
        self._learn(DrainEnded(POOL, replica.address))
        self._distrust(replica.address)
        self._watch(replica.address)

    def left(self, address: str) -> None:
        """Discovery no longer lists it."""
        self._watched.pop(address, None)
        self._learn(Remove(POOL, address))

    def drains(self, address: str) -> None:
        """Somebody asks that the replica get nothing new."""
        self._learn(DrainAsked(POOL, address))

    def _distrust(self, address: str) -> None:
        """Put the wrong prior in; only learning can mend it."""
        member = self.router.pools[POOL].fleet.get(address)
        error = self.wiring.prior_error
        if member is not None and error != 1.0 and self._places[address] % self.wiring.prior_error_every == 0:
            member.speed.prior = member.speed.prior.scaled(error, error)

    # --- other routers ------------------------------------------------------------------------------------------------

    def die(self) -> None:
        """Its process ends; whatever it held or had in flight is nobody's from now on."""
        self.alive = False

    def _beat(self, sharing: Sharing) -> None:
        if not self.alive:
            return
        now = self._timeline.now
        if self._beats.random() >= sharing.loss:
            self._words += 1
            self._changed.clear()
            said = word(self.router, POOL, sharing, self._words, now)
            self._timeline.at(now + sharing.delay_s, self._exchange, (said, sharing.delay_s))
            if sharing.push:
                self._timeline.at(now + sharing.delay_s, self._pushed, said)
        self._timeline.at(now + sharing.beat_s, self._beat, sharing)

    def _tell(self, address: str, placed: bool) -> None:
        """The load of a replica changed here; others learn it soon."""
        sharing = self.wiring.sharing
        if self._store is None or sharing is None or not sharing.push:
            return
        self._changed.add(address)
        wait_s = 0.0 if placed else sharing.ends_within_s
        if wait_s is None:
            return
        at = max(self._timeline.now + wait_s, self._pushed_at + sharing.push_interval_s)
        if at < self._pushes_at:
            self._pushes_at = at
            self._timeline.at(at, self._push, (sharing, at))

    def _push(self, planned: tuple[Sharing, float]) -> None:
        sharing, now = planned[0], self._timeline.now
        if not self.alive or planned[1] != self._pushes_at:  # a sooner one was planned since
            return
        self._pushes_at, self._pushed_at = math.inf, now
        self._words += 1
        said = push(self.router, POOL, sharing, self._words, sorted(self._changed), now)
        self._changed.clear()
        if self._beats.random() >= sharing.loss:
            self._timeline.at(now + sharing.delay_s, self._pushed, said)

    def _pushed(self, said: Word) -> None:
        assert self._store is not None
        self._store.push(self._number, said, self._timeline.now)

    def _hear_soon(self, back_s: float, facts: list[Fact]) -> None:
        self._timeline.at(self._timeline.now + back_s, self._hear, (facts, back_s))

    def _exchange(self, message: tuple[Word, float]) -> None:
        said, back_s = message
        assert self._store is not None
        facts = self._store.exchange(self._number, said, self._timeline.now)
        self._timeline.at(self._timeline.now + back_s, self._hear, (facts, back_s))

    def _hear(self, message: tuple[list[Fact], float]) -> None:
        facts, age_s = message
        if not self.alive:
            return
        for fact in facts:
            if isinstance(fact, PeerReported):
                fact = replace(fact, age_s=fact.age_s + age_s)
            self.router.learn(fact, self._timeline.now)
        self.ask_turns()

    # --- replicas' own words ------------------------------------------------------------------------------------------

    def hear(self, fact: CacheFact) -> None:
        """A replica's KV events came."""
        if self.alive:
            self._learn(fact)

    # --- recurring ----------------------------------------------------------------------------------------------------

    def _tick(self, _: object) -> None:
        if not self.alive:
            return
        self.router.expire(self._timeline.now)
        self.ask_turns()
        self._timeline.at(self._timeline.now + TICK_S, self._tick)

    def _watch(self, address: str) -> None:
        if address not in self._watched:
            watched = self._watched[address] = _Watched(self._nodes[address])
            self._list_models(watched.node)
            self._scrape_in(watched, self._rng.random() * self.wiring.scrape_interval_s)
            first_s = self._phases.random() * self.wiring.doubt_interval_s
            self._timeline.at(self._timeline.now + first_s, self._check, watched)

    def _list_models(self, node: Node) -> None:
        adapters = node.spec.adapters
        if adapters:
            parents = dict.fromkeys(adapters, MODEL) if self.wiring.lists_parents else {}
            self._learn(Serves(POOL, node.address, (MODEL, *adapters), parents))

    def _check(self, watched: _Watched) -> None:
        """Whether it lives and lists its model. A hung one does both: its HTTP server is another process than its engine."""
        node = watched.node
        if self._watched.get(node.address) is not watched:
            return  # no member any more
        well = node.up
        for probe in (Probe.LIVE, Probe.READY):
            self._learn(Probed(POOL, node.address, probe, well))
        interval_s = self.wiring.health_interval_s if well else self.wiring.doubt_interval_s
        self._timeline.at(self._timeline.now + interval_s, self._check, watched)

    def _scrape_in(self, watched: _Watched, pause_s: float) -> None:
        watched.due = self._timeline.now + pause_s
        self._timeline.at(watched.due, self._scrape, watched)

    def _hurry(self, address: str) -> None:
        """One interval from now, if that is sooner than planned."""
        watched = self._watched.get(address)
        if watched is not None and watched.due > self._timeline.now + self.wiring.scrape_interval_s:
            self._scrape_in(watched, self.wiring.scrape_interval_s)

    def _scrape(self, watched: _Watched) -> None:
        if self._timeline.now < watched.due or watched.due == -math.inf:
            return
        if self._watched.get(watched.node.address) is not watched:
            return  # no member any more
        watched.due = -math.inf  # under way: neither an older plan nor a hurry may start another
        sample = watched.node.sample() if watched.node.up else None
        if self.wiring.scrape_age_s:
            self._timeline.at(self._timeline.now + self.wiring.scrape_age_s, self._scraped, (watched, sample))
        else:
            self._scraped((watched, sample))

    def _scraped(self, result: tuple[_Watched, Sample | None]) -> None:
        watched, sample = result
        address = watched.node.address
        if sample is None:
            watched.refused += 1
            self._learn(NotSampled(POOL, address, ScrapeFailure.REFUSED))
        else:
            watched.refused = 0
            watched.has_work = bool(sample.running or sample.waiting)
            self._learn(Sampled(POOL, address, sample))
        self._scrape_in(watched, self._pause_s(watched) * (1.0 - 0.1 * self._rng.random()))

    def _pause_s(self, watched: _Watched) -> float:
        """As the service's scraper: soon while there is work, doubling while nobody listens."""
        wiring = self.wiring
        if watched.refused:
            return min(wiring.scrape_interval_s * 2.0 ** min(watched.refused - 1, 30), wiring.scrape_idle_interval_s)
        member = self.router.pools[POOL].fleet.get(watched.node.address)
        busy = watched.has_work or (member is not None and len(member.load) > 0)
        return wiring.scrape_interval_s if busy else wiring.scrape_idle_interval_s

    def _learn(self, fact: Fact) -> None:
        self.router.learn(fact, self._timeline.now)
        self.ask_turns()


def _pool(policy: str, options: Mapping[str, float | int | str | bool], wiring: Wiring) -> PoolSettings:
    return PoolSettings(
        name=POOL,
        models=(MODEL,),
        policy=policy,
        policy_options=dict(options),
        stale_after_s=wiring.stale_after_s,
        health=wiring.health,
        queue=wiring.queue,
        scaling=wiring.scaling,
        disaggregation=wiring.disaggregation,
        lora=wiring.lora,
    )
