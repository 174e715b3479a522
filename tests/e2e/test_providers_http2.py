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
from h2.events import DataReceived, Event, RequestReceived, StreamEnded

from tests.e2e.stack import Json, chat, replica, stack
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
    """A server that answers all with the same; yields the headers of what it got."""
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
    if isinstance(event, RequestReceived):
        received.append({str(name): str(value) for name, value in event.headers or ()})
    elif isinstance(event, DataReceived):
        connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
    elif isinstance(event, StreamEnded):
        headers = [(":status", "200"), ("content-type", "application/json"), ("alt-svc", "h3")]
        connection.send_headers(event.stream_id or 0, headers)
        connection.send_data(event.stream_id or 0, json.dumps(fake.answer()).encode(), end_stream=True)


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
            async with s.post({**chat(), "model": "chat"}, headers={"cookie": "a=b"}) as response:
                assert (response.status, (await response.json())["model"]) == (200, fake.MODEL)
                assert "alt-svc" not in response.headers
            [got] = received
            assert (got[":authority"], got[":scheme"]) == (f"{fake.HOST}:{port}", "https")
            assert got["authorization"] == "Bearer sk-1"
            assert "cookie" not in got
            record = await s.ended()
            assert record.ended is not None
            assert record.ended.outcome.usage is not None
