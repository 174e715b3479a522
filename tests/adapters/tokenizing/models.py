"""Small tokenizers of the kinds that models have, and folders as models come in."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and on it goes: 12 345 times!",
    "Hello there, wörld. é 漢字 ▁ <|x",
] * 3
MARKS = ("<|start|>", "<|end|>", "<s>", "<|end|>x")
"""The last begins like another one, and is longer."""


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, normalized=False, **flags)


def _trained(model: Any, trainer: Any, normalizer: Any, pre_tokenizer: Any, added: list[AddedToken]) -> Tokenizer:
    found = Tokenizer(model)
    if normalizer is not None:
        found.normalizer = normalizer
    found.pre_tokenizer = pre_tokenizer
    found.train_from_iterator(CORPUS, trainer)
    found.add_special_tokens(added)
    return found


def _bpe(normalizer: Any, pre_tokenizer: Any, added: list[AddedToken]) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    return _trained(models.BPE(), trainer, normalizer, pre_tokenizer, added)


def _unigram(normalizer: Any, pre_tokenizer: Any, added: list[AddedToken]) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    return _trained(models.Unigram(), trainer, normalizer, pre_tokenizer, added)


def _plain() -> list[AddedToken]:
    return [special(mark) for mark in MARKS]


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: _bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=False), _plain()),
    "byte level with a space in front": lambda: _bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=True), _plain()),
    "llama 3": lambda: _bpe(
        None,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        _plain(),
    ),
    "normalized": lambda: _bpe(normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False), _plain()),
    "metaspace at the beginning": lambda: _unigram(None, pre_tokenizers.Metaspace(prepend_scheme="first"), _plain()),
    "metaspace always": lambda: _unigram(None, pre_tokenizers.Metaspace(prepend_scheme="always"), _plain()),
    "legacy llama": lambda: _unigram(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        pre_tokenizers.Split("▁", "merged_with_next"),
        _plain(),
    ),
    "stripped": lambda: _unigram(normalizers.Strip(), pre_tokenizers.Whitespace(), _plain()),
    "greedy for white space": lambda: _bpe(
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        [special("<|start|>", rstrip=True), special("<|end|>", lstrip=True), special("<s>", lstrip=True, rstrip=True)],
    ),
    "whole words": lambda: _bpe(
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        [special("<|start|>"), special("the", single_word=True), special("<s>")],
    ),
    "words in the vocabulary": lambda: _bpe(
        normalizers.Lowercase(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        [special("<|start|>"), special("<|end|>"), AddedToken("fox<", normalized=True, special=False)],
    ),
}


@cache
def made(kind: str) -> Tokenizer:
    return KINDS[kind]()


def folder(path: Path, tokenizer: Tokenizer | None = None, **config: Any) -> Path:
    """A model's folder: a tokenizer that puts `<s>` in front, and this `tokenizer_config.json`."""
    found = Tokenizer.from_str((tokenizer or made("byte level")).to_str())
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", found.token_to_id("<s>"))]
    )
    path.mkdir(parents=True, exist_ok=True)
    found.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **config}))
    return path


TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
