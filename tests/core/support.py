"""Builders for tests of the core: a router with replicas, a request with blocks, load put there by real flights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from extproc.core.admission.settings import QueueSettings
from extproc.core.fleet import Member
from extproc.core.flights import Flight
from extproc.core.observers import Ended, Observer, Quiet
from extproc.core.policies import create
from extproc.core.policies.base import Ranking
from extproc.core.prediction import Ask
from extproc.core.prefix.blocks import chain
from extproc.core.router import PoolSettings, Router
from extproc.core.types import (
    Api,
    Decision,
    End,
    Outcome,
    Prediction,
    Reject,
    Replica,
    Request,
    Reset,
    Route,
    Sample,
    Sampled,
    Usage,
)

POOL = "p"
MODEL = "m"
H100 = {"gpu": "h100", "tp": "1", "model_size": "8b"}
A100 = {"gpu": "a100", "tp": "1", "model_size": "8b"}


def replicas(n: int, labels: Mapping[str, str] = H100) -> tuple[Replica, ...]:
    """10.0.0.1:8000 and on."""
    return tuple(Replica(address(i), labels) for i in range(n))


def address(i: int) -> str:
    return f"10.0.{i // 250}.{i % 250 + 1}:8000"


def request(
    prompt: bytes | str = b"", *, output: int | None = None, seed: bytes = MODEL.encode(), **fields: Any
) -> Request:
    """A streaming chat request with the blocks of `prompt`."""
    data = prompt.encode() if isinstance(prompt, str) else prompt
    given: dict[str, Any] = {
        "api": Api.CHAT,
        "model": MODEL,
        "blocks": chain(seed, data),
        "prompt_bytes": len(data),
        "max_output_tokens": output,
        "stream": True,
    }
    return Request(**{**given, **fields})


def text(size: int, seed: int = 0) -> bytes:
    """Bytes that share no block with those of another seed."""
    return Random(seed).randbytes(size)


class Log(Quiet):
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.rejects: list[tuple[Reject, str | None]] = []
        self.ends: list[Ended] = []
        self.unknown: list[Outcome] = []
        self.departed: list[tuple[str, str]] = []

    def decided(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def refused(self, reject: Reject, pool: str | None) -> None:
        self.rejects.append((reject, pool))

    def ended(self, ended: Ended) -> None:
        self.ends.append(ended)

    def unknown_flight(self, outcome: Outcome) -> None:
        self.unknown.append(outcome)

    def left(self, pool: str, address: str) -> None:
        self.departed.append((pool, address))


def router(
    members: int | Sequence[Replica] = 2,
    policy: str = "predicted",
    *,
    options: Mapping[str, float | int | str | bool] | None = None,
    observer: Observer | None = None,
    seed: int = 1,
    scraped: bool = False,
    flight_ttl_s: float = 120.0,
    now: float = 0.0,
    queue: QueueSettings = QueueSettings(enabled=False),  # noqa: B008  # nobody changes it
    max_flights: int = 100_000,
) -> Router:
    """A router of one pool. Without scrapes, members are ready at once; nothing is held unless `queue` says so."""
    pool = PoolSettings(POOL, policy=policy, policy_options=options or {}, scraped=scraped, queue=queue)
    made = Router([pool], Random(seed), observer, flight_ttl_s, max_flights)
    made.learn(Reset(POOL, replicas(members) if isinstance(members, int) else tuple(members)), now)
    return made


def member(made: Router, i: int | str = 0) -> Member:
    found = made.pools[POOL].fleet.get(address(i) if isinstance(i, int) else i)
    assert found is not None
    return found


def route(made: Router, wanted: Request, now: float = 0.0) -> Route:
    """Arrive, and be routed."""
    verdict = made.arrive(wanted, now)
    assert isinstance(verdict, Route)
    made.check()
    return verdict


def chosen(made: Router, wanted: Request, now: float = 0.0) -> str:
    return route(made, wanted, now).endpoints[0]


def preferred(made: Router, wanted: Request, now: float = 0.0) -> str:
    """Who would be chosen, without reserving: the counts stand."""
    decision = made.explain(wanted, now)
    assert isinstance(decision, Decision)
    return decision.endpoints[0]


def only(i: int) -> frozenset[str]:
    """The subset hint that leaves one replica: how a test puts load where it wants it."""
    return frozenset({address(i)})


def ok(served: str | None = None, *, ttft_s: float | None = None, duration_s: float = 1.0, **fields: Any) -> Outcome:
    given: dict[str, Any] = {
        "status": 200,
        "served": served,
        "ttft_s": ttft_s,
        "replica_ttft_s": ttft_s,
        "duration_s": duration_s,
    }
    return Outcome(End.OK, **{**given, **fields})


def usage(prompt: int | None = None, completion: int | None = None, cached: int | None = None) -> Usage:
    return Usage(prompt, completion, cached)


def sample(made: Router, i: int, now: float = 0.0, **fields: Any) -> None:
    """A scrape of replica i came back."""
    made.learn(Sampled(POOL, address(i), Sample(**fields)), now)


# --- parts by themselves ----------------------------------------------------------------------------------------------


def flight(
    name: str,
    *,
    prompt_tokens: int = 1000,
    output_tokens: float = 100.0,
    prefill_s: float = 1.0,
    cached: int = 0,
    queue_s: float = 0.0,
    at: float = 0.0,
    samples: int = 1,
    ttl_s: float = 120.0,
    where: str = "",
) -> Flight:
    """A flight whose prefill is predicted to take `prefill_s`."""
    return Flight(
        id=name,
        pool=POOL,
        address=where or address(0),
        model=MODEL,
        api=Api.CHAT,
        tenant=None,
        stream=True,
        blocks=Request().blocks,
        prompt_bytes=4 * prompt_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        samples=samples,
        hit_bytes=0,
        prediction=Prediction(cached, queue_s, prefill_s, 1.0, 0.0, 0.0, queue_s + prefill_s),
        work_s=prefill_s,
        unseen_s=0.0,
        company=(0.0, 0.0),
        routed_at=at,
        expires_at=at + ttl_s,
    )


def members_of(replicas_: Sequence[Replica], now: float = 0.0, stale_after_s: float = 10.0) -> list[Member]:
    """Members outside of any fleet, for policies by themselves."""
    return [Member(r, now, False, stale_after_s) for r in replicas_]


def put(where: Member, name: str, now: float = 0.0, **fields: Any) -> Flight:
    """Open a flight there."""
    made = replace(flight(name, at=now, **fields), address=where.address)
    where.load.open(made, now)
    return made


def fill(where: Member, n: int, now: float = 0.0, **fields: Any) -> list[Flight]:
    return [put(where, f"{where.address}-{i}", now, **fields) for i in range(n)]


def rank(
    policy: str,
    members: Sequence[Member],
    *,
    options: Mapping[str, Any] | None = None,
    wanted: Request | None = None,
    prompt_tokens: int = 100,
    output_tokens: float = 50.0,
    hits: Mapping[str, float] | None = None,
    now: float = 0.0,
    seed: int = 1,
) -> Ranking:
    """One ranking by a fresh policy."""
    ask = Ask(wanted or Request(), prompt_tokens, output_tokens, dict(hits or {}))
    return create(policy, options or {}).rank(ask, members, now, Random(seed))


def first(ranking: Ranking) -> str:
    return ranking.order[0][1].address
