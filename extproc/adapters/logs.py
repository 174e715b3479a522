"""Log lines to standard error by a thread of their own: a terminal, pipe or disk that takes none must not stop the event loop."""

from __future__ import annotations

import logging
import sys
import threading
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from typing import Any, Final, TextIO

LINES: Final = 10_000
"""Kept while standard error is slow, some 2 MB; further ones are dropped and counted."""
FORMAT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"
LAST_WORDS_S: Final = 1.0
"""What is queued at the end may take so long to be written."""


class Logs:
    """The log of the whole process, from `start` to `stop`."""

    def __init__(self, stream: TextIO | None = None, lines: int = LINES) -> None:
        """`stream`: standard error when not given."""
        queue: Queue[Any] = Queue(lines)
        self._lines = _Lines(queue)
        self._out = _Out(stream or sys.stderr)
        self._out.setFormatter(logging.Formatter(FORMAT))
        self._listener = QueueListener(queue, self._out)
        self._queue = queue

    def __repr__(self) -> str:
        return f"<Logs {self.dropped} lines dropped>"

    @property
    def dropped(self) -> int:
        """Lines for which there was no room, or that could not be written."""
        return self._lines.dropped + self._out.failed

    def start(self, level: str) -> None:
        """Take all lines from this `level` (`inspect.log_level`) on."""
        self._listener.start()
        logging.getLogger().addHandler(self._lines)
        # It tells of each move beside a file that is watched, and the log itself may be written there: a line for each line.
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        set_level(level)

    def stop(self) -> bool:
        """Write what is queued; whether that could be done within `LAST_WORDS_S`.

        Where not, a thread hangs in a write, and the interpreter would wait for it at its own end.
        """
        logging.getLogger().removeHandler(self._lines)
        ending = threading.Thread(target=self._end, daemon=True)
        ending.start()
        ending.join(LAST_WORDS_S)
        return not ending.is_alive()

    def _end(self) -> None:
        self._queue.put(None)  # waits for room, where the listener's own way to end would raise
        self._queue.join()


def set_level(level: str) -> None:
    """Least severity of the lines of this process (`inspect.log_level`)."""
    logging.getLogger().setLevel(level.upper())


class _Lines(QueueHandler):
    """The handler of the root logger: never waits."""

    def __init__(self, queue: Queue[Any]) -> None:
        super().__init__(queue)
        self.dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            super().enqueue(record)
        except Full:
            self.dropped += 1


class _Out(logging.StreamHandler[TextIO]):
    """Counts what the stream does not take, as on a full disk, instead of complaining to the same stream."""

    failed = 0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, ARG002  # those of the base
        self.failed += 1
