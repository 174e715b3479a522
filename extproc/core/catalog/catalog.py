"""Names to targets: the rules, the shares, and the order in which targets are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby

from xxhash import xxh3_64_intdigest

from extproc.core.catalog.rules import meets
from extproc.core.catalog.settings import CatalogSettings, Model, Sticky, Target, When
from extproc.core.catalog.shares import Group
from extproc.core.types import Blocks, Request

SizeAt = Callable[[Target], tuple[float, float]]
"""Expected prompt tokens and output tokens of one sample, as that target counts them."""
Draw = Callable[[], int]
"""64 random bits, for what is not sticky."""


class Catalog:
    """The configured models. Without any it knows no name, and everything goes by what pools list."""

    def __init__(self, settings: CatalogSettings = CatalogSettings()) -> None:  # noqa: B008  # nobody changes it
        self.models = settings.models
        self._models = {name: model for model in settings.models for name in (model.name, *model.aliases)}
        self._groups = {model.name: _groups(model.targets) for model in settings.models}

    def __repr__(self) -> str:
        return f"<catalog of {', '.join(model.name for model in self.models) or 'nothing'}>"

    def __len__(self) -> int:
        return len(self.models)

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may ask for, aliases included."""
        return tuple(self._models)

    def find(self, name: str | None) -> Model | None:
        """The model with this name or alias."""
        return self._models.get(name) if name is not None else None

    def targets(self, model: Model, request: Request, size: SizeAt, draw: Draw) -> list[Target]:
        """Where the request may go, in the order in which that is tried; none where it meets no rule.

        The group of the first rule that it meets, its own share first, then those fallbacks whose rule it meets.
        """
        for when, group in self._groups[model.name]:
            targets = group.targets
            if meets(when, request, lambda: size(targets[0])):  # noqa: B023  # asked at once
                first = list(targets) if len(targets) == 1 else group.ranked(_key(model.sticky, request, draw))
                return [*first, *self.fallbacks(model, request, size)]
        return []

    def fallbacks(self, model: Model, request: Request, size: SizeAt) -> Iterable[Target]:
        """Those that the request may use."""
        return (target for target in model.fallback if meets(target.when, request, lambda: size(target)))  # noqa: B023

    def after(self, target: Target, request: Request, size: SizeAt) -> list[Target]:
        """Where a request may go that waited for this target in vain: the others of its group by weight, then fallbacks."""
        model = self._models.get(target.model)
        if model is None:  # no longer configured
            return []
        group = next((group.targets for _, group in self._groups[model.name] if target in group.targets), ())
        others = sorted((other for other in group if other.weight > 0), key=lambda other: -other.weight)
        return [other for other in (*others, *self.fallbacks(model, request, size)) if other != target]


def _groups(targets: tuple[Target, ...]) -> tuple[tuple[When, Group], ...]:
    """Rules in the order in which they first stand, each with all of its targets."""
    order = list(dict.fromkeys(target.when for target in targets))
    by_rule = sorted(targets, key=lambda target: order.index(target.when))
    return tuple((when, Group(tuple(group))) for when, group in groupby(by_rule, key=lambda target: target.when))


def _key(sticky: Sticky, request: Request, draw: Draw) -> bytes:
    """What stays together. Where there is nothing to go by each request is drawn by itself, so that shares hold."""
    hashes = request.blocks.hashes
    if sticky is Sticky.SESSION and request.session is not None:
        return request.session.encode("utf-8", "replace")
    if sticky is Sticky.TENANT and request.tenant is not None:
        return request.tenant.encode("utf-8", "replace")
    if sticky is Sticky.REQUEST and hashes:
        return hashes[min(3, len(hashes) - 1)].to_bytes(8, "little")
    return draw().to_bytes(8, "little")


def aimed(request: Request, target: Target) -> Request:
    """The request as that target gets it: by the name that the model has there, in the prefix index as well."""
    blocks = request.blocks
    if request.target is not None:
        blocks = known_as(blocks, request.target.engine)  # undone: it is its own inverse
    return replace(request, model=target.engine, blocks=known_as(blocks, target.engine), target=target)


def known_as(blocks: Blocks, model: str) -> Blocks:
    """A chain that was hashed without the model's name, for that model: no hash of one is likely to be one of another's.

    The name is known only after the rules were asked, and the prompt is not hashed again for it. So an alias shares the cache
    of the model that it stands for.
    """
    if not blocks.hashes:
        return blocks
    mask = xxh3_64_intdigest(model.encode("utf-8", "surrogatepass"))
    return Blocks(tuple([h ^ mask for h in blocks.hashes]), blocks.ends)
