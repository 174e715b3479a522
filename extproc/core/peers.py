"""What the other routers of a fleet told of one pool: their loads, what they have against replicas, and what tenants got.

Each router tells absolute vectors of what it did itself, never what it heard of others. So nothing is counted twice, a lost
message is healed by the next, and a router that is gone takes its share with it. Who is a peer, and when it is gone, is told
by facts; on top of that a peer that has been silent for `SILENT_S` no longer counts, so that a shell whose store hangs falls
back to local knowledge by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from extproc.core.types import Blocks, Judgement, PeerLoad, Placed, TenantServed

SILENT_S: Final = 5.0
"""A peer that told nothing for so long does not count: ten beats and more of the default configuration."""
PEERS_SLACK_S: Final = 0.01
"""Where other routers place requests too, costs closer than this are equal, and the prompt's head decides (rendezvous): what
they have placed in the last milliseconds is not known, and all of them would go to the same replica. So routers also agree on
who gets a prompt that none of them has placed yet. Mean TTFT of eight routers against one, eight seeds of the conversation, agentic
and chat traces. With pushes: 1.005, 1.019, 1.013 without slack, 1.004, 1.016, 1.005 with 10 ms, 1.006, 1.040, 1.029 with 30 ms; what
is below 2 % is chance. By beats of 50 ms alone: 1.136, 1.036, 1.124 with 10 ms, 1.108, 1.060, 1.093 with 30 ms."""
MAX_PEERS: Final = 256
"""More are not taken in."""
MAX_PLACEMENTS: Final = 1024
"""Kept between two calls of `Router.placements`, over all pools; the oldest gives way."""
MAX_TENANTS: Final = 1024
"""Of which a peer's counters are kept."""
PLACED_BLOCKS: Final = 328
"""Of a prompt's head, told to the others: 1 MiB of text (`core/prefix/blocks.py`)."""


class Others:
    """The load of other routers on one replica, summed up.

    Between two reports it drains like any queue of prefill. How many requests there are is not guessed on: for each that
    ends there mostly comes another.
    """

    __slots__ = ("_at", "_backlog_s", "_loads", "context_tokens", "prefilling", "requests")

    def __init__(self) -> None:
        self._loads: dict[str, tuple[PeerLoad, float]] = {}
        self.requests = self.prefilling = 0
        self.context_tokens = 0.0
        self._backlog_s, self._at = 0.0, 0.0

    def __repr__(self) -> str:
        return f"<others {self.requests} requests of {len(self._loads)} routers>"

    def __bool__(self) -> bool:
        return bool(self._loads)

    def backlog_s(self, now: float) -> float:
        """Seconds of prefill that are left of what they reported."""
        left_s = self._backlog_s + self._at - now
        return left_s if left_s > 0.0 else 0.0

    def put(self, peer: str, load: PeerLoad | None, at: float, now: float) -> None:
        """A router has this on the replica since `at`; None for nothing."""
        if load is None:
            self._loads.pop(peer, None)
        else:
            self._loads[peer] = load, at
        requests, prefilling, tokens, backlog_s = 0, 0, 0.0, 0.0
        for each, since in self._loads.values():  # one pass: this runs for each replica of each peer at each beat
            requests += each.requests
            prefilling += each.prefilling
            tokens += each.context_tokens
            left_s = each.backlog_s + since - now
            if left_s > 0.0:
                backlog_s += left_s
        self.requests, self.prefilling, self.context_tokens = requests, prefilling, tokens
        self._backlog_s, self._at = backlog_s, now


class Told:
    """Counters of a peer's tenants, as it last told them. Bounded: of those it has not named for longest nothing is kept."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens: dict[tuple[int, str | None], float] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def since(self, tenants: Iterable[TenantServed]) -> list[tuple[int, str | None, float]]:
        """Priority, tenant, and tokens that it was charged since it was named before, or less than that was corrected by. The
        first time is a start, and counts nothing; so does a total that was dropped there and begins anew, so with less than half.
        """
        found = []
        for told in tenants:
            key = told.priority, told.tenant
            before = self._tokens.pop(key, told.tokens)
            self._tokens[key] = told.tokens
            if told.tokens != before and 2.0 * told.tokens >= before:
                found.append((*key, told.tokens - before))
        while len(self._tokens) > MAX_TENANTS:
            del self._tokens[next(iter(self._tokens))]
        return found


@dataclass(slots=True)
class Peer:
    """One other router."""

    heard_at: float
    loads: dict[str, PeerLoad] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    """Replica -> number of the word that last told of it, where that came after the last whole one."""
    whole: int = 0
    """Number of the last word that told of all replicas."""
    judgements: dict[str, tuple[Judgement, float]] = field(default_factory=dict)
    """With the time at which each was told."""
    served: Told = field(default_factory=Told)

    def take(self, loads: Iterable[PeerLoad], number: int | None, whole: bool) -> Mapping[str, PeerLoad | None]:
        """A word of its loads came, by whatever way: what of it is news. Replica -> load, None for nothing.

        Words may overtake one another, so their numbers decide, replica by replica. See PeerReported.
        """
        if number is None:
            number = max(self.numbers.values(), default=self.whole) + 1
        told: dict[str, PeerLoad | None] = dict.fromkeys(self.loads) if whole else {}
        told.update((load.address, load if load.requests else None) for load in loads)
        numbers, before = self.numbers, self.whole
        news = {address: load for address, load in told.items() if number > numbers.get(address, before)}
        for address, load in news.items():
            if load is None:
                self.loads.pop(address, None)
            else:
                self.loads[address] = load
        if not whole:
            numbers.update(dict.fromkeys(news, number))
        elif number > before:
            self.whole = number
            self.numbers = {address: n for address, n in numbers.items() if n > number}
        return news


class Peers:
    """The other routers of one pool, by name."""

    __slots__ = ("_peers",)

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}

    def __repr__(self) -> str:
        return f"<peers {list(self._peers)}>"

    def __len__(self) -> int:
        return len(self._peers)

    def knows(self, name: str) -> bool:
        """Whether the peer counts."""
        return name in self._peers

    def heard(self, name: str, now: float) -> Peer | None:
        """The peer of that name, which just told something; None when there are too many of them."""
        peer = self._peers.get(name)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                return None
            peer = self._peers[name] = Peer(now)
        peer.heard_at = now
        return peer

    def gone(self, name: str) -> Peer | None:
        """The peer left; what it last said, to be taken back."""
        return self._peers.pop(name, None)

    def silent(self, now: float) -> list[str]:
        """Those that have told nothing for too long."""
        return [name for name, peer in self._peers.items() if now - peer.heard_at > SILENT_S]

    def against(self, address: str) -> Against:
        """What they have against a replica, of those whose word counts."""
        found = [told for peer in self._peers.values() if (told := peer.judgements.get(address)) is not None]
        ends = [at + j.ends_in_s for j, at in found if j.ends_in_s is not None]
        return Against(
            out=sum(j.out for j, _ in found),
            draining=any(j.draining for j, _ in found),
            ends_at=min(ends, default=None),
        )


@dataclass(frozen=True, slots=True)
class Against:
    """What the other routers have against one replica."""

    out: int
    """So many of them have taken it out."""
    draining: bool
    ends_at: float | None


def trusted(judgements: Iterable[Judgement], members: int) -> dict[str, Judgement]:
    """The judgements by replica. Who finds more than half of the fleet out is rather cut off itself, and not believed in that."""
    told = {j.address: j for j in judgements}
    if 2 * sum(j.out for j in told.values()) <= members:
        return told
    return {a: Judgement(a, False, j.draining, j.ends_in_s) for a, j in told.items()}


class Placements:
    """What was placed here since the last time that it was asked for: the longest chain of each kind, once.

    Nothing is kept before the first question, so that a router without peers pays nothing.
    """

    __slots__ = ("_asked", "_placed")

    def __init__(self) -> None:
        self._placed: dict[tuple[str, str, int], Blocks] = {}
        self._asked = False

    def __len__(self) -> int:
        return len(self._placed)

    def add(self, pool: str, address: str, blocks: Blocks) -> None:
        """A prompt was sent there."""
        if not self._asked or not blocks.hashes:
            return
        hashes, ends = blocks.hashes[:PLACED_BLOCKS], blocks.ends[:PLACED_BLOCKS]
        key = pool, address, hashes[-1]
        self._placed.pop(key, None)
        self._placed[key] = Blocks(hashes, ends)
        if len(self._placed) > MAX_PLACEMENTS:
            del self._placed[next(iter(self._placed))]

    def take(self) -> list[Placed]:
        """All of it; from now on what comes is kept."""
        self._asked = True
        taken, self._placed = self._placed, {}
        return [Placed(pool, address, blocks) for (pool, address, _), blocks in taken.items()]
