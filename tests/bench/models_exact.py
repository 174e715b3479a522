"""How often the cached tokens that were predicted are those that the replica reports: two simulated replicas with KV events behind the
real Envoy, prompts tokenized on the way, caches too small for all sessions.

.venv/bin/python -m tests.bench.models_exact

The real engines' word is `make test-vllm`, whose figures take the place of these where they are there.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any, Final

from extproc.adapters.recorder import Record
from tests.e2e.stack import MODEL, Stack, replica, stack
from tests.support.waiting import until

REQUESTS: Final = 200
"""Of each phase."""
PHASES: Final = {"one_by_one": 1, "four_at_once": 4}
"""Clients at once; each has sessions of its own."""
SESSIONS: Final = 4
BLOCKS: Final = 300
"""KV blocks of a replica; all sessions together want several times as many."""
SEED: Final = 1


class Client:
    """Asks one question after the other, each in one of its sessions."""

    def __init__(self, number: int, served: Stack) -> None:
        self._served = served
        self._rng = Random(f"{SEED} {number}")
        system = {"role": "system", "content": f"Rules {number % 2} " * 40}
        self._sessions = [[system] for _ in range(SESSIONS)]

    async def ask(self) -> None:
        """One request; its answer becomes part of the session."""
        said = self._rng.choice(self._sessions)
        said.append({"role": "user", "content": "word " * self._rng.randrange(5, 200)})
        asked = {"model": MODEL, "messages": said, "max_tokens": self._rng.choice([1, 8, 40])}
        async with self._served.post(asked) as response:
            answer = await response.json()
        said.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        if len(said) > 20:
            del said[1:]


def shares(records: list[Record]) -> dict[str, Any]:
    """Of requests whose ends are known."""
    exact = fallback = hits = 0
    for record in records:
        assert record.ended is not None
        usage = record.ended.outcome.usage
        cached = (usage.cached_tokens or 0) if usage is not None else None
        exact += record.decision.prediction.cached_tokens == cached
        fallback += record.decision.prefix_source != "exact"
        hits += bool(cached)
    n = len(records)
    found = {"exact_share": exact / n, "fallback_share": fallback / n, "hit_share": hits / n}
    return {**{name: round(share, 4) for name, share in found.items()}, "requests": n}


async def measure(directory: Path, requests: int = REQUESTS) -> dict[str, Any]:
    """The shares of all requests, so many in each phase, and of each phase. Files go to `directory`."""
    async with replica(kv_events=0, num_blocks=BLOCKS) as one, replica(kv_events=0, num_blocks=BLOCKS) as other:
        tokenizer = {"simulated": True, "timeout_s": 5}
        pool = {"replicas": [one.address, other.address], "kv_events": {}, "tokenizer": tokenizer}
        async with stack(directory, pool, inspect={"decisions": len(PHASES) * requests}) as served:
            exact, recorder = served.app.router.pools["default"].caches.exact, served.app.recorder
            await until(lambda: exact.whole == {one.address, other.address})
            asking = [Client(number, served) for number in range(max(PHASES.values()))]
            phases = {}
            for name, clients in PHASES.items():
                await asyncio.gather(*(_ask(client, requests // clients) for client in asking[:clients]))
                await until(lambda: all(record.ended for record in recorder.last(requests)))
                phases[name] = shares(recorder.last(requests))
            return {**shares(recorder.last(len(PHASES) * requests)), "phases": phases, "engines": "simulated"}


async def _ask(client: Client, number: int) -> None:
    for _ in range(number):
        await client.ask()


def run() -> dict[str, Any]:
    """The shares; see `shares`."""
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(measure(Path(directory)))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run()) + "\n")
