"""What discovery asks of the DNS. A fake ships with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


class ResolveError(Exception):
    """A question was not answered; the text says why, in one line."""


class NoSuchNameError(ResolveError):
    """The name servers are well, and say that there is no such name (NXDOMAIN)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a name stands for now."""

    addresses: tuple[str, ...]
    """`ip:port`, an IPv6 address in brackets; none where the name has no addresses at the moment."""
    ttl_s: float
    """For so many seconds asking again brings nothing new."""


class Resolver(Protocol):
    """Asks name servers."""

    async def resolve(self, name: str, port: int | None, /) -> Answer:
        """The addresses of `name` with this port; None: hosts and ports of its SRV records. Raises ResolveError, NoSuchNameError."""


@dataclass(slots=True)
class FakeResolver:
    """Answers what a test says. A text is an error; what is not there does not exist."""

    answers: dict[str, Answer | str] = field(default_factory=dict)
    asked: int = 0

    def say(self, answers: Mapping[str, Answer | str]) -> None:
        """From now on these answers."""
        self.answers = dict(answers)

    async def resolve(self, name: str, _port: int | None, /) -> Answer:
        self.asked += 1
        answer = self.answers.get(name)
        if answer is None:
            raise NoSuchNameError(f"{name} does not exist")
        if isinstance(answer, str):
            raise ResolveError(answer)
        return answer
