"""Composition root: configuration -> core -> adapters -> servers, and the order in which they start and stop.

Start: metrics and core, then membership (so that the first request finds replicas), scrapes, the members file, HTTP, and gRPC
last, because Envoy sends traffic from then on. Stop in the reverse order: no new streams, then the rest.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import fields
from random import Random
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, disable_created_metrics

from extproc.adapters import discovery
from extproc.adapters.admin import Admin
from extproc.adapters.engines import ENGINES
from extproc.adapters.metrics import FleetCollector, RouterMetrics, ServerCollector
from extproc.adapters.recorder import Recorder
from extproc.adapters.scraping import Scraper, Target
from extproc.config import Config, PoolConfig, Section
from extproc.core.admission.settings import QueueSettings
from extproc.core.fleet import Readiness
from extproc.core.health.settings import HealthSettings
from extproc.core.observers import Ended, Quiet, Several
from extproc.core.router import PoolSettings, Router
from extproc.core.types import Change, Decision, End, Fact, NotSampled, Reset, Sampled
from extproc.envoy.endpoints import EndpointsError, EndpointsFile, Health, Member
from extproc.envoy.intake import Intake
from extproc.envoy.server import Server

log = logging.getLogger(__name__)

TICK_S = 0.25
"""How often lost flights are swept and the members file is compared; both cost microseconds when there is nothing to do."""


class StartError(Exception):
    """Extproc cannot listen where it is told to; the text names the key and the remedy."""


class Waker(Quiet):
    """Has a replica scraped soon after it was given work, or failed."""

    def __init__(self, wake: Callable[[str], None]) -> None:
        self._wake = wake

    def decided(self, decision: Decision) -> None:
        self._wake(decision.endpoints[0])

    def ended(self, ended: Ended) -> None:
        if ended.moved or ended.outcome.end in (End.UNREACHABLE, End.UPSTREAM_ERROR):
            self._wake(ended.flight.address)  # passed over until it is heard of again


class App:
    """One extproc process."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic, rng: Random | None = None) -> None:
        self.config = config
        self._clock = clock
        rng = rng or Random()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody reads
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(self.registry)
        self.recorder = Recorder(config.inspect.decisions)
        self.router = Router(
            [settings(pool) for pool in config.pools],
            rng,
            Several(self.metrics, self.recorder, Waker(self._wake)),
            config.requests.flight_ttl_s,
        )
        self.registry.register(FleetCollector(self.router, clock))
        targets = {pool.name: Target(ENGINES.get(pool.engine), pool.scrape) for pool in config.pools}
        self._scraper = Scraper(targets, self._learn, rng=rng, busy=self._busy)
        self._sources = [discovery.from_config(pool, self._discovery_error(pool.name)) for pool in config.pools]
        self._known: set[str] = set()
        """Pools whose members are known; the members file of the others is left alone."""
        self._members_changed = asyncio.Event()
        self._endpoints = EndpointsFile(config.envoy.endpoints_file, [pool.name for pool in config.pools])
        self._endpoints_error: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._web: web.AppRunner | None = None
        self._server = Server(config, Intake(self.router, config), self.router, clock, self.metrics.decided_in)
        self.registry.register(ServerCollector(self._server.streams, self._server.entries))

    async def start(self) -> None:
        """Begin to serve. Raises StartError when a port is taken, EndpointsError when the members file cannot be written."""
        for source in self._sources:
            self._spawn(source.run(self._changed), f"discovery of {source.pool}")
        await asyncio.sleep(0)  # static pools tell their members at once
        self._write_endpoints(strict=True)
        self._spawn(self._tick(), "tick")
        await self._start_http()
        await self._start_grpc()
        log.info("serving: %s", self.router)

    async def stop(self, grace_s: float | None = None) -> None:
        """End what was started, last first, also after a start that failed. Envoy goes on with the members it has."""
        await self._server.stop(self.config.shutdown_grace_s if grace_s is None else grace_s)
        if self._web is not None:
            await self._web.cleanup()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._scraper.stop()
        log.info("stopped: %s", self.router)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        try:
            await self.start()
            await ended.wait()
        finally:
            await self.stop()

    def not_ready(self) -> str | None:
        """Why requests cannot be routed now; None when each pool has a replica that may be chosen."""
        now = self._clock()
        for name, pool in self.router.pools.items():
            if not len(pool.fleet):
                return f"pool {name} has no members"
            if all(m.readiness(now) in (Readiness.DOWN, Readiness.UNSAMPLED) for m in pool.fleet.members):
                return f"pool {name}: no member has answered a scrape"
        return None

    # --- facts --------------------------------------------------------------------------------------------------------

    def _learn(self, fact: Fact) -> None:
        self.router.learn(fact, self._clock())
        self._server.holding.poke()
        if isinstance(fact, Sampled):
            self.metrics.scrapes.labels(fact.pool, "ok").inc()
        elif isinstance(fact, NotSampled):
            self.metrics.scrapes.labels(fact.pool, fact.why.value).inc()

    def _changed(self, change: Change) -> None:
        self._learn(change)
        if isinstance(change, Reset):
            self._known.add(change.pool)
        self._scraper.follow(change)
        self._members_changed.set()

    def _wake(self, address: str) -> None:
        self._scraper.wake(address)

    def _busy(self, address: str) -> bool:
        members = (pool.fleet.get(address) for pool in self.router.pools.values())
        return any(member is not None and len(member.load) > 0 for member in members)

    def _discovery_error(self, pool: str) -> Callable[[str], None]:
        return lambda _: self.metrics.discovery_errors.labels(pool).inc()

    # --- recurring ----------------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_report)
        self._tasks.append(task)

    async def _tick(self) -> None:
        while True:
            # Envoy shall know a member no later than it is picked: until it does, its fallback takes the request elsewhere.
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    TICK_S
                ):  # wait_for of Python 3.11 may swallow the cancellation that ends this
                    await self._members_changed.wait()
            self._members_changed.clear()
            self.router.expire(self._clock())
            self._server.holding.poke()
            self._write_endpoints()

    def _write_endpoints(self, strict: bool = False) -> None:
        """Tell Envoy who is a member and who is healthy, if that changed.

        Of a pool not before its members are known: after a restart Envoy keeps serving with those of the last file.
        """
        now = self._clock()
        members = {
            name: [Member(m.address, _health(m.readiness(now)), m.replica.weight) for m in pool.fleet.members]
            for name, pool in self.router.pools.items()
            if name in self._known
        }
        try:
            self._endpoints.write(members)
            self._endpoints_error = None
        except EndpointsError as e:
            if strict:
                raise
            if str(e) != self._endpoints_error:
                log.error("%s", e)
            self._endpoints_error = str(e)

    # --- servers ------------------------------------------------------------------------------------------------------

    async def _start_http(self) -> None:
        admin = Admin(
            self.router,
            self.recorder,
            self.registry,
            self._clock,
            self.not_ready,
            self.config.requests.max_body_bytes,
        )
        self._web = web.AppRunner(admin.application(), access_log=None)
        await self._web.setup()
        try:
            await _site(self._web, self.config.listen.http).start()
        except OSError as e:
            raise _cannot_listen("http", self.config.listen.http, os.strerror(e.errno or 0)) from None

    async def _start_grpc(self) -> None:
        try:
            await self._server.start()
        except RuntimeError:  # gRPC tells the reason in its own line on standard error, and not here
            raise _cannot_listen("grpc", self.config.listen.grpc, "taken, or not of this machine") from None


def _site(runner: web.AppRunner, listen: str) -> web.BaseSite:
    if listen.startswith("unix:"):
        return web.UnixSite(runner, listen.removeprefix("unix:"))
    host, _, port = listen.rpartition(":")
    return web.TCPSite(runner, host.strip("[]"), int(port))


def _cannot_listen(key: str, listen: str, why: str) -> StartError:
    return StartError(f"listen.{key}: cannot listen on {listen}: {why}; stop what listens there, or choose another")


def settings(pool: PoolConfig) -> PoolSettings:
    """The core's view of a pool's configuration."""
    return PoolSettings(
        name=pool.name,
        models=pool.models,
        policy=pool.policy,
        policy_options=pool.policy_options,
        scraped=pool.engine != "none",
        stale_after_s=pool.scrape.stale_after_s,
        health=HealthSettings(**_shared(HealthSettings, pool.health)),
        queue=QueueSettings(**_shared(QueueSettings, pool.queue)),
    )


def _shared(record: type[Any], section: Section) -> dict[str, Any]:
    """The values of a section that the core's settings name as well."""
    return {field.name: getattr(section, field.name) for field in fields(record)}


def _health(readiness: Readiness) -> Health:
    return Health.UNHEALTHY if readiness is Readiness.DOWN else Health.HEALTHY


def _report(task: asyncio.Task[None]) -> None:
    """A recurring task that dies leaves the process half alive: say so loudly."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended: %r", task.get_name(), error, exc_info=error)
