"""The targets themselves, without guidance: seeds, their mutations, and any bytes."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extproc.envoy.exchange import Close, Continue, EchoBody, Head, HeadersArrived, Mode, Part
from tests.fuzz.proxy import Illegal, Proxy
from tests.fuzz.targets import SEEDS, TARGETS, body, stream, wire


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, seeds in SEEDS.items() for seed in seeds])
def test_seeds(name: str, seed: bytes) -> None:
    TARGETS[name](seed)


def test_every_target_has_seeds() -> None:
    assert set(SEEDS) == set(TARGETS)


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_streams(data: bytes) -> None:
    stream(data)


@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from([250, 1, 0, 130, 150])), max_size=60))
@settings(max_examples=300)
def test_streams_with_whole_bodies(data: list[int]) -> None:
    stream(bytes(data))


@given(st.binary(max_size=200))
def test_messages(data: bytes) -> None:
    wire(data)


@given(st.sampled_from(SEEDS["body"]), st.integers(0, 200), st.binary(max_size=3))
@example(SEEDS["body"][0], 0, b"")
def test_bodies_with_a_wound(seed: bytes, at: int, wound: bytes) -> None:
    body(seed[:at] + wound + seed[at + len(wound) :])


def test_the_proxy_complains_of_answers_that_nobody_waits_for() -> None:
    proxy = Proxy(Mode.BUFFERED)
    proxy.sends(HeadersArrived(Head()))
    proxy.takes(Continue(Part.HEADERS))
    with pytest.raises(Illegal):
        proxy.takes(Continue(Part.HEADERS))


def test_the_proxy_complains_of_a_body_before_its_headers() -> None:
    proxy = Proxy(Mode.FULL_DUPLEX)
    proxy.sends(HeadersArrived(Head()))
    with pytest.raises(Illegal):
        proxy.takes(EchoBody(b"x", True))


def test_the_proxy_complains_of_anything_after_the_end() -> None:
    proxy = Proxy(Mode.BUFFERED)
    proxy.sends(HeadersArrived(Head()))
    proxy.takes(Close())
    with pytest.raises(Illegal):
        proxy.takes(Continue(Part.HEADERS))
