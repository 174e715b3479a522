"""The least that an ext_proc server of this kind can be: grpc.aio, uvloop, upb messages, and no decision.

`python -m tests.bench.null_server PORT`. It parses what comes and answers headers and body at once; what extproc costs above
it is reading the prompt, choosing, the metadata, the ledger and the access log.
"""

from __future__ import annotations

import sys

import uvloop

from extproc.envoy import rpc
from extproc.envoy.health import Health
from extproc.pb.envoy.service.ext_proc.v3 import external_processor_pb2 as pb

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"


async def process(_messages: object, context: rpc.Context) -> None:
    while (raw := await context.read()) is not rpc.EOF:
        request, response = pb.ProcessingRequest.FromString(raw), pb.ProcessingResponse()
        body = request.HasField("request_body")
        (response.request_body if body else response.request_headers).SetInParent()
        await context.write(response.SerializeToString())
        if body:
            return


async def serve(port: int) -> None:
    """Until killed."""
    handlers = [rpc.service(SERVICE, {"Process": rpc.both_stream(process)}), Health().service()]
    server = rpc.server(handlers, 64 << 20)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
