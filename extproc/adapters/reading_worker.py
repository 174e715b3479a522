"""A process that reads bodies: one after the other from standard input, what they say to standard output, until its input ends.

    python -m extproc.adapters.reading_worker MEMORY_BYTES

Each message is two lengths, a pickle, and a body (empty in answers). Its parent is the only one who writes to it, and the only one it writes to.
"""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

from extproc.openai.reading import TOO_COMPLEX, Reading, perform

LENGTHS = struct.Struct(">II")
"""Of the pickle and of the body, bytes."""
READY = b"ready"
"""Its first message, bare: it has started and waits for work."""


def packed(value: Any, body_bytes: int = 0) -> bytes:
    """A message up to its body."""
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return LENGTHS.pack(len(data), body_bytes) + data


def main() -> None:
    """Serve standard input."""
    _, memory = sys.argv
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # a parser that runs out of memory may crash, and the core would be a prompt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.SIG_IGN
        )  # sent to the whole group: the parent finishes its work first, then our input ends
    gc.disable()  # what JSON becomes has no cycles, and looking for them takes as long as the parser
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else may print
    answers.write(READY)
    answers.flush()
    while answer := _next(sys.stdin.buffer):
        answers.write(answer)
        answers.flush()


def _next(questions: BinaryIO) -> bytes:
    """The answer to the next question; empty at the end of input, within a message too."""
    lengths = questions.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return b""
    size, body_bytes = LENGTHS.unpack(lengths)
    task = questions.read(size)
    body = questions.read(body_bytes)
    if len(task) + len(body) < size + body_bytes:
        return b""
    return packed(_read(pickle.loads(task), body))


def _read(task: Any, body: bytes) -> Reading:
    try:
        return perform(task, body)
    except (MemoryError, SystemError):  # the latter is how orjson 3.13 says the former
        return Reading(TOO_COMPLEX)


if __name__ == "__main__":
    main()
