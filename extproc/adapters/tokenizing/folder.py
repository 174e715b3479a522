"""A model's folder: its tokenizer, its chat templates and its special tokens, as transformers reads them.

tokenizer.json                      required
tokenizer_config.json               special tokens; chat templates of older models
chat_template.jinja                 goes before those
additional_chat_templates/*.jinja   further ones by name; `tool_use` is for requests with tools
chat_template.json                  of a multimodal model: goes before all for requests without tools
config.json                         tells models whose prompts engines make by code of their own
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer

from extproc.adapters.tokenizing.pieces import Ids, Pieces
from extproc.config import ConfigError, TokenizerConfig
from extproc.openai.chat_template import ChatTemplate, ContentFormat
from extproc.openai.engine_prompt import Templates

BY_CODE: Final = frozenset(
    {"gpt_oss", "deepseek_v32", "deepseek_v4", "kimi_k3", "kimi_audio", "inkling", "cohere2_moe"}
)
"""Model types whose chats vLLM 0.32 does not render by a template, or not by it alone."""
PROBE: Final = "a"


@dataclass(frozen=True, slots=True)
class Model:
    """What is needed to tokenize for one model."""

    pieces: Pieces
    before: tuple[int, ...]
    """Ids that begin a prompt where special tokens are added, and"""
    after: tuple[int, ...]
    """those that end it."""
    templates: Templates


def load(settings: TokenizerConfig, now: Callable[[], datetime]) -> Model:
    """Read the folder. Raises ConfigError with the file and the remedy."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text, one thread: how many there are is configured
    path = settings.path
    assert path is not None
    tokenizer = _tokenizer(path / "tokenizer.json")
    config = _config(path)
    try:
        _add_tokens(tokenizer, config)
        special = _special_tokens(tokenizer, config)
        choice = _choice(settings, config, now)
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise ConfigError(f"{path}: tokenizer_config.json is not what transformers write: {e!r}") from None
    tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
    before, after = _around(tokenizer)
    templates = Templates(
        choice,
        special,
        settings.template_values,
        None if settings.content_format == "auto" else ContentFormat(settings.content_format),
    )
    return Model(Pieces(tokenizer, settings.cache_bytes), before, after, templates)


def _tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise ConfigError(f"{path} does not exist; tokenizer.path is the folder of a model, with tokenizer.json in it")
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises nothing more special
        raise ConfigError(f"{path} cannot be read: {e}") from None
    found.no_truncation()
    found.no_padding()
    return found


def _config(path: Path) -> dict[str, Any]:
    """What the tokenizer is told beside its own file. A file of older models speaks where that one has no tokens."""
    config = _json(path / "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else config | _json(path / "special_tokens_map.json")


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Those that only the configuration has, or has otherwise."""
    known = {index: _flags(each) for index, each in tokenizer.get_added_tokens_decoder().items()}
    listed = config.get("added_tokens_decoder") or {}
    for index, each in sorted((int(key), value) for key, value in listed.items()):
        token = _token(each)
        if known.get(index) != _flags(token):
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _special_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like by name. Those, and further ones without a name, become tokens where they are none yet."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    named = {**config, **extra} if isinstance(extra, dict) else config
    tokens = {key: _token(value) for key, value in named.items() if key.endswith("_token") and _is_token(value)}
    known = {each.content for each in tokenizer.get_added_tokens_decoder().values()}
    in_order = [*(tokens[key] for key in _NAMED if key in tokens), *tokens.values()]
    for token in [*in_order, *(map(_token, extra) if not isinstance(extra, dict) else ())]:
        if token.content not in known:
            token.special = True
            tokenizer.add_special_tokens([token])
            known.add(token.content)
    return {key: token.content for key, token in tokens.items()}


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _token(value: str | Mapping[str, Any]) -> AddedToken:
    """Written as its text, or with its flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    return AddedToken(**{key: value[key] for key in ("content", *_FLAGS) if key in value})


_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""In the order in which they get their ids."""
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _flags(token: AddedToken) -> tuple[object, ...]:
    return (token.content, *(getattr(token, flag) for flag in _FLAGS))


def _around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is put before and after a text."""
    bare = tokenizer.encode(PROBE, add_special_tokens=False).ids
    whole = tokenizer.encode(PROBE, add_special_tokens=True).ids
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    at = next(starts, 0)
    return tuple(whole[:at]), tuple(whole[at + len(bare) :])


# --- chat templates ---------------------------------------------------------------------------------------------------


def _choice(
    settings: TokenizerConfig, config: Mapping[str, Any], now: Callable[[], datetime]
) -> Callable[[bool], ChatTemplate | None]:
    """Which template is for a request, with or without tools."""
    path = settings.path
    assert path is not None
    if _json(path / "config.json").get("model_type") in BY_CODE:
        return lambda _tools: None
    if settings.chat_template is not None:
        given = _compiled(settings.chat_template, _text(settings.chat_template), now)
        return lambda _tools: given
    by_name = {name: _compiled(file, source, now) for name, (file, source) in _sources(path, config).items()}
    default = by_name.get("default")
    plain = _json(path / "chat_template.json").get("chat_template")
    without = _compiled(path / "chat_template.json", plain, now) if isinstance(plain, str) else default
    with_tools = by_name.get("tool_use", default)
    return lambda tools: with_tools if tools else without


def _sources(path: Path, config: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    """Templates by name, each with its file."""
    main = path / "chat_template.jinja"
    files = {each.stem: each for each in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if main.exists():
        files["default"] = main
    if files:
        return {name: (file, _text(file)) for name, file in files.items()}
    listed, file = config.get("chat_template"), path / "tokenizer_config.json"
    if isinstance(listed, str):
        return {"default": (file, listed)}
    return {each["name"]: (file, each["template"]) for each in listed or ()}


def _compiled(path: Path, source: str, now: Callable[[], datetime]) -> ChatTemplate:
    try:
        found = ChatTemplate(source, now)
        _ = found.content_format  # found out now, and not with the first request
    except TemplateError as e:
        raise ConfigError(f"{path}: the chat template cannot be read: {e}") from None
    return found


def put_together(model: Model, ids: Ids, special: bool) -> Ids:
    """With what is put around a text, if wanted."""
    if not special or not (model.before or model.after):
        return ids
    whole = type(ids)(ids.typecode, model.before)
    whole.extend(ids)
    whole.extend(type(ids)(ids.typecode, model.after))
    return whole
