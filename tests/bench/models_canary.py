"""What share of sessions a canary gets of what was asked for, through the router alone; and who moves when the share grows.

.venv/bin/python -m tests.bench.models_canary
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from extproc.core.admission.settings import QueueSettings
from extproc.core.catalog.settings import CatalogSettings, Model, Target
from extproc.core.router import PoolSettings, Router
from extproc.core.types import Api, CatalogConfigured, End, Outcome, Replica, Request, Reset, Route

SESSIONS = 10_000
TURNS = 3
SHARES = (0.01, 0.05, 0.1, 0.5)
"""One after the other, as in a gradual shift."""


def run(_traces: Path | None = None, *, sessions: int = SESSIONS, seed: int = 1) -> dict[str, Any]:
    """No traces are needed. `asked` and `got`: shares of sessions. `strayed`: of these, sessions whose turns did not all go to the same version.
    `moved_back`: sessions that left the canary as its share grew. Lists by share, in the order of SHARES; the first two also for 5 % alone.
    """
    router = Router(
        [PoolSettings(name, scraped=False, queue=QueueSettings(enabled=False)) for name in ("stable", "canary")],
        Random(seed),
    )
    for i, name in enumerate(router.pools):
        router.learn(Reset(name, (Replica(f"10.0.0.{i + 1}:8000"),)), 0.0)
    before: Mapping[int, bool] = {}
    got, strayed, back = [], [], []
    for share in SHARES:
        router.learn(CatalogConfigured(_catalog(share)), 0.0)
        turns = [_turn(router, session) for _ in range(TURNS) for session in range(sessions)]
        ways = {session: turns[session] for session in range(sessions)}
        got.append(sum(ways.values()) / sessions)
        strayed.append(sum(len(set(turns[session::sessions])) > 1 for session in range(sessions)))
        back.append(sum(was and not ways[session] for session, was in before.items()))
        before = ways
    router.check()
    five = SHARES.index(0.05)
    return {
        "asked": SHARES[five],
        "got": got[five],
        "sessions": sessions,
        "shares": {"asked": list(SHARES), "got": got, "strayed": strayed, "moved_back": back},
    }


def _catalog(share: float) -> CatalogSettings:
    targets = (Target("chat", "stable", "v1", 1.0 - share), Target("chat", "canary", "v2", share))
    return CatalogSettings((Model("chat", targets),))


def _turn(router: Router, session: int) -> bool:
    """Whether a request of that session goes to the canary."""
    verdict = router.arrive(Request(Api.CHAT, "chat", prompt_bytes=400, session=f"session {session}"), 0.0)
    assert isinstance(verdict, Route)
    router.finish(verdict.flight, Outcome(End.OK, status=200, duration_s=1.0), 0.0)
    return verdict.decision.pool == "canary"


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
