"""Meters of limits in Redis, that several routers take leases from.

One key for each tenant and limit, `PREFIX:1:limit:KIND:{TENANT}`, and for a model that is counted apart `:MODEL` after that; only the tenant is in
the braces that tell a Cluster where to put it. Its value is the theoretical arrival time of `core/admission/gcra.py`, in microseconds
by the clock of Redis, for the clocks of routers differ. It expires a second after the meter is full.

Of requests in flight (`KIND` is `in_flight`) the value is JSON, `{ROUTER: [count, until]}` with milliseconds, and expires with the last of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from redis.asyncio.cluster import RedisCluster
from redis.exceptions import NoScriptError

from extproc.adapters.leasing import StoreError
from extproc.adapters.shared.redis_client import Client, connect, disconnect
from extproc.config import Shared
from extproc.core.admission.in_flight import TOLD_S, Held
from extproc.core.admission.leases import Ask, Key, Told

log = logging.getLogger(__name__)

SCHEMA: Final = 1
"""Of the keys."""

Call = tuple[str, list[str]]
"""Key and arguments of a script."""

SCRIPT: Final = """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local charge, want, routers = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local tat = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
tat = math.max(tat + charge * interval, now)
local free = math.floor((now + burst * interval - tat) / interval + 0.000001)
local granted = math.max(math.min(want, free, math.max(math.ceil(free / routers), 1)), 0)
tat = tat + granted * interval
if tat > now then
  redis.call('SET', KEYS[1], string.format('%.0f', tat), 'PX', math.ceil((tat - now) / 1000) + 1000)
else
  redis.call('DEL', KEYS[1])
end
return {tostring(granted), string.format('%.0f', tat - now)}
"""
"""Settle debts, grant what is there, say how full the meter is: atomic, and to the rules of `core/admission/leases.py`.

Microseconds since 1970 fit a Lua number without loss (2^53). A router gets no more than its share of what is there, but one at least.
"""

HOLD: Final = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local router, count, ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local told = redis.call('GET', KEYS[1])
local kept, others, any = {}, 0, false
for name, word in pairs(told and cjson.decode(told) or {}) do
  if name ~= router and word[2] > now then
    kept[name], others, any = word, others + word[1], true
  end
end
if count > 0 then
  kept[router], any = {count, now + ttl}, true
end
if any then
  redis.call('SET', KEYS[1], cjson.encode(kept), 'PX', ttl)
elseif told then
  redis.call('DEL', KEYS[1])
end
return others
"""
"""Put this router's count in the place of its last, pass over what has lapsed, say what the others have."""


class RedisStore:
    """Meters in Redis. After a failure the connection is made anew: to the master of then, with the password of then."""

    def __init__(self, shared: Shared, router: str) -> None:
        """`router` names the connection. Nothing is connected before the first call."""
        self._shared, self._router = shared, router
        self._client: Client | None = None

    def __repr__(self) -> str:
        return f"<RedisStore {'connected' if self._client else 'not connected'}>"

    async def lease(self, asks: Sequence[Ask]) -> list[Told]:
        """One round trip; two where Redis has forgotten the script."""
        try:
            async with asyncio.timeout(self._shared.timeout_s):
                if not asks:  # is it there? PING would be one right more
                    await self._connected().get(f"{self._shared.prefix}:{SCHEMA}:limit:")
                    return []
                answers = await self._run(SCRIPT, [(self._key(ask.key), _arguments(ask)) for ask in asks])
                return [_told(ask, answer) for ask, answer in zip(asks, answers, strict=True)]
        except Exception as e:
            raise await self._failed(e) from None

    async def hold(self, held: Sequence[Held]) -> list[int]:
        """As `lease`."""
        ttl = str(round(TOLD_S * 1e3))
        try:
            async with asyncio.timeout(self._shared.timeout_s):
                calls = [(self._key(each.key), [self._router, str(each.count), ttl]) for each in held]
                return [int(answer) for answer in await self._run(HOLD, calls)]
        except Exception as e:
            raise await self._failed(e) from None

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            try:
                async with asyncio.timeout(self._shared.timeout_s):
                    await disconnect(client)
            except Exception as e:
                log.debug("closing: %r", e)

    async def _failed(self, error: Exception) -> StoreError:
        await self.close()
        return StoreError(f"{type(error).__name__}: {error}".rstrip(": ")[:200])

    def _connected(self) -> Client:
        if self._client is None:
            self._client = connect(self._shared, f"limits-{self._router}")
        return self._client

    async def _run(self, script: str, calls: Sequence[Call]) -> list[Any]:
        """The answers of a script that is run for each."""
        client = self._connected()
        answers = await self._evaluated(client, script, calls)
        if undone := [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]:
            await client.script_load(script)
            again = await self._evaluated(client, script, [calls[i] for i in undone])
            for i, answer in zip(undone, again, strict=True):
                answers[i] = answer
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def _evaluated(self, client: Client, script: str, calls: Sequence[Call]) -> list[Any]:
        """An answer or an error for each. By hand: the script objects of redis-py ask before each pipeline whether the script is there,
        and in a Cluster it takes no EVALSHA into a pipeline.
        """
        cluster = isinstance(client, RedisCluster)
        async with client.pipeline(transaction=False) as pipe:
            run, code = (pipe.eval, script) if cluster else (pipe.evalsha, _sha(script))
            for key, arguments in calls:
                run(code, 1, key, *arguments)
            answers: list[Any] = await pipe.execute(raise_on_error=False)
        return answers

    def _key(self, key: Key) -> str:
        tenant, kind, model = key
        name = f"{self._shared.prefix}:{SCHEMA}:limit:{kind}:{{{tenant}}}"
        return f"{name}:{model}" if model else name


@cache
def _sha(script: str) -> str:
    """By which Redis knows it."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _arguments(ask: Ask) -> list[str]:
    """Interval in microseconds, burst, charge, want, routers."""
    return [repr(ask.rate.interval_s * 1e6), repr(ask.rate.burst), repr(ask.charge), repr(ask.want), str(ask.routers)]


def _told(ask: Ask, answer: Sequence[bytes]) -> Told:
    granted, full_in_us = answer
    return Told(ask.key, float(granted), float(full_in_us) / 1e6)
