"""Discovery over HTTP, against the API server of the tests."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from extproc.adapters.discovery import SliceSource
from extproc.adapters.discovery.kube_api import (
    ENDPOINT_SLICES,
    PODS,
    BrokenError,
    Event,
    GoneError,
    KubeError,
    Query,
)
from extproc.adapters.discovery.kube_client import PAGE, TIMEOUT_S, connector
from extproc.adapters.discovery.mirror import Pace
from extproc.config import KubernetesDiscovery
from extproc.core.types import Replica
from tests.support.discovery import Watch, running
from tests.support.kube_api import KubeServer
from tests.support.kube_objects import act, endpoint, endpoint_slice, on_the_server, pod
from tests.support.waiting import until

FIXTURES = Path(__file__).parent.parent / "fixtures" / "kubernetes"
FAST = Pace(resync_s=1000, watch_s=1000, first_pause_s=0.01, longest_pause_s=0.03, steady_s=0.5)
A = "10.0.0.1:8000"
SLICES = Query(ENDPOINT_SLICES)


@asynccontextmanager
async def discovering(server: KubeServer, path: Path, pace: Pace = FAST, **settings: Any) -> AsyncIterator[Watch]:
    wanted = KubernetesDiscovery(**{"service": "vllm", **settings})
    connect = connector(server.kubeconfig(path / "kubeconfig"))
    async with running(
        lambda watch: SliceSource("p", wanted, {}, connect, on_error=watch.mistakes.append, rng=Random(1), pace=pace)
    ) as watch:
        yield watch


async def asked(kubeconfig: Path | None, query: Query = SLICES, **options: Any) -> Any:
    async with connector(kubeconfig, **options)() as api:
        return await api.list(query)


async def watched(kubeconfig: Path, version: str, timeout_s: float = 1.0, query: Query = SLICES) -> list[Event]:
    async with connector(kubeconfig)() as api:
        return [event async for event in api.watch(query, version, timeout_s)]


class TestLists:
    async def test_come_page_by_page_from_the_namespace_of_the_kubeconfig(self, tmp_path: Path) -> None:
        async with KubeServer() as server:
            for i in range(2 * PAGE + 1):
                server.kube.put(ENDPOINT_SLICES, endpoint_slice(f"s{i}"))
            listed = await asked(server.kubeconfig(tmp_path / "k"))
            assert len(listed.items) == 2 * PAGE + 1
            assert listed.version == str(server.kube.version)
            assert [r.match_info["namespace"] for r in server.asked] == ["prod"] * 3

    async def test_select_by_label_name_and_namespace(self, tmp_path: Path) -> None:
        async with KubeServer() as server:
            for name in ("a", "b"):
                server.kube.put(ENDPOINT_SLICES, endpoint_slice(name, service=name))
            path = server.kubeconfig(tmp_path / "k")
            by_label = await asked(path, Query(ENDPOINT_SLICES, "blue", labels="kubernetes.io/service-name=a"))
            by_name = await asked(path, Query(ENDPOINT_SLICES, name="b"))
            assert [i["metadata"]["name"] for i in (*by_label.items, *by_name.items)] == ["a", "b"]
            assert [r.match_info["namespace"] for r in server.asked] == ["blue", "prod"]

    async def test_of_metadata_are_asked_for_as_such(self, tmp_path: Path) -> None:
        async with KubeServer() as server:
            server.kube.put(PODS, pod("a", {"x": "y"}))
            listed = await asked(server.kubeconfig(tmp_path / "k"), Query(PODS, metadata_only=True))
            assert [i["kind"] for i in listed.items] == ["PartialObjectMetadata"]
            assert server.asked[0].path == "/api/v1/namespaces/prod/pods"
            assert server.asked[0].headers["Accept"].startswith("application/json;as=PartialObjectMetadataList;")

    async def test_that_never_end_fail(self, tmp_path: Path) -> None:
        many = {"items": [{"metadata": {"name": "x"}}] * 10_000, "metadata": {"continue": "once more"}}
        async with KubeServer(page=json.dumps(many).encode()) as server:
            with pytest.raises(KubeError, match="more than 100000 objects; narrow the selector"):
                await asked(server.kubeconfig(tmp_path / "k"))
            assert len(server.asked) == 10

    @pytest.mark.parametrize(
        ("page", "mistake"),
        [
            (b"<html>", "not JSON"),
            (b"[]", "not a list"),
            (b'{"items": {}}', "not a list"),
            (b'{"items": [7]}', "not a list"),
            (b'{"items": []}', "it has no resourceVersion"),
            (b'{"items": [], "metadata": "none"}', "it has no resourceVersion"),
            (b'{"items": [], "metadata": ["continue"]}', "it has no resourceVersion"),
        ],
    )
    async def test_that_are_none_fail(self, tmp_path: Path, page: bytes, mistake: str) -> None:
        """An answer without members would be the removal of all of them."""
        async with KubeServer(page=page) as server:
            with pytest.raises(KubeError, match=mistake):
                await asked(server.kubeconfig(tmp_path / "k"))


class TestWatches:
    async def test_tell_what_came_after_a_version_with_bookmarks_and_end_when_the_server_ends_them(
        self, tmp_path: Path
    ) -> None:
        async with KubeServer() as server:
            for name in ("a", "b"):
                server.kube.put(ENDPOINT_SLICES, endpoint_slice(name))
            server.kube.delete(ENDPOINT_SLICES, "a")
            server.kube.bookmark(ENDPOINT_SLICES)
            events = await watched(server.kubeconfig(tmp_path / "k"), "2")
            assert [(e.kind, e.item["metadata"].get("name")) for e in events] == [
                ("ADDED", "b"),
                ("DELETED", "a"),
                ("BOOKMARK", None),
            ]

    @pytest.mark.parametrize("in_stream", [False, True])
    async def test_from_a_version_that_is_too_old_are_gone(self, tmp_path: Path, in_stream: bool) -> None:
        async with KubeServer(gone_in_stream=in_stream) as server:
            server.kube.put(ENDPOINT_SLICES, endpoint_slice("a"))
            server.kube.forget()
            with pytest.raises(GoneError, match=r"too old resource version: 1 \(2\)"):
                await watched(server.kubeconfig(tmp_path / "k"), "1")

    async def test_from_a_version_that_is_yet_to_come_are_gone_too(self, tmp_path: Path) -> None:
        """As after a restore of etcd: to ask on from there would be to wait for what is not going to happen."""
        raw = (
            b'{"type": "ERROR", "object": {"code": 504, "reason": "Timeout", '
            b'"message": "Timeout: Too large resource version: 9, current: 3"}}\n'
        )
        async with KubeServer(raw=raw) as server:
            with pytest.raises(GoneError, match="Too large resource version: 9, current: 3"):
                await watched(server.kubeconfig(tmp_path / "k"), "9")

    async def test_whose_connection_is_cut_are_broken(self, tmp_path: Path) -> None:
        async with KubeServer() as server:
            server.kube.put(ENDPOINT_SLICES, endpoint_slice("a"))
            task = asyncio.create_task(watched(server.kubeconfig(tmp_path / "k"), "1", 60))
            await until(lambda: server.asked)
            await asyncio.sleep(0.1)
            server.kube.break_watches()
            with pytest.raises(BrokenError):
                await task

    @pytest.mark.parametrize(
        ("raw", "mistake"),
        [
            (b"<html>\n", "not an event: b'<html>'"),
            (b'{"type": "ADDED"}\n', "not an event"),
            (b"[]\n", "not an event"),
            (b'{"type": "ADDED", "object": 7}\n', "status 500"),
            (b'{"type": "ERROR", "object": {"code": 500, "message": "etcd\\nis tired"}}\n', "etcd is tired"),
        ],
    )
    async def test_that_tell_nonsense_fail(self, tmp_path: Path, raw: bytes, mistake: str) -> None:
        async with KubeServer(raw=raw) as server:
            with pytest.raises(KubeError, match=mistake):
                await watched(server.kubeconfig(tmp_path / "k"), "1")

    async def test_pass_over_kinds_of_events_that_are_not_known(self, tmp_path: Path) -> None:
        async with KubeServer(raw=b'{"type": "RENAMED", "object": {}}\n\n') as server:
            assert await watched(server.kubeconfig(tmp_path / "k"), "1") == []


class TestRefusals:
    async def test_for_want_of_rights_are_in_the_words_of_the_server(self, tmp_path: Path) -> None:
        async with KubeServer(forbidden={"endpointslices"}) as server:
            with pytest.raises(KubeError) as raised:
                await asked(server.kubeconfig(tmp_path / "k"))
        assert str(raised.value) == (
            'endpointslices.discovery.k8s.io is forbidden: User "system:serviceaccount:prod:extproc" cannot list '
            'resource "endpointslices" in API group "discovery.k8s.io" in the namespace "prod"; '
            "allow it list and watch of endpointslices.discovery.k8s.io in namespace prod, "
            "as deploy/kubernetes/base/rbac.yaml does"
        )

    async def test_of_a_watch_name_the_right_whatever_the_server_says(self, tmp_path: Path) -> None:
        """Some authorizers answer without a Status; in the stream it may come, too."""
        allow = "allow it list and watch of pods in namespace blue"
        async with KubeServer(status=403) as server:
            with pytest.raises(KubeError, match=f"status 403; {allow}"):
                await watched(server.kubeconfig(tmp_path / "k"), "1", query=Query(PODS, "blue"))
        error = b'{"type": "ERROR", "object": {"code": 403, "message": "no longer"}}\n'
        async with KubeServer(raw=error) as server:
            with pytest.raises(KubeError, match=f"no longer; {allow}"):
                await watched(server.kubeconfig(tmp_path / "k"), "1", query=Query(PODS, "blue"))

    async def test_of_what_the_server_does_not_have(self, tmp_path: Path) -> None:
        async with KubeServer(unknown={"endpointslices"}) as server:
            with pytest.raises(KubeError) as raised:
                await asked(server.kubeconfig(tmp_path / "k"))
        assert str(raised.value) == (
            "status 404; the API server does not know endpointslices.discovery.k8s.io in namespace prod: "
            "is its CustomResourceDefinition there, in this version?"
        )

    @pytest.mark.parametrize("status", [429, 500, 502])
    async def test_without_words_have_their_status(self, tmp_path: Path, status: int) -> None:
        async with KubeServer(status=status) as server:
            with pytest.raises(KubeError, match=f"status {status}"):
                await asked(server.kubeconfig(tmp_path / "k"))

    async def test_of_a_port_where_nothing_listens(self, tmp_path: Path) -> None:
        path = KubeServer().kubeconfig(tmp_path / "k")
        with pytest.raises(KubeError, match=r"^Connection refused$"):
            await asked(path)


class TestCredentials:
    async def test_of_a_wrong_token(self, tmp_path: Path) -> None:
        async with KubeServer(token="right") as server:
            with pytest.raises(KubeError, match="Unauthorized; the credentials are not accepted"):
                await asked(server.kubeconfig(tmp_path / "k", token="wrong"))

    async def test_a_token_that_is_replaced_while_a_connection_is_open_is_read_again(self, tmp_path: Path) -> None:
        token = tmp_path / "token"
        token.write_text("first\n")
        server = KubeServer(token="first")
        async with server, connector(server.kubeconfig(tmp_path / "k", tokenFile=str(token)))() as api:
            await api.list(SLICES)
            server.token = "second"
            token.write_text("second\n")
            await api.list(SLICES)
            token.unlink()
            server.token = "third"
            with pytest.raises(KubeError, match=r"no credentials: .*token not found"):
                await api.list(SLICES)

    @pytest.mark.parametrize(
        ("content", "mistake"),
        [
            (None, "no credentials: Configuration file .*/k not found"),
            ("{", "no credentials: while parsing"),
            ("7", "the kubeconfig cannot be used"),
            ("{}", "the kubeconfig cannot be used: KeyError"),
            ("{clusters: [], contexts: [], current-context: x}", "no credentials: Context 'x' not found"),
            (
                "{clusters: [{name: c, cluster: {server: x}}], contexts: [{name: x, context: {cluster: c}}], "
                "current-context: x}",
                "the kubeconfig cannot be used: .*Missing user",
            ),
            (
                "{clusters: [{name: c, cluster: {server: 'http://x:y'}}], users: [{name: u, user: {token: t}}], "
                "contexts: [{name: x, context: {cluster: c, user: u}}], current-context: x}",
                "the kubeconfig cannot be used: InvalidURL",
            ),
            (
                "{clusters: [{name: c, cluster: {server: 'https://x', certificate-authority: ca.crt}}], "
                "users: [{name: u, user: {token: t}}], "
                "contexts: [{name: x, context: {cluster: c, user: u}}], current-context: x}",
                "no credentials: No such file or directory",
            ),
        ],
    )
    async def test_of_a_kubeconfig_that_is_missing_or_wrong(
        self, tmp_path: Path, content: str | None, mistake: str
    ) -> None:
        path = tmp_path / "k"
        if content is not None:
            path.write_text(content)
        with pytest.raises(KubeError, match=mistake):
            await asked(path)

    @pytest.mark.parametrize(
        ("elsewhere", "mistake"),
        [("none", "no credentials: Configuration file none not found"), ("~nobody-of-that-name/x", "cannot be used")],
    )
    async def test_of_a_pod_without_a_token_say_where_it_should_be(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str, mistake: str
    ) -> None:
        monkeypatch.setenv("KUBECONFIG", elsewhere)
        with pytest.raises(KubeError, match=mistake) as raised:
            await asked(None, service_account=tmp_path)
        hint = f"; in a pod {tmp_path} should have a token: is automountServiceAccountToken false?"
        assert str(raised.value).endswith(hint)

    @pytest.mark.parametrize(
        ("command", "mistake"),
        [
            (["echo", "{}"], r"no credentials: the exec plugin of the kubeconfig gave no token \(KeyError"),
            (["echo", "<html>"], "no credentials: the exec plugin of the kubeconfig gave no token"),
            (["false"], "no credentials: Exec false returned 1"),
            (["no-such-command"], "no credentials: No such file or directory: no-such-command"),
        ],
    )
    async def test_of_an_exec_plugin_that_gives_none(self, tmp_path: Path, command: list[str], mistake: str) -> None:
        path = KubeServer().kubeconfig(tmp_path / "k", exec=plugin(*command))
        with pytest.raises(KubeError, match=mistake):
            await asked(path)

    async def test_of_an_exec_plugin_that_hangs_are_not_waited_for_beyond_the_watch(self, tmp_path: Path) -> None:
        pid = tmp_path / "pid"
        path = KubeServer().kubeconfig(tmp_path / "k", exec=plugin("sh", "-c", f"echo $$ > {pid}; exec sleep 1"))
        with pytest.raises(KubeError, match=r"no watch within 0\.3 s"):
            await watched(path, "1", 0.3 - TIMEOUT_S)
        child = Path("/proc") / pid.read_text().strip()
        await until(lambda: not child.exists())

    @pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
    async def test_of_a_service_account_in_the_cluster(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        certificate(tmp_path)
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key")
        (tmp_path / "token").write_text("t")
        (tmp_path / "namespace").write_text("blue")
        async with KubeServer(token="t", tls=tls) as server:
            monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
            assert (await asked(None, service_account=tmp_path)).items == ()
            assert server.asked[0].match_info["namespace"] == "blue"
            with pytest.raises(KubeError, match="CERTIFICATE_VERIFY_FAILED"):
                await asked(server.kubeconfig(tmp_path / "k", token="t"))


def plugin(command: str, *arguments: str) -> dict[str, Any]:
    return {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": command, "args": arguments}


def certificate(directory: Path) -> None:
    """A self-signed one for 127.0.0.1: `ca.crt` and `key`."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=kubernetes",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", directory / "key", "-out", directory / "ca.crt"],
        check=True, capture_output=True,
    )  # fmt: skip


class TestSource:
    async def test_follows_a_rolling_update_as_the_api_tells_it(self, tmp_path: Path) -> None:
        """Both watches are held until all members are known, then the slices tell first."""
        async with KubeServer() as server:
            for resource, name in ((ENDPOINT_SLICES, "endpointslices"), (PODS, "pods")):
                for item in json.loads((FIXTURES / f"{name}.json").read_text())["items"]:
                    server.kube.put(resource, item)
            old = {"gpu": "h100", "tp": "2", "model_size": "70b"}
            new = {**old, "gpu": "h200"}
            a, b, c = "10.244.1.17:8000", "10.244.2.4:8000", "10.244.3.9:8000"
            async with discovering(server, tmp_path) as watch:
                await until(lambda: watch.members is not None)
                assert watch.members == {a: Replica(a, old), b: Replica(b, old)}
                replay(server, "pods", 0, 1)
                steps = [
                    {a: Replica(a, old), b: Replica(b, old), c: Replica(c, new, drain=True)},
                    {a: Replica(a, old), b: Replica(b, old), c: Replica(c, new)},
                    {a: Replica(a, old, drain=True), b: Replica(b, old), c: Replica(c, new)},
                    {b: Replica(b, old), c: Replica(c, new)},
                ]
                for i, expected in enumerate(steps):
                    replay(server, "endpointslices", i, i + 1)
                    await until(lambda expected=expected: watch.members == expected)  # type: ignore[misc]
                replay(server, "endpointslices", 4, 9)
                replay(server, "pods", 1, 9)
                await until(lambda: watch.members == steps[-1])
                assert watch.mistakes == []

    async def test_meets_an_api_server_that_ends_watches_at_once_with_patience(self, tmp_path: Path) -> None:
        async with KubeServer(ends_at_once=True) as server:
            server.kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1")))
            async with discovering(server, tmp_path, pod_labels={}) as watch:
                await until(lambda: watch.members == {A: Replica(A)})
                loop = asyncio.get_running_loop()
                began, before = loop.time(), len(server.asked)
                await asyncio.sleep(0.3)
                assert len(server.asked) - before <= (loop.time() - began) / (0.5 * FAST.first_pause_s)
                server.ends_at_once = False
                server.kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.2")))
                await until(lambda: watch.members == {"10.0.0.2:8000": Replica("10.0.0.2:8000")})
                assert len(server.asks("endpointslices")) > 2

    async def test_reads_again_what_was_cut_in_the_middle_of_a_line(self, tmp_path: Path) -> None:
        async with KubeServer() as server:
            server.kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1")))
            async with discovering(server, tmp_path, pod_labels={}) as watch:
                await until(lambda: watch.members == {A: Replica(A)})
                server.half_lines = 2
                server.kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.2")))
                await until(lambda: watch.members == {"10.0.0.2:8000": Replica("10.0.0.2:8000")})
                assert server.half_lines == 0
                assert [e.query.get("resourceVersion") for e in server.asked] == [None, "2", "2", "2"]
                assert watch.mistakes == []

    async def test_lists_again_where_the_server_has_gone_back_in_time(self, tmp_path: Path) -> None:
        too_new = (
            b'{"type": "ERROR", "object": {"code": 504, "message": "Too large resource version: 2, current: 1"}}\n'
        )
        async with KubeServer() as server:
            server.kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1")))
            async with discovering(server, tmp_path, pod_labels={}) as watch:
                await until(lambda: watch.members == {A: Replica(A)})
                server.kube.objects.clear()
                server.raw = too_new
                server.kube.break_watches()
                await until(lambda: watch.members == {})
                server.raw = None
                server.kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.2")))
                await until(lambda: watch.members == {"10.0.0.2:8000": Replica("10.0.0.2:8000")})

    async def test_asks_the_server_to_end_a_watch_and_goes_on_where_it_ended(self, tmp_path: Path) -> None:
        pace = Pace(resync_s=1000, watch_s=1, first_pause_s=0.01, steady_s=0.5)
        async with KubeServer() as server:
            server.kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1")))
            async with discovering(server, tmp_path, pace, pod_labels={}) as watch:
                await until(lambda: len(server.asked) >= 3)
                listed, *watches = server.asked
                assert "watch" not in listed.query
                assert {(w.query["timeoutSeconds"], w.query["resourceVersion"]) for w in watches} == {("1", "2")}
                assert watch.mistakes == []

    async def test_lives_through_everything_over_real_connections(self, tmp_path: Path) -> None:
        """As the property over the server in memory, with resets, 410 of both kinds, 500 and lost rights."""
        rng = Random(7)
        pace = Pace(1000, 1000, 0.002, 0.01, steady_s=0.0)
        async with KubeServer() as server, discovering(server, tmp_path, pace) as watch:
            for i in range(60):
                ends = [(rng.randint(1, 5), rng.randrange(4)) for _ in range(rng.randrange(4))]
                put, label = ("put", i % 3, ends), ("label", rng.randint(1, 5), "h200")
                act(
                    server.kube,
                    rng.choice([put, put, ("delete", i % 3), label, ("break",), ("forget",), ("bookmark",)]),
                )
                server.status = 500 if rng.random() < 0.2 else None
                server.forbidden = {"pods"} if rng.random() < 0.2 else set()
                server.gone_in_stream = rng.random() < 0.5
                server.delay_s = rng.choice((0.0, 0.0, 0.005))
                await asyncio.sleep(rng.choice((0.0, 0.01, 0.03)))
            server.status, server.forbidden, server.delay_s = None, set(), 0.0
            await until(lambda: watch.members == on_the_server(server.kube))

    async def test_an_api_server_that_goes_and_comes_back_changes_nothing_and_costs_one_line_each(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        kube = KubeServer().kube
        kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1")))
        async with KubeServer(kube) as server, discovering(server, tmp_path, pod_labels={}) as watch:
            await until(lambda: watch.members == {A: Replica(A)})
            await server.__aexit__(None, None, None)
            await until(lambda: watch.mistakes)
            await asyncio.sleep(0.2)  # several attempts
            assert [text.rpartition(": ")[2] for text in watch.mistakes] == ["Connection refused"]
            assert watch.members == {A: Replica(A)}
            await server.__aenter__()
            kube.put(ENDPOINT_SLICES, endpoint_slice("vllm-1", endpoint("10.0.0.1"), endpoint("10.0.0.2")))
            await until(lambda: watch.members is not None and len(watch.members) == 2)
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("extproc")]
        assert [line.rpartition(": ")[2].partition("(")[0] for line in lines] == [
            "1 members",
            "Connection refused; what was known stays",
            "answered again",
            "Add",
        ]


def replay(server: KubeServer, name: str, first: int, last: int) -> None:
    """Do to the server what the told events of a fixture say; bookmarks aside."""
    resource = ENDPOINT_SLICES if name == "endpointslices" else PODS
    for kind, item in _lines(name)[first:last]:
        if kind == "DELETED":
            server.kube.delete(resource, item["metadata"]["name"])
        else:
            server.kube.put(resource, item)


def _lines(name: str) -> list[tuple[str, Any]]:
    content = (FIXTURES / f"{name}_rolling_update.jsonl").read_bytes()
    told = [json.loads(line) for line in content.split(b"\n") if line]
    return [(event["type"], event["object"]) for event in told if event["type"] != "BOOKMARK"]


async def test_a_stream_is_read_as_it_is_written(tmp_path: Path) -> None:
    """Line by line, also where a string holds what ends a line of text."""
    for name, versions in (
        ("endpointslices", ["812010", "812040", "812077", "812081", "812095", "812110", "812130"]),
        ("pods", ["812005", "812080", "812090", "812109"]),
    ):
        async with KubeServer(raw=(FIXTURES / f"{name}_rolling_update.jsonl").read_bytes()) as server:
            query = SLICES if name == "endpointslices" else Query(PODS, metadata_only=True)
            events = await watched(server.kubeconfig(tmp_path / "k"), "812000", query=query)
        assert [event.item["metadata"]["resourceVersion"] for event in events] == versions
