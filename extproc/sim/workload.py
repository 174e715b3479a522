"""Chat sessions to load a fleet with: made from a seed alone, so that two runs meet the same requests at the same times.

A session belongs to a group whose members share a system prompt, and grows by each user turn and by the answer that really
came. Sessions arrive whenever they like (Poisson); inside one, the next turn waits for the answer and then for a pause.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Final

from pydantic import Field, model_validator

from extproc.config import Section

BYTES_PER_TOKEN: Final = 4
"""The simulated replica counts so; the text below is plain ASCII, so a byte is a character."""

_VOCABULARY: Final = """
amber basin canal delta ember fjord grove haven inlet jetty knoll ledge marsh north oasis plain quarry ridge shore tundra
upland valley wharf yonder zenith beacon cedar drift elm ferry gravel harbor iris juniper kelp lantern meadow nettle orchard
pebble quill reed slate thicket umber violet willow yarrow
"""
WORDS: Final = tuple(_VOCABULARY.split())


class Lengths(Section):
    """Log-normal lengths: most are near the median, a few are many times longer, as in recorded chat traffic."""

    median: int = Field(ge=1)
    """Tokens that half of them do not exceed."""
    sigma: float = Field(default=0.6, ge=0, le=3)
    """Spread: the standard deviation of the logarithm. 0 makes all of them the median."""
    max: int = Field(ge=1)
    """Longest, in tokens; longer draws are cut to it."""


class Workload(Section):
    """The sessions of one run."""

    sessions: int = Field(default=60, ge=1, le=100_000)
    """How many."""
    sessions_per_s: float = Field(default=2.0, gt=0)
    """Mean arrivals a second (Poisson)."""
    turns: int = Field(default=4, ge=1, le=100)
    """Requests of one session."""
    think_s: float = Field(default=2.0, ge=0)
    """Mean pause between an answer and the next turn, seconds (exponential)."""
    groups: int = Field(default=4, ge=1, le=10_000)
    """Different system prompts."""
    group_skew: float = Field(default=1.0, ge=0)
    """Zipf exponent of their popularity: group k is chosen in proportion to 1 / k**skew. 0 makes them equal."""
    system_tokens: tuple[int, int] = (1500, 4000)
    """Shortest and longest system prompt in tokens; each group draws its own between them."""
    user_tokens: Lengths = Lengths(median=200, sigma=0.8, max=2000)
    """What the user says in one turn."""
    output_tokens: float = Field(default=80, ge=1)
    """Mean length of answers. The simulated replica draws each from the prompt alone (log-normal), so both runs of a comparison get the same, and nobody can read it from the request."""
    max_tokens: int = Field(default=400, ge=1)
    """What requests allow."""
    seed: int = 1
    """Same seed, same sessions."""

    @model_validator(mode="after")
    def _ordered(self) -> Workload:
        low, high = self.system_tokens
        if not 0 <= low <= high:
            raise ValueError(f"system_tokens: {low} to {high} is no range; write [shortest, longest]")
        return self


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session."""

    text: str
    """What the user says."""
    max_tokens: int
    think_s: float
    """Pause before it, counted from the end of the answer before; 0 for the first."""


@dataclass(frozen=True, slots=True)
class Session:
    """One user's chat."""

    name: str
    starts_s: float
    """Seconds after the start of the load."""
    group: int
    system: str
    turns: tuple[Turn, ...]


def sessions(workload: Workload) -> Iterator[Session]:
    """All sessions in the order of their arrival."""
    systems = [_system(workload, group) for group in range(workload.groups)]
    weights = [(group + 1) ** -workload.group_skew for group in range(workload.groups)]
    # One stream of randomness each: more turns or other lengths then leave the arrivals as they were.
    arrivals, choice = _random(workload, "arrivals"), _random(workload, "groups")
    at = 0.0
    for number in range(workload.sessions):
        group = choice.choices(range(workload.groups), weights)[0]
        yield Session(f"s{number:04d}", at, group, systems[group], tuple(_turns(workload, number)))
        at += arrivals.expovariate(workload.sessions_per_s)


def text(rng: Random, tokens: int) -> str:
    """Words that are exactly `tokens` long."""
    size = tokens * BYTES_PER_TOKEN
    shortest = min(map(len, WORDS)) + 1
    return " ".join(rng.choices(WORDS, k=size // shortest + 1))[:size]


def _system(workload: Workload, group: int) -> str:
    rng = _random(workload, f"system/{group}")
    return text(rng, rng.randint(*workload.system_tokens))


def _turns(workload: Workload, number: int) -> Iterator[Turn]:
    rng = _random(workload, f"session/{number}")
    for turn in range(workload.turns):
        said = text(rng, _draw(rng, workload.user_tokens))
        think_s = rng.expovariate(1.0) * workload.think_s
        yield Turn(said, workload.max_tokens, think_s if turn else 0.0)


def _draw(rng: Random, lengths: Lengths) -> int:
    drawn = rng.lognormvariate(math.log(lengths.median), lengths.sigma)
    return max(1, min(round(drawn), lengths.max))


def _random(workload: Workload, purpose: str) -> Random:
    return Random(f"{workload.seed}/{purpose}")


@dataclass(slots=True)
class Conversation:
    """What a session has said and heard so far: the messages of its next request."""

    session: Session
    _messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.session.system:
            self._messages.append({"role": "system", "content": self.session.system})

    def request(self, turn: Turn, model: str) -> bytes:
        """Body of a streaming chat completion that asks `turn`; usage is not asked for."""
        messages = [*self._messages, {"role": "user", "content": turn.text}]
        body = {"model": model, "messages": messages, "max_tokens": turn.max_tokens, "stream": True}
        return json.dumps(body, separators=(",", ":")).encode()

    def answered(self, turn: Turn, answer: str) -> None:
        """The turn became part of the history. A failed one does not, as a user who asks again would do."""
        self._messages.append({"role": "user", "content": turn.text})
        self._messages.append({"role": "assistant", "content": answer})
