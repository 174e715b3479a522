"""What is changed in a request's body on its way: the model's name, usage asked for, a tenant's salt. All in one pass, the rest as it came."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

from extproc.core.record import record
from extproc.envoy.exchange import Data
from extproc.openai import body as bodies
from extproc.openai.body import Change, Span

ROOMS: Final = 2**63 - 1
"""Numbers under which two engines of SGLang's meet, from 1: 0 is what an empty place has there."""


class NotFoundInBody(Exception):  # noqa: N818, it names what happened
    """The model's name is not where it was read."""


@record
class Rewriting:
    """A body that may be changed. Places are looked for where they are needed."""

    body: Data
    model: str | None
    """As the client names it."""
    usage: Callable[[], Change | None]
    """How to ask for usage; None where there is nothing to change."""
    span: Callable[[], Span | None]
    """Where the model's name stands; None where that was not looked for, or is not found."""
    salt: str | None
    """The tenant's, where engines are to keep their caches apart."""

    def asking(self) -> list[Change]:
        """Have the engine tell usage; empty where nothing is to be changed."""
        change = self.usage()
        return [] if change is None else [change]

    def renaming(self, model: str | None) -> list[Change]:
        """Have the body name the model so. Raises NotFoundInBody."""
        if model is None or model == self.model:
            return []
        # Who read the body was not asked for the place where there were no models yet: a reload came in between.
        span = self.span() or bodies.model_span(bytes(self.body))
        if span is None:
            raise NotFoundInBody(f"no key model in a body of {len(self.body)} bytes")
        return [bodies.rename(span, model)]

    def pairing(self, prefiller: str, port: int) -> list[Change]:
        """Have two engines of SGLang's that get the body meet at the bootstrap server of `prefiller` (`ip:port`)."""
        host = prefiller.rpartition(":")[0]  # of IPv6 with its brackets, as from SGLang's router
        return [bodies.pair(self.body, host, port, 1 + secrets.randbelow(ROOMS))]

    def salting(self) -> list[Change]:
        """Put the tenant's salt into the body."""
        return [] if self.salt is None else [bodies.salt(self.body, self.salt)]
