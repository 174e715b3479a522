"""Folders of models: what is read of them, and what is said where it cannot be."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from extproc.adapters.tokenizing.folder import Model, load
from extproc.config import ConfigError, TokenizerConfig
from extproc.openai.chat_template import ChatTemplate
from tests.adapters.tokenizing.models import TEMPLATE, folder


def loaded(path: Path, **settings: Any) -> Model:
    return load(TokenizerConfig(path=path, **settings), datetime.now)


def source(model: Model, tools: bool = False) -> str | None:
    found: ChatTemplate | None = model.templates.of(tools)
    return found.source if found is not None else None


def test_tokens_around_a_text_are_found(tmp_path: Path) -> None:
    path = folder(tmp_path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("<|end|>")
    model = loaded(path)
    assert (model.before, model.after) == ((start,), ())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", start), ("<|end|>", end)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    model = loaded(path)
    assert (model.before, model.after) == ((start,), (end,))


def test_a_tokenizer_that_truncates_and_pads_does_so_no_more(tmp_path: Path) -> None:
    path = folder(tmp_path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path / "tokenizer.json"))
    assert len(loaded(path).pieces.ids("x" * 20)) not in (3, 50)


def test_special_tokens_have_names(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "eos_token": {"content": "<|end|>", "lstrip": False},
        "pad_token": None,
        "model_max_length": 5,
    }
    path = folder(tmp_path, **more)
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<other>", "unk_token": "<u>"}))
    named = {"bos_token": "<other>", "eos_token": "<|end|>", "unk_token": "<u>"}
    assert loaded(path).templates.special_tokens == named
    folder(tmp_path, **more, added_tokens_decoder={})  # as it has been for years; then that one has the last word
    assert loaded(path).templates.special_tokens == {"bos_token": "<s>", "eos_token": "<|end|>"}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"eos_token": "<|stop|>"}, {"eos_token": "<|stop|>"}),
        ({"eos_token": {"content": "<|stop|>", "lstrip": False}}, {"eos_token": "<|stop|>"}),
        ({"additional_special_tokens": ["<|stop|>"]}, {}),
        ({"extra_special_tokens": [{"content": "<|stop|>"}]}, {}),
        ({"extra_special_tokens": {"image_token": "<|stop|>"}}, {"image_token": "<|stop|>"}),
    ],
)
def test_special_tokens_are_tokens_although_the_tokenizer_has_none(
    tmp_path: Path, config: dict[str, Any], named: dict[str, str]
) -> None:
    plain = loaded(folder(tmp_path / "plain"))
    model = loaded(folder(tmp_path / "more", **config))
    assert len(model.pieces.ids("<|stop|>")) == 1 < len(plain.pieces.ids("<|stop|>"))
    assert list(model.pieces.cut("a<|stop|>b")) == ["a", "<|stop|>b"]
    assert model.templates.special_tokens == {"bos_token": "<s>", **named}


def test_special_tokens_get_their_ids_in_the_order_of_transformers(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "pad_token": "<p>",
        "extra_special_tokens": ["<x>"],
        "unk_token": "<u>",
        "eos_token": "<e>",
    }
    model = loaded(folder(tmp_path, **config))
    first = len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab())
    assert [list(model.pieces.ids(token)) for token in ("<e>", "<u>", "<p>", "<x>")] == [[first + i] for i in range(4)]


def test_special_tokens_in_a_text_may_be_text(tmp_path: Path) -> None:
    model = loaded(folder(tmp_path, split_special_tokens=True))
    assert list(model.pieces.cut("a<|start|>b")) == ["a<|start|>b"]
    assert len(model.pieces.ids("<|start|>")) > 1


def test_tokens_that_only_the_configuration_has(tmp_path: Path) -> None:
    added = {"content": "<|tool|>", "special": True, "normalized": False, "lstrip": False}
    path = folder(tmp_path, added_tokens_decoder={"9000": added})
    assert list(loaded(path).pieces.cut("a<|tool|>b")) == ["a", "<|tool|>b"]
    assert len(loaded(path).pieces.ids("<|tool|>")) == 1


def test_where_templates_come_from(tmp_path: Path) -> None:
    path = folder(tmp_path)
    assert source(loaded(path)) is None
    folder(tmp_path, chat_template="in the configuration")
    assert source(loaded(path)) == "in the configuration"
    assert source(loaded(path), tools=True) == "in the configuration"
    folder(
        tmp_path, chat_template=[{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    )
    assert (source(loaded(path)), source(loaded(path), tools=True)) == ("plain", "tools")
    (path / "chat_template.jinja").write_text("in a file")
    assert (source(loaded(path)), source(loaded(path), tools=True)) == ("in a file", "in a file")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools in a file")
    assert (source(loaded(path)), source(loaded(path), tools=True)) == ("in a file", "tools in a file")
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert (source(loaded(path)), source(loaded(path), tools=True)) == ("of the processor", "tools in a file")
    given = tmp_path / "given.jinja"
    given.write_text("given")
    model = loaded(path, chat_template=given)
    assert (source(model), source(model, tools=True)) == ("given", "given")


def test_models_whose_prompts_are_made_by_code(tmp_path: Path) -> None:
    path = folder(tmp_path, chat_template=TEMPLATE)
    (path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    assert source(loaded(path)) is None


def test_settings_of_the_engine_are_handed_on(tmp_path: Path) -> None:
    model = loaded(folder(tmp_path), template_values={"tone": "kind"}, content_format="openai")
    assert model.templates.values == {"tone": "kind"}
    assert model.templates.content_format == "openai"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "does not exist; tokenizer.path is the folder of a model, with tokenizer.json in it"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read: "),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read: Expecting"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "tokenizer_config.json is not what transf"),
        ("tokenizer_config.json", '{"extra_special_tokens": [3]}', "tokenizer_config.json is not what transformers"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 3}]}', "tokenizer_config.json is not what transformers"),
        ("chat_template.jinja", "{% for %}", "chat_template.jinja: the chat template cannot be read: "),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = folder(tmp_path)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_text(content)
    with pytest.raises(ConfigError) as e:
        loaded(path)
    assert message in str(e.value)
    assert str(path) in str(e.value)


def test_a_template_that_was_named_and_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.jinja cannot be read"):
        loaded(folder(tmp_path), chat_template=tmp_path / "missing.jinja")
