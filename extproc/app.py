"""Composition root: configuration -> core -> adapters -> servers, and the order in which they start and stop.

Start: metrics and core, then membership (so that the first request finds replicas), scrapes, the members file, HTTP, and gRPC
last, because Envoy sends traffic from then on. Stop in the reverse order: no new streams, then the rest.
While it runs the configuration file is followed, as far as a running process can.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from aiohttp import web
from prometheus_client import CollectorRegistry, disable_created_metrics

from extproc.adapters import discovery
from extproc.adapters.admin import Admin, Wanted
from extproc.adapters.config_watch import ConfigState, ConfigWatch
from extproc.adapters.gpu import follow
from extproc.adapters.gpu_replicas import GpuWatch
from extproc.adapters.health_log import HealthLog
from extproc.adapters.keys import KeyFileError
from extproc.adapters.kv_events.listening import Listening
from extproc.adapters.logs import Logs, set_level
from extproc.adapters.looplag import LoopWatch
from extproc.adapters.metrics import FleetCollector, RouterMetrics, ServerCollector
from extproc.adapters.metrics_events import EventCollector, EventMetrics
from extproc.adapters.metrics_models import ModelCollector, ModelMetrics
from extproc.adapters.metrics_queue import QueueCollector, QueueMetrics
from extproc.adapters.metrics_scaling import ScalingCollector
from extproc.adapters.metrics_service import Life, ServiceCollector
from extproc.adapters.metrics_shared import SharedCollector
from extproc.adapters.metrics_tokenizing import TokenizingCollector, TokenizingMetrics
from extproc.adapters.probing import Prober
from extproc.adapters.pulse import Pulse
from extproc.adapters.ranks import Ranks
from extproc.adapters.reading import ReadingCollector, ReadingPool
from extproc.adapters.recorder import Recorder
from extproc.adapters.scraping import Scraper
from extproc.adapters.shared.pushing import Changes
from extproc.adapters.shared.sharing import Sharing
from extproc.adapters.sites import StartError as StartError
from extproc.adapters.sites import cannot_listen, not_taken, site
from extproc.adapters.tasks import Tasks
from extproc.adapters.tenancy import Tenancy
from extproc.adapters.tokenizing.starting import tokenizing
from extproc.adapters.waking import DOUBT, Waker
from extproc.config import (
    READING_LIMIT_S,
    Config,
    ConfigError,
    Gpus,
    PoolConfig,
    Shared,
)
from extproc.core import fleet
from extproc.core.health.states import State
from extproc.core.observers import Several
from extproc.core.pool import Pool
from extproc.core.ranks import endpoint_of
from extproc.core.roles import role, unknown_role
from extproc.core.router import Router
from extproc.core.types import (
    CacheChanged,
    CacheUnknown,
    CatalogConfigured,
    Change,
    Configured,
    Fact,
    NotSampled,
    Probed,
    Remove,
    Replica,
    Reset,
    Sampled,
    ScrapeFailure,
    Stalled,
)
from extproc.envoy import credentials
from extproc.envoy.endpoints import EndpointsFile, Members
from extproc.envoy.exchange import Head
from extproc.envoy.intake import Intake
from extproc.envoy.members_writer import MembersWriter
from extproc.envoy.membership import for_envoy
from extproc.envoy.models import catalog_settings
from extproc.envoy.scaler import Scale, Scaler
from extproc.envoy.server import Server
from extproc.openai.errors import HttpError
from extproc.openai.tokens import TOKENIZED, Tokenized
from extproc.redis_url import parse
from extproc.settings import checks_of, gpu_url, settings, target

log = logging.getLogger(__name__)

TICK_S = 0.25
"""How often lost flights are swept and the members file is compared; both cost microseconds when there is nothing to do."""


CLOSING_S = 1.0
"""Of the grace period, kept for the end: pages that are being read, tasks, the log."""


class App:
    """One extproc process."""

    def __init__(
        self,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
        rng: Random | None = None,
        *,
        path: Path | None = None,
        logs: Logs | None = None,
    ) -> None:
        """`path`: the configuration file, to be followed; None where there is none. `logs` where lines may be dropped."""
        self.config = config
        self._clock = clock
        rng = rng or Random()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody reads
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(self.registry)
        self.recorder = Recorder(config.inspect.decisions)
        changes = Changes()
        tokenizing_metrics = TokenizingMetrics(self.registry, lambda: self._tokenizing)
        self._tokenizing = tokenizing(config.pools, tokenizing_metrics.took)
        self.registry.register(TokenizingCollector(lambda: self._tokenizing))
        self.router = Router(
            [settings(pool) for pool in config.pools],
            rng,
            Several(
                self.metrics,
                changes,
                QueueMetrics(self.registry),
                ModelMetrics(self.registry),
                *([tokenizing_metrics] if self._tokenizing else []),
                self.recorder,
                HealthLog(clock),
                Waker(self._scrape_soon, self._probe_soon, self._list_soon, self._tell_envoy),
            ),
            config.requests.flight_ttl_s,
            config.requests.max_flights,
        )
        self.registry.register(QueueCollector(self.router))
        self.registry.register(ModelCollector(self.router, clock))
        self.registry.register(ScalingCollector(self.router, clock))
        self.registry.register(FleetCollector(self.router, clock))
        targets = {pool.name: target(pool) for pool in config.pools}
        self._scraper = Scraper(targets, self._learn, rng=rng, busy=self._busy)
        checks = {pool.name: checks_of(pool) for pool in config.pools}
        self._prober = Prober(checks, self._learn, rng=rng, doubtful=self._doubtful, idle=self._idle)
        self._listening = Listening(self._told, rng, EventMetrics(self.registry).lag)
        self.registry.register(EventCollector(lambda: self._listening.following))
        self._ranks = Ranks({pool.name: pool.data_parallel for pool in config.pools})
        self._known: set[str] = set()
        """Pools whose members are known; the members file of the others is left alone."""
        self._members_changed = asyncio.Event()
        self._endpoints = MembersWriter(EndpointsFile(config.envoy.endpoints_file, [p.name for p in config.pools]))
        self._tasks = Tasks()
        self._pulse = Pulse(clock, self._stalled)
        self._watch = ConfigWatch(path, config, self._reconfigure) if path else None
        self._sharing = Sharing(self.router, self._learn, clock, Random(secrets.randbits(64)), changes)
        self.registry.register(SharedCollector(self._sharing, clock))
        self._stopping = False
        self._web: web.AppRunner | None = None
        self._reader = ReadingPool(config.requests.max_body_bytes, READING_LIMIT_S)
        self._tenancy = _tenancy(config, self.router, clock, self._sharing.name)
        self._intake = Intake(self.router, config, self._tenancy.secret, self._tenancy.keys)
        self.router.learn(CatalogConfigured(catalog_settings(config, self._intake.hashed)), clock())
        self.registry.register(self._tenancy.collector(self._clients))
        self._scaler = Scaler(self._scale)
        self._server = Server(
            config,
            self._intake,
            self.router,
            clock,
            self.metrics.decided_in,
            self._reader,
            self._leased if self._tenancy.waits else None,
            (self._scaler.service(),),
            self._tokenizing,
        )
        self.registry.register(ServerCollector(self._server.streams, self._server.entries))
        self.registry.register(
            ServiceCollector(
                Life(
                    self.router,
                    self._watch.state if self._watch else ConfigState(),
                    self._tasks,
                    self._pulse,
                    endpoints_errors=lambda: self._endpoints.errors,
                    log_lines_dropped=lambda: logs.dropped if logs else 0,
                    stopping=lambda: self._stopping,
                )
            )
        )
        self.registry.register(ReadingCollector(self._reader.counts, lambda: self._server.buffers.held))
        self._loop_watch = LoopWatch()
        self.registry.register(self._loop_watch)

    async def start(self) -> None:
        """Begin to serve. Raises StartError when a port is taken, EndpointsError when the members file cannot be written."""
        self._pulse.start()
        self._listening.configure(self.config.pools, self._replicas)
        for pool in self.config.pools:
            self._discover(pool)
            self._follow_gpus(pool)
            self._watch_gpus(pool)
        await asyncio.sleep(0)  # static pools tell their members at once
        self._endpoints.write_now(self._members())
        credentials.write(self.config)
        self._tasks.start("endpoints", self._endpoints.run)
        self._tasks.start("tick", self._tick)
        self._loop_watch.start()
        self._tenancy.start(self._tasks, self.config.shared)
        if self.config.shared is not None:
            self._share(self.config.shared)
        await self._start_http()
        await self._start_grpc()
        if self._watch is not None:
            self._tasks.start("configuration", self._watch.run)
        log.info("serving: %s", self.router)

    async def stop(self, grace_s: float | None = None) -> None:
        """End what was started, last first, also after a start that failed. Envoy goes on with the members it has."""
        self._stopping = True
        if grace_s is None:
            grace_s = max(self.config.shutdown_grace_s - CLOSING_S, self.config.shutdown_grace_s / 2)
        self._scaler.close()
        await self._server.stop(grace_s)
        await self._reader.stop()
        self._loop_watch.stop()
        if self._web is not None:
            await self._web.cleanup()
        if self._tokenizing is not None:
            self._tokenizing.close()
        self._pulse.stop()
        await self._tasks.stop()
        await self._prober.stop()
        await self._scraper.stop()
        await self._listening.stop()
        log.info("stopped: %s", self.router)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second one ends at once. SIGHUP reads the configuration file."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_end, number, ended)
        if self._watch is not None:
            loop.add_signal_handler(signal.SIGHUP, self._watch.nudge)
        try:
            await self.start()
            await ended.wait()
        finally:
            await self.stop()

    def _asked_to_end(self, number: signal.Signals, ended: asyncio.Event) -> None:
        if ended.is_set():
            log.warning("%s again: ending at once", number.name)
            self._server.hurry()
            return
        log.info("%s: finishing what is held, within %g s", number.name, self.config.shutdown_grace_s)
        ended.set()
        # Whatever hangs by then, a write to a dead disk say, the process ends.
        last = threading.Timer(self.config.shutdown_grace_s, os._exit, (1,))
        last.daemon = True
        last.start()

    def not_ready(self) -> str | None:
        """Why requests cannot be routed now; None when each pool, or with `models` any, has a replica that may be chosen."""
        if self._stopping:
            return "stopping"
        found = [self._not_ready(name, pool) for name, pool in self.router.pools.items()]
        whys = [why for why in found if why is not None]
        instead = len(whys) < len(found) or bool(self.config.providers)
        if self.config.models and instead and all(pool.listed for pool in self.router.pools.values()):
            return None  # what else there is may serve; a backup that is empty is no reason to be taken out
        return next(iter(whys), None)

    def _not_ready(self, name: str, pool: Pool) -> str | None:
        if not len(pool.fleet):
            if pool.scaling is not None and pool.scaling.settings.from_zero:
                return None  # requests wait for its first replica
            return f"pool {name} has no members"
        now = self._clock()
        if all(m.health.unreachable(now) or m.state(now) is State.STARTING for m in pool.fleet.members):
            return f"pool {name}: no member has answered a scrape"
        return None

    # --- facts --------------------------------------------------------------------------------------------------------

    def _learn(self, fact: Fact) -> None:
        now = self._clock()
        if _by_silence(fact) and self._pulse.settling(now):
            return  # it may be our own timer that is late
        for each in self._ranks.fact(fact):
            self.router.learn(each, now)
        self._server.holding.poke()
        if isinstance(fact, Sampled):
            self.metrics.scrapes.labels(fact.pool, "ok").inc()
        elif isinstance(fact, NotSampled):
            self.metrics.scrapes.labels(fact.pool, fact.why.value).inc()
        elif isinstance(fact, Probed):
            self.metrics.probes.labels(fact.pool, fact.probe.value, "ok" if fact.ok else "failed").inc()

    def _told(self, fact: CacheChanged | CacheUnknown) -> None:
        """Of the cache of a replica. What is held waits for room, which this is none of, so nobody is woken."""
        self.router.learn(fact, self._clock())

    def _drained(self, fact: Fact) -> None:
        self._learn(fact)
        log.info("by call: %s", fact)

    def _changed(self, change: Change) -> None:
        for each in self._ranks.change(change):
            self._learn(each)
        if isinstance(change, Reset):
            self._known.add(change.pool)
        self._warn_of_roles(change)
        self._scraper.follow(change)
        self._prober.follow(change)
        self._listening.follow(change)
        self._members_changed.set()

    def _warn_of_roles(self, change: Change) -> None:
        """Of replicas that join a pool where prefill and decode are apart and that are known to do neither."""
        pool = self.router.pools.get(change.pool)
        if pool is None or pool.disaggregation is None or isinstance(change, Remove):
            return
        for replica in change.replicas if isinstance(change, Reset) else (change.replica,):
            if role(replica.labels) is None:
                log.warning("pool %s, replica %s: %s", change.pool, replica.address, unknown_role(replica.labels))

    def _scale(self, pool: str | None) -> Scale | None:
        """What the external scaler asks for; None where no such pool scales."""
        scaled = {name: each for name, each in self.router.pools.items() if each.scaling is not None}
        found = scaled.get(pool) if pool is not None else next(iter(scaled.values())) if len(scaled) == 1 else None
        if found is None or found.scaling is None:
            return None
        return Scale(found.scaling.asked, found.scaling.active(found.admission, found.fleet, self._clock()))

    def _tell_envoy(self) -> None:
        self._members_changed.set()

    def _scrape_soon(self, address: str) -> None:
        self._scraper.wake(endpoint_of(address))

    def _list_soon(self, address: str) -> None:
        self._scraper.list_soon(endpoint_of(address))

    def _probe_soon(self, address: str) -> None:
        self._prober.wake(endpoint_of(address))

    def _at(self, address: str) -> list[fleet.Member]:
        """The replica, as each pool that has it sees it, and each of its ranks."""
        pools = self.router.pools.items()
        found = (pool.fleet.get(rank) for name, pool in pools for rank in self._ranks.members(name, address))
        return [member for member in found if member is not None]

    def _busy(self, address: str) -> bool:
        return any(member.load.requests for member in self._at(address))

    def _idle(self, address: str) -> bool:
        """Nothing runs there, by our flights and its own word where it gives one. Unknown is not idle."""
        now = self._clock()
        return not self._busy(address) and all(
            not member.scraped or ((sample := member.fresh(now)) is not None and sample.running == sample.waiting == 0)
            for member in self._at(address)
        )

    def _doubtful(self, address: str) -> bool:
        now = self._clock()
        return any(member.state(now) in DOUBT for member in self._at(address))

    def _stalled(self, for_s: float) -> None:
        self._learn(Stalled(for_s))

    def _discover(self, pool: PoolConfig) -> None:
        source = discovery.from_config(pool, self._discovery_error(pool.name))
        self._tasks.start(f"discovery of {pool.name}", partial(source.run, self._changed))

    def _reconfigure(self, config: Config) -> None:
        """Go on with a configuration that differs only in what a running process can take over."""
        before, self.config = self.config, config
        set_level(config.inspect.log_level)
        if before.shared != config.shared:
            self._share(config.shared)
            self._tenancy.share(self._tasks, config.shared)
        if (before.models, before.providers) != (config.models, config.providers):
            self._intake.configure(config)
            self._learn(CatalogConfigured(catalog_settings(config, self._intake.hashed)))
        for old, new in zip(before.pools, config.pools, strict=True):
            if settings(old) != settings(new):
                self._learn(Configured(new.name, settings(new)))
            self._scraper.retarget(new.name, target(new))
            self._prober.retarget(new.name, checks_of(new))
            if (old.replicas, old.discovery, old.labels) != (new.replicas, new.discovery, new.labels):
                self._discover(new)
            if gpu_url(old) != gpu_url(new):
                self._follow_gpus(new)
                self._watch_gpus(new)  # who tells the mean over the pool is another now

        try:
            self._listening.configure(config.pools, self._replicas)
        except ConfigError as e:
            log.error("%s", e)

    def _replicas(self, pool: str) -> list[Replica]:
        """Members by their addresses, whatever ranks are behind them."""
        found: dict[str, Replica] = {}
        for member in self.router.pools[pool].fleet.members:
            endpoint = endpoint_of(member.address)
            found[endpoint] = replace(member.replica, address=endpoint)
        return list(found.values())

    def _share(self, shared: Shared | None) -> None:
        """From now on with these settings; what was shared by those before is taken back first."""
        self._tasks.start("sharing", partial(_shared_by_redis, self._sharing, shared))

    def _clients(self) -> dict[str, int]:
        """Requests by how their client was known."""
        identity = self._intake.identity
        return {} if identity is None else {source.value: n for source, n in identity.sources.items()}

    async def _leased(self, head: Head) -> None:
        """Before the decision on a request, where limits are strict."""
        await self._tenancy.before(self._intake.accounts(head))

    async def _asked(
        self, path: str, headers: Mapping[str, str], body: bytes, tenant: str | None, tier: str | None
    ) -> Wanted | HttpError:
        """For the page that explains: what a request with these headers would ask of the router."""
        read = {name: value for name, value in headers.items() if name in self._intake.headers}
        ready = self._intake.asked(Head("POST", path, headers=read), body, tenant, tier)
        if isinstance(ready, HttpError):
            return ready
        if self._tokenizing is None:
            return Wanted(ready.request)
        found = await self._tokenizing.explained(self._intake.places(ready), ready.question, body)
        if isinstance(found, Tokenized):
            return Wanted(ready.tokenized(found), TOKENIZED)
        return Wanted(ready.request, found)

    def _follow_gpus(self, pool: PoolConfig) -> None:
        """Ask for the use of the pool's GPUs from now on, where it is told of."""
        self._tasks.start(f"GPU use of {pool.name}", partial(follow, pool.name, gpu_url(pool), self._learn))

    def _watch_gpus(self, pool: PoolConfig) -> None:
        """Ask for the use of each replica's GPUs from now on, where it is told of."""
        if pool.gpu is not None:
            self._tasks.start(f"GPUs of replicas of {pool.name}", partial(self._gpus_of, pool, pool.gpu))

    async def _gpus_of(self, pool: PoolConfig, settings: Gpus) -> None:
        replicas = partial(self._replicas, pool.name)
        whole = gpu_url(pool) is None
        await GpuWatch(pool.name, settings, replicas, self._everywhere, self._learn, whole=whole).run()

    def _everywhere(self) -> set[str]:
        """Addresses of the members of every pool, whatever ranks are behind them."""
        return {endpoint_of(member.address) for _, member in self.router.members()}

    def _discovery_error(self, pool: str) -> Callable[[str], None]:
        errors = self.metrics.discovery_errors.labels(pool)  # there from the start: the first one is an increase, too
        return lambda _: errors.inc()

    # --- recurring ----------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            # Envoy shall know a member no later than it is picked: until it does, its fallback takes the request elsewhere.
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    TICK_S
                ):  # wait_for of Python 3.11 may swallow the cancellation that ends this
                    await self._members_changed.wait()
            self._members_changed.clear()
            now = self._clock()
            if not self._pulse.settling(now):  # else reports that wait in the socket come too late
                self.router.expire(now)
            self._server.holding.poke()
            self._endpoints.want(self._members())

    def _members(self) -> Members:
        """Who is a member and who is healthy, for Envoy.

        Of a pool not before its members are known: after a restart Envoy keeps serving with those of the last file.
        """
        now = self._clock()
        return {
            name: for_envoy(pool.fleet.members, now) for name, pool in self.router.pools.items() if name in self._known
        }

    # --- servers ------------------------------------------------------------------------------------------------------

    async def _start_http(self) -> None:
        admin = Admin(
            self.router,
            self.recorder,
            self.registry,
            self._clock,
            self.not_ready,
            self.config.requests.max_body_bytes,
            self._drained,
            self._asked,
        )
        self._web = web.AppRunner(admin.application(), access_log=None, shutdown_timeout=CLOSING_S / 2)
        await self._web.setup()
        await not_taken("http", self.config.listen.http)
        try:
            await site(self._web, self.config.listen.http).start()
        except OSError as e:
            raise cannot_listen("http", self.config.listen.http, os.strerror(e.errno or 0)) from None

    async def _start_grpc(self) -> None:
        await not_taken("grpc", self.config.listen.grpc)
        try:
            await self._server.start()
        except RuntimeError:  # gRPC tells the reason in its own line on standard error, and not here
            raise cannot_listen("grpc", self.config.listen.grpc, "taken, or not of this machine") from None


def _tenancy(config: Config, router: Router, clock: Callable[[], float], name: str) -> Tenancy:
    """Raises StartError where the secret or the keys cannot be read."""
    router.limits.routers = lambda: 1 + max(len(pool.peers) for pool in router.pools.values())
    try:
        return Tenancy(config, router.limits, clock, name)
    except KeyFileError as e:
        raise StartError(f"tenants: {e}") from None


async def _shared_by_redis(sharing: Sharing, shared: Shared | None) -> None:
    """Share until cancelled; nothing where there are no settings."""
    if shared is None:
        return
    from extproc.adapters.shared.redis_board import RedisBoard  # 40 ms and 5 MB, which only those pay who share
    from extproc.adapters.shared.redis_channel import RedisChannel

    channel = RedisChannel(shared, sharing.name) if shared.push else None
    await sharing.run(shared, f"Redis ({parse(shared.url)})", RedisBoard(shared, sharing.name), channel)


def _by_silence(fact: Fact) -> bool:
    """Whether the fact may say no more than that a timer of ours fired."""
    if isinstance(fact, NotSampled):
        return fact.why is ScrapeFailure.LATE
    return isinstance(fact, Probed) and not fact.ok
