from __future__ import annotations

import pytest

from extproc.sim.vllm_replies import Answer, Chat, Completion, Reporting
from tests.sim import recorded


@pytest.mark.parametrize("api", [Chat, Completion])
def test_tokens_written_late_are_chunks_as_if_written_in_time(api: type[Chat] | type[Completion]) -> None:
    answer = Answer(0, prompt_tokens=5, text=b" abc def ghi", finish_reason="stop", emitted=3)  # all out already
    reply = api("id", 1, "m", [answer], 1, Reporting(in_stream=True, continuous=True))
    chunks = recorded.chunks(b"".join(reply.piece(answer, i) for i in range(3)).decode())
    chunks = [c for c in chunks if c["usage"]["completion_tokens"]]  # without the role
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3]
