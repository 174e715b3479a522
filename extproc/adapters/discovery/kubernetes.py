"""Members from a Kubernetes API server: the endpoints of a Service, or the pods of an InferencePool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Final, TypeVar

from extproc.adapters.discovery import kube_objects as objects
from extproc.adapters.discovery.base import Emit, OnError, ignore_errors
from extproc.adapters.discovery.kube_api import ENDPOINT_SLICES, PODS, Connect, Object, Query, Resource
from extproc.adapters.discovery.kube_objects import Endpoint, Labels, PodSeen, PoolSpec
from extproc.adapters.discovery.membership import Membership
from extproc.adapters.discovery.mirror import Mirror, Pace
from extproc.config import InferencePoolDiscovery, KubernetesDiscovery

SERVICE_LABEL: Final = "kubernetes.io/service-name"
"""Every EndpointSlice of a Service bears its name here (discovery/v1)."""
POOL_VERSIONS: Final = {"inference.networking.k8s.io": "v1", "inference.networking.x-k8s.io": "v1alpha2"}

T = TypeVar("T")


class SliceSource:
    """The endpoints of all EndpointSlices that match, with the labels of their pods.

    A Reset when the slices were first listed and the pods' labels are there, or were asked for three times in vain: without them a
    replica that somebody took out by the label `drain` would get requests. Then the fewest changes. Whatever fails later changes
    nothing: the members stay as they were last known.
    """

    def __init__(
        self,
        pool: str,
        settings: KubernetesDiscovery,
        labels: Labels,
        connect: Connect,
        *,
        on_error: OnError = ignore_errors,
        rng: Random | None = None,
        pace: Pace | None = None,
    ) -> None:
        """`labels` of the pool; `pace` for tests, in which an hour has to pass at once."""
        self.pool = pool
        self._labels = labels
        self._told = Membership(pool)
        self._moved = asyncio.Event()
        mirrors = _Mirrors(connect, self._moved, on_error, rng or Random(), pace or Pace(resync_s=settings.resync_s))
        query = Query(ENDPOINT_SLICES, settings.namespace, _slice_selector(settings))
        self._slices: Mirror[tuple[Endpoint, ...]] = mirrors(
            query,
            partial(objects.slice_endpoints, port=settings.port),
            ("there is none; check service and namespace", "the pool is empty"),
        )
        self._pods: Mirror[Labels] | None = None
        if settings.pod_labels:
            query = Query(PODS, settings.namespace, settings.pod_selector, metadata_only=True)
            self._pods = mirrors(query, partial(objects.pod_labels, names=settings.pod_labels))

    def __repr__(self) -> str:
        return f"<SliceSource {self.pool}: {self._told!r} from {self._slices!r}>"

    async def run(self, emit: Emit) -> None:
        self._told = Membership(self.pool)
        self._moved.set()  # a second run has everything already
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._slices.run())
            if self._pods is not None:
                tasks.create_task(self._pods.run())
            while True:
                await self._moved.wait()
                self._moved.clear()
                self._tell(emit)

    def _tell(self, emit: Emit) -> None:
        slices, pods = self._slices.items, self._pods
        if slices is None or (pods is not None and not pods.tried):
            return
        labels = pods.items or {} if pods is not None else {}
        self._told.became(objects.slice_members(slices.values(), labels, self._labels), emit)


class InferencePoolSource:
    """The pods and ports that an InferencePool selects.

    A Reset when the pool and its pods were first listed, then the fewest changes. While there is no such InferencePool, at the start
    or later, and whatever else fails, the members stay as they are.
    """

    def __init__(
        self,
        pool: str,
        settings: InferencePoolDiscovery,
        labels: Labels,
        connect: Connect,
        *,
        on_error: OnError = ignore_errors,
        rng: Random | None = None,
        pace: Pace | None = None,
    ) -> None:
        """As `SliceSource`."""
        self.pool = pool
        self._settings = settings
        self._labels = labels
        self._told = Membership(pool)
        self._moved = asyncio.Event()
        self._mirrors = _Mirrors(
            connect, self._moved, on_error, rng or Random(), pace or Pace(resync_s=settings.resync_s)
        )
        resource = Resource("inferencepools", POOL_VERSIONS[settings.group], settings.group)
        self._pools: Mirror[PoolSpec] = self._mirrors(
            Query(resource, settings.namespace, name=settings.name),
            objects.pool_spec,
            ("there is none; check its name and namespace", "what was known stays"),
        )
        self._spec: PoolSpec | None = None
        self._pods: Mirror[PodSeen | None] | None = None
        self._watching: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<InferencePoolSource {self.pool}: {self._told!r} from {self._pools!r}>"

    async def run(self, emit: Emit) -> None:
        self._told, self._spec = Membership(self.pool), None
        self._moved.set()  # a second run has everything already
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pools.run())
            while True:
                await self._moved.wait()
                self._moved.clear()
                self._follow_spec(tasks)
                self._tell(emit)

    def _follow_spec(self, tasks: asyncio.TaskGroup) -> None:
        """Watch the pods that the InferencePool selects now."""
        if self._pools.items is None:
            return
        spec = self._pools.items.get(self._settings.name)
        if spec is None or spec == self._spec:
            return
        if self._spec is None or spec.selector != self._spec.selector:
            if self._watching is not None:
                self._watching.cancel()
            query = Query(PODS, self._settings.namespace, spec.selector)
            self._pods = self._mirrors(query, partial(objects.pod_seen, names=self._settings.pod_labels))
            self._watching = tasks.create_task(self._pods.run())
        self._spec = spec

    def _tell(self, emit: Emit) -> None:
        if self._spec is None or self._pods is None or self._pods.items is None:
            return
        self._told.became(objects.pool_members(self._spec, self._pods.items.values(), self._labels), emit)


class _Mirrors:
    """Makes the mirrors of one source."""

    def __init__(self, connect: Connect, moved: asyncio.Event, on_error: OnError, rng: Random, pace: Pace) -> None:
        self._connect = connect
        self._moved = moved
        self._on_error = on_error
        self._rng = rng
        self._pace = pace

    def __call__(self, query: Query, parse: Callable[[Object], T], absence: tuple[str, str] | None = None) -> Mirror[T]:
        return Mirror(
            query,
            self._connect,
            parse,
            self._moved.set,
            on_error=self._on_error,
            rng=self._rng,
            pace=self._pace,
            absence=absence,
        )


def _slice_selector(settings: KubernetesDiscovery) -> str:
    service = f"{SERVICE_LABEL}={settings.service}" if settings.service else None
    return ",".join(part for part in (service, settings.selector) if part)
