"""Answers of `/v1/models`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.adapters.engines import listed_models, listed_parents


class TestListedModels:
    def test_adapters_are_listed_beside_their_base(self) -> None:
        page = (
            b'{"object":"list","data":[{"id":"tiny","parent":null},{"id":"adapter-a","parent":"tiny"},{"id":"tiny"}]}'
        )
        assert listed_models(page) == ("tiny", "adapter-a")

    @pytest.mark.parametrize("page", [b"", b"[]", b"{}", b'{"data":{}}', b"\xff", b"<html>", b"[" * 5000])
    def test_what_is_no_list_of_models_says_nothing(self, page: bytes) -> None:
        assert listed_models(page) is None

    def test_entries_without_a_name_are_passed_over(self) -> None:
        assert listed_models(b'{"data":[{"id":3},{},7,null,{"id":""},{"id":"m"}]}') == ("m",)

    @given(st.binary(max_size=200))
    def test_no_bytes_make_it_raise(self, page: bytes) -> None:
        assert listed_models(page) is None


class TestListedParents:
    def test_an_adapter_names_its_base_and_the_base_nobody(self) -> None:
        page = b'{"data":[{"id":"tiny","parent":null},{"id":"adapter-a","parent":"tiny"},{"id":"b"},{"id":3,"parent":"x"}]}'
        assert listed_parents(page) == {"adapter-a": "tiny"}

    @given(st.binary(max_size=200))
    def test_no_bytes_make_it_raise(self, page: bytes) -> None:
        assert listed_parents(page) is not None
