"""A text in pieces has the tokens that it has as a whole, whatever the tokenizer."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.adapters.tokenizing import pieces
from extproc.adapters.tokenizing.pieces import PieceCache, Pieces, _any_of
from tests.adapters.tokenizing.models import KINDS, MARKS, made

ROOM = 1 << 20
snippets = st.one_of(
    st.sampled_from(
        [
            *MARKS,
            "<|",
            "|>",
            "x",
            " ",
            "  ",
            "\n",
            "the",
            " the ",
            "fox<",
            "FOX<s>",
            " fox<|start|>",
            " fox",
            "Hello",
            "▁",
            "12",
            "é",
            "e\u0301",
        ]
    ),
    st.text(max_size=6),
)
texts = st.lists(snippets, max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_have_the_tokens_of_the_whole(kind: str, data: st.DataObject) -> None:
    tokenizer = made(kind)
    cut = Pieces(tokenizer, ROOM)
    for _ in range(3):  # with what is kept of those before
        text = data.draw(texts)
        try:
            whole = tokenizer.encode(text, add_special_tokens=False).ids
        except UnicodeEncodeError:
            with pytest.raises(UnicodeEncodeError):
                cut.ids(text)
            continue
        assert list(cut.ids(text)) == whole
        assert "".join(cut.cut(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut(kind: str) -> None:
    found = list(Pieces(made(kind), ROOM).cut("a<|start|>b<|end|>c"))
    if kind == "whole words":
        assert found == ["a<|start|>b<|end|>c"]
    elif kind == "greedy for white space":
        assert found == ["a", "<|start|>b<|end|>c"]
    else:
        assert found == ["a", "<|start|>b", "<|end|>c"]


def test_the_longest_mark_counts() -> None:
    assert list(Pieces(made("byte level"), ROOM).cut("<|end|>x<|end|><|end|>xx")) == [
        "<|end|>x",
        "<|end|>",
        "<|end|>xx",
    ]


@given(st.sets(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=6), st.text("ab<", max_size=12))
def test_the_pattern_finds_the_longest_of_the_leftmost(words: set[str], text: str) -> None:
    plain = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    assert re.findall(_any_of(words), text) == re.findall(plain, text)


def test_what_was_done_is_not_done_again() -> None:
    cut = Pieces(made("byte level"), ROOM)
    assert cut.cache is not None
    first = "<|start|>Hello<|end|><|start|>there<|end|>"
    cut.ids(first)
    assert (cut.cache.found_characters, cut.cache.made_characters) == (0, len(first))
    cut.ids(first + "<|start|>fox")
    assert (cut.cache.found_characters, cut.cache.made_characters) == (len(first), len(first) + len("<|start|>fox"))


def test_nothing_is_kept_without_room() -> None:
    cut = Pieces(made("byte level"), 0)
    assert cut.cache is None
    assert list(cut.ids("<|start|>Hello")) == made("byte level").encode("<|start|>Hello").ids


def test_too_many_marks_are_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_CUTS", 3)
    text = "<|start|>" * 6
    cut = Pieces(made("byte level"), ROOM)
    assert [len(piece) // len("<|start|>") for piece in cut.cut(text)] == [1, 1, 4]
    assert list(cut.ids(text)) == made("byte level").encode(text).ids


def test_the_cache_stays_within_its_room() -> None:
    cut = Pieces(made("byte level"), 4096)
    assert cut.cache is not None
    for i in range(200):
        cut.ids(f"<|start|>{i}")
        assert cut.cache.bytes <= 4096
    assert 5 < len(cut.cache) < 20
    assert cut.cache.find(["<|start|>199"]) != [None]
    assert cut.cache.find(["<|start|>0"]) == [None]


def test_what_is_used_stays() -> None:
    cut = Pieces(made("byte level"), 4096)
    assert cut.cache is not None
    for i in range(200):
        cut.ids(f"<|start|>every time<|end|>{i}")
    assert cut.cache.found_characters == 199 * len("<|start|>every time")


def test_a_piece_that_would_fill_it_is_not_kept() -> None:
    cut = Pieces(made("byte level"), 4096)
    assert cut.cache is not None
    cut.ids("<|start|>" + "x" * 4096)
    assert len(cut.cache) == 0
    assert repr(cut) == "<tokenizer cut at 4 tokens, <piece cache: 0 pieces, 0 B>>"


def test_an_empty_text_has_no_tokens() -> None:
    assert list(Pieces(made("byte level"), ROOM).ids("")) == []
    assert repr(PieceCache(3)) == "<piece cache: 0 pieces, 0 B>"


def test_batches_and_pieces_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_PIECE", 24)
    text = "".join(f"<|start|>é{i}" for i in range(9))
    for room in (0, ROOM):
        assert list(Pieces(made("byte level"), room).ids(text)) == made("byte level").encode(text).ids
    assert list(pieces._batches(["a" * 20, "b" * 4, "c", "é" * 12])) == [["a" * 20, "b" * 4], ["c"], ["é" * 12]]
    with pytest.raises(OverflowError):
        Pieces(made("byte level"), ROOM).ids("é" * 13)
