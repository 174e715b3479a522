"""Log lines never stop the loop, whatever takes them."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from extproc.adapters.logs import Logs

log = logging.getLogger("tests.logs")


class Stuck(io.StringIO):
    """Takes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.free.wait(20)
        return super().write(text)


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, os.strerror(28))


@contextmanager
def logging_to(stream: TextIO, lines: int = 1000) -> Iterator[Logs]:
    root = logging.getLogger()
    level = root.level
    logs = Logs(stream, lines)
    logs.start("info")
    try:
        yield logs
    finally:
        logs.stop()
        root.setLevel(level)


def test_lines_are_written_in_order_with_their_traceback() -> None:
    out = io.StringIO()
    with logging_to(out) as logs:
        log.info("one %s", 1)
        try:
            raise ValueError("two")
        except ValueError:
            log.exception("failed")
        log.debug("too small")
        assert logs.stop()
    text = out.getvalue()
    assert "INFO tests.logs one 1\n" in text
    assert text.index("one 1") < text.index("failed") < text.index("ValueError: two")
    assert "too small" not in text


def test_a_stream_that_hangs_costs_lines_and_no_time() -> None:
    out = Stuck()
    with logging_to(out, lines=10) as logs:
        for i in range(100):
            log.info("line %d", i)
        assert 85 <= logs.dropped <= 90  # ten in the queue, and up to one in the hands of the thread
        assert not logs.stop()
        out.free.set()


def test_what_a_full_disk_does_not_take_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(Full()) as logs:
        log.info("line")
        assert logs.stop()
        assert logs.dropped == 1
    assert capsys.readouterr().err == ""
