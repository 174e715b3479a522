"""How many bytes of request bodies this process holds, exactly: a claim for each stream, which ends once."""

from __future__ import annotations


class Buffers:
    """The sum of all claims, below a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.held = 0
        """Bytes."""

    def __repr__(self) -> str:
        return f"<buffers {self.held} of {self._limit} B>"

    def claim(self) -> Claim:
        """A claim of nothing yet. End it with `close`."""
        return Claim(self)

    def take(self, more: int) -> bool:
        """Whether so many bytes more fit, which are then counted. Giving back, below 0, always fits."""
        if more > 0 and self.held + more > self._limit:
            return False
        self.held += more
        return True


class Claim:
    """The bytes of one stream."""

    __slots__ = ("_buffers", "_closed", "size")

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._closed = False
        self.size = 0
        """Bytes."""

    def __repr__(self) -> str:
        return f"<claim {self.size} B{', closed' if self._closed else ''}>"

    def resize(self, size: int) -> bool:
        """Hold so many bytes from now on; False, and nothing changed, where they do not fit. Raises RuntimeError after the end."""
        if self._closed:
            raise RuntimeError(f"{self!r} is over")
        if not self._buffers.take(size - self.size):
            return False
        self.size = size
        return True

    def close(self) -> None:
        """The end. Raises RuntimeError when it comes a second time."""
        self.resize(0)
        self._closed = True
