"""Routers of several pools with a catalog."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from extproc.core.admission.settings import QueueSettings
from extproc.core.catalog.settings import CatalogSettings, Model, ProviderSettings, Target, When
from extproc.core.observers import Observer
from extproc.core.router import PoolSettings, Router
from extproc.core.types import CatalogConfigured, Replica, Request, Reset, Route
from tests.core.support import H100, ok, request

UNHELD = QueueSettings(enabled=False)


def target(to: str, weight: float = 1.0, *, model: str = "chat", engine: str = "", when: When | None = None) -> Target:
    """Called `engine-POOL` there, and its version is the pool's name."""
    return Target(model, to, engine or f"engine-{to}", weight, to, when or When())


def model(*targets: Target, **fields: Any) -> Model:
    return Model(**{"name": "chat", "targets": targets, **fields})


def catalog(*models: Model, providers: Sequence[ProviderSettings] = ()) -> CatalogConfigured:
    return CatalogConfigured(CatalogSettings(models, tuple(providers)))


def at(pool: str, i: int = 0) -> str:
    """The address of the i-th replica of a pool that has a name of one letter."""
    return f"10.{ord(pool)}.0.{i + 1}:8000"


def pools(
    *names: str,
    configured: CatalogConfigured | None = None,
    members: int = 1,
    queue: QueueSettings = UNHELD,
    observer: Observer | None = None,
    **fields: Any,
) -> Router:
    """A router with these pools; members are ready at once."""
    settings = [PoolSettings(name, scraped=False, queue=queue, **fields) for name in names]
    made = Router(settings, Random(1), observer)
    for name in names:
        made.learn(Reset(name, tuple(Replica(at(name, i), H100) for i in range(members))), 0.0)
    if configured is not None:
        made.learn(configured, 0.0)
    return made


def chat(prompt: bytes | str = b"", **fields: Any) -> Request:
    """A request for the model of the catalog, hashed without its name."""
    return request(prompt, seed=b"", **{"model": "chat", **fields})


def placed(made: Router, wanted: Request, now: float = 0.0) -> Route:
    verdict = made.arrive(wanted, now)
    assert isinstance(verdict, Route), verdict
    made.check()
    return verdict


def went(made: Router, wanted: Request, now: float = 0.0) -> str:
    """The pool or provider; the flight ends at once."""
    route = placed(made, wanted, now)
    made.finish(route.flight, ok(route.endpoints[0] if route.endpoints else None), now)
    return route.decision.pool
