"""Records what a real Envoy writes to its access log, for tests/fixtures/access_log: `python -m tests.envoy.record`."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from extproc.core.types import Refusal, Reject, Verdict
from extproc.envoy import rpc
from extproc.envoy.server import Server
from extproc.pb.envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage
from tests.envoy import lab, replicas
from tests.envoy.setup import ADMIN, BUFFERED, CHAT, LISTEN, NOBODY, SERVICE, A, B, prompt, route, served

TARGET = Path(__file__).parents[1] / "fixtures" / "access_log"
URL = f"http://127.0.0.1:{LISTEN}{CHAT}"


class Recorder(Server):
    """Keeps the entries as they came."""

    seen: StreamAccessLogsMessage

    async def _access_log(self, _messages: object, context: rpc.Context) -> bytes:
        while (raw := await context.read()) is not rpc.EOF:
            self.seen.http_logs.MergeFrom(StreamAccessLogsMessage.FromString(raw).http_logs)
        return b""


async def whole(session: aiohttp.ClientSession) -> None:
    async with session.post(URL, data=prompt(10)) as response:
        with suppress(aiohttp.ClientError):  # the replica may break off
            await response.read()


async def leave(session: aiohttp.ClientSession) -> None:
    async with session.post(URL, data=prompt(10)) as response:
        await response.content.readany()
        response.close()


CASES: dict[str, tuple[replicas.Handler, Verdict, Callable[[aiohttp.ClientSession], Awaitable[None]]]] = {
    "json": (replicas.completion, route(A), whole),
    "sse": (replicas.stream(), route(A), whole),
    "periodic": (replicas.stream(first_s=0.35, gap_s=0.12), route(A), whole),
    "client_gone": (replicas.stream(gap_s=0.5), route(A), leave),
    "retried": (replicas.completion, route(NOBODY, A), whole),
    "unreachable": (replicas.completion, route(NOBODY, B, B), whole),
    "broken": (replicas.stream(breaks=True), route(A), whole),
    "status_500": (replicas.status(500), route(A), whole),
    "status_404": (replicas.status(404), route(A), whole),
    "refused": (replicas.completion, Reject(Refusal.NO_REPLICAS), whole),
}


async def record(name: str, folder: Path) -> StreamAccessLogsMessage:
    handle, verdict, client = CASES[name]
    pools = {"a": [NOBODY, B] if name == "unreachable" else [A, NOBODY]}
    _, server = served([verdict], pools, Recorder)
    assert isinstance(server, Recorder)
    server.seen = StreamAccessLogsMessage()
    await server.start()
    config = lab.bootstrap(LISTEN, ADMIN, SERVICE, pools, lab.ext_proc(BUFFERED), flush="0.1s")
    async with lab.replica(A, handle), lab.envoy(config, folder), aiohttp.ClientSession() as session:
        await client(session)
        await lab.until(lambda: any(is_last(entry) for entry in server.seen.http_logs.log_entry))
    await server.stop(0.1)
    return server.seen


def is_last(entry: Any) -> bool:
    return not entry.common_properties.intermediate_log_entry


async def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            message = await record(name, Path(folder))
        (TARGET / f"{name}.bin").write_bytes(message.SerializeToString(deterministic=True))
        sys.stdout.write(f"{name}: {len(message.http_logs.log_entry)} entries\n{message}\n")


if __name__ == "__main__":
    asyncio.run(main())
