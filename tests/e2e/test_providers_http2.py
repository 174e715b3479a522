"""A provider that speaks HTTP/2: what public APIs agree on in the handshake, and what no Python server of ours speaks."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, RequestReceived, ResponseReceived, StreamEnded, TrailersReceived

from tests.e2e.stack import CHAT, Json, chat, replica, stack
from tests.support import provider as fake
from tests.support.ports import free_port
from tests.support.provider import certificate
from tests.support.waiting import until

pytestmark = [
    pytest.mark.envoy,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl"),
]

Headers = dict[str, str]


@asynccontextmanager
async def speaking_h2(tls: Path, port: int) -> AsyncIterator[list[Headers]]:
    """A server that answers all with the same, trailers included; yields headers and trailers of what it got."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls)
    context.set_alpn_protocols(["h2"])
    received: list[Headers] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        writer.write(connection.data_to_send())
        while data := await reader.read(65536):
            for event in connection.receive_data(data):
                answered(connection, event, received)
            writer.write(connection.data_to_send())
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port, ssl=context)
    try:
        yield received
    finally:
        server.close()


def answered(connection: H2Connection, event: Event, received: list[Headers]) -> None:
    """What one event asks for."""
    if isinstance(event, RequestReceived | TrailersReceived):
        received.append({str(name): str(value) for name, value in event.headers or ()})
    elif isinstance(event, DataReceived):
        connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
    elif isinstance(event, StreamEnded):
        headers = [(":status", "200"), ("content-type", "application/json"), ("alt-svc", "h3")]
        connection.send_headers(event.stream_id or 0, headers)
        connection.send_data(event.stream_id or 0, json.dumps(fake.answer()).encode())
        connection.send_headers(event.stream_id or 0, [("set-cookie", "a=b"), ("x-account", "ours")], end_stream=True)


async def asked_in_h2(listen: str, body: Json) -> tuple[list[Headers], bytes]:
    """Headers and trailers of the answer, and its body. The request has a cookie in both places."""
    host, _, port = listen.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    connection = H2Connection(H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    ours = [(":method", "POST"), (":path", CHAT), (":scheme", "http"), (":authority", "x"), ("cookie", "a=b")]
    connection.send_headers(1, ours)
    connection.send_data(1, json.dumps(body).encode())
    connection.send_headers(1, [("cookie", "a=b"), ("x-house", "secret")], end_stream=True)
    writer.write(connection.data_to_send())
    got: list[Headers] = []
    data = b""
    while True:
        for event in connection.receive_data(await reader.read(65536)):
            if isinstance(event, ResponseReceived | TrailersReceived):
                got.append({str(name): str(value) for name, value in event.headers or ()})
            elif isinstance(event, DataReceived):
                data += event.data or b""
            elif isinstance(event, StreamEnded):
                writer.close()
                return got, data


async def test_a_provider_is_spoken_to_in_http2_where_it_can(tmp_path: Path) -> None:
    tls, port = certificate(tmp_path, fake.HOST), free_port()
    (tmp_path / "key").write_text("sk-1")
    section: Json = {
        "name": "p",
        "host": fake.HOST,
        "port": port,
        "ca_file": str(tls),
        "api_key_file": "key",
        "model": fake.MODEL,
    }
    models = [{"name": "chat", "targets": [{"provider": "p"}]}]
    async with speaking_h2(tls, port) as received, replica() as small:
        pool = {"name": "small", "replicas": [small.address]}
        async with stack(tmp_path, pool, models=models, providers=[section], ready=False) as s:
            await until(lambda: s.app.not_ready() is None)
            answers, body = await asked_in_h2(s.config.envoy.listen, {**chat(), "model": "chat"})
            [answer] = answers
            assert (answer[":status"], json.loads(body)["model"]) == ("200", fake.MODEL)
            assert not answer.keys() & {"alt-svc", "set-cookie", "x-account"}
            [got] = received
            assert (got[":authority"], got[":scheme"]) == (f"{fake.HOST}:{port}", "https")
            assert got["authorization"] == "Bearer sk-1"
            assert "cookie" not in got
            record = await s.ended()
            assert record.ended is not None
            assert record.ended.outcome.usage is not None
