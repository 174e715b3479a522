"""One request body to the prompt as the engine will have it: what a thread does."""

from __future__ import annotations

import json
from array import array
from typing import Any, Final

from extproc.adapters.tokenizing.folder import Model, put_together
from extproc.adapters.tokenizing.pieces import Ids
from extproc.core.prefix.exact import UNIT, token_chain
from extproc.core.types import Api, TokenBlocks
from extproc.openai import engine_prompt, simulated_prompt
from extproc.openai.engine_prompt import Cut, Text
from extproc.openai.tokens import MAX_TEXT, CannotTokenize, Question, Tokenized, Untokenized

MAX_BODY_BYTES: Final = 8 << 20
"""Larger bodies are not parsed beside the event loop, which would stand still meanwhile. A million tokens take 4 MB."""


def tokenized(model: Model | None, question: Question, body: bytes, unit: int = UNIT) -> Tokenized:
    """The prompt of a body, in blocks of `unit` tokens; without a model, as simulated replicas have it. Raises CannotTokenize."""
    if question.api not in (Api.CHAT, Api.COMPLETIONS):
        raise CannotTokenize(Untokenized.API)
    if len(body) > MAX_BODY_BYTES:
        raise CannotTokenize(Untokenized.LARGE)
    data = _loaded(body)
    ids = _simulated(question.api, data) if model is None else _ids(model, question.api, data)
    if model is not None and engine_prompt.reads_no_cache(data):
        return Tokenized(TokenBlocks(unit), len(ids))
    salt = question.salt or data.get("cache_salt")
    blocks = token_chain(ids, unit, question.lora, salt if isinstance(salt, str) else None)
    return Tokenized(blocks, len(ids))


def _loaded(body: bytes) -> dict[str, Any]:
    """By the standard library, as vLLM does it: whole numbers beyond 64 bits stay what they are."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise CannotTokenize(Untokenized.REFUSED) from None
    if not isinstance(data, dict):
        raise CannotTokenize(Untokenized.REFUSED)
    return data


def _simulated(api: Api, data: dict[str, Any]) -> list[int]:
    """They have media too, and cut nothing off."""
    if api is Api.CHAT:
        messages = data.get("messages")
        if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
            raise CannotTokenize(Untokenized.REFUSED)
        return simulated_prompt.token_ids(simulated_prompt.chat_prompt(messages, data.get("tools")))
    prompt = engine_prompt.of_completion(data)
    if isinstance(prompt, Text):
        return simulated_prompt.token_ids(simulated_prompt.tokenized([prompt.text]))
    return simulated_prompt.token_ids(simulated_prompt.from_token_ids(prompt.ids))


def _ids(model: Model, api: Api, data: dict[str, Any]) -> Ids:
    if api is Api.CHAT:
        prompt: Text | engine_prompt.Ids = engine_prompt.of_chat(data, model.templates)
    else:
        prompt = engine_prompt.of_completion(data)
    if isinstance(prompt, Text):
        return _of_text(model, prompt)
    try:
        ids = array("I", prompt.ids)
    except OverflowError:
        raise CannotTokenize(Untokenized.REFUSED) from None
    return ids if prompt.cut is None else _cut(ids, prompt.cut)


def _of_text(model: Model, prompt: Text) -> Ids:
    if len(prompt.text) > MAX_TEXT:
        raise CannotTokenize(Untokenized.LARGE)
    try:
        ids = model.pieces.ids(prompt.text)
    except UnicodeEncodeError:  # half a surrogate pair
        raise CannotTokenize(Untokenized.REFUSED) from None
    except OverflowError:
        raise CannotTokenize(Untokenized.LARGE) from None
    cut = prompt.cut
    if cut is None:
        return put_together(model, ids, prompt.special)
    if cut.side is not None:
        return _cut(put_together(model, ids, prompt.special), cut)
    room = cut.tokens - (len(model.before) + len(model.after) if prompt.special else 0)
    if room < 1:
        raise CannotTokenize(Untokenized.FIELD)
    return put_together(model, _cut(ids, Cut(room)), prompt.special)


def _cut(ids: Ids, cut: Cut) -> Ids:
    """The end of it, unless told otherwise: vLLM has its tokenizers cut off the beginning."""
    if cut.tokens >= len(ids):
        return ids
    return ids[: cut.tokens] if cut.side == "right" else ids[-cut.tokens :]
