"""What the core needs to know of the configured models and providers; `models` and `providers` of the configuration explain each."""

from __future__ import annotations

from enum import StrEnum

from extproc.core.record import record


class Sticky(StrEnum):
    """What stays with one of several targets that share a rule."""

    SESSION = "session"
    TENANT = "tenant"
    REQUEST = "request"


class Estimate(StrEnum):
    """How the prompt tokens of a request are counted for rules."""

    LEARNED = "learned"
    WORDS = "words"


@record
class When:
    """A rule: a request meets it when all that is named here holds. What is not named does not matter."""

    prompt_tokens_below: int | None = None
    prompt_tokens_at_least: int | None = None
    output_tokens_below: int | None = None
    output_tokens_at_least: int | None = None
    tools: bool | None = None
    images: bool | None = None
    tenants: frozenset[str] = frozenset()
    """Keyed hashes, as in `Request.tenant`; the request's is one of them, or its tier one of `tiers`."""
    tiers: frozenset[str] = frozenset()
    quality: frozenset[str] = frozenset()
    quality_not: frozenset[str] = frozenset()

    @property
    def weighs(self) -> bool:
        """Whether the size of the request matters."""
        sizes = (
            self.prompt_tokens_below,
            self.prompt_tokens_at_least,
            self.output_tokens_below,
            self.output_tokens_at_least,
        )
        return any(bound is not None for bound in sizes)


ANYTHING = When()
"""The rule that every request meets."""


@record
class Target:
    """Where requests for a model may go."""

    model: str
    """The model, by its configured name."""
    to: str
    """Name of the pool or provider."""
    engine: str
    """What the model is called there."""
    weight: float = 1.0
    """Share among the targets with the same rule."""
    version: str = ""
    """Label in metrics."""
    when: When = ANYTHING

    @property
    def place(self) -> tuple[str, str]:
        """Pool or provider, and the name there: what two targets have in common that are the same to a request."""
        return self.to, self.engine


@record
class Model:
    """One name that clients may ask for."""

    name: str
    targets: tuple[Target, ...]
    aliases: tuple[str, ...] = ()
    fallback: tuple[Target, ...] = ()
    """In this order, where no target can serve the request."""
    estimate: Estimate = Estimate.LEARNED
    sticky: Sticky = Sticky.SESSION


@record
class ProviderSettings:
    """An API elsewhere that is paid for by the token."""

    name: str
    prompt_dollars: float = 0.0
    """Of a million prompt tokens."""
    output_dollars: float = 0.0
    """Of a million output tokens."""
    daily_dollars: float | None = None
    """Most in 24 hours; None for no bound."""
    daily_tokens: float | None = None
    """Prompt and output tokens, likewise."""
    tenant_dollars: float | None = None
    """As `daily_dollars`, for each tenant; requests without one count as those of one."""
    tenant_tokens: float | None = None
    """Likewise."""


@record
class CatalogSettings:
    """All of them."""

    models: tuple[Model, ...] = ()
    providers: tuple[ProviderSettings, ...] = ()
