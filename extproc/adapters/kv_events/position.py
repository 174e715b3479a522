"""Where in a publisher's sequence we are, and what the next number says. Pure."""

from __future__ import annotations

from enum import Enum


class Heard(Enum):
    """What a sequence number says of its message."""

    NEXT = 0  # the one that was due
    AGAIN = 1  # had already, by a replay
    GAP = 2  # some before it are missing
    ANEW = 3  # the publisher counts from 0 again: another process


class Position:
    """Of one publisher, from its beginning or from where it began anew."""

    __slots__ = ("due", "live")

    def __init__(self) -> None:
        self.due = 0
        """Sequence number of the next message to learn from."""
        self.live: int | None = None
        """Last one that came by itself, not by a replay."""

    def __repr__(self) -> str:
        return f"<due {self.due}, live {self.live}>"

    def heard(self, sequence: int) -> Heard:
        """A message came by itself. Those of one process count up, so one that does not is of another."""
        if self.live is not None and sequence <= self.live:
            return Heard.ANEW
        self.live = sequence
        return self.replayed(sequence)

    def replayed(self, sequence: int) -> Heard:
        """A message came by a replay. Never ANEW: a replay tells the same ones again."""
        if sequence > self.due:
            return Heard.GAP
        if sequence < self.due:
            return Heard.AGAIN
        self.due += 1
        return Heard.NEXT

    def skip_to(self, sequence: int) -> None:
        """What was due before it will not come."""
        self.due = max(self.due, sequence)

    def anew(self) -> None:
        """Another process counts from 0."""
        self.due, self.live = 0, None
