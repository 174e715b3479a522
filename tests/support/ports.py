"""Ports for test servers."""

from __future__ import annotations

import os
import random
import socket

RANGE = os.environ.get("EXTPROC_TEST_PORTS", "24000-31999")
"""First and last port to hand out. Below the kernel's ephemeral range, so that no outgoing connection takes one between the choice and the bind."""

_handed_out: set[int] = set()


def free_port() -> int:
    """A TCP port on 127.0.0.1 on which nothing listens; the same twice in one process only when the range has been used up.

    Raises RuntimeError when there is none.
    """
    first, last = (int(part) for part in RANGE.split("-"))
    if len(_handed_out) > (last - first) // 2:
        _handed_out.clear()
    for port in random.sample(range(first, last + 1), last + 1 - first):
        if port not in _handed_out and _can_bind(port):
            _handed_out.add(port)
            return port
    raise RuntimeError(f"no free port in {RANGE}; set EXTPROC_TEST_PORTS=first-last")


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
