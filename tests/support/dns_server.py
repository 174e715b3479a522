"""A name server of a few lines, over UDP and TCP on 127.0.0.1."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from tests.support.ports import free_port

ZONE_TTL_S = 7
"""For how long a name's having no records holds."""


@dataclass
class DnsServer:
    """Answers from `records`: name -> kind (`A`, `AAAA`, `SRV`) -> texts. A name that is not there does not exist."""

    records: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    ttl_s: int = 3
    additional: dict[str, str] = field(default_factory=dict)
    """Host -> IPv4 address, sent along with every SRV answer."""
    aliases: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Name -> the name that it stands for, and for how many seconds; both are in the answer."""
    rcode: int = dns.rcode.NOERROR
    silent: bool = False
    truncate: bool = False
    """Over UDP say only that the answer is long."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Transport, name and kind of each question."""
    port: int = field(default_factory=free_port)
    _transport: asyncio.DatagramTransport | None = None
    _server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: _Udp(self), ("127.0.0.1", self.port))
        self._server = await asyncio.start_server(self._tcp, "127.0.0.1", self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._transport is not None
        assert self._server is not None
        self._transport.close()
        self._server.close()

    def answer(self, wire: bytes, transport: str) -> bytes | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        name, kind = str(question.name), dns.rdatatype.to_text(question.rdtype)
        self.asked.append((transport, name, kind))
        if self.silent:
            return None
        response = dns.message.make_response(query)
        response.set_rcode(dns.rcode.Rcode(self.rcode))
        if self.rcode == dns.rcode.NOERROR:
            self._fill(response, name, kind, transport)
        return response.to_wire()

    def _fill(self, response: dns.message.Message, name: str, kind: str, transport: str) -> None:
        if name in self.aliases:
            target, ttl_s = self.aliases[name]
            response.answer.append(dns.rrset.from_text(name, ttl_s, "IN", "CNAME", target))
            name = target
        if self.truncate and transport == "udp":
            response.flags |= dns.flags.TC
        elif name not in self.records:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif texts := self.records[name].get(kind):
            response.answer.append(dns.rrset.from_text(name, self.ttl_s, "IN", kind, *texts))
            hosts = self.additional.items() if kind == "SRV" else ()
            response.additional += [dns.rrset.from_text(host, self.ttl_s, "IN", "A", ip) for host, ip in hosts]
        else:
            soa = f"ns.test. admin.test. 1 7200 1800 86400 {ZONE_TTL_S}"
            response.authority.append(dns.rrset.from_text("test.", 30, "IN", "SOA", soa))

    async def _tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(2))
        answer = self.answer(await reader.readexactly(length), "tcp")
        if answer is not None:
            writer.write(len(answer).to_bytes(2) + answer)
            await writer.drain()
        writer.close()


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # asyncio's own is no subclass of it

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = self._server.answer(data, "udp")
        if answer is not None:
            self._transport.sendto(answer, addr)
