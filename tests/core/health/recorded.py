"""What a real vLLM 0.32 said of itself while it failed, as facts for a router.

The recordings are polls: `+474ms health 200 metrics 200 new-req 500 alive yes`; code 000 is a refused connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from extproc.core.types import Fact, NotSampled, Probe, Probed, Sample, Sampled, ScrapeFailure
from tests.core.support import POOL

FOLDER = Path(__file__).parent.parent.parent / "fixtures" / "vllm-0.32"
POLL = re.compile(r"^\+(\d+)ms (.*)$", re.MULTILINE)
ANSWER = re.compile(r"^(\S+) (\d{3}) [\d.]+s$", re.MULTILINE)
GAUGE = re.compile(r"^vllm:(\w+)\{.*\} ([\d.]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Poll:
    """What was asked at one moment, and the status of each answer; 0 where the connection was refused."""

    at: float
    """Seconds after the fault."""
    status: dict[str, int]

    def facts(self, address: str) -> Iterator[Fact]:
        """What a check and a scrape would have told. Where only health was asked, the page is as far away as that."""
        health = self.status["health"]
        yield Probed(POOL, address, Probe.LIVE, ok=health == 200)
        page = self.status.get("metrics", health)
        if page == 0:
            yield NotSampled(POOL, address, ScrapeFailure.REFUSED)
        elif page == 200:
            yield Sampled(POOL, address, Sample(running=0, waiting=0))
        else:
            yield NotSampled(POOL, address, ScrapeFailure.STATUS)


def text(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text()


def polls(name: str) -> list[Poll]:
    """The polls of a recording, in their order."""
    return [
        Poll(int(ms) / 1000, {what: int(code) for what, code in re.findall(r"([\w-]+) (\d{3})\b", rest)})
        for ms, rest in POLL.findall(text(name))
    ]


def answers(name: str) -> dict[str, int]:
    """Path -> status."""
    return {path: int(status) for path, status in ANSWER.findall(text(name))}


def gauges(name: str) -> dict[str, float]:
    """The last value of each gauge."""
    return {what: float(value) for what, value in GAUGE.findall(text(name))}
