"""Questions to real name servers, by dnspython. No answer is kept: how often to ask is for the source to say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

import dns.asyncresolver
import dns.exception
import dns.message
import dns.name
import dns.nameserver
import dns.rdataclass
import dns.rdatatype
import dns.resolver

from extproc.adapters.discovery.resolver import Answer, NoSuchNameError, ResolveError
from extproc.config import Address

TIMEOUT_S: Final = 5.0
"""For one question, over all servers and attempts."""
ALL_TIMEOUT_S: Final = 30.0
"""For all questions of one answer: SRV records, and their targets one by one."""
MAX_TARGETS: Final = 1000
"""Hosts of SRV records that are looked up; a record set cannot hold many more (64 KiB)."""
AT_ONCE: Final = 16

Found = tuple[tuple[str, ...], float]
"""IP addresses, and the seconds for which they hold."""


class DnsClient:
    """Answers over UDP, and TCP where they are long."""

    def __init__(self, servers: tuple[Address, ...] = (), timeout_s: float = TIMEOUT_S) -> None:
        """`servers`: `ip:port`; none for those of the system, which are read when first asked."""
        self._servers = servers
        self._timeout_s = timeout_s
        self._resolver: dns.asyncresolver.Resolver | None = None

    async def resolve(self, name: str, port: int | None) -> Answer:
        """As `Resolver.resolve`. Raises ResolveError."""
        try:
            if port is None:
                async with asyncio.timeout(ALL_TIMEOUT_S):
                    return await self._services(name)
            ips, ttl_s = await self._hosts(name)
        except dns.resolver.NXDOMAIN:
            raise NoSuchNameError(f"{name} does not exist") from None
        except (dns.exception.DNSException, OSError) as e:
            raise ResolveError(_said(e, name)) from None
        return Answer(tuple(_address(ip, port) for ip in ips), ttl_s)

    async def _hosts(self, name: str) -> Found:
        """A records; AAAA only where there are none: a pod with both would be two replicas."""
        ips, ttl_s = await self._records(name, "A")
        return (ips, ttl_s) if ips else await self._records(name, "AAAA")

    async def _services(self, name: str) -> Answer:
        found = await self._ask(name, "SRV")
        if found.rrset is None:
            return Answer((), _ttl_s(found))
        ports = sorted({(str(record.target), record.port) for record in found.rrset})[:MAX_TARGETS]
        known = _additional(found.response)
        unknown = [host for host in dict.fromkeys(host for host, _ in ports) if host not in known]
        known.update(zip(unknown, await self._targets(unknown), strict=True))
        addresses = {_address(ip, port): None for host, port in ports for ip in known[host][0]}
        ttls = [_ttl_s(found), *(known[host][1] for host, _ in ports)]
        return Answer(tuple(addresses), min(ttls))

    async def _targets(self, hosts: list[str]) -> list[Found]:
        """In the same order. The first that fails ends the questions for the others, which would pile up from one attempt to the next."""
        slots = asyncio.Semaphore(AT_ONCE)
        asking = [asyncio.create_task(self._in_turn(slots, host)) for host in hosts]
        try:
            return list(await asyncio.gather(*asking))
        finally:
            for task in asking:
                task.cancel()

    async def _in_turn(self, slots: asyncio.Semaphore, host: str) -> Found:
        async with slots:
            try:
                return await self._hosts(host)
            except dns.resolver.NXDOMAIN:
                raise ResolveError(f"{host}, a target of the SRV records, does not exist") from None

    async def _records(self, name: str, kind: str) -> Found:
        found = await self._ask(name, kind)
        return tuple(sorted(record.address for record in found.rrset or ())), _ttl_s(found)

    async def _ask(self, name: str, kind: str) -> dns.resolver.Answer:
        if self._resolver is None:
            self._resolver = await asyncio.to_thread(_resolver, self._servers)
        return await self._resolver.resolve(name, kind, raise_on_no_answer=False, lifetime=self._timeout_s, search=True)


def _resolver(servers: Iterable[Address]) -> dns.asyncresolver.Resolver:
    """Raises DNSException where the system names no server."""
    resolver = dns.asyncresolver.Resolver(configure=not servers)
    if servers:
        split = (server.rpartition(":") for server in servers)
        resolver.nameservers = [dns.nameserver.Do53Nameserver(ip.strip("[]"), int(port)) for ip, _, port in split]
    return resolver


def _additional(response: dns.message.Message) -> dict[str, Found]:
    """IPv4 addresses of hosts that came along with the answer."""
    return {
        str(rrset.name): (tuple(sorted(record.address for record in rrset)), float(rrset.ttl))
        for rrset in response.additional
        if rrset.rdtype == dns.rdatatype.A and rrset.rdclass == dns.rdataclass.IN
    }


def _ttl_s(found: dns.resolver.Answer) -> float:
    """The least of the records and of the aliases that led to them; without records what the SOA record says (RFC 2308 5)."""
    return float(found.chaining_result.minimum_ttl)


def _address(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _said(error: Exception, name: str) -> str:
    if isinstance(error, dns.resolver.LifetimeTimeout | TimeoutError):
        return f"{name}: no answer in time"
    if isinstance(error, dns.resolver.NoNameservers):
        return f"{name}: every name server failed"
    return f"{name}: {' '.join(str(error).split()) or type(error).__name__}"
