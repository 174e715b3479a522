"""What breaks, one coroutine each: it marks when it breaks and when it is whole again, and leaves everything whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from math import inf

from tests.chaos.rows import Kind, Marks
from tests.chaos.stack import Replica, Scene
from tests.support.waiting import until

Run = Callable[[Scene, Marks], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the table."""

    name: str
    kind: Kind
    text: str
    """What happens, for the page."""
    run: Run


FAULTS: dict[str, Fault] = {}


def fault(name: str, kind: Kind) -> Callable[[Run], Run]:
    """Register under a name; the docstring is the text."""

    def register(run: Run) -> Run:
        FAULTS[name] = Fault(name, kind, " ".join((run.__doc__ or "").split()), run)
        return run

    return register


def broken(marks: Marks, replicas: Iterable[Replica], *, begun_until: float | None = None) -> None:
    """From now on; streams of these that have begun by `begun_until` cannot be saved, None for streams that can."""
    marks.at = time.monotonic()
    marks.victims = tuple(r.address for r in replicas)
    if begun_until is not None:
        marks.last_begin = dict.fromkeys(marks.victims, begun_until)


def returning(marks: Marks) -> None:
    marks.returning = time.monotonic()


def whole(marks: Marks) -> None:
    marks.over = time.monotonic()
    marks.returning = marks.returning or marks.over


@fault("nothing", Kind.NOTHING)
async def nothing(scene: Scene, marks: Marks) -> None:
    """The steady load alone, for comparison."""
    broken(marks, ())
    await asyncio.sleep(8)
    whole(marks)


# --- one replica --------------------------------------------------------------------------------------------------------


@fault("replica kill -9", Kind.DEAD)
async def replica_killed(scene: Scene, marks: Marks) -> None:
    """One of six is killed, and started again 6 s later."""
    victim = scene.replicas[0]
    # What its clients get to see after its death was sent before it.
    broken(marks, [victim], begun_until=inf)
    await victim.kill()
    await asyncio.sleep(6)
    returning(marks)
    await victim.start(scene.http)
    whole(marks)


@fault("replica hangs", Kind.HUNG)
async def replica_hangs(scene: Scene, marks: Marks) -> None:
    """The engine of one stands still for 12 s, while its HTTP server, `/health` and `/metrics` answer."""
    victim = scene.replicas[1]
    broken(marks, [victim], begun_until=time.monotonic())
    await victim.set(scene.http, hang=True)
    await asyncio.sleep(12)
    returning(marks)
    await victim.set(scene.http, hang=False)
    whole(marks)


@fault("replica answers 500", Kind.FAILING)
async def replica_fails(scene: Scene, marks: Marks) -> None:
    """One answers every completion with 500 for 6 s; `/health` says 200."""
    victim = scene.replicas[2]
    broken(marks, [victim])
    await victim.set(scene.http, fail_with=500)
    await asyncio.sleep(6)
    returning(marks)
    await victim.set(scene.http, fail_with=None)
    whole(marks)


@fault("replica accepts, never answers", Kind.HUNG)
async def replica_stopped(scene: Scene, marks: Marks) -> None:
    """The process of one is stopped (SIGSTOP): the kernel still accepts connections. Killed after 12 s and started again, as a kubelet would."""
    victim = scene.replicas[3]
    broken(marks, [victim], begun_until=inf)
    victim.pause()
    await asyncio.sleep(12)
    await victim.kill()
    returning(marks)
    await victim.start(scene.http)
    whole(marks)


async def with_metrics(scene: Scene, marks: Marks, bad: dict[str, object], good: dict[str, object]) -> None:
    broken(marks, [scene.replicas[4]])
    await scene.replicas[4].set(scene.http, **bad)
    await asyncio.sleep(8)
    await scene.replicas[4].set(scene.http, **good)
    whole(marks)


@fault("metrics page 900 ms late", Kind.AROUND)
async def metrics_slow(scene: Scene, marks: Marks) -> None:
    """The metrics page of one replica takes 900 ms longer, for 8 s."""
    await with_metrics(scene, marks, {"metrics_delay_s": 0.9}, {"metrics_delay_s": 0.0})


@fault("metrics page is garbage", Kind.AROUND)
async def metrics_garbage(scene: Scene, marks: Marks) -> None:
    """The metrics page of one replica is no such page, for 8 s."""
    await with_metrics(scene, marks, {"metrics_garbage": True}, {"metrics_garbage": False})


@fault("replica drains by itself", Kind.LEAVING)
async def replica_drains(scene: Scene, marks: Marks) -> None:
    """One answers new requests with 500 and finishes those it has, as vLLM does after SIGTERM with `--shutdown-timeout`; it ends after 5 s and comes back."""
    victim = scene.replicas[5]
    broken(marks, [victim])
    await victim.set(scene.http, draining=True)
    await asyncio.sleep(5)
    await victim.terminate()
    returning(marks)
    await victim.start(scene.http)
    whole(marks)


@fault("replica is drained", Kind.LEAVING)
async def replica_drained(scene: Scene, marks: Marks) -> None:
    """`POST /replicas/drain`, and 5 s later `/replicas/undrain`."""
    victim = scene.replicas[0]
    broken(marks, [victim])
    await _posted(scene, f"/replicas/drain?replica={victim.address}")
    await asyncio.sleep(5)
    returning(marks)
    await _posted(scene, f"/replicas/undrain?replica={victim.address}")
    whole(marks)


async def _posted(scene: Scene, path: str) -> None:
    async with scene.http.post(f"http://{scene.files.http}{path}") as response:
        assert response.status == 200, f"POST {path}: {response.status} {await response.text()}"


@fault("replica joins", Kind.JOINING)
async def replica_joins(scene: Scene, marks: Marks) -> None:
    """One is taken from the discovery file and its process ended; 2 s after it has left, a new one at the same address is listed."""
    victim = scene.replicas[1]
    scene.files.write_members(r.address for r in scene.replicas if r is not victim)
    await until(lambda: _has_left(scene, victim), timeout_s=10)
    await asyncio.sleep(2)
    await victim.terminate()
    await victim.start(scene.http)
    broken(marks, [victim])
    scene.files.write_members(r.address for r in scene.replicas)
    whole(marks)


async def _has_left(scene: Scene, replica: Replica) -> bool:
    states = await scene.states()
    return bool(states) and replica.address not in states


@fault("all replicas gone", Kind.DEAD)
async def all_killed(scene: Scene, marks: Marks) -> None:
    """All six are killed, and started again 3 s later."""
    broken(marks, scene.replicas, begun_until=inf)
    await asyncio.gather(*(r.kill() for r in scene.replicas))
    await asyncio.sleep(3)
    returning(marks)
    await asyncio.gather(*(r.start(scene.http) for r in scene.replicas))
    whole(marks)


# --- extproc and Envoy --------------------------------------------------------------------------------------------------


@fault("extproc kill -9", Kind.EXTPROC)
async def extproc_killed(scene: Scene, marks: Marks) -> None:
    """Killed, and started again 3 s later."""
    broken(marks, ())
    await scene.extproc.kill()
    await asyncio.sleep(3)
    await scene.extproc.start(scene.http)
    whole(marks)


@fault("extproc SIGSTOP 5 s", Kind.EXTPROC)
async def extproc_stopped(scene: Scene, marks: Marks) -> None:
    """Stopped for 5 s with its sockets open, then continued."""
    broken(marks, ())
    scene.extproc.pause()
    try:
        await asyncio.sleep(5)
    finally:
        scene.extproc.resume()
    whole(marks)


@fault("extproc restart", Kind.EXTPROC)
async def extproc_restarted(scene: Scene, marks: Marks) -> None:
    """SIGTERM; started again as soon as it has ended."""
    broken(marks, ())
    status = await scene.extproc.terminate()
    assert status == 0, f"extproc ended with {status}"
    await scene.extproc.start(scene.http)
    whole(marks)


@fault("Envoy restart without extproc", Kind.EXTPROC)
async def envoy_restarted(scene: Scene, marks: Marks) -> None:
    """extproc is killed; Envoy, from which the load was taken first, is restarted and serves the last members for 3 s; extproc is started."""
    broken(marks, ())
    await scene.extproc.kill()
    await asyncio.sleep(1)
    await scene.restart_envoy()
    await asyncio.sleep(3)
    await scene.extproc.start(scene.http)
    whole(marks)


@fault("access log cut", Kind.AROUND)
async def log_cut(scene: Scene, marks: Marks) -> None:
    """The connection of Envoy's access log to extproc is cut for 4 s; what ends meanwhile is never reported."""
    broken(marks, ())
    await scene.wire.cut()
    try:
        await asyncio.sleep(4)
    finally:
        await scene.wire.mend()
    whole(marks)


# --- the clients --------------------------------------------------------------------------------------------------------


@fault("overload", Kind.LOAD)
async def overload(scene: Scene, marks: Marks) -> None:
    """Twice the load that saturates the fleet, for 10 s."""
    more = 2 * scene.settings.saturation - scene.settings.rate
    broken(marks, ())
    async with scene.load.at(more, scene.requests.steady):
        await asyncio.sleep(10)
    whole(marks)


@fault("a tenant floods", Kind.LOAD)
async def flood(scene: Scene, marks: Marks) -> None:
    """One tenant more sends what saturates the fleet, beside the steady load of the others, for 8 s."""
    broken(marks, ())
    async with scene.load.at(scene.settings.saturation, lambda: scene.requests.of("flood", 0)):
        await asyncio.sleep(8)
    whole(marks)


@fault("bodies of 10 MB", Kind.AROUND)
async def large_bodies(scene: Scene, marks: Marks) -> None:
    """Beside the steady load one request a second with an image of 10 MB, for 8 s."""
    broken(marks, ())
    async with scene.load.at(1.0, scene.requests.large):
        await asyncio.sleep(8)
    whole(marks)


@fault("clients vanish", Kind.AROUND)
async def vanishing(scene: Scene, marks: Marks) -> None:
    """Beside the steady load half as many requests whose clients leave within 0.8 s, for 8 s."""
    broken(marks, ())
    async with scene.load.at(scene.settings.rate / 2, scene.requests.vanishing):
        await asyncio.sleep(8)
    whole(marks)
