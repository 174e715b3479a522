"""grpc.aio around the pure parts: reads messages, performs commands, counts. Nothing is decided here.

Whatever comes in, an RPC ends with OK: Envoy then lets the request pass as if we had not been asked, while an error status would turn it
into a 500 unless the proxy is told to fail open.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from extproc.config import Config
from extproc.core.types import Reject, Route
from extproc.envoy import codec, rpc
from extproc.envoy.access_log import LogCounts, deliver
from extproc.envoy.exchange import (
    DELIVERED,
    ENDED,
    PASS,
    Abandon,
    Answer,
    Close,
    Commands,
    Decide,
    Decided,
    Delayed,
    Exchange,
    IllegalEvent,
    Respond,
    SetDestination,
)
from extproc.envoy.health import Health
from extproc.envoy.holding import Holding
from extproc.envoy.intake import Hold, Intake, Router

log = logging.getLogger(__name__)

PROCESSOR = "envoy.service.ext_proc.v3.ExternalProcessor"
ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService"
HEADROOM_BYTES = 1 << 20
"""Above the largest body: the rest of its message, and headers, which proxies limit to 60 KiB by default."""
NOTICED_S = 1.0
"""Envoy's health check sees within this time that we stop, and sends no further streams."""
COMPLAINT_INTERVAL_S = 10.0
"""Between log lines about one kind of failure, which may strike every request."""

Clock = Callable[[], float]
"""Seconds on the router's scale."""


@dataclass(slots=True)
class StreamCounts:
    """ext_proc streams by what became of them."""

    opened: int = 0
    steered: int = 0
    refused: int = 0
    """Answered by us with an error."""
    abandoned: int = 0
    """Decided, but the client had left before the answer was sent."""
    unexpected: int = 0
    """Ended early because the proxy sent what cannot be read or cannot come; the request passed unrouted."""
    failed: int = 0
    """A mistake of ours; the request passed unrouted."""


class Complaints:
    """Log lines, at most one of a kind in a while."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._quiet_until: dict[str, float] = {}  # one entry for each kind, of which there are a few

    def about(self, kind: str, detail: object, trace: bool = False) -> None:
        now = self._clock()
        if now >= self._quiet_until.get(kind, now):
            self._quiet_until[kind] = now + COMPLAINT_INTERVAL_S
            log.warning("%s: %s", kind, detail, exc_info=trace)


class Server:
    """The three gRPC services on one address."""

    def __init__(
        self,
        config: Config,
        intake: Intake,
        router: Router,
        clock: Clock,
        on_decided: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        """`on_decided` gets the seconds that each decision took, the reading of the body included."""
        self._address = config.listen.grpc
        self._limit = config.requests.max_body_bytes + HEADROOM_BYTES
        self._intake = intake
        self._rules = intake.rules
        self._wanted = codec.ALWAYS | intake.headers
        self._router = router
        self._clock = clock
        self._on_decided = on_decided
        self._complaints = Complaints(clock)
        self._budget_s = config.hold_limit_s
        self.holding = Holding(router, clock)
        self._logs_open: set[asyncio.Task[Any]] = set()
        self._server: Any = None
        self._stopping = False
        self.streams = StreamCounts()
        self.entries = LogCounts()
        self.health: Health

    async def start(self) -> str:
        """Listen; returns the address bound, with the port chosen where 0 was asked for. Raises RuntimeError when it is taken."""
        self.health = Health()
        self._server = rpc.server([*self._services(), self.health.service()], self._limit)
        port = self._server.add_insecure_port(self._address)
        await self._server.start()
        if self._address.startswith("unix:"):
            return self._address
        return f"{self._address.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, take no more streams, give those under way `grace_s` seconds, then cut them. Nothing if it was never started."""
        if self._server is None:
            return
        self.health.stop_serving()
        self._stopping = True
        await self._last_turns(grace_s / 2)
        stopping = asyncio.ensure_future(self._server.stop(grace_s / 2))
        await asyncio.sleep(0)  # let it refuse newcomers first
        for task in tuple(self._logs_open):
            task.cancel()  # these never end by themselves; waiting for them would always take the whole grace
        await stopping
        self.holding.close()

    async def _last_turns(self, within_s: float) -> None:
        """Those who wait shall not be cut off, nor newcomers while the proxy has not seen that we stop."""
        deadline = self._clock() + within_s
        await asyncio.sleep(min(NOTICED_S, within_s))
        while len(self.holding) and (left_s := deadline - self._clock()) > 0:
            await asyncio.sleep(min(left_s, 0.05))
        self.holding.release()

    def _services(self) -> tuple[rpc.Service, ...]:
        return (
            rpc.service(PROCESSOR, {"Process": rpc.both_stream(self._process)}),
            rpc.service(ACCESS_LOG, {"StreamAccessLogs": rpc.client_stream(self._access_log)}),
        )

    # --- ext_proc ---

    async def _process(self, _messages: object, context: rpc.Context) -> None:
        """One RPC. EOF and cancellation are both normal ends: proxies reset streams that they no longer need."""
        exchange = Exchange(self._rules)
        self.streams.opened += 1
        try:
            while (raw := await context.read()) is not rpc.EOF:
                if await self._perform(exchange.on(codec.event(raw, self._wanted)), exchange, context):
                    return
        except (codec.Unreadable, IllegalEvent) as e:
            self.streams.unexpected += 1
            self._complaints.about("the proxy sent what we cannot answer; the request passes unrouted", e)
        except Exception as e:
            self.streams.failed += 1
            self._complaints.about("a stream failed; the request passes unrouted", repr(e), trace=True)
        finally:
            self._abandon(exchange.on(ENDED))

    async def _perform(self, commands: Commands, exchange: Exchange, context: rpc.Context) -> bool:
        """Do as the machine says; whether that was all."""
        for command in commands:
            if isinstance(command, Close):
                return True
            if isinstance(command, Decide):
                answer = self._decide(command)
                if isinstance(answer, Hold):
                    await self._perform(exchange.on(Delayed(self._budget_s)), exchange, context)
                    answer = await self._turn(answer)
                return await self._perform(exchange.on(Decided(answer)), exchange, context)
            message = codec.answer(command)
            if isinstance(command, SetDestination):
                self.streams.steered += 1
                exchange.on(DELIVERED)
            elif isinstance(command, Respond):
                self.streams.refused += 1
            await context.write(message)
        return False

    def _decide(self, command: Decide) -> Answer | Hold:
        began = self._clock()
        try:
            answer = self._intake.decide(command.head, command.body, began, command.rewritable)
            self._on_decided(self._clock() - began)
        except Exception as e:
            self.streams.failed += 1
            self._complaints.about("a decision failed; the request passes unrouted", repr(e), trace=True)
            return PASS
        self.holding.poke()  # it may have taken the place of one that waits
        return answer

    async def _turn(self, hold: Hold) -> Answer:
        """The answer to a request that waits, when its turn has come."""
        turn = self.holding.wait(hold.ticket)
        try:
            verdict = await turn
        except asyncio.CancelledError:  # the client left
            self._left(hold, turn)
            raise
        try:
            return self._intake.resume(hold, verdict)
        except Exception as e:
            self.streams.failed += 1
            self._complaints.about("a decision failed; the request passes unrouted", repr(e), trace=True)
            return PASS

    def _left(self, hold: Hold, turn: asyncio.Future[Route | Reject]) -> None:
        now = self._clock()
        self.holding.drop(hold.ticket)
        if turn.done() and not turn.cancelled():
            verdict = turn.result()  # it came in the same moment
            if isinstance(verdict, Route):
                self.streams.abandoned += 1
                self._intake.abandon(verdict.flight, now)
        else:
            self._intake.leave(hold, now)
        self.holding.poke()

    def _abandon(self, commands: Commands) -> None:
        for command in commands:
            if isinstance(command, Abandon):
                self.streams.abandoned += 1
                self._intake.abandon(command.flight, self._clock())

    # --- access log ---

    async def _access_log(self, _messages: object, context: rpc.Context) -> bytes:
        """One long RPC for each worker thread of the proxy. A message that does not parse costs only itself."""
        task = asyncio.current_task()
        assert task is not None
        self._logs_open.add(task)
        try:
            while (raw := await context.read()) is not rpc.EOF:
                self._take(raw)
        except asyncio.CancelledError:
            if not self._stopping:
                raise  # the proxy left
        finally:
            self._logs_open.discard(task)
        return b""  # StreamAccessLogsResponse

    def _take(self, raw: bytes) -> None:
        try:
            deliver(codec.log_entries(raw), self._router, self.entries, self._clock())
        except codec.Unreadable as e:
            self.entries.unreadable += 1
            self._complaints.about("an access log message is lost", e)
        except Exception as e:
            self.entries.failed += 1
            self._complaints.about("an access log message failed", repr(e), trace=True)
        self.holding.poke()
