"""Response bodies and stream chunks as vLLM 0.32 writes them.

A chunk is cut from bytes made once for each sequence: at thousands of tokens a second, JSON for each would cost more
than the simulated engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

import orjson

from extproc.openai.simulated_prompt import TOKEN_BYTES

FINGERPRINT: Final = "vllm-0.32.0-a47651d5"
DONE: Final = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Answer:
    """One sequence: what it will say, and how far it is."""

    index: int
    prompt_tokens: int
    text: bytes
    finish_reason: str
    emitted: int = 0
    cached_tokens: int = 0

    def token(self, position: int) -> bytes:
        return self.text[position * TOKEN_BYTES : (position + 1) * TOKEN_BYTES]


@dataclass(frozen=True, slots=True)
class Reporting:
    """Which usage goes into a response."""

    usage: bool = True
    """False: none at all, as of an engine that does not tell."""
    cached_tokens: bool = True
    """`--enable-prompt-tokens-details`."""
    in_stream: bool = False
    """A usage chunk at the end of the stream."""
    continuous: bool = False
    """Usage in each chunk, too."""


class Reply(Protocol):
    """One HTTP response of some API."""

    def opening(self) -> bytes:
        """What a stream sends before there is any token."""

    def piece(self, answer: Answer, position: int) -> bytes:
        """What a stream sends for the token at `position` of an answer."""

    def closing(self) -> bytes:
        """The end of a stream."""

    def whole(self) -> bytes:
        """The body when it is not streamed."""


def usage(answers: Sequence[Answer], samples: int, details: bool, streamed: bool) -> dict[str, Any]:
    """Token counts; each prompt counts once, however many samples it has."""
    prompt, completion = sum(a.prompt_tokens for a in answers[::samples]), sum(a.emitted for a in answers)
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
    }
    cached = sum(a.cached_tokens for a in answers[::samples])
    if streamed:  # a stream leaves null fields out
        return counts | ({"prompt_tokens_details": {"cached_tokens": cached}} if details else {})
    full = {"cached_tokens": cached, "created_cache_tokens": None, "multimodal_tokens": None}
    return counts | {"prompt_tokens_details": full if details else None, "completion_tokens_details": None}


class _Choices:
    """What the chat and the completions API have in common: chunks of choices, usage, [DONE]."""

    chunk_object: ClassVar[str]
    before_text: ClassVar[bytes]
    after_text: ClassVar[bytes]
    """With %s for the finish reason."""

    def __init__(
        self, id_: str, created: int, model: str, answers: Sequence[Answer], samples: int, report: Reporting
    ) -> None:
        self.id, self.created, self.model = id_, created, model
        self.answers, self.samples, self.report = answers, samples, report
        opened = orjson.dumps(self._envelope(self.chunk_object))[:-1]
        self._heads = [b'data: %s,"choices":[{"index":%d,' % (opened, a.index) for a in answers]
        self._left = len(answers)

    def _envelope(self, object_: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_, "created": self.created, "model": self.model}

    def opening(self) -> bytes:
        return b""

    def piece(self, answer: Answer, position: int) -> bytes:
        answer.emitted = position + 1  # several tokens may have come out before the first of them is written
        last = answer.emitted * TOKEN_BYTES == len(answer.text)
        after = self.after_text % (b'"%s","stop_reason":null' % answer.finish_reason.encode()) if last else self._after
        text = self._heads[answer.index] + self.before_text + answer.token(position) + after
        return text + self._tail(answer, last)

    @property
    def _after(self) -> bytes:
        raise NotImplementedError

    def _tail(self, answer: Answer, last: bool) -> bytes:
        """The end of a chunk after its choices."""
        self._left -= last
        report = self.report
        if report.usage and report.continuous:
            return b',"usage":%s}\n\n' % orjson.dumps(usage([answer], 1, report.cached_tokens, streamed=True))
        if last and not self._left and not (report.usage and report.in_stream):
            return b',"system_fingerprint":"%s"}\n\n' % FINGERPRINT.encode()
        return b"}\n\n"

    def closing(self) -> bytes:
        report = self.report
        if not (report.usage and report.in_stream):
            return DONE
        counts = usage(self.answers, self.samples, report.cached_tokens, streamed=True)
        chunk = self._envelope(self.chunk_object) | {"choices": [], "usage": counts, "system_fingerprint": FINGERPRINT}
        return b"data: %s\n\n%s" % (orjson.dumps(chunk), DONE)

    def _usage(self) -> dict[str, Any] | None:
        return (
            usage(self.answers, self.samples, self.report.cached_tokens, streamed=False) if self.report.usage else None
        )


class Chat(_Choices):
    """`/v1/chat/completions`."""

    chunk_object = "chat.completion.chunk"
    before_text = b'"delta":{"content":"'
    after_text = b'"},"logprobs":null,"finish_reason":%s,"token_ids":null}]'
    _after = after_text % b"null"

    def piece(self, answer: Answer, position: int) -> bytes:
        chunk = super().piece(answer, position)
        return self._role(answer) + chunk if position == 0 else chunk

    def _role(self, answer: Answer) -> bytes:
        """The first chunk of an answer has no text; it comes together with the first token, not before."""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        report, counts = self.report, b""
        if report.usage and report.continuous:
            nothing = Answer(answer.index, answer.prompt_tokens, b"", "", cached_tokens=answer.cached_tokens)
            counts = b',"usage":' + orjson.dumps(usage([nothing], 1, report.cached_tokens, streamed=True))
        return self._heads[answer.index] + delta + counts + b',"prompt_token_ids":null,"prompt_text":null}\n\n'

    def whole(self) -> bytes:
        body = self._envelope("chat.completion") | {
            "choices": [_chat_choice(a) for a in self.answers],
            "service_tier": None, "system_fingerprint": FINGERPRINT, "usage": self._usage(),
            "prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None,
            "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip
        return orjson.dumps(body)


def _chat_choice(answer: Answer) -> dict[str, Any]:
    nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
    return {
        "index": answer.index,
        "message": {"role": "assistant", "content": answer.text.decode(), **nothing},
        "logprobs": None, "finish_reason": answer.finish_reason, "stop_reason": None, "token_ids": None, "routed_experts": None,
    }  # fmt: skip


class Completion(_Choices):
    """`/v1/completions`."""

    chunk_object = "text_completion"
    before_text = b'"text":"'
    after_text = b'","logprobs":null,"finish_reason":%s,"prompt_token_ids":null,"token_ids":null}]'
    _after = after_text % b'null,"stop_reason":null'

    def whole(self) -> bytes:
        body = self._envelope("text_completion") | {
            "choices": [_completion_choice(a) for a in self.answers],
            "service_tier": None, "system_fingerprint": FINGERPRINT, "usage": self._usage(),
            "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip
        return orjson.dumps(body)


def _completion_choice(answer: Answer) -> dict[str, Any]:
    return {
        "index": answer.index, "text": answer.text.decode(),
        "logprobs": None, "finish_reason": answer.finish_reason, "stop_reason": None, "token_ids": None,
        "prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None,
    }  # fmt: skip


class Responses:
    """`/v1/responses`: the events and fields that clients read. Its stream opens before the first token is there."""

    def __init__(self, id_: str, created: int, model: str, answers: Sequence[Answer], report: Reporting) -> None:
        self.id, self.created, self.model, self.report = id_, created, model, report
        self.answer = answers[0]
        self._item = f"msg_{id_.removeprefix('resp_')}"
        self._events = 0

    def _response(
        self, status: str, output: Sequence[Mapping[str, Any]], counts: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": self.model,
            "error": None, "incomplete_details": None, "instructions": None, "metadata": None, "output": output,
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": counts,
        }  # fmt: skip

    def _message(self, status: str, content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.answer.text.decode(), "annotations": [], "logprobs": None}

    def _usage(self) -> dict[str, Any] | None:
        if not self.report.usage:
            return None
        a = self.answer
        return {
            "input_tokens": a.prompt_tokens,
            "input_tokens_details": {"cached_tokens": a.cached_tokens if self.report.cached_tokens else 0},
            "output_tokens": a.emitted,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": a.prompt_tokens + a.emitted,
        }

    def _complete(self) -> dict[str, Any]:
        return self._response("completed", [self._message("completed", [self._part()])], self._usage())

    def _event(self, type_: str, **fields: Any) -> bytes:
        payload = {"type": f"response.{type_}", "sequence_number": self._events, **fields}
        self._events += 1
        return b"event: response.%s\ndata: %s\n\n" % (type_.encode(), orjson.dumps(payload))

    def opening(self) -> bytes:
        begun = self._response("in_progress", [], None)
        return self._event("created", response=begun) + self._event("in_progress", response=begun)

    def piece(self, answer: Answer, position: int) -> bytes:
        at = {"item_id": self._item, "output_index": 0, "content_index": 0}
        before = b""
        if position == 0:
            before = self._event("output_item.added", output_index=0, item=self._message("in_progress", []))
            before += self._event("content_part.added", **at, part=self._part() | {"text": ""})
        return before + self._event("output_text.delta", **at, delta=answer.token(position).decode(), logprobs=[])

    def closing(self) -> bytes:
        at = {"item_id": self._item, "output_index": 0, "content_index": 0}
        item = self._message("completed", [self._part()])
        return (
            self._event("output_text.done", **at, text=self.answer.text.decode(), logprobs=[])
            + self._event("content_part.done", **at, part=self._part())
            + self._event("output_item.done", output_index=0, item=item)
            + self._event("completed", response=self._complete())
        )

    def whole(self) -> bytes:
        return orjson.dumps(self._complete())


EMBEDDING: Final = (0.25, -0.5, 0.125, 0.0, 0.5, -0.25, 0.75, -0.125)


def embeddings(id_: str, created: int, model: str, answers: Sequence[Answer]) -> bytes:
    """The body of `/v1/embeddings`; every text has the same vector."""
    data = [{"index": a.index, "object": "embedding", "embedding": EMBEDDING} for a in answers]
    prompt = sum(a.prompt_tokens for a in answers)
    counts = {"prompt_tokens": prompt, "total_tokens": prompt, "completion_tokens": 0, "prompt_tokens_details": None}
    body = {"id": id_, "object": "list", "created": created, "model": model, "data": data, "usage": counts}
    return orjson.dumps(body)


def models(base: str, adapters: Sequence[str], max_model_len: int, created: int) -> bytes:
    """The body of `/v1/models`."""
    cards = [
        _card(base, base, None, max_model_len, created),
        *(_card(a, f"./{a}", base, None, created) for a in adapters),
    ]
    return orjson.dumps({"object": "list", "data": cards})


def _card(name: str, root: str, parent: str | None, max_model_len: int | None, created: int) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{name}", "object": "model_permission", "created": created,
        "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False,
        "allow_view": True, "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
    }  # fmt: skip
    return {
        "id": name, "object": "model", "created": created, "owned_by": "vllm", "root": root, "parent": parent,
        "max_model_len": max_model_len, "permission": [permission],
    }  # fmt: skip
