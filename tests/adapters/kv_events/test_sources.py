from __future__ import annotations

import pytest

from extproc.adapters.kv_events.sources import Source, SourcesError, configured, told
from extproc.config import KvEvents
from extproc.core.types import Replica
from tests.adapters.kv_events.support import FIXTURES

REPLICA = Replica("10.0.0.1:8000")


class TestConfigured:
    def test_the_host_of_the_replica(self) -> None:
        assert configured(KvEvents(), REPLICA) == (Source(0, "tcp://10.0.0.1:5557"),)

    def test_ipv6(self) -> None:
        assert configured(KvEvents(), Replica("[::1]:8000")) == (Source(0, "tcp://[::1]:5557"),)

    def test_ports_of_ranks_count_up(self) -> None:
        settings = KvEvents(endpoint="tcp://{host}:6000", replay_endpoint="tcp://{host}:7000")
        assert configured(settings, REPLICA, 2) == (
            Source(0, "tcp://10.0.0.1:6000", "tcp://10.0.0.1:7000"),
            Source(1, "tcp://10.0.0.1:6001", "tcp://10.0.0.1:7001"),
        )

    def test_labels_overrule(self) -> None:
        replica = Replica("10.0.0.1:8000", {"kv_events": "tcp://10.0.0.9:1", "kv_replay": "tcp://{host}:2"})
        assert configured(KvEvents(), replica) == (Source(0, "tcp://10.0.0.9:1", "tcp://10.0.0.1:2"),)

    @pytest.mark.parametrize(
        "label", ["5557", "tcp://10.0.0.1", "tcp://*:5557", "ipc:///run/x", "tcp://a b:5557", "tcp://{host}:70000"]
    )
    def test_a_label_that_is_no_endpoint_is_said(self, label: str) -> None:
        with pytest.raises(SourcesError, match=r"label kv_events: .* write tcp://\{host\}:5557"):
            configured(KvEvents(), Replica("10.0.0.1:8000", {"kv_events": label}))

    def test_engines_that_connect_are_asked_for_replays_only(self) -> None:
        settings = KvEvents(mode="bind", bind="tcp://*:5557", replay_endpoint="tcp://{host}:5558")
        assert configured(settings, REPLICA) == (Source(0, None, "tcp://10.0.0.1:5558"),)


class TestTold:
    def test_the_recorded_answer(self) -> None:
        body = (FIXTURES / "vllm-0.32" / "kv_event_sources.json").read_bytes()
        assert told(body, "10.0.0.1:8000") == (Source(0, "tcp://10.0.0.1:21557", "tcp://10.0.0.1:21558"),)

    def test_events_are_off(self) -> None:
        assert told(b"{}", "10.0.0.1:8000") == ()

    def test_ranks_with_ports_of_their_own(self) -> None:
        """`tcp://*:0` of the configuration is answered with what was bound."""
        body = b'{"1": {"endpoint": "tcp://10.0.0.1:4001"}, "0": {"endpoint": "tcp://10.0.0.1:4000", "replay_endpoint": null}}'
        assert told(body, "10.0.0.1:8000") == (Source(0, "tcp://10.0.0.1:4000"), Source(1, "tcp://10.0.0.1:4001"))

    @pytest.mark.parametrize("host", ["*", "0.0.0.0", "[::]", "[::1]"])
    def test_ipv6(self, host: str) -> None:
        assert told(b'{"0": {"endpoint": "tcp://%s:1"}}' % host.encode(), "[::1]:8000") == (Source(0, "tcp://[::1]:1"),)

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b"<html>", "is not JSON"),
            (b"[]", "is not an object"),
            (b'{"a": {}}', "names no rank: 'a'"),
            (b'{"99": {}}', "names no rank: '99'"),
            (b'{"0": 7}', "names no rank: '0'"),
            (b'{"0": {"publisher": "null"}}', "publishes by 'null', not by zmq"),
            (b'{"0": {"endpoint": "ipc:///run/x"}}', "is no tcp://host:port"),
            (b'{"0": {"endpoint": "tcp://*:0"}}', "is no tcp://host:port"),
            (b'{"0": {"endpoint": "tcp://*:65536"}}', "is no tcp://host:port"),
            (
                b'{"0": {"endpoint": "tcp://*:5557"}, "1": {"endpoint": "tcp://*:5557"}}',
                "names tcp://10.0.0.1:5557 for two ranks",
            ),
            (
                b'{"0": {"endpoint": "tcp://10.0.0.7:5557"}}',
                "another host; if the engine connects there, set kv_events.mode: bind",
            ),
        ],
    )
    def test_what_cannot_be_listened_to_is_said(self, body: bytes, said: str) -> None:
        with pytest.raises(SourcesError) as e:
            told(body, "10.0.0.1:8000")
        assert said in str(e.value)
