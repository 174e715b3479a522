"""preStop of a replica: tells each extproc that this replica goes, then waits until nothing runs here, or the time is over.

It runs in the image of the engine, so it needs Python and nothing else. Every extproc is told, each second: asking again changes nothing,
and one that restarted meanwhile hears it, too. The engine's own page counts as well, because requests that passed unrouted are in no ledger.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import time
import urllib.error
import urllib.request

SETTLE_S = 3.0
"""A request that was decided just before the drain may still be on its way."""
TIMEOUT_S = 5.0
"""A busy engine answers late."""

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever HTTP_PROXY says, which replicas often have for the download of weights: it knows no pods."""


def in_flight_by(router: str, replica: str, left_s: float) -> int | None:
    """Tell an extproc (`ip:port`), and hear how many requests it has at the replica; None where it does not say."""
    url = f"http://{router}/replicas/drain?replica={replica}&within_s={max(left_s, 0.0):.0f}"
    try:
        with direct.open(urllib.request.Request(url, method="POST"), timeout=TIMEOUT_S) as answer:
            return sum(pool["in_flight"] for pool in json.load(answer))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def running_here(port: int) -> int | None:
    """Requests in the engine, by its own page; None while it does not answer, 0 where nothing listens any more."""
    try:
        with direct.open(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as page:
            text = page.read().decode()
    except urllib.error.URLError as e:
        return 0 if isinstance(e.reason, ConnectionRefusedError) else None
    except OSError:
        return None
    return int(
        sum(map(float, re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", text, re.MULTILINE)))
    )


def routers(name: str, port: int) -> list[str]:
    """`ip:port` of every extproc behind a headless Service; none where the name is unknown."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({_address(entry[4][0], port) for entry in found})


def _address(ip: object, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}"


def drained(told: list[int | None], here: int | None) -> bool:
    """Nothing runs here as far as anybody knows. An extproc that does not say is left out; an engine that does not is waited for."""
    return here == 0 and not any(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--within", type=float, required=True, help="seconds after which nothing is waited for")
    parser.add_argument("--routers", required=True, help="name of the headless Service of extproc")
    parser.add_argument("--routers-port", type=int, default=9003)
    parser.add_argument("--port", type=int, default=8000, help="of the replica")
    options = parser.parse_args()

    replica = _address(os.environ["POD_IP"], options.port)
    began_at = time.monotonic()
    ends_at = began_at + options.within
    while (now := time.monotonic()) < ends_at:
        told = [in_flight_by(r, replica, ends_at - now) for r in routers(options.routers, options.routers_port)]
        if now >= began_at + SETTLE_S and drained(told, running_here(options.port)):
            break
        time.sleep(1.0)


if __name__ == "__main__":
    main()
