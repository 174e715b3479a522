"""Names to targets: the rules, the shares, and the order in which targets are tried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Final

from xxhash import xxh3_64_intdigest

from extproc.core.catalog.rules import may_ask, meets
from extproc.core.catalog.settings import CatalogSettings, Estimate, Model, Sticky, Target, When
from extproc.core.catalog.shares import Group
from extproc.core.types import Blocks, Request

SizeAt = Callable[[Target], tuple[float, float]]
"""Expected prompt tokens and output tokens of one sample, as that target counts them."""
TOKENS_PER_WORD: Final = 1.3
"""The rule of thumb for English text; see `Estimate.WORDS`."""
Draw = Callable[[], int]
"""64 random bits, for what is not sticky."""


class Catalog:
    """The configured models. Without any it knows no name, and everything goes by what pools list."""

    def __init__(self, settings: CatalogSettings = CatalogSettings()) -> None:  # noqa: B008  # nobody changes it
        self.models = settings.models
        self._models = {name: model for model in settings.models for name in (model.name, *model.aliases)}
        self._groups = {model.name: _groups(model.targets) for model in settings.models}
        self._aimed_at: defaultdict[tuple[str, str | None], list[Target]] = defaultdict(list)
        """By pool and name there, and under None all of the pool."""
        for target in (target for model in settings.models for target in (*model.targets, *model.fallback)):
            self._aimed_at[target.place].append(target)
            self._aimed_at[target.to, None].append(target)

    def __repr__(self) -> str:
        return f"<catalog of {', '.join(model.name for model in self.models) or 'nothing'}>"

    def __len__(self) -> int:
        return len(self.models)

    def find(self, name: str | None) -> Model | None:
        """The model with this name or alias."""
        return self._models.get(name) if name is not None else None

    def targets(self, model: Model, request: Request, size: SizeAt, draw: Draw) -> list[Target]:
        """Where the request may go, in the order in which that is tried; none where it meets no rule.

        The group of the first rule that it meets, its own share first, then those fallbacks whose rule it meets.
        """
        group = self._group(model, request, size)
        if group is None:
            return []
        alone = len(group.targets) == 1
        first = group.targets if alone else group.ranked(_key(model.sticky, request, draw))
        return _once([*first, *_fallbacks(model, request, size)]) if model.fallback else list(first)

    def after(self, target: Target, request: Request, size: SizeAt) -> list[Target]:
        """Where a request may go that waited for this target in vain: the others of its group by weight, then fallbacks.

        By the rules as they are now: weights may have changed while it waited, and the target itself may be gone.
        """
        model = self._models.get(target.model)
        if model is None:  # no longer configured
            return []
        group = self._group(model, request, size)
        others = sorted(group.targets, key=lambda other: -other.weight) if group is not None else ()
        ways = [*(other for other in others if other.weight > 0), *_fallbacks(model, request, size)]
        return [way for way in _once(ways) if way.place != target.place]

    def open_to(self, pool: str, name: str | None, who: Request) -> bool:
        """Whether this client may ask the pool itself, under a name that no model has; None is no name at all.

        A pool that is only a target of rules for certain tenants is theirs. Where the name is what a target calls its model there, that
        target's rule counts, and not what other models in the same pool are open to.
        """
        targets = self._aimed_at.get((pool, name)) or self._aimed_at.get((pool, None), [])
        return not targets or any(may_ask(target.when, who) for target in targets)

    def _group(self, model: Model, request: Request, size: SizeAt) -> Group | None:
        """Of the first rule that the request meets, in sizes as its first target counts them."""
        for when, group in self._groups[model.name]:
            if meets(when, request, partial(_sized, model, request, size, group.targets[0])):
                return group
        return None


def _groups(targets: tuple[Target, ...]) -> tuple[tuple[When, Group], ...]:
    """Rules in the order in which they first stand, each with all of its targets."""
    by_rule: defaultdict[When, list[Target]] = defaultdict(list)
    for target in targets:
        by_rule[target.when].append(target)
    return tuple((when, Group(group)) for when, group in by_rule.items())


def _fallbacks(model: Model, request: Request, size: SizeAt) -> Iterable[Target]:
    """Those that the request may use."""
    return (each for each in model.fallback if meets(each.when, request, partial(_sized, model, request, size, each)))


def _sized(model: Model, request: Request, size: SizeAt, target: Target) -> tuple[float, float]:
    prompt_tokens, output_tokens = size(target)
    if model.estimate is Estimate.WORDS and request.prompt_words is not None:
        prompt_tokens = TOKENS_PER_WORD * request.prompt_words
    return prompt_tokens, output_tokens


def _once(targets: list[Target]) -> list[Target]:
    """A fallback that is also a target is asked as the one that comes first."""
    first: dict[tuple[str, str], Target] = {}
    for target in targets:
        first.setdefault(target.place, target)
    return list(first.values())


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
