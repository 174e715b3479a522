"""The models that can be asked for at present."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from extproc.core.catalog.catalog import Catalog
from extproc.core.catalog.providers import Provider
from extproc.core.catalog.rules import may_ask
from extproc.core.catalog.settings import Model
from extproc.core.fleet import Member
from extproc.core.pool import Pool
from extproc.core.record import record
from extproc.core.types import Request


@record
class Listed:
    """One name."""

    name: str
    root: str
    """The model that it stands for: itself, unless it is an alias."""
    parent: str | None = None
    """The base model of a LoRA adapter; None for what is none, or where the engine does not tell."""


def listed(
    catalog: Catalog, pools: Mapping[str, Pool], providers: Mapping[str, Provider], who: Request, now: float
) -> Iterator[Listed]:
    """Names that `who` may ask for and that somebody is there to serve, each once: those of the catalog first, then what pools and replicas name."""
    there = {name for name, pool in pools.items() if _serves(pool, now)} | providers.keys()
    for model in catalog.models:
        if _open(model, there, who):
            yield from (Listed(name, model.name) for name in (model.name, *model.aliases))
    told: set[str] = set()
    for pool in (pools[name] for name in pools if name in there):
        members = pool.fleet.members
        for name in pool.models:
            if name not in told and catalog.find(name) is None and catalog.open_to(pool.settings.name, name, who):
                told.add(name)
                yield Listed(name, name, _parent(members, name))


def _parent(members: Iterable[Member], name: str) -> str | None:
    for member in members:
        if name in member.parents:
            return member.parents[name]
    return None


def _open(model: Model, there: set[str], who: Request) -> bool:
    """Whether any request of this client could be served. Other rules than those on who asks depend on the request."""
    mine = [target for target in model.targets if target.weight > 0 and may_ask(target.when, who)]
    if not mine:
        return False
    backup = [target for target in model.fallback if may_ask(target.when, who)]
    return any(target.to in there for target in (*mine, *backup))


def _serves(pool: Pool, now: float) -> bool:
    """Whether requests for the pool are served, or wait for its first replica."""
    scaling = pool.settings.scaling
    return not pool.fleet.absent(now) or (scaling is not None and scaling.from_zero)
