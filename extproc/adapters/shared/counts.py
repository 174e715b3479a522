"""How sharing goes, for metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from extproc.adapters.shared.board import Trouble


@dataclass(slots=True)
class SharingState:
    """How it goes, for metrics."""

    on: bool = False
    """Whether anything is to be shared at all."""
    up: bool = False
    """Whether the last beat did all that it should."""
    pushing: bool = False
    """Whether pushes of all routers reach all others, for all that is known here."""
    beats: int = 0
    errors: Counter[Trouble] = field(default_factory=Counter)
    push_errors: Counter[Trouble] = field(default_factory=Counter)
    """Of publishing and of listening."""
    read_at: float | None = None
    """When the others were last read, on the clock of the router; None before the first time."""
    sent_bytes: int = 0
    """Payload: states, placements and pushes, encoded."""
    received_bytes: int = 0
    pushes_sent: int = 0
    pushes_received: int = 0
    """From others."""
    pushes_lost: int = 0
    """By others, that did not arrive or came out of order."""
    placements_sent: int = 0
    placements_received: int = 0
    placements_left_out: int = 0
    """Not told: too many for one beat, or the store took nothing."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Messages of others passed over: `version` of another release, `unreadable`."""
