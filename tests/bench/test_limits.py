"""What the documentation promises of limits that routers share, measured on a real Redis."""

from __future__ import annotations

from tests.bench.limits import ROUTERS, bound, measured, overshoot
from tests.support.redis import RedisServer


def test_four_routers_give_at_most_five_percent_more_than_the_limit() -> None:
    assert ROUTERS == 4
    assert bound() <= 0.05
    assert overshoot() <= bound()


async def test_nor_do_they_give_much_less() -> None:
    async with RedisServer() as server:
        found = await measured(server.url, seconds=2.0)
    assert min(found.values()) > -0.1, found
