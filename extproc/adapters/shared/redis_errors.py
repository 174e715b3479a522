"""The errors of the Redis library, and whatever else comes of what answers there, in terms of `board.py`."""

from __future__ import annotations

import ssl
from typing import Final

from redis import exceptions as errors

from extproc.adapters.shared.board import BoardError, Trouble

LONGEST_TEXT: Final = 200

Troubles = tuple[tuple[tuple[type[BaseException], ...], Trouble], ...]
TROUBLES: Final[Troubles] = (
    ((errors.TimeoutError, TimeoutError), Trouble.TIMEOUT),
    ((errors.AuthenticationError, errors.AuthorizationError, errors.NoPermissionError), Trouble.AUTH),
    ((errors.BusyLoadingError,), Trouble.LOADING),
    ((errors.OutOfMemoryError,), Trouble.FULL),
    ((errors.ReadOnlyError,), Trouble.READ_ONLY),
    ((ssl.SSLError,), Trouble.TLS),
    ((errors.InvalidResponse,), Trouble.PROTOCOL),
    ((errors.ConnectionError, errors.ClusterError, errors.RedisClusterException, OSError), Trouble.UNREACHABLE),
    ((errors.RedisError,), Trouble.REFUSED),
)
"""The first that fits counts: an AuthenticationError is a ConnectionError as well."""


def translated(error: BaseException) -> BoardError:
    """The library's errors in our terms. TLS errors come wrapped, and on what is no Redis it fails with whatever Python raises."""
    error = next((e for e in (error.__cause__, error.__context__) if isinstance(e, ssl.SSLError)), error)
    trouble = next((t for kinds, t in TROUBLES if isinstance(error, kinds)), Trouble.PROTOCOL)
    return BoardError(trouble, _one_line(error))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."
