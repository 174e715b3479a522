"""What discovery asks of a Kubernetes API server: a list, and a watch from there on. A fake ships with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

Object = Mapping[str, Any]
"""A resource as JSON says it."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of namespaced resource, by its place in the API."""

    plural: str
    version: str
    group: str = ""
    """Empty for the core group."""

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


ENDPOINT_SLICES: Final = Resource("endpointslices", "v1", "discovery.k8s.io")
PODS: Final = Resource("pods", "v1")


@dataclass(frozen=True, slots=True)
class Query:
    """Which objects are wanted."""

    resource: Resource
    namespace: str | None = None
    """None for that of the credentials."""
    labels: str | None = None
    """Label selector as in the API; None for all."""
    name: str | None = None
    """Only the object of this name."""
    metadata_only: bool = False
    """Ask for the metadata alone (PartialObjectMetadata): of a pod a tenth of it."""

    def __str__(self) -> str:
        where = f" in {self.namespace}" if self.namespace else ""
        which = f" {self.name}" if self.name else f" with {self.labels}" if self.labels else ""
        return f"{self.resource}{which}{where}"


@dataclass(frozen=True, slots=True)
class Listed:
    """All objects that there are, and the version of the collection: a watch from it misses nothing."""

    items: tuple[Object, ...]
    version: str


@dataclass(frozen=True, slots=True)
class Event:
    """What a watch tells. Of a BOOKMARK only the version counts: all before it has been told."""

    kind: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    item: Object


class KubeError(Exception):
    """A question was not answered; the text says why, in one line."""


class GoneError(KubeError):
    """The server does not know what came after the version: it is too old (410), or of before a restore of etcd. List again."""


class BrokenError(KubeError):
    """The connection ended in the middle of a watch, which servers and what stands before them do now and then."""


class KubeApi(Protocol):
    """One connection to an API server."""

    async def list(self, query: Query) -> Listed:
        """Raises KubeError."""

    def watch(self, query: Query, version: str, timeout_s: float) -> AsyncGenerator[Event, None]:
        """What happened after `version`; ends when the server ends it, which it is asked to do after `timeout_s`. Raises KubeError."""


Connect = Callable[[], AbstractAsyncContextManager[KubeApi]]
"""Opens a connection. What it raises on entry is a KubeError."""


def key_of(item: Object) -> str:
    """Name of an object; with the namespace, of the queries used here each stays in one."""
    return str(_metadata(item).get("name", ""))


def version_of(item: Object) -> str | None:
    """Its resourceVersion, None where it has none."""
    version = _metadata(item).get("resourceVersion")
    return str(version) if version else None


def _metadata(item: Object) -> Mapping[str, Any]:
    metadata = item.get("metadata")
    return metadata if isinstance(metadata, Mapping) else {}


@dataclass(slots=True)
class _Stored:
    resource: Resource
    event: Event
    version: int


@dataclass(slots=True)
class FakeKube:
    """An API server in memory. Tests put and delete objects, forget history, break watches, and take it down."""

    down: str | None = None
    """While this is not None every question fails with it."""
    objects: dict[tuple[Resource, str], Object] = field(default_factory=dict)
    version: int = 1
    lists: int = 0
    """How often something was listed."""
    watching: list[Query] = field(default_factory=list)
    """The watches that are open."""
    _history: list[_Stored] = field(default_factory=list)
    _oldest: int = 0
    _moved: asyncio.Event = field(default_factory=asyncio.Event)
    _breaks: int = 0

    def put(self, resource: Resource, item: dict[str, Any]) -> None:
        """Create or replace an object."""
        key = (resource, key_of(item))
        kind: Literal["ADDED", "MODIFIED"] = "MODIFIED" if key in self.objects else "ADDED"
        self.objects[key] = self._next(resource, kind, item)

    def delete(self, resource: Resource, name: str) -> None:
        """Delete an object that is there."""
        self._next(resource, "DELETED", self.objects.pop((resource, name)))

    def bookmark(self, resource: Resource) -> None:
        """Tell all watches the version of now."""
        self._next(resource, "BOOKMARK", {"metadata": {}})

    def forget(self) -> None:
        """Compact: watches from versions before now are refused as gone."""
        self._history.clear()
        self._oldest = self.version
        self.break_watches()

    def break_watches(self) -> None:
        """Cut the connection of all who watch."""
        self._breaks += 1
        self._wake()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[KubeApi]:
        """As `Connect`."""
        yield self

    async def list(self, query: Query) -> Listed:
        """As `KubeApi.list`, at once."""
        self._check()
        self.lists += 1
        found = (item for (resource, _), item in self.objects.items() if resource == query.resource)
        return Listed(tuple(item for item in found if selected(query, item)), str(self.version))

    async def watch(self, query: Query, version: str, timeout_s: float) -> AsyncGenerator[Event, None]:
        """As `KubeApi.watch`. An object that a selector no longer matches is told as deleted."""
        self._check()
        if int(version) < self._oldest:
            raise GoneError(f"too old resource version: {version} ({self._oldest})")
        self.watching.append(query)
        try:
            async for event in self._told(query, int(version), asyncio.get_running_loop().time() + timeout_s):
                yield event
        finally:
            self.watching.remove(query)

    async def _told(self, query: Query, told: int, deadline: float) -> AsyncIterator[Event]:
        breaks = self._breaks
        while True:
            moved = self._moved
            for stored in [s for s in self._history if s.version > told]:
                told = stored.version
                for event in _seen_by(query, stored):
                    yield event
            self._check()
            if breaks != self._breaks:
                raise BrokenError("connection reset")
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await moved.wait()

    def _next(self, resource: Resource, kind: Any, item: Object) -> Object:
        self.version += 1
        item = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self.version)}}
        self._history.append(_Stored(resource, Event(kind, item), self.version))
        self._wake()
        return item

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _check(self) -> None:
        if self.down is not None:
            raise KubeError(self.down)


def selected(query: Query, item: Object) -> bool:
    """Whether a name and a label selector of equalities match."""
    metadata = item.get("metadata", {})
    wanted = dict(part.split("=", 1) for part in (query.labels or "").split(",") if part)
    labels = metadata.get("labels") or {}
    named = query.name is None or query.name == metadata.get("name")
    return named and all(labels.get(key.strip()) == value.strip("= ") for key, value in wanted.items())


def _seen_by(query: Query, stored: _Stored) -> Iterator[Event]:
    if stored.resource != query.resource:
        return
    if stored.event.kind == "BOOKMARK" or selected(query, stored.event.item):
        yield stored.event
    elif stored.event.kind == "MODIFIED" and query.name in (None, key_of(stored.event.item)):
        yield Event("DELETED", stored.event.item)
