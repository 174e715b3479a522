"""The form of what is known of an engine: where the figures of a sample stand on its metrics page, and what it answers on which path.

Pure data; `parser.py` reads pages by it. A series is named without the engine's prefix, in one of three ways:

    name                    its values
    name{label="value"}     of its series only those with that label
    name[label]             not its value but the number in that label
"""

from __future__ import annotations

from dataclasses import dataclass, field

Figures = tuple["Figure", ...]
"""Alternatives, the newest version's first: a page that has two of them says the same twice, so the first that is there counts."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One way in which a figure is told."""

    series: str
    """Must be on the page, or the next alternative is looked for."""
    plus: tuple[str, ...] = ()
    """Added where they are on the page too."""
    in_blocks: bool = False
    """Counts KV blocks where a sample counts tokens."""
    only_with: bytes = b""
    """Text that decides: on a page that has it this alternative is the one, whether its series is there or not; on others it is not."""
    of_all: bool = False
    """Each data parallel rank tells the sum over all of them."""
    at_end: bool = False
    """Moves only when a request ends, and not with each step."""


@dataclass(frozen=True, slots=True)
class HealthPaths:
    """Where an engine tells how it is: 200 is well, everything else is not, but 404 says that it is not asked so."""

    live: str
    """Is the process there, and its engine alive?"""
    ready: str | None = None
    """Can it answer requests? None where the list of models tells that."""


@dataclass(frozen=True, slots=True)
class Table:
    """One engine."""

    name: str
    prefix: str
    """Of all its series; begins every name. A regular expression, whose literal beginning makes the scan fast."""
    running: Figures = ()
    waiting: Figures = ()
    kv_usage: Figures = ()
    """0 to 1; the mean over ranks."""
    block_size: Figures = ()
    """Tokens; the same on all ranks, or unknown."""
    num_blocks: Figures = ()
    cache_tokens: Figures = ()
    """KV cache size where the engine tells it in tokens."""
    prompt_tokens: Figures = ()
    generated_tokens: Figures = ()
    prefix_queries: Figures = ()
    prefix_hits: Figures = ()
    preemptions: Figures = ()
    awake: Figures = ()
    """1 while it serves, 0 while it sleeps and its memory is given to others."""
    adapters: str = ""
    """Series whose labels tell of LoRA adapters, as vLLM's `lora_requests_info` does. Empty: none."""
    rank: str | None = None
    """Label that numbers its data parallel ranks, each of which has a queue and a KV cache of its own."""
    copies: tuple[str, ...] = ()
    """Labels of ranks that tell the same twice (tensor parallel ones, say): of series that differ in these alone the largest counts."""
    skip: str = ""
    """Regular expression for labels (with a comma before each) of series that are parts of another; they are passed over."""
    path: str = "/metrics"
    """Of its metrics page."""
    health: tuple[HealthPaths, ...] = field(default=(HealthPaths("/health"),))
    """Tried in this order until one answers other than with 404."""
    needs: str = ""
    """What its operator must do for it to tell anything; ends the sentence "needs ...". Empty: nothing."""


def first(*names: str) -> Figures:
    """Alternatives that differ in their names alone."""
    return tuple(Figure(name) for name in names)
