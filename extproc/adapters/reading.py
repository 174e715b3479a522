"""Large bodies are read in processes of their own: a parser holds the interpreter's lock, so that a thread would not help.

    body of 30 MB               the loop stands still: read in place, ms    read here, ms
    one long text                                                 39              7
    the same, rewritten to ask for usage                          69              6
    ten million empty arrays                                     564              3

The processes are started by exec, never by a bare fork, which gRPC's threads would not survive; with the first large body, and
again after one died. A body goes through a socket in pieces, so that none of its copying holds the loop up. Three things can go wrong:

1. A body takes longer than `read_s`, or more memory than bodies do: its process is killed, and it is refused.
2. A process dies while it reads: another tries once more; if that dies too it is for the body's sake, which is refused.
3. None can be started, or none is free in time: that is no fault of the body. Whoever asked decides what becomes of it.

`concurrent.futures.ProcessPoolExecutor` gives up all of its processes when one dies, and has no way to end the one that is stuck (loky
renews itself after the former). Both pickle a body in one piece, in a thread that takes the lock from the loop.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from socket import socket, socketpair
from subprocess import Popen

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.adapters.reading_worker import LENGTHS, READY, packed
from extproc.openai.reading import TOO_COMPLEX, NotRead, Reading, Task

log = logging.getLogger(__name__)

WORKERS = 2
"""Processes: one hostile body leaves the other free. The second is started when the first is busy."""
MAX_WAITING = 64
"""Bodies that wait for a process; beyond, further ones are busy at once."""
READ_S = 5.0
"""Longest time for one body; 30 MB of text take 0.1 s."""
START_S = 5.0
"""Longest time until a process is ready; it takes 0.1 s."""
PIECE_BYTES = 256 * 1024
"""Of a body, written between two looks at other work."""
MAX_ANSWER_BYTES = 1 << 20
"""1,024 hashes, names and a change take 20 KB; an answer above this is none."""
MEMORY_BYTES = 256 << 20
"""Of address space for a process, and"""
MEMORY_PER_BYTE = 24
"""so much for each byte of the largest body: text takes 3 to 6, numbers 17, small strings 20, arrays of nothing 32."""

COMMAND = (sys.executable, "-m", "extproc.adapters.reading_worker")


@dataclass(slots=True)
class ReadingCounts:
    """Large bodies, and the processes that read them."""

    read: int = 0
    too_complex: int = 0
    """Refused: took too long, or a process died of it twice."""
    busy: int = 0
    """Not read, because no process was free in time."""
    failed: int = 0
    """Not read, because none could be started."""
    started: int = 0
    """Processes."""
    died: int = 0
    """Processes that ended while reading, or gave no sense."""
    killed: int = 0
    """Processes ended by us, because they took too long or the client had left."""


class Died(Exception):  # noqa: N818 - says what happened
    """The process is gone, or talks nonsense."""


class Worker:
    """One process. It reads one body at a time; after an error or a cancellation it is good for nothing but `kill`."""

    def __init__(self, process: Popen[bytes], reader: StreamReader, writer: StreamWriter) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    def __repr__(self) -> str:
        return f"<worker {self.pid}>"

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @classmethod
    async def start(cls, command: Sequence[str]) -> Worker:
        """Start one; it may not be ready yet. Raises OSError."""
        process, ours = _started(command)
        try:
            return cls(process, *await asyncio.open_unix_connection(sock=ours))
        except BaseException:  # nobody waits for it any longer
            ours.close()
            process.kill()
            process.wait()
            raise

    async def ready(self) -> None:
        """Once it has started. Raises Died."""
        if await self._exactly(len(READY)) != READY:
            raise Died("it does not say that it is ready")

    async def read(self, task: Task, body: bytes | memoryview) -> Reading:
        """What the body says. Raises Died."""
        view = memoryview(body)
        try:
            self._writer.write(packed(task, len(view)))
            for at in range(0, len(view), PIECE_BYTES):
                self._writer.write(view[at : at + PIECE_BYTES])
                await self._writer.drain()
        except OSError as e:
            raise Died(repr(e)) from None
        size, rest = LENGTHS.unpack(await self._exactly(LENGTHS.size))
        if rest or size > MAX_ANSWER_BYTES:
            raise Died(f"its answer has {size} and {rest} bytes")
        return _unpacked(await self._exactly(size))

    def kill(self) -> None:
        """End it, whatever it does."""
        self._writer.transport.abort()
        self._process.kill()

    async def ended(self) -> None:
        """Once it has."""
        await asyncio.to_thread(self._process.wait)

    async def _exactly(self, size: int) -> bytes:
        try:
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as e:
            raise Died(repr(e)) from None


def _started(command: Sequence[str]) -> tuple[Popen[bytes], socket]:
    """A process, and our end of the socket that is its standard input and output.

    Not by the event loop's own means: uvloop forks, which runs gRPC's handlers, and those stop its threads. This is vfork and exec, 1 ms.
    """
    ours, theirs = socketpair()
    with theirs:
        try:
            return Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno()), ours
        except OSError:
            ours.close()
            raise


def _unpacked(data: bytes) -> Reading:
    try:
        reading = pickle.loads(data)
    except Exception as e:  # pickles fail in every way
        raise Died(f"its answer is no pickle: {e!r}") from None
    if not isinstance(reading, Reading):
        raise Died(f"its answer is a {type(reading).__name__}")
    return reading


class ReadingPool:
    """Reads large bodies; a `Reader` for extproc/envoy. All calls belong to one event loop."""

    def __init__(
        self,
        max_body_bytes: int,
        limit_s: float,
        workers: int = WORKERS,
        read_s: float = READ_S,
        start_s: float = START_S,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """`limit_s` is for one body in all, the wait for a process included."""
        self._command = (*command, str(MEMORY_BYTES + MEMORY_PER_BYTE * max_body_bytes))
        self._limit_s = limit_s
        self._read_s = read_s
        self._start_s = start_s
        self._free = asyncio.Semaphore(workers)
        self._waiting = 0
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self.counts = ReadingCounts()

    def __repr__(self) -> str:
        return f"<reading pool: {len(self._idle)} idle, {len(self._busy)} busy, {self._waiting} bodies wait>"

    async def read(self, task: Task, body: bytes | memoryview) -> Reading | NotRead:
        """What the body says. Cancelling it kills the process that reads it."""
        try:
            async with asyncio.timeout(self._limit_s):
                found = await self._in_turn(task, body)
        except TimeoutError:
            found = NotRead.BUSY
        self._count(found)
        return found

    async def stop(self) -> None:
        """End all processes. What is being read is not."""
        for worker in (*self._idle, *self._busy):
            self._kill(worker)
        self._idle.clear()
        await asyncio.gather(*self._ending)

    async def _in_turn(self, task: Task, body: bytes | memoryview) -> Reading | NotRead:
        if self._free.locked() and self._waiting >= MAX_WAITING:
            return NotRead.BUSY
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            return await self._twice(task, body)
        finally:
            self._free.release()

    async def _twice(self, task: Task, body: bytes | memoryview) -> Reading | NotRead:
        for _ in range(2):
            worker = self._idle.pop() if self._idle else await self._started()
            if worker is None:
                return NotRead.FAILED
            try:
                return await self._by(worker, task, body)
            except Died as e:
                self.counts.died += 1
                log.warning("a process that reads bodies died: %s", e)
        return Reading(TOO_COMPLEX)

    async def _by(self, worker: Worker, task: Task, body: bytes | memoryview) -> Reading:
        self._busy.add(worker)
        try:
            async with asyncio.timeout(self._read_s):
                reading = await worker.read(task, body)
        except Died:
            self._kill(worker)
            raise
        except BaseException as e:  # too slow, or the client left: it would be busy with a body that nobody wants
            self.counts.killed += 1
            self._kill(worker)
            if isinstance(e, TimeoutError):
                return Reading(TOO_COMPLEX)
            raise
        self._busy.discard(worker)
        self._idle.append(worker)
        return reading

    async def _started(self) -> Worker | None:
        """None where it cannot be."""
        try:
            worker = await Worker.start(self._command)
        except OSError as e:
            log.error("a process to read bodies cannot be started: %s", e)
            return None
        self._busy.add(worker)
        self.counts.started += 1
        try:
            async with asyncio.timeout(self._start_s):
                await worker.ready()
        except (Died, TimeoutError) as e:
            log.error("a process to read bodies did not start: %r", e)
            self._kill(worker)
            return None
        except BaseException:
            self._kill(worker)
            raise
        return worker

    def _kill(self, worker: Worker) -> None:
        self._busy.discard(worker)
        worker.kill()
        ending = asyncio.ensure_future(worker.ended())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def _count(self, found: Reading | NotRead) -> None:
        if found is NotRead.BUSY:
            self.counts.busy += 1
        elif found is NotRead.FAILED:
            self.counts.failed += 1
        elif isinstance(found, Reading) and found.result == TOO_COMPLEX:
            self.counts.too_complex += 1
        else:
            self.counts.read += 1


class ReadingCollector(Collector):
    """What happened to large bodies, and how many bytes of bodies are here, read when asked."""

    def __init__(self, counts: ReadingCounts, held: Callable[[], int]) -> None:
        """`held` gives the bytes of bodies in this process."""
        self._counts = counts
        self._held = held

    def collect(self) -> Iterator[Metric]:
        text = "Bodies above requests.large_body_bytes by what became of them, and the processes that read them."
        family = CounterMetricFamily("extproc_large_bodies", text, labels=("kind",))
        for field in fields(self._counts):
            family.add_metric((field.name,), getattr(self._counts, field.name))
        yield family
        held = GaugeMetricFamily(
            "extproc_buffered_bytes", "Request bodies in this process; requests.max_buffered_bytes bounds it."
        )
        held.add_metric((), self._held())
        yield held
