"""Where this process listens."""

from __future__ import annotations

import asyncio

from aiohttp import web


class StartError(Exception):
    """Extproc cannot listen where it is told to; the text names the key and the remedy."""


def site(runner: web.AppRunner, listen: str) -> web.BaseSite:
    """The HTTP server on `ip:port` or `unix:/path`, to be started."""
    if listen.startswith("unix:"):
        return web.UnixSite(runner, listen.removeprefix("unix:"))
    host, _, port = listen.rpartition(":")
    return web.TCPSite(runner, host.strip("[]"), int(port))


async def not_taken(key: str, listen: str) -> None:
    """Raises StartError where another process answers on the socket: it would be taken away from it without a word."""
    if not listen.startswith("unix:"):
        return
    try:
        async with asyncio.timeout(1):
            _, writer = await asyncio.open_unix_connection(listen.removeprefix("unix:"))
    except OSError:
        return  # no such file, or left behind by one that is gone
    writer.close()
    raise cannot_listen(key, listen, "another process answers there")


def cannot_listen(key: str, listen: str, why: str) -> StartError:
    """To be raised: names the key of the configuration and the remedy."""
    return StartError(f"listen.{key}: cannot listen on {listen}: {why}; stop what listens there, or choose another")
