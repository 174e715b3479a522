"""A fleet of real processes: several `extproc serve`, each with its Envoy, before the same simulated replicas, and one real Redis.

Measured under load: what sharing costs, how soon a router that is killed is forgotten, and what the clients see of each fault of
Redis. Files and logs lie in build/bench-fleet/.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml

from extproc.demo.children import Children, beside, cpu_s
from tests.chaos.load import Load, Requests
from tests.chaos.rows import Sent
from tests.chaos.settings import Settings
from tests.chaos.stack import Files, Replica, Service, emptied
from tests.support.redis import RedisServer
from tests.support.relay import Relay
from tests.support.waiting import until

ROUTERS: Final = 3
SETTINGS: Final = Settings(replicas=4, rate=7.0)
"""About half of what saturates these replicas, from all clients together."""
MEASURED_S: Final = 12.0
FAULT_S: Final = 3.0
"""How long a fault lasts: longer than the expiry, so that the routers are on their own."""
HEALED_S: Final = 20.0
LOOK_S: Final = 0.02


class Router:
    """One extproc with its Envoy and its clients."""

    def __init__(self, children: Children, directory: Path, settings: Settings, name: str) -> None:
        self.name, self.settings = name, settings
        self.files = Files(emptied(directory))
        config = ("--config", str(self.files.config))
        ready = f"http://{self.files.http}/readyz"
        self.extproc = Service(children, f"{name}-extproc", ready, beside("extproc"), "serve", *config)
        # Hot restart shares memory under a number, and a second Envoy on this machine would meet it there.
        quiet = ("--disable-hot-restart", "--concurrency", "1", "-l", "error")
        command = (beside("envoy"), "-c", str(self.files.bootstrap), *quiet)
        self.envoy = Service(children, f"{name}-envoy", f"http://{self.files.admin}/ready", *command)
        self.load = Load(f"http://{self.files.listen}", settings)
        self._render = partial(children.run, f"{name}-render", beside("extproc"), "envoy", *config, timeout_s=60)

    def __repr__(self) -> str:
        return f"<{self.name}: {self.extproc!r}>"

    def write(self, addresses: list[str], url: str | None) -> None:
        """The configuration, with what is shared by `url`; a running extproc takes it over."""
        if not self.files.config.exists():
            self.files.write_config(self.settings)
            self.files.write_members(addresses)
        raw = yaml.safe_load(self.files.config.read_text())
        raw["shared"] = None if url is None else {"url": url}
        new = self.files.config.with_suffix(".new")
        new.write_text(yaml.safe_dump(raw))
        new.rename(self.files.config)

    async def start(self, http: aiohttp.ClientSession) -> None:
        await self.extproc.start(http)
        await self._render()
        await self.envoy.start(http)


@dataclass(slots=True)
class Fleet:
    """All that runs."""

    routers: list[Router]
    replicas: list[Replica]
    redis: RedisServer
    relay: Relay
    http: aiohttp.ClientSession
    requests: Requests
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of Redis, through the relay."""
        return f"redis://127.0.0.1:{self.relay.port}"

    def write(self, url: str | None) -> None:
        for router in self.routers:
            router.write([r.address for r in self.replicas], url)

    async def shared(self, router: Router) -> dict[str, float]:
        """What it says of sharing, without the head of the names. Empty where it shares nothing."""
        head = "extproc_shared_"
        async with self.http.get(f"http://{router.files.http}/metrics") as response:
            lines = (await response.text()).splitlines()
        pairs = (line.removeprefix(head).rpartition(" ") for line in lines if line.startswith(head))
        return {name: float(value) for name, _, value in pairs}

    async def together(self) -> bool:
        """Whether each router knows of all others, and pushes reach all."""
        seen = [await self.shared(router) for router in self.routers]
        well = [each.get("up") == each.get("pushing") == 1 for each in seen]
        return all(well) and all(each.get("peers") == len(self.routers) - 1 for each in seen)

    @asynccontextmanager
    async def loaded(self, routers: list[Router] | None = None) -> AsyncIterator[None]:
        """Under the steady load, spread over these routers or all."""
        chosen = routers or self.routers
        async with AsyncExitStack() as loads:
            for router in chosen:
                rate = router.settings.rate / len(self.routers)
                await loads.enter_async_context(router.load.at(rate, self.requests.steady))
            yield

    def sent(self, since: float) -> list[Sent]:
        return [sent for router in self.routers for sent in router.load.sent if sent.sent_at >= since]

    async def finished(self) -> None:
        await asyncio.gather(*(router.load.finished() for router in self.routers))


@asynccontextmanager
async def fleet(directory: Path, routers: int = ROUTERS, settings: Settings = SETTINGS) -> AsyncIterator[Fleet]:
    """Everything ready and together. All processes end with the block."""
    async with AsyncExitStack() as exits:
        http = await exits.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)))
        redis = await exits.enter_async_context(RedisServer())
        relay = await exits.enter_async_context(Relay(f"127.0.0.1:{redis.port}"))
        children = await exits.enter_async_context(Children(emptied_all(directory)))
        replicas = [Replica(children, f"replica-{i}", settings) for i in range(settings.replicas)]
        await asyncio.gather(*(replica.start(http) for replica in replicas))
        own = [replace(settings, seed=i) for i in range(routers)]  # else all clients would send at the same moments
        named = [Router(children, directory / f"router-{i}", own[i], f"router-{i}") for i in range(routers)]
        for router in named:
            exits.push_async_callback(router.load.close)
        running = Fleet(named, replicas, redis, relay, http, Requests(settings))
        running.write(running.url)
        for router in named:
            await router.start(http)
        await until(running.together, timeout_s=HEALED_S)
        yield running


def emptied_all(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.log"):
        old.unlink()
    return directory


# --- what sharing costs -----------------------------------------------------------------------------------------------


async def costs(running: Fleet) -> dict[str, Any]:
    """CPU of a router with and without sharing, and bytes a second through Redis, for the same load."""
    shared = await measured(running)
    running.write(None)
    await until(partial(nobody_shares, running), timeout_s=HEALED_S)
    alone = await measured(running)
    running.write(running.url)
    await until(running.together, timeout_s=HEALED_S)
    return {
        "routers": len(running.routers),
        "requests_per_s": shared["requests_per_s"],
        "cpu_per_router": shared["cpu"],
        "cpu_per_router_unshared": alone["cpu"],
        "redis_bytes_per_s_per_router": shared["bytes"],
        "redis_cpu": shared["redis_cpu"],
    }


async def measured(running: Fleet) -> dict[str, float]:
    """Over MEASURED_S of load: shares of a core, and bytes that go in and out of Redis for each router."""
    async with running.loaded():
        await asyncio.sleep(2.0)
        before = await used(running)
        await asyncio.sleep(MEASURED_S)
        after = await used(running)
    await running.finished()
    seconds, routers = after["at"] - before["at"], len(running.routers)
    spent = {name: (after[name] - before[name]) / seconds for name in after}
    return {
        "cpu": round(spent["cpu"] / routers, 4),
        "redis_cpu": round(spent["redis_cpu"], 4),
        "bytes": round(spent["bytes"] / routers),
        "requests_per_s": round(sum(s.sent_at < after["at"] for s in running.sent(before["at"])) / seconds, 1),
    }


async def used(running: Fleet) -> dict[str, float]:
    stats = await running.redis.command("INFO", "stats")
    return {
        "at": time.monotonic(),
        "cpu": sum(cpu_s(router.extproc.child.pid) for router in running.routers),
        "redis_cpu": cpu_s(running.redis.pid),
        "bytes": stats["total_net_input_bytes"] + stats["total_net_output_bytes"],
    }


async def nobody_shares(running: Fleet) -> bool:
    return not any([await running.shared(router) for router in running.routers])


# --- a router dies ----------------------------------------------------------------------------------------------------


async def death(running: Fleet) -> dict[str, Any]:
    """Seconds from `kill -9` of a router under load until the last of the others has forgotten its load, and until all are together again."""
    victim, *others = running.routers
    async with running.loaded():
        await until(partial(loads_known, running, others), timeout_s=HEALED_S)
        known = [(await running.shared(router))["peer_requests"] for router in others]
        began = time.monotonic()
        await victim.extproc.kill()
        alone = len(others) - 1
        forgotten = await asyncio.gather(*(peers_become(running, router, alone) for router in others))
        await victim.extproc.start(running.http)
        await until(running.together, timeout_s=HEALED_S)
        together_s = time.monotonic() - began
    await running.finished()
    return {
        "router_death_s": round(max(forgotten) - began, 2),
        "together_again_s": round(together_s, 2),
        "peer_requests_before": known,
        "errors": errors(running.sent(began)),
    }


async def loads_known(running: Fleet, routers: list[Router]) -> bool:
    return all([(await running.shared(router)).get("peer_requests", 0) > 0 for router in routers])


async def peers_become(running: Fleet, router: Router, peers: int) -> float:
    async def so() -> bool:
        return (await running.shared(router)).get("peers") == peers

    await until(so, timeout_s=HEALED_S, every_s=LOOK_S)
    return time.monotonic()


# --- faults of Redis --------------------------------------------------------------------------------------------------


Change = Callable[[Fleet], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to Redis, and how it is undone."""

    name: str
    begin: Change
    end: Change
    seen: str | None = "up"
    """The metric that the routers put to 0 because of it; None where they need not notice."""


async def nothing(_: Fleet) -> None:
    """Heals by itself."""


async def slow(running: Fleet) -> None:
    running.relay.delay_s = 2.0


async def fast(running: Fleet) -> None:
    running.relay.delay_s = 0.0


async def paused(running: Fleet) -> None:
    running.redis.pause()


async def resumed(running: Fleet) -> None:
    running.redis.resume()


async def client_pause(running: Fleet) -> None:
    await running.redis.command("CLIENT", "PAUSE", round(FAULT_S * 1e3), "ALL")


async def killed(running: Fleet) -> None:
    await running.redis.kill()


async def started(running: Fleet) -> None:
    await running.redis.start()


async def flushed(running: Fleet) -> None:
    await running.redis.command("FLUSHALL")


async def full(running: Fleet) -> None:
    await running.redis.command("CONFIG", "SET", "maxmemory", "1", "maxmemory-policy", "noeviction")


async def emptied_again(running: Fleet) -> None:
    await running.redis.command("CONFIG", "SET", "maxmemory", "0")


async def read_only(running: Fleet) -> None:
    await running.redis.command("REPLICAOF", "127.0.0.1", "1")


async def master_again(running: Fleet) -> None:
    await running.redis.command("REPLICAOF", "NO", "ONE")


async def other_password(running: Fleet) -> None:
    await running.redis.command("ACL", "SETUSER", "door", "on", "nopass", "~*", "+@all")
    await running.redis.command("ACL", "SETUSER", "default", "resetpass", ">other", "-@all")
    await running.relay.drop()


async def old_password(running: Fleet) -> None:
    await running.redis.kill()  # a running one lets nobody in who could change it
    await running.redis.start()


async def deaf(running: Fleet) -> None:
    await running.redis.command("ACL", "SETUSER", "default", "-subscribe")
    await running.redis.command("CLIENT", "KILL", "TYPE", "pubsub")


async def hearing(running: Fleet) -> None:
    await running.redis.command("ACL", "SETUSER", "default", "+subscribe")


async def mute(running: Fleet) -> None:
    await running.redis.command("ACL", "SETUSER", "default", "-publish")


async def speaking(running: Fleet) -> None:
    await running.redis.command("ACL", "SETUSER", "default", "+publish")


async def cut(running: Fleet) -> None:
    await running.redis.command("CLIENT", "KILL", "TYPE", "pubsub")


async def nonsense(running: Fleet) -> None:
    running.relay.answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    await running.relay.drop()


async def sense(running: Fleet) -> None:
    running.relay.answer = None


async def moved(running: Fleet) -> None:
    running.write(f"redis://127.0.0.1:{running.redis.port}")


async def moved_back(running: Fleet) -> None:
    running.write(running.url)


FAULTS: Final = (
    Fault("answers after 2 s", slow, fast),
    Fault("SIGSTOP", paused, resumed),
    Fault("CLIENT PAUSE", client_pause, nothing),
    Fault("kill -9, started again", killed, started),
    Fault("FLUSHALL", flushed, nothing, seen=None),
    Fault("full (noeviction)", full, emptied_again),
    Fault("read only", read_only, master_again),
    Fault("another password", other_password, old_password),
    Fault("answers nonsense", nonsense, sense),
    Fault("moved (URL, by reload)", moved, moved_back, seen=None),
    Fault("subscriptions cut", cut, nothing, seen=None),
    Fault("no subscriptions", deaf, hearing, seen="pushing"),
    Fault("no pushes", mute, speaking, seen="pushing"),
)


async def faults(running: Fleet) -> list[dict[str, Any]]:
    """One after the other, under load."""
    return [await one_fault(running, fault) for fault in FAULTS]


async def one_fault(running: Fleet, fault: Fault) -> dict[str, Any]:
    """The clients' errors from its beginning until all routers are together again."""
    async with running.loaded():
        await asyncio.sleep(1.0)
        began = time.monotonic()
        await fault.begin(running)
        seen = [zero(running, router, fault.seen) for router in running.routers if fault.seen is not None]
        noticed = await asyncio.gather(*seen)
        await asyncio.sleep(max(0.0, began + FAULT_S - time.monotonic()))
        await fault.end(running)
        over = time.monotonic()
        await until(running.together, timeout_s=HEALED_S)
        healed_s = time.monotonic() - over
    await running.finished()
    sent = running.sent(began)
    row = {
        "fault": fault.name,
        "errors": len(errors(sent)),
        "requests": len(sent),
        "noticed_s": round(max(noticed) - began, 2) if noticed else None,
        "healed_s": round(healed_s, 2),
    }
    if found := errors(sent):
        row["what"] = found[:3]
    print(row, flush=True)
    return row


async def zero(running: Fleet, router: Router, metric: str) -> float:
    """When the router said so: `up` or `pushing` is 0. Raises AssertionError when that does not come."""

    async def so() -> bool:
        return (await running.shared(router)).get(metric) == 0

    await until(so, timeout_s=HEALED_S, every_s=LOOK_S)
    return time.monotonic()


def errors(sent: list[Sent]) -> list[str]:
    return [each.error for each in sent if each.error is not None]


async def run(directory: Path) -> dict[str, Any]:
    """All of it: {"costs", "death", "redis_faults"}. SIGTERM ends it in order, so that no process stays behind."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with fleet(directory) as running:
        cost = await costs(running)
        print(cost, flush=True)
        told = await death(running)
        print(told, flush=True)
        return {"costs": cost, "death": told, "redis_faults": await faults(running)}
