"""grpc.aio around the pure parts: reads messages, performs commands, counts. Nothing is decided here.

Whatever comes in, an RPC ends with OK: Envoy then lets the request pass as if we had not been asked, while an error status would turn it
into a 500 unless the proxy is told to fail open. Where no request may pass undecided (`Config.undecided_pass`) it is answered with an
error first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from extproc.config import Config
from extproc.core.types import Refusal, Reject, Route
from extproc.envoy import codec, rpc
from extproc.envoy.access_log import LogCounts, deliver
from extproc.envoy.buffers import Buffers
from extproc.envoy.exchange import (
    DELIVERED,
    ENDED,
    PASS,
    Abandon,
    Answer,
    Close,
    Commands,
    Data,
    Decide,
    Decided,
    Delayed,
    Exchange,
    Head,
    IllegalEvent,
    Refuse,
    Report,
    Respond,
    SetDestination,
)
from extproc.envoy.health import Health
from extproc.envoy.holding import Holding
from extproc.envoy.intake import Hold, Intake, Ready, Router
from extproc.envoy.reading import AtOnce, Reader
from extproc.envoy.responses import Responses
from extproc.envoy.tokenizing import Tokenizing
from extproc.openai import errors
from extproc.openai.errors import HttpError
from extproc.openai.reading import NotRead

log = logging.getLogger(__name__)

PROCESSOR = "envoy.service.ext_proc.v3.ExternalProcessor"
ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService"
HEADROOM_BYTES = 1 << 20
"""Above the largest body: the rest of its message, and headers, which proxies limit to 60 KiB by default."""
NOTICED_S = 1.0
"""Envoy's health check sees within this time that we stop, and sends no further streams."""
CUT_S = 0.5
"""Streams that are left so long before the end of the grace period are ended by us."""
COMPLAINT_INTERVAL_S = 10.0
"""Between log lines about one kind of failure, which may strike every request."""

REMIND_S = 0.1
"""Between looks at which responses are to be told of again: so those of a second do not come in one heap."""

MAX_STREAMS = 10_000
"""Most ext_proc streams open at one time; beyond, requests are refused with 503. Each takes 24 KB, and a proxy opens further connections
where one has no room for its streams, so that a limit per connection would bound nothing."""

Clock = Callable[[], float]
"""Seconds on the router's scale."""
OVERLOADED = Refuse(errors.of_refusal(Reject(Refusal.OVERLOADED)))
"""The answer where this process, and not the replicas, has too much to do."""
STOPPING = errors.of_refusal(Reject(Refusal.STOPPING))


@dataclass(slots=True)
class StreamCounts:
    """ext_proc streams by what became of them."""

    opened: int = 0
    steered: int = 0
    refused: int = 0
    """Answered by us with an error."""
    replied: int = 0
    """Answered by us with what was asked for: the models that there are."""
    overloaded: int = 0
    """Of the refused, those for which this process had no room: too many streams, too many bytes of bodies, or nobody free to read a large one."""
    cut: int = 0
    """Ended by us because this process had to end: undecided, so that the request passed unrouted, or was refused where it must not; or while a
    gateway's response went through us, which was broken off."""
    abandoned: int = 0
    """Decided, but the client had left before the answer was sent."""
    unexpected: int = 0
    """Ended early because the proxy sent what cannot be read or cannot come; as with `cut`."""
    failed: int = 0
    """A mistake of ours; as with `cut`."""


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
    """The gRPC services on one address."""

    def __init__(
        self,
        config: Config,
        intake: Intake,
        router: Router,
        clock: Clock,
        on_decided: Callable[[float], None] = lambda _seconds: None,
        reader: Reader | None = None,
        before: Callable[[Head], Awaitable[None]] | None = None,
        also: tuple[rpc.Service, ...] = (),
        tokenizing: Tokenizing | None = None,
    ) -> None:
        """`on_decided` gets the seconds that each decision took, the reading of the body included unless `reader` read it: those above
        `requests.large_body_bytes`. `before` is awaited before each decision. `also`: further
        services on the address. `tokenizing`: who is asked for the tokens of prompts; None: nobody.
        """
        self._also = also
        self._tokenizing = tokenizing
        self._before = before
        self._address = config.listen.grpc
        self._limit = config.requests.max_body_bytes + HEADROOM_BYTES
        self._intake = intake
        self._rules = intake.rules
        self._undecided: Answer = PASS if self._rules.passes else Refuse(errors.internal())
        """The answer after a mistake of ours."""
        self._fate = "the request passes unrouted" if self._rules.passes else "the request is refused"
        self._wanted = codec.ALWAYS | intake.headers
        self._router = router
        self._clock = clock
        self._on_decided = on_decided
        self._complaints = Complaints(clock)
        self._budget_s = config.hold_limit_s
        every_s = config.envoy.progress_interval_s
        self._reported_within_s = None if every_s is None else 3 * every_s + config.envoy.log_flush_interval_s
        self._reader: Reader = reader or AtOnce()
        self._large_bytes = config.requests.large_body_bytes
        self._open: set[asyncio.Task[Any]] = set()
        """Streams under way."""
        self.buffers = Buffers(config.requests.max_buffered_bytes)
        self.holding = Holding(router, clock)
        self.responses = Responses(router, clock)
        self._reminder: asyncio.TimerHandle | None = None
        self._logs_open: set[asyncio.Task[Any]] = set()
        self._server: Any = None
        self._stopping = False
        self._hurried = asyncio.Event()
        self.streams = StreamCounts()
        self.entries = LogCounts()
        self.health: Health

    async def start(self) -> str:
        """Listen; returns the address bound, with the port chosen where 0 was asked for. Raises RuntimeError when it is taken."""
        self.health = Health()
        self._server = rpc.server([*self._services(), *self._also, self.health.service()], self._limit)
        port = self._server.add_insecure_port(self._address)
        await self._server.start()
        if self._address.startswith("unix:"):
            return self._address
        return f"{self._address.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, let those who wait have their turn, take no more streams, and cut what is left after `grace_s` seconds.

        Nothing if it was never started.
        """
        if self._server is None:
            return
        deadline = self._clock() + grace_s
        self._stopping = True
        self.health.stop_serving()
        await self._last_turns(grace_s)
        left_s = max(deadline - self._clock(), 0.0)
        stopping = asyncio.ensure_future(self._server.stop(left_s))
        await asyncio.sleep(0)  # let it refuse newcomers first
        for task in tuple(self._logs_open):
            task.cancel()  # these never end by themselves; waiting for them would always take the whole grace
        await self._unless_hurried(asyncio.shield(stopping), max(left_s - CUT_S, left_s / 2))
        self._hurried.set()
        for task in tuple(self._open):
            task.cancel()  # not by gRPC, which would end them with an error, nor by a second stop, which crashes it
        await stopping
        self.holding.close()
        if self._reminder is not None:
            self._reminder.cancel()

    def hurry(self) -> None:
        """End the grace of `stop` now."""
        self._hurried.set()

    async def _last_turns(self, grace_s: float) -> None:
        """Those who wait shall not be cut off, nor newcomers while the proxy has not seen that we stop."""
        notice_s = min(NOTICED_S, grace_s / 2)
        await self._unless_hurried(asyncio.sleep(notice_s), notice_s)
        await self._unless_hurried(self.holding.empty(), grace_s / 2 - notice_s)
        self.holding.release()

    async def _unless_hurried(self, work: Awaitable[object], within_s: float) -> None:
        """Wait for `work`, but not longer than told, nor after `hurry`."""
        both = {asyncio.ensure_future(work), asyncio.ensure_future(self._hurried.wait())}
        _, late = await asyncio.wait(both, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        for task in late:
            task.cancel()

    def _services(self) -> tuple[rpc.Service, ...]:
        return (
            rpc.service(PROCESSOR, {"Process": rpc.both_stream(self._process)}),
            rpc.service(ACCESS_LOG, {"StreamAccessLogs": rpc.client_stream(self._access_log)}),
        )

    # --- ext_proc ---

    async def _process(self, _messages: object, context: rpc.Context) -> None:
        """One RPC. EOF and cancellation are both normal ends: proxies reset streams that they no longer need."""
        exchange, claim = Exchange(self._rules), self.buffers.claim()
        self.streams.opened += 1
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if len(self._open) > MAX_STREAMS:
                await self._overloaded(context)
                return
            while (commands := await self._next(exchange, context)) is not None:
                if not claim.resize(exchange.body_bytes):
                    await self._overloaded(context)
                    return
                if await self._perform(commands, exchange, context):
                    return
        except asyncio.CancelledError:
            if not self._hurried.is_set():
                raise  # the proxy left
            self.streams.cut += 1
            await self._give_up(exchange, context, STOPPING)
        except (codec.Unreadable, IllegalEvent) as e:
            self.streams.unexpected += 1
            self._complaints.about(f"the proxy sent what we cannot answer; {self._fate}", e)
            await self._give_up(exchange, context, errors.internal())
        except Exception as e:
            self.streams.failed += 1
            self._complaints.about(f"a stream failed; {self._fate}", repr(e), trace=True)
            await self._give_up(exchange, context, errors.internal())
        finally:
            self._open.discard(task)
            claim.close()
            self._abandon(exchange.on(ENDED))

    async def _give_up(self, exchange: Exchange, context: rpc.Context, error: HttpError) -> None:
        """Answer a request that nothing was decided on, unless it may pass."""
        if not self._rules.passes and not exchange.settled:
            self.streams.refused += 1
            await context.write(codec.answer(Respond(error)))

    async def _next(self, exchange: Exchange, context: rpc.Context) -> Commands | None:
        """What to do about the next message, of which no name here keeps a second copy; None at the end."""
        raw = await context.read()
        return None if raw is rpc.EOF else exchange.on(codec.event(raw, self._wanted))

    async def _overloaded(self, context: rpc.Context) -> None:
        self.streams.refused += 1
        self.streams.overloaded += 1
        await context.write(codec.answer(Respond(OVERLOADED.error)))

    async def _perform(self, commands: Commands, exchange: Exchange, context: rpc.Context) -> bool:
        """Do as the machine says; whether that was all."""
        for command in commands:
            if isinstance(command, Close):
                return True
            if isinstance(command, Decide):
                answer = await self._decided(command, exchange, context)
                if isinstance(answer, Hold):
                    answer = await self._turn(answer, exchange, context)
                return await self._perform(exchange.on(Decided(answer)), exchange, context)
            if isinstance(command, Report):
                self._report(command)
                continue
            if isinstance(command, Abandon):
                self._complaints.about(
                    "a provider was chosen, and only the bootstrap of `extproc envoy` leads to one", "refused with 500"
                )
                self._intake.abandon(command.flight, self._clock())
                continue
            message = codec.answer(command)
            if len(message) > codec.LARGE_BYTES:  # with a new body: it took as long to make as it will take to send
                await asyncio.sleep(0)
            if isinstance(command, SetDestination):
                self.streams.steered += 1
                exchange.on(DELIVERED)
                if exchange.follows:
                    self._follow(command.steer.flight)
            elif isinstance(command, Respond):
                refused = command.error.status >= 400
                self.streams.refused += refused
                self.streams.replied += not refused
            try:
                await context.write(message)
            except asyncio.CancelledError:
                if isinstance(command, SetDestination) and not exchange.follows:
                    self._doubt(command.steer.flight)
                raise
        return False

    def _doubt(self, flight: str) -> None:
        """The proxy ended the RPC in the moment of the answer: with the answer, or because the client left.

        Of a flight that is in the air its next report tells; no report, no flight.
        """
        if self._reported_within_s is not None:
            asyncio.get_running_loop().call_later(self._reported_within_s, self._unless_reported, flight)

    def _unless_reported(self, flight: str) -> None:
        if self._router.forget(flight, self._clock()):
            self.streams.abandoned += 1
            self.holding.poke()

    async def _decided(self, command: Decide, exchange: Exchange, context: rpc.Context) -> Answer | Hold:
        body, intake = command.body, self._intake
        if self._before is not None:
            await self._before(command.head)
        if body is None or len(body) <= self._large_bytes:
            if self._tokenizing is None or body is None:
                return self._decide(lambda now: intake.decide(command.head, body, now, command.rewritable))
            return await self._precisely(lambda now: intake.read(command.head, body, now, command.rewritable), body)
        task = intake.task(command.head, command.rewritable)
        if isinstance(task, Refuse):
            return task
        # At once, although most are read in less time than the proxy waits by itself: a message is nothing beside such a body.
        await self._perform(exchange.on(Delayed(self._budget_s)), exchange, context)
        reading = await self._reader.read(task, body)
        if reading is NotRead.BUSY:
            self.streams.overloaded += 1
            return OVERLOADED
        if reading is NotRead.FAILED:  # nothing is known against it
            self.streams.failed += 1
            self._complaints.about(f"a large body could not be read; {self._fate}", repr(self._reader))
            return self._undecided
        if self._tokenizing is None:
            return self._decide(lambda now: intake.decide_read(command.head, body, reading, now, command.rewritable))
        return await self._precisely(lambda _: intake.take(command.head, body, reading, command.rewritable), body)

    async def _precisely(self, read: Callable[[float], Ready | Answer], body: Data) -> Answer | Hold:
        """Decide with the prompt as the engine will have it, where that is known in time."""
        assert self._tokenizing is not None
        began = self._clock()
        try:
            ready = read(began)
        except Exception as e:
            return self._mistaken(e)
        if not isinstance(ready, Ready):
            return ready
        reading_s = self._clock() - began
        known = None
        if places := self._intake.places(ready):
            known = await self._tokenizing.tokens(places, ready.question, body)
        return self._decide(lambda now: self._intake.proceed(ready, now, known), reading_s)

    def _decide(self, choose: Callable[[float], Answer | Hold], before_s: float = 0.0) -> Answer | Hold:
        """`before_s`: what of the decision was done already, seconds."""
        began = self._clock()
        try:
            answer = choose(began)
            self._on_decided(self._clock() - began + before_s)
        except Exception as e:
            return self._mistaken(e)
        self.holding.poke()  # it may have taken the place of one that waits
        return answer

    def _mistaken(self, error: Exception) -> Answer:
        self.streams.failed += 1
        self._complaints.about(f"a decision failed; {self._fate}", repr(error), trace=True)
        return self._undecided

    async def _turn(self, hold: Hold, exchange: Exchange, context: rpc.Context) -> Answer:
        """The answer to a request that waits, when its turn has come."""
        turn = self.holding.wait(hold.ticket)  # before anything is written: the turn may come meanwhile
        try:
            await self._perform(exchange.on(Delayed(self._budget_s)), exchange, context)
            verdict = await turn
        except BaseException:  # the client left, as a rule
            self._left(hold, turn)
            raise
        try:
            return self._intake.resume(hold, verdict)
        except Exception as e:
            self.streams.failed += 1
            self._complaints.about(f"a decision failed; {self._fate}", repr(e), trace=True)
            return self._undecided

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

    def _follow(self, flight: str) -> None:
        self.responses.begin(flight)
        if self._reminder is None:
            self._reminder = asyncio.get_running_loop().call_later(REMIND_S, self._remind)

    def _remind(self) -> None:
        self._reminder = None
        self._tell(self.responses.remind)
        if len(self.responses):
            self._reminder = asyncio.get_running_loop().call_later(REMIND_S, self._remind)

    def _report(self, report: Report) -> None:
        self._tell(lambda: self.responses.take(report))
        if report.over:
            self.holding.poke()

    def _tell(self, tell: Callable[[], None]) -> None:
        """A mistake of ours in the books is no reason to break off a response."""
        try:
            tell()
        except Exception as e:
            self.streams.failed += 1
            self._complaints.about("a report of a response failed; the response goes on", repr(e), trace=True)

    def _abandon(self, commands: Commands) -> None:
        for command in commands:
            if isinstance(command, Report):
                self._report(command)
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
