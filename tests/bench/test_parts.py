"""The benchmark's own parts: a wrong end of message or a wrong ratio would be believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from extproc.config import parse
from extproc.envoy import bootstrap
from tests.bench.canned import COMPLETION
from tests.bench.http1 import message_end
from tests.bench.overhead import Block, Logged, cpu_figures, latency_figures, log_figures
from tests.bench.requests import SIZE, Bodies
from tests.bench.setting import without_access_log


@pytest.mark.parametrize("cut", range(1, len(COMPLETION), 37))
def test_a_message_is_whole_only_with_its_last_byte(cut: int) -> None:
    assert message_end(COMPLETION[:cut]) is None
    assert message_end(COMPLETION) == len(COMPLETION)


def test_the_next_message_does_not_count() -> None:
    assert message_end(COMPLETION + COMPLETION[:50]) == len(COMPLETION)


def test_a_chunked_message_ends_with_its_last_chunk() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    assert message_end(head) is None
    assert message_end(head + b"0\r\n\r\n") == len(head) + 5


def test_a_content_length_in_the_body_is_not_taken_for_a_header() -> None:
    message = b"HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n\r\ncontent-length: 9999"
    assert message_end(message + b"x") == len(message)


def parsed(request: bytes) -> dict[str, Any]:
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    found: dict[str, Any] = json.loads(body)
    return found


def test_bodies_have_the_size_that_the_figures_name_and_are_never_alike() -> None:
    bodies = Bodies()
    first, second = bodies.request(), bodies.request()
    assert len(first.partition(b"\r\n\r\n")[2]) == SIZE
    assert first != second
    assert "stream" not in parsed(first)


def test_bodies_share_their_head_alone() -> None:
    bodies = Bodies()
    one, other = parsed(bodies.request())["messages"], parsed(bodies.request())["messages"]
    assert one[0] == other[0]
    assert one[1]["content"][:8] != other[1]["content"][:8]


def test_streaming_bodies_ask_for_as_many_tokens() -> None:
    body = parsed(Bodies(stream_tokens=5).request())
    assert (body["stream"], body["max_tokens"]) == (True, 5)


def test_the_ratio_is_of_medians_so_that_one_disturbed_block_does_not_count() -> None:
    blocks = {
        "extproc": [Block(300, 100, 2000), Block(310, 100, 2000), Block(900, 100, 500)],
        "null": [Block(150, 90, 4000), Block(155, 90, 4000), Block(160, 90, 4000)],
    }
    figures = cpu_figures(blocks)
    assert figures["cpu_ratio_null"]["4KB"] == 2.0
    assert figures["cpu_us_range"]["extproc"] == [300, 900]


def test_added_latency_is_the_difference_of_neighbours() -> None:
    def block(extproc: float, none: float) -> dict[str, dict[str, Any]]:
        paths = {"extproc": extproc, "none": none, "null": none}
        return {path: {"p50_ms": value, "p90_ms": value, "p99_ms": value} for path, value in paths.items()}

    # The machine got slower in the second block, for both sides.
    figures = latency_figures([block(1.5, 0.5), block(11.5, 10.5), block(1.5, 0.5)])
    assert figures["added_p50_ms"] == 1.0
    assert figures["added_ms_null"]["p99"] == 0.0


def test_the_cost_of_an_entry_is_what_is_above_the_streams_without() -> None:
    figures = log_figures([(Logged(0.5, 1400), Logged(0.3, 200)), (Logged(0.5, 1400), Logged(0.4, 200))])
    assert figures["accesslog_cpu_us_per_entry"] == pytest.approx(0.3 / 2400 * 1e6)


def test_no_entries_give_no_cost() -> None:
    assert log_figures([(Logged(0.5, 200), Logged(0.3, 200))])["accesslog_cpu_us_per_entry"] is None


def test_the_null_bootstrap_differs_in_the_access_log_alone() -> None:
    rendered = bootstrap.render(parse("pools: [{replicas: ['127.0.0.1:9']}]", base=Path("/x")))
    less = without_access_log(rendered)
    assert "http_grpc" in json.dumps(rendered)
    assert "http_grpc" not in json.dumps(less)
    assert less["static_resources"]["clusters"] == rendered["static_resources"]["clusters"]
    with pytest.raises(ValueError, match="no gRPC access log"):
        without_access_log(less)
