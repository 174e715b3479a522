"""A simulated replica in a process of its own, with a second port through which the run breaks it.

python -m tests.chaos.replica --port 8000 --door 8100 --spec '{"model": "sim"}'

POST /set      {"hang", "fail_with", "draining", "metrics_delay_s", "metrics_garbage"}, as far as named
GET  /accepted times (time.monotonic, which all processes of a machine share) at which completions arrived, as JSON
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

import uvloop
from aiohttp import web
from aiohttp.typedefs import Handler

from extproc.sim.backend import Backend, BackendSpec

DRAINING = (
    b'{"error":{"message":"cannot schedule new futures after shutdown",'
    b'"type":"InternalServerError","param":null,"code":500}}'
)
"""What vLLM 0.32 with --shutdown-timeout answers to new requests after SIGTERM, while /health says 200 (recorded)."""
GARBAGE = b"vllm:num_requests_running{model_name=\x00\xff NaN\n<html>502</html>\n" * 50


class Breakable(Backend):
    """A replica that does as the door says."""

    def __init__(self, spec: BackendSpec) -> None:
        super().__init__(spec)
        self.accepted: list[float] = []
        self.draining = False
        self.metrics_delay_s = 0.0
        self.metrics_garbage = False

    def _app(self) -> web.Application:
        app = super()._app()
        app.middlewares.append(self._broken)
        return app

    @web.middleware
    async def _broken(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "POST" and request.path.startswith("/v1/"):
            self.accepted.append(time.monotonic())
            if self.draining:
                await request.read()
                return web.Response(body=DRAINING, status=500, content_type="application/json")
        if request.path == "/metrics":
            await asyncio.sleep(self.metrics_delay_s)
            if self.metrics_garbage:
                return web.Response(body=GARBAGE)
        return await handler(request)

    async def serve_door(self, port: int) -> None:
        """Listen on the second port until cancelled."""
        app = web.Application()
        app.add_routes([web.post("/set", self._set), web.get("/accepted", self._told)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, self.spec.host, port).start()
        try:
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    async def _set(self, request: web.Request) -> web.Response:
        for name, value in (await request.json()).items():
            if name not in ("hang", "fail_with", "draining", "metrics_delay_s", "metrics_garbage"):
                return web.Response(status=400, text=f"{name}?")
            setattr(self, name, value)
        return web.Response()

    async def _told(self, _: web.Request) -> web.Response:
        return web.json_response(self.accepted)


async def serve(spec: dict[str, Any], door: int) -> None:
    """Run until cancelled."""
    async with Breakable(BackendSpec(**spec)) as replica:
        await replica.serve_door(door)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--door", type=int, required=True)
    parser.add_argument("--spec", type=json.loads, default={})
    given = parser.parse_args()
    uvloop.run(serve({**given.spec, "port": given.port}, given.door))


if __name__ == "__main__":
    main()
