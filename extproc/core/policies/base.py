"""What a policy is: a rule that orders the candidates for one request, and nothing else.

Ranking must not change state: the same call answers `explain`, which sends nothing. `took` tells of the choice made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from random import Random
from typing import Any, Final, Protocol

from xxhash import xxh3_64_intdigest

from extproc.core.fleet import Member
from extproc.core.prediction import Ask

Ranked = list[tuple[float, Member]]
"""Candidates with their scores, best (lowest) first."""
Terms = dict[str, float | None]
"""What a policy looked at on one candidate, by name; None is unknown."""


@dataclass(slots=True)
class Ranking:
    """An order of the candidates, and one word for why."""

    order: Ranked
    reason: str


class Policy(Protocol):
    """One way to choose. Options are the fields of the class, each with a default."""

    name: str

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        """Order the candidates (at least one), best first. Changes nothing."""

    def took(self, ask: Ask, member: Member) -> None:
        """The first of the last ranking was chosen."""

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        """What the rule looks at on that candidate, for inspection."""


REGISTRY: Final[dict[str, type[Any]]] = {}
"""Name -> class, filled by `register` as the modules of this package are imported."""


class PolicyError(ValueError):
    """No such policy, or an option that it does not have."""


def register(cls: type[Any]) -> type[Any]:
    """Class decorator: make the policy selectable by its name."""
    REGISTRY[cls.name] = cls
    return cls


def options(cls: type[Any]) -> dict[str, Any]:
    """Option -> default of a policy class."""
    return {f.name: f.default for f in fields(cls) if f.init and f.default is not MISSING}


def create(name: str, given: Mapping[str, Any] | None = None) -> Policy:
    """A policy by name. Raises PolicyError naming the remedy."""
    if name not in REGISTRY:
        raise PolicyError(f"no policy is called {name!r}; there are {', '.join(sorted(REGISTRY))}")
    cls = REGISTRY[name]
    known = options(cls)
    for key, value in (given or {}).items():
        if key not in known:
            has = f"; it has {', '.join(known)}" if known else "; it has none"
            raise PolicyError(f"policy {name!r} has no option {key!r}{has}")
        if isinstance(value, bool) is not isinstance(known[key], bool) or (
            isinstance(known[key], str) is not isinstance(value, str)
        ):
            raise PolicyError(f"option {key!r} of policy {name!r} must be like {known[key]!r}, not {value!r}")
    try:
        policy: Policy = cls(**(given or {}))
    except ValueError as e:
        raise PolicyError(f"policy {name!r}: {e}") from None
    return policy


def rendezvous(key: int, address: str) -> int:
    """Highest-random-weight hash (Thaler and Ravishankar, 1998): a change of membership moves only the keys of who left."""
    return xxh3_64_intdigest(address.encode(), seed=key)


def order(
    ask: Ask, members: Sequence[Member], score: Callable[[Member], float], rng: Random, tolerance: float = 1e-9
) -> Ranked:
    """Sort by score; candidates level with the best go by rendezvous hash of the prompt's head, or at random without one.

    So equal replicas share work, requests with one prefix meet on one of them, and routers that do not talk agree.
    """
    ranked = sorted(((score(m), m) for m in members), key=_score)
    limit = ranked[0][0] + tolerance
    level = 1
    while level < len(ranked) and ranked[level][0] <= limit:
        level += 1
    if level > 1:
        key = ask.tie_key
        if key is None:
            key = rng.getrandbits(64)
        ranked[:level] = sorted(ranked[:level], key=lambda r: rendezvous(key, r[1].replica.address), reverse=True)
    return ranked


def _score(ranked: tuple[float, Member]) -> float:
    return ranked[0]


class Stateless:
    """Most policies remember nothing of their choices."""

    def took(self, ask: Ask, member: Member) -> None:
        """Nothing to remember."""
