"""Questions to a real API server, over lightkube's credentials and connections.

lightkube brings what is tedious and security relevant: kubeconfig and service account, certificates, the token that kubelet replaces
every hour. Its own `watch` is not used: it asks for no bookmarks, takes a 410 in the status line for a failure, asks again without
a pause when a watch ends, and splits lines where JSON may have none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx2
import orjson
import yaml
from lightkube.config.client_adapter import ConnectionParams
from lightkube.config.kubeconfig import SERVICE_ACCOUNT, KubeConfig
from lightkube.core.exceptions import ConfigError
from lightkube.core.generic_client import BasicRequest, GenericAsyncClient

from extproc.adapters.discovery.kube_api import (
    BrokenError,
    Connect,
    Event,
    GoneError,
    KubeApi,
    KubeError,
    Listed,
    Query,
    version_of,
)

TIMEOUT_S: Final = 10.0
"""For a connection, and for each piece of an answer."""
LIST_TIMEOUT_S: Final = 60.0
PAGE: Final = 500
"""Objects in one answer to a list."""
MAX_OBJECTS: Final = 100_000
"""Of one list; a cluster has up to 150,000 pods."""
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""Of one page of a list, and of one event. etcd takes objects up to 1.5 MiB."""
TOO_NEW: Final = "Too large resource version"
"""Of a Status (504) where the version that is asked for is yet to come: etcd was restored, or this server is behind the one before."""
ACCEPT: Final = "application/json"
ACCEPT_METADATA: Final = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1,application/json"

for _library in ("httpx2", "httpcore2"):  # a line for each request, one a second in an outage
    logging.getLogger(_library).setLevel(logging.WARNING)


def connector(kubeconfig: Path | None, service_account: Path = Path(SERVICE_ACCOUNT)) -> Connect:
    """Connections by a kubeconfig; None: by the service account, else by `$KUBECONFIG` or `~/.kube/config`."""
    return partial(_connected, kubeconfig, service_account)


@asynccontextmanager
async def _connected(kubeconfig: Path | None, service_account: Path) -> AsyncIterator[KubeApi]:
    """Credentials are read anew for each connection: whoever replaces them need not restart extproc."""
    try:
        client = await asyncio.to_thread(_client, kubeconfig, service_account)
    except (ConfigError, OSError, ssl.SSLError, yaml.YAMLError) as e:
        raise KubeError(f"no credentials: {_said(e)}{_hint(kubeconfig, service_account)}") from None
    except Exception as e:  # whatever lightkube makes of a kubeconfig of another shape: none of it is documented
        raise KubeError(f"the kubeconfig cannot be used: {e!r}{_hint(kubeconfig, service_account)}") from None
    try:
        yield KubeClient(client)
    finally:
        await client.close()


def _client(kubeconfig: Path | None, service_account: Path) -> GenericAsyncClient:
    config = KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_env(service_account)
    return GenericAsyncClient(ConnectionParams(timeout=httpx2.Timeout(TIMEOUT_S)), config.get())


def _hint(kubeconfig: Path | None, service_account: Path) -> str:
    """Where the credentials should have been: a pod without a token fails by a kubeconfig that nobody meant it to have."""
    if kubeconfig is not None or (service_account / "token").exists():
        return ""
    return f"; in a pod {service_account} should have a token: is automountServiceAccountToken false?"


class KubeClient:
    """One connection to an API server."""

    def __init__(self, client: GenericAsyncClient) -> None:
        self._client = client

    async def list(self, query: Query) -> Listed:
        """Page after page, all of one version."""
        items: list[dict[str, Any]] = []
        params = {"limit": str(PAGE)}
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                while True:
                    page = await self._page(query, params)
                    items += page.get("items") or []
                    if not (token := _continue(page)):
                        break
                    if len(items) >= MAX_OBJECTS:
                        raise KubeError(f"more than {MAX_OBJECTS} objects; narrow the selector")
                    params["continue"] = token
        except TimeoutError:
            raise KubeError(f"no list within {LIST_TIMEOUT_S:g} s") from None
        version = version_of(page)
        if version is None:
            raise KubeError("not a list: it has no resourceVersion")
        return Listed(tuple(items), version)

    async def watch(self, query: Query, version: str, timeout_s: float) -> AsyncGenerator[Event, None]:
        """One watch. A line that takes `TIMEOUT_S` longer than the whole watch should never comes."""
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, round(timeout_s))),
        }
        limit_s = timeout_s + TIMEOUT_S
        try:
            async with asyncio.timeout(limit_s):  # an `exec` plugin of a kubeconfig has no limit of its own
                answer = await self._send(query, self._request(query, params, limit_s))
        except TimeoutError:
            raise KubeError(f"no watch within {limit_s:g} s") from None
        try:
            async for line in _lines(answer):
                if event := _event(line, self._place(query)):
                    yield event
        except httpx2.HTTPError as e:
            raise BrokenError(_said(e)) from None
        finally:
            await answer.aclose()

    async def _page(self, query: Query, params: dict[str, str]) -> dict[str, Any]:
        answer = await self._send(query, self._request(query, params, TIMEOUT_S))
        try:
            page = orjson.loads(await _body(answer))
        except httpx2.HTTPError as e:
            raise KubeError(_said(e)) from None
        except orjson.JSONDecodeError as e:
            raise KubeError(f"not JSON: {e}") from None
        finally:
            await answer.aclose()
        items = page.get("items") or [] if isinstance(page, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise KubeError("not a list")
        return dict(page)

    def _request(self, query: Query, params: dict[str, str], read_s: float) -> BasicRequest:
        selects = {"labelSelector": query.labels, "fieldSelector": query.name and f"metadata.name={query.name}"}
        accept = ACCEPT
        if query.metadata_only:
            accept = ACCEPT_METADATA.format("" if "watch" in params else "List")
        return BasicRequest(
            "GET",
            _path(query, self._client.namespace),
            params={**params, **{name: value for name, value in selects.items() if value}},
            headers={"Accept": accept, "User-Agent": "extproc"},
            timeout=httpx2.Timeout(TIMEOUT_S, read=read_s),
        )

    def _place(self, query: Query) -> str:
        return f"{query.resource} in namespace {query.namespace or self._client.namespace}"

    async def _send(self, query: Query, request: BasicRequest) -> httpx2.Response:
        """The answer, if its status is 200, before its body. Raises KubeError."""
        try:
            answer: httpx2.Response = await self._client.send(self._client.build_adapter_request(request), stream=True)
            if answer.status_code == 200:
                return answer
            try:
                raise _refused(answer.status_code, await _body(answer), self._place(query))
            finally:
                await answer.aclose()
        except (httpx2.HTTPError, httpx2.InvalidURL) as e:
            raise KubeError(_said(e)) from None
        except (ConfigError, OSError) as e:  # the token cannot be read
            raise KubeError(f"no credentials: {_said(e)}") from None
        except (ValueError, KeyError, TypeError) as e:  # what an `exec` plugin said
            raise KubeError(f"no credentials: the exec plugin of the kubeconfig gave no token ({e!r})") from None


def _path(query: Query, namespace: str) -> str:
    resource = query.resource
    root = f"apis/{resource.group}/{resource.version}" if resource.group else f"api/{resource.version}"
    return f"{root}/namespaces/{query.namespace or namespace}/{resource.plural}"


def _continue(page: dict[str, Any]) -> str | None:
    """What to ask for the next page with; None on the last."""
    metadata = page.get("metadata")
    token = metadata.get("continue") if isinstance(metadata, dict) else None
    return str(token) if token else None


async def _body(answer: httpx2.Response) -> bytes:
    """Raises KubeError where it is too large."""
    pieces = []
    size = 0
    async for piece in answer.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise KubeError(f"an answer larger than {MAX_ANSWER_BYTES} bytes")
    return b"".join(pieces)


async def _lines(answer: httpx2.Response) -> AsyncGenerator[bytes, None]:
    """Split at newlines alone: JSON may hold the other characters that end a line of text. Raises KubeError."""
    rest = b""
    async for piece in answer.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
        if len(rest) > MAX_ANSWER_BYTES:
            raise KubeError(f"an event larger than {MAX_ANSWER_BYTES} bytes")


def _event(line: bytes, place: str) -> Event | None:
    """What a line of a watch of `place` tells; None of a kind that is not known. Raises KubeError."""
    try:
        told = orjson.loads(line)
        kind, item = told["type"], told["object"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise KubeError(f"not an event: {line[:80]!r}") from None
    if kind == "ERROR" or not isinstance(item, dict):
        raise _refused(item.get("code", 500) if isinstance(item, dict) else 500, orjson.dumps(item), place)
    return Event(kind, item) if kind in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK") else None


def _refused(status: int, body: bytes, place: str) -> KubeError:
    """The error that a Status object tells of, or the status of the answer alone. `place`: what was asked for, and where."""
    try:
        text = str(orjson.loads(body)["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        text = f"status {status}"
    if status == 410 or TOO_NEW in text:
        return GoneError(text)
    if status == 401:
        text += "; the credentials are not accepted"
    if status == 403:
        text += f"; allow it list and watch of {place}, as deploy/kubernetes/base/rbac.yaml does"
    if status == 404:
        text += f"; the API server does not know {place}: is its CustomResourceDefinition there, in this version?"
    return KubeError(" ".join(text.split()))


def _said(error: Exception) -> str:
    """Why, in one line: the words of the operating system or of TLS where they have some."""
    cause: BaseException | None = None if isinstance(error, ConfigError) else error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):  # its errno is not one of the operating system
            return " ".join(str(cause).split())
        if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
            return os.strerror(cause.errno) + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split()) or type(error).__name__
