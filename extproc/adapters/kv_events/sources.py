"""Where a replica publishes its KV events: as configured, as its labels say, or as it answers when asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import orjson

from extproc.config import KvEvents, zmq_endpoint
from extproc.core.types import Replica

PATH: Final = "/kv_event_sources"
"""vLLM after 0.28 tells there, for each data-parallel rank, how its publisher was configured."""
LABEL, REPLAY_LABEL = "kv_events", "kv_replay"
"""Labels of a replica that name its endpoints instead of the pool's settings."""
ANY_HOST: Final = frozenset({"*", "0.0.0.0", "[::]", "::"})
MAX_RANKS: Final = 64
LAST_PORT: Final = 65_535


class SourcesError(Exception):
    """The answer names nothing that can be listened to; the text says why, and the remedy where there is one."""


@dataclass(frozen=True, slots=True)
class Source:
    """One publisher."""

    rank: int
    endpoint: str | None
    """What to connect to; None where it connects to us."""
    replay: str | None = None
    """Where it tells its last messages again; None where it does not."""


def configured(settings: KvEvents, replica: Replica, ranks: int = 1) -> tuple[Source, ...]:
    """As the pool's settings and the replica's labels say, for so many data parallel ranks. For engines that connect to us only the replays have a place.

    Raises SourcesError where a label is no endpoint.
    """
    host = replica.address.rpartition(":")[0]
    endpoint = None if settings.mode == "bind" else _labelled(replica, LABEL, settings.endpoint)
    replay = _labelled(replica, REPLAY_LABEL, settings.replay_endpoint)
    return tuple(Source(rank, _at(endpoint, host, rank), _at(replay, host, rank)) for rank in range(ranks))


def _labelled(replica: Replica, label: str, otherwise: str | None) -> str | None:
    named = replica.labels.get(label)
    if named is None:
        return otherwise
    try:
        if "*" in zmq_endpoint(named):
            raise ValueError(f"{named!r} is where an engine listens; write tcp://{{host}}:5557")
    except ValueError as e:
        raise SourcesError(f"label {label}: {e}") from None
    return named


def told(body: bytes, address: str) -> tuple[Source, ...]:
    """As the replica answers: `{"0": {"endpoint": "tcp://*:5557", "replay_endpoint": ..., ...}, ...}`; none where events are off.

    Raises SourcesError. Ports are those of each rank, already counted up.
    """
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise SourcesError("is not JSON") from None
    if not isinstance(answer, dict) or len(answer) > MAX_RANKS:
        raise SourcesError(f"is not an object of at most {MAX_RANKS} ranks")
    host = address.rpartition(":")[0]
    found = tuple(_told(rank, each, host) for rank, each in sorted(answer.items()))
    for source, n in Counter(source.endpoint for source in found).items():
        if n > 1:
            raise SourcesError(f"names {source} for two ranks")
    return found


def _told(rank: str, source: Any, host: str) -> Source:
    if not rank.isdecimal() or int(rank) >= MAX_RANKS or not isinstance(source, dict):
        raise SourcesError(f"names no rank: {rank[:20]!r}")
    endpoint, replay = source.get("endpoint"), source.get("replay_endpoint")
    if source.get("publisher", "zmq") != "zmq" or not isinstance(endpoint, str):
        raise SourcesError(f"rank {rank} publishes by {str(source.get('publisher'))[:20]!r}, not by zmq")
    return Source(int(rank), _of(endpoint, host), _of(replay, host) if isinstance(replay, str) else None)


def _of(endpoint: str, host: str) -> str:
    """The replica's own address in the place of any. No other host: a replica shall not send us elsewhere."""
    named, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not port.isdecimal() or not 0 < int(port) <= LAST_PORT:
        raise SourcesError(f"names {endpoint[:80]!r}, which is no tcp://host:port")
    if named not in ANY_HOST and named.strip("[]") != host.strip("[]"):
        raise SourcesError(
            f"names {endpoint[:80]!r}, which is another host; if the engine connects there, set kv_events.mode: bind, "
            "and if it is the replica under another address, mode: connect"
        )
    return f"tcp://{host}:{port}"


def _at(endpoint: str | None, host: str, rank: int) -> str | None:
    """The port of each further rank is one higher, as in vLLM."""
    return None if endpoint is None else counted_up(endpoint.replace("{host}", host), rank)


def counted_up(endpoint: str, rank: int) -> str:
    """`tcp://host:port` of the first rank -> that of another."""
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + rank}"
