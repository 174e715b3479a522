from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.adapters.discovery import FakeSource, FileSource, Source, StaticSource, from_config
from extproc.adapters.discovery.base import difference
from extproc.adapters.discovery.listing import ListingError, parse
from extproc.config import PoolConfig
from extproc.core.types import Add, Change, Remove, Replica, Reset

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


class TestFromConfig:
    async def test_fixed_replicas_come_in_one_reset_with_the_labels_of_the_pool_below_their_own(self) -> None:
        pool = PoolConfig.model_validate(
            {
                "labels": {"gpu": "a100", "tp": 2},
                "replicas": [{"address": A, "labels": {"gpu": "h100"}, "weight": 3}, B],
            }
        )
        told: list[Change] = []
        await from_config(pool).run(told.append)
        first = Replica(A, {"gpu": "h100", "tp": "2"}, 3.0)
        assert told == [Reset("default", (first, Replica(B, {"gpu": "a100", "tp": "2"})))]

    @pytest.mark.parametrize(
        ("pool_labels", "listed", "drain"),
        [
            ({}, {}, False),
            ({}, {"drain": True}, True),
            ({}, {"labels": {"drain": "true"}}, True),
            ({}, {"labels": {"drain": True}}, True),
            ({}, {"labels": {"drain": "no"}}, False),
            ({"drain": "true"}, {}, True),
            ({"drain": "true"}, {"labels": {"drain": "false"}}, False),
            ({}, {"drain": True, "labels": {"drain": "false"}}, True),
        ],
    )
    async def test_a_drain_is_a_key_or_a_label_which_is_no_label_of_the_hardware(
        self, pool_labels: dict[str, str], listed: dict[str, object], drain: bool
    ) -> None:
        pool = PoolConfig.model_validate({"labels": pool_labels, "replicas": [{"address": A, **listed}]})
        told: list[Change] = []
        await from_config(pool).run(told.append)
        assert told == [Reset("default", (Replica(A, drain=drain),))]

    def test_a_discovery_file_is_watched(self, tmp_path: Path) -> None:
        pool = PoolConfig.model_validate({"name": "p", "discovery": {"file": {"path": str(tmp_path / "r.yaml")}}})
        source = from_config(pool)
        assert isinstance(source, FileSource)
        assert repr(source) == f"<FileSource p: unread from {tmp_path}/r.yaml, good>"


async def test_a_static_source_shows_its_size() -> None:
    assert repr(StaticSource("p", (Replica(A),))) == "<StaticSource p: 1 replicas>"


async def test_a_fake_source_tells_what_was_pushed_before_and_while_it_runs() -> None:
    source = FakeSource("p")
    as_source: Source = source
    told: asyncio.Queue[Change] = asyncio.Queue()
    source.push(Reset("p", ()))
    task = asyncio.create_task(as_source.run(told.put_nowait))
    assert await told.get() == Reset("p", ())
    source.push(Remove("p", A))
    assert await told.get() == Remove("p", A)
    task.cancel()


class TestListing:
    @pytest.mark.parametrize(
        "content",
        [
            f"- {A}\n- address: {B}\n  weight: 2\n  labels: {{tp: 4}}\n",
            f"replicas:\n- {A}\n- {{address: '{B}', weight: 2, labels: {{tp: '4'}}}}\n",
            f'["{A}", {{"address": "{B}", "weight": 2, "labels": {{"tp": 4}}}}]',
            f'{{"replicas": ["{A}", {{"address": "{B}", "weight": 2, "labels": {{"tp": "4"}}}}]}}',
        ],
    )
    def test_yaml_and_json_a_list_and_an_object_say_the_same(self, content: str) -> None:
        expected = {A: Replica(A, {"gpu": "h100"}), B: Replica(B, {"gpu": "h100", "tp": "4"}, 2.0)}
        assert parse(content.encode(), {"gpu": "h100"}) == expected

    @pytest.mark.parametrize("content", ["[]", "replicas: []"])
    def test_an_empty_list_is_an_empty_pool(self, content: str) -> None:
        assert parse(content.encode(), {}) == {}

    @pytest.mark.parametrize(
        ("content", "mistake"),
        [
            ("", "must be a list of replicas, or an object with the key replicas"),
            ("7", "must be a list of replicas, or an object with the key replicas"),
            ("{}", "replicas: is missing; add it"),
            (
                f"replicas: [{A}]\nreplica: []",
                "replica: no such key; did you mean replicas?",
            ),
            (f"[{A}, {A}]", f"replica {A} is listed twice; remove one"),
            (
                "[vllm-0:8000]",
                "replicas[0].address: 'vllm-0:8000' is not ip:port; write the IP address instead of 'vllm-0'",
            ),
            (f"[{A}, {{address: '{B}', weight: 0}}]", "replicas[1].weight: input should be greater than 0"),
            (f"[{{address: '{A}', wieght: 1}}]", "replicas[0].wieght: no such key; did you mean weight?"),
            (f"[{A}, ", "neither YAML nor JSON: while parsing a flow node"),
            ("[\x00]", "neither YAML nor JSON: unacceptable character"),
        ],
    )
    def test_a_mistake_is_named_in_one_line(self, content: str, mistake: str) -> None:
        with pytest.raises(ListingError) as raised:
            parse(content.encode(), {})
        assert str(raised.value).startswith(mistake)
        assert "\n" not in str(raised.value)

    @given(st.binary(max_size=60) | st.text("[]{}:,- &*!|>'\"\n\t#%1.a", max_size=40).map(str.encode))
    def test_no_content_raises_anything_else(self, content: bytes) -> None:
        with suppress(ListingError):
            parse(content, {})


def replicas(names: dict[int, int]) -> dict[str, Replica]:
    return {f"10.0.0.{n}:1": Replica(f"10.0.0.{n}:1", weight=1.0 + weight) for n, weight in names.items()}


MEMBERSHIPS = st.dictionaries(st.integers(0, 6), st.integers(0, 1)).map(replicas)


class TestDifference:
    @given(MEMBERSHIPS, MEMBERSHIPS)
    def test_its_changes_lead_from_one_membership_to_the_other_and_none_is_idle(
        self, before: dict[str, Replica], after: dict[str, Replica]
    ) -> None:
        members = dict(before)
        for change in difference("p", before, after):
            was = dict(members)
            match change:
                case Add(replica=replica):
                    members[replica.address] = replica
                case Remove(address=address):
                    del members[address]
            assert members != was
        assert members == after

    def test_a_full_replacement_never_leaves_the_pool_empty(self) -> None:
        changes = list(difference("p", replicas({1: 0, 2: 0}), replicas({3: 0})))
        assert [type(c) for c in changes] == [Add, Remove, Remove]
