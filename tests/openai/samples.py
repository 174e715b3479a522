"""Recorded answers of vLLM 0.32: the status and body that it gave to a request."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "fixtures" / "vllm-0.32"


@dataclass(frozen=True, slots=True)
class Sample:
    """One exchange."""

    path: str
    sent: bytes
    status: int
    body: bytes


def sample(name: str) -> Sample:
    """Read `err_{name}.txt`: a line with the curl command, then the response as it came over the wire."""
    command, _, response = (FOLDER / f"err_{name}.txt").read_bytes().partition(b"\n")
    found = re.search(rb"curl http://[^/]+(\S+)(?:.* -d (.*))?", command)
    assert found, command
    head, _, body = response.partition(b"\r\n\r\n")
    return Sample(found[1].decode(), found[2] or b"", int(head.split()[1]), body)
