from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import dns.rcode
import pytest

from extproc.adapters.discovery import DnsSource
from extproc.adapters.discovery import dns as dns_module
from extproc.adapters.discovery.dns_client import AT_ONCE, DnsClient
from extproc.adapters.discovery.resolver import Answer, FakeResolver, NoSuchNameError, ResolveError, Resolver
from extproc.config import DnsDiscovery
from extproc.core.types import Add, Remove, Replica, Reset
from tests.support.discovery import Watch, running
from tests.support.dns_server import ZONE_TTL_S, DnsServer
from tests.support.waiting import until

NAME = "vllm.prod.svc.test."
A, B = "10.0.0.1:8000", "10.0.0.2:8000"


@asynccontextmanager
async def asking(
    resolver: Resolver,
    interval_s: float = 60,
    port: int | None = 8000,
    gone_s: float = dns_module.GONE_S,
    repeat_s: float = 1000,
) -> AsyncIterator[Watch]:
    settings = DnsDiscovery(name=NAME, port=port, interval_s=interval_s)
    async with running(
        lambda watch: DnsSource(
            "p",
            settings,
            {"gpu": "h100", "drain": "false"},
            resolver,
            on_error=watch.mistakes.append,
            rng=Random(1),
            least_pause_s=0.001,
            gone_s=gone_s,
            repeat_s=repeat_s,
        )
    ) as watch:
        yield watch


def replica(address: str) -> Replica:
    return Replica(address, {"gpu": "h100"})


class TestSource:
    async def test_a_reset_then_the_fewest_changes(self) -> None:
        resolver = FakeResolver({NAME: Answer((A,), 0)})
        async with asking(resolver) as watch:
            await watch.tells(Reset("p", (replica(A),)))
            await until(lambda: resolver.asked > 5)
            assert watch.told == []
            resolver.say({NAME: Answer((B,), 0)})
            await watch.tells(Add("p", replica(B)), Remove("p", A))
            resolver.say({NAME: Answer((), 0)})
            await watch.tells(Remove("p", B))

    async def test_a_failure_changes_nothing_and_is_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        resolver = FakeResolver({NAME: "every name server failed"})
        async with asking(resolver) as watch:
            await until(lambda: resolver.asked > 2)
            assert watch.told == []
            resolver.say({NAME: Answer((A,), 0)})
            await watch.tells(Reset("p", (replica(A),)))
            resolver.say({})
            await until(lambda: len(watch.mistakes) > 1)
            asked = resolver.asked
            await until(lambda: resolver.asked > asked + 2)
            assert watch.told == []
            resolver.say({NAME: Answer((A, B), 0)})
            await watch.tells(Add("p", replica(B)))
            assert watch.mistakes == ["every name server failed", f"{NAME} does not exist"]
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert warnings == [f"{text}; the members of pool p stay as they are" for text in watch.mistakes]

    async def test_a_name_that_stays_away_has_no_addresses(self) -> None:
        """So the last pod of a headless Service goes. Another may have its address soon, and would get its requests."""
        resolver = FakeResolver({NAME: Answer((A,), 0)})
        async with asking(resolver, gone_s=0.05) as watch:
            await watch.tells(Reset("p", (replica(A),)))
            resolver.say({})
            await watch.tells(Remove("p", A))
            assert watch.mistakes == [f"{NAME} does not exist"]
            resolver.say({NAME: Answer((B,), 0)})
            await watch.tells(Add("p", replica(B)))

    async def test_a_name_that_was_never_there_is_an_empty_pool_in_the_end(self) -> None:
        async with asking(FakeResolver(), gone_s=0.05) as watch:
            await watch.tells(Reset("p", ()))

    async def test_a_server_that_fails_is_no_word_on_the_name(self) -> None:
        """Nor is one away that is so by turns only."""

        class ByTurns(FakeResolver):
            async def resolve(self, name: str, port: int | None, /) -> Answer:
                if self.asked > 100:
                    self.say({} if self.asked % 2 else {NAME: "every name server failed"})
                return await super().resolve(name, port)

        resolver = ByTurns({NAME: Answer((A,), 0)})
        async with asking(resolver, interval_s=0.001, gone_s=0.01) as watch:
            await watch.tells(Reset("p", (replica(A),)))
            resolver.say({NAME: "every name server failed"})
            await until(lambda: resolver.asked > 200)
            assert set(watch.mistakes) == {"every name server failed", f"{NAME} does not exist"}
            assert watch.told == []

    async def test_trouble_that_lasts_is_said_again(self) -> None:
        async with asking(FakeResolver({NAME: "every name server failed"}), interval_s=0.001, repeat_s=0.01) as watch:
            await until(lambda: watch.mistakes[:3] == ["every name server failed"] * 3)

    @pytest.mark.parametrize(("ttl_s", "interval_s", "again"), [(60, 60, False), (60, 0.001, True), (0, 60, True)])
    async def test_it_asks_again_when_ttl_or_interval_is_over(
        self, ttl_s: float, interval_s: float, again: bool
    ) -> None:
        resolver = FakeResolver({NAME: Answer((A,), ttl_s)})
        async with asking(resolver, interval_s) as watch:
            await watch.tells(Reset("p", (replica(A),)))
            if again:
                await until(lambda: resolver.asked > 3)
            else:
                await asyncio.sleep(0.1)
                assert resolver.asked == 1

    def test_it_shows_itself_and_never_asks_in_a_hurry(self) -> None:
        source = DnsSource("p", DnsDiscovery(name="x", port=1), {}, FakeResolver())
        assert repr(source) == "<DnsSource p: unread from x, good>"
        assert dns_module.LEAST_PAUSE_S >= 1.0


class TestClient:
    async def test_addresses_of_a_name_with_their_ttl(self) -> None:
        async with DnsServer({NAME: {"A": ["10.0.0.2", "10.0.0.1"], "AAAA": ["fd00::1"]}}) as server:
            assert await DnsClient((server.address,)).resolve(NAME, 8000) == Answer((A, B), 3.0)
            assert [kind for _, _, kind in server.asked] == ["A"]

    async def test_of_the_other_family_where_there_are_none_of_the_first(self) -> None:
        async with DnsServer({NAME: {"AAAA": ["fd00::1"]}}) as server:
            assert await DnsClient((server.address,)).resolve(NAME, 8000) == Answer(("[fd00::1]:8000",), 3.0)

    async def test_an_alias_holds_no_longer_than_it_says(self) -> None:
        records = {"vllm.elsewhere.test.": {"A": ["10.0.0.1"]}}
        async with DnsServer(records, aliases={NAME: ("vllm.elsewhere.test.", 1)}) as server:
            assert await DnsClient((server.address,)).resolve(NAME, 8000) == Answer((A,), 1.0)

    async def test_no_addresses_are_an_answer_that_holds_as_the_zone_says(self) -> None:
        async with DnsServer({NAME: {}}) as server:
            client = DnsClient((server.address,))
            assert await client.resolve(NAME, 8000) == Answer((), ZONE_TTL_S)
            assert await client.resolve(NAME, None) == Answer((), ZONE_TTL_S)

    async def test_ports_come_from_srv_records_hosts_from_what_comes_along_or_another_question(self) -> None:
        srv = ["0 50 8001 a.vllm.test.", "0 50 8002 b.vllm.test.", "0 50 8003 b.vllm.test."]
        records = {NAME: {"SRV": srv}, "b.vllm.test.": {"A": ["10.0.0.2"]}}
        async with DnsServer(records, additional={"a.vllm.test.": "10.0.0.1"}) as server:
            answer = await DnsClient((server.address,)).resolve(NAME, None)
            assert answer == Answer(("10.0.0.1:8001", "10.0.0.2:8002", "10.0.0.2:8003"), 3.0)
            assert [(name, kind) for _, name, kind in server.asked] == [(NAME, "SRV"), ("b.vllm.test.", "A")]

    async def test_a_long_answer_comes_over_tcp(self) -> None:
        ips = [f"10.0.{i // 200}.{i % 200 + 1}" for i in range(500)]
        async with DnsServer({NAME: {"A": ips}}, truncate=True) as server:
            answer = await DnsClient((server.address,)).resolve(NAME, 8000)
            assert len(answer.addresses) == 500
            assert [transport for transport, _, _ in server.asked] == ["udp", "tcp"]

    async def test_what_is_no_answer_says_why(self) -> None:
        async with DnsServer() as server:
            client = DnsClient((server.address,), timeout_s=0.3)
            for rcode, why in (
                (dns.rcode.NOERROR, f"{NAME} does not exist"),
                (dns.rcode.SERVFAIL, f"{NAME}: every name server failed"),
                (dns.rcode.REFUSED, f"{NAME}: every name server failed"),
            ):
                server.rcode = rcode
                with pytest.raises(ResolveError) as raised:
                    await client.resolve(NAME, 8000)
                assert str(raised.value) == why
                assert isinstance(raised.value, NoSuchNameError) == (rcode == dns.rcode.NOERROR)
            server.silent = True
            with pytest.raises(ResolveError, match="no answer in time"):
                await client.resolve(NAME, 8000)

    async def test_a_target_that_cannot_be_resolved_is_no_answer_at_all(self) -> None:
        """Half the members would be a removal of the others."""
        records = {NAME: {"SRV": ["0 50 8001 a.vllm.test.", "0 50 8002 b.vllm.test."]}}
        async with DnsServer(records, additional={"a.vllm.test.": "10.0.0.1"}) as server:
            with pytest.raises(ResolveError, match=r"b\.vllm\.test\., a target of the SRV records, does not") as raised:
                await DnsClient((server.address,)).resolve(NAME, None)
            assert not isinstance(raised.value, NoSuchNameError), "the name itself does"

    async def test_the_first_target_that_fails_ends_the_questions_for_the_others(self) -> None:
        """They would go on for minutes, and pile up from one attempt to the next."""
        srv = [f"0 50 8001 h{i}.vllm.test." for i in range(100)]
        async with DnsServer({NAME: {"SRV": srv}}) as server:
            before = asyncio.all_tasks()
            with pytest.raises(ResolveError):
                await DnsClient((server.address,)).resolve(NAME, None)
            await until(lambda: asyncio.all_tasks() <= before)
            assert len(server.asked) <= 1 + 2 * AT_ONCE

    async def test_a_source_over_a_real_name_server(self) -> None:
        server = DnsServer({NAME: {"A": ["10.0.0.1"]}}, ttl_s=0)
        async with server, asking(DnsClient((server.address,))) as watch:
            await watch.tells(Reset("p", (replica(A),)))
            server.rcode = dns.rcode.SERVFAIL
            await until(lambda: watch.mistakes)
            server.rcode = dns.rcode.NOERROR
            server.records[NAME]["A"] = ["10.0.0.2"]
            await watch.tells(Add("p", replica(B)), Remove("p", A))
