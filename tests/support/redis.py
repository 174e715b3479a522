"""A real Redis for the length of a test, on a port and in a directory of its own.

    async with RedisServer() as redis:
        shared = Shared(url=redis.url)
        await redis.command("FLUSHALL")

The binary is the `redis-server` of PATH; where there is none, and this is Debian with root (the clean machine of CI), it is
installed from the distribution.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tests.support.ports import free_port
from tests.support.waiting import until

READY_S = 10.0
INSTALL_S = 300.0
HOW = "the tests need a redis-server (6.2 or newer): apt-get install redis-server, or put one on PATH"


@cache
def redis_binary() -> str:
    """Path of a redis-server. Raises RuntimeError with how to get one."""
    if (found := shutil.which("redis-server")) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        _install()
        found = shutil.which("redis-server")
    if found is None:
        raise RuntimeError(HOW)
    return found


def _install() -> None:
    # RUNLEVEL=1 keeps the package from starting a server of its own.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", "redis-server")
    for command in (install, ("apt-get", "update", "-qq"), install):
        done = subprocess.run(command, env=environment, capture_output=True, timeout=INSTALL_S, check=False)
        if done.returncode == 0 and command is install:
            return


class RedisServer:
    """One server, started on entry, ended by its pid on exit."""

    def __init__(self, *options: str, port: int | None = None, tls: bool = False, sentinel: bool = False) -> None:
        """`options` as on the command line (`--maxmemory`, `4mb`). With `tls` the port is one of TLS: name the files in the options."""
        self.port = port or free_port()
        self.bus_port = free_port()
        """Where other nodes of a cluster speak to it; ten thousand above its port, Redis's default, any connection may already be."""
        bus = ("--cluster-port", str(self.bus_port)) if "--cluster-enabled" in options else ()
        self._tls, self._sentinel, self._options = tls, sentinel, (*options, *bus)
        self.directory = Path(tempfile.mkdtemp(prefix="redis-"))
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"<RedisServer {self.port}>"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def socket(self) -> Path:
        """Always there as well; where TLS or a password is wanted on the port, tests speak through this one."""
        return self.directory / "redis.sock"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"Redis's log ends with:\n{self.log()[-2000:]}")
        await self.end()
        shutil.rmtree(self.directory, ignore_errors=True)

    def log(self) -> str:
        """What it wrote, over all its lives."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def start(self) -> None:
        """Start, and wait until it answers."""
        configuration = self.directory / "redis.conf"  # Sentinel wants to rewrite its own
        if not configuration.exists():
            configuration.write_text("\n".join(self._lines()) + "\n")
        mode = ("--sentinel",) if self._sentinel else ()
        with (self.directory / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                redis_binary(), str(configuration), *mode, *self._options, stdout=log, stderr=log
            )
        await until(self._answers, timeout_s=READY_S)

    async def command(self, *words: Any) -> Any:
        """The answer to one command; whatever the ACL says of the default user on the port, the socket asks as well."""
        client = Redis(unix_socket_path=str(self.socket), retry=Retry(NoBackoff(), 0), protocol=2)
        try:
            return await client.execute_command(*words)  # type: ignore[no-untyped-call]
        finally:
            await client.aclose()

    def pause(self) -> None:
        """SIGSTOP: it hangs, and its sockets stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL; `start` begins anew, with nothing in it."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        """End it in any case; safe to call twice."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def _lines(self) -> list[str]:
        port = [f"tls-port {self.port}", "port 0"] if self._tls else [f"port {self.port}"]
        common = [*port, "bind 127.0.0.1", f"dir {self.directory}", f"unixsocket {self.socket}"]
        return common if self._sentinel else [*common, 'save ""', "appendonly no"]

    async def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, self.log()
        try:
            return bool(await self.command("PING"))
        except (RedisError, OSError):
            return False
