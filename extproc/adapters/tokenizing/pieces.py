"""Text to token ids, piece by piece, so that what was tokenized once is looked up.

A `tokenizers` library tokenizer first cuts a text at its added tokens (`<|im_start|>` and the like), as they stand in the raw text, and
does everything else to each part alone. So a text may be cut before such a token, tokenized in pieces and put together again, with the
same result, provided three things.

1. The token is looked for in the raw text: `normalized` is false.
2. It takes no white space from before it: `lstrip` is false.
3. It is found where the tokenizer would find it: of all added tokens the leftmost counts, of several there the longest. Tokens that
   only count as whole words (`single_word`) are looked at in context; a tokenizer that has one is not cut at all.

Metaspace with `prepend_scheme: first` asks whether a part begins the text: the first piece still does, and no other does, as the others
begin with a token. A conversation is cut at every turn, so it pays for the new one alone; a text without such tokens is one piece.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final, TypeAlias

from tokenizers import Tokenizer

MAX_CUTS: Final = 16_384
"""Of one text; what follows is one piece."""
MAX_PIECE: Final = 1 << 20
"""Bytes of UTF-8 of one piece, a quarter of a million tokens of English, and of those that are tokenized at once: the library takes up
150 to 300 bytes a token meanwhile, 180 MB at most."""
PIECE_BYTES: Final = 200
"""What keeping a piece takes beside its text and its ids."""
CHARACTER_BYTES: Final = 4
"""At most: Python's strings take 1, 2 or 4."""
Ids: TypeAlias = "array[int]"
_CODE: Final = "I"


class PieceCache:
    """Pieces of text and their ids; the least recently used go first. For several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._ids: OrderedDict[str, Ids] = OrderedDict()
        self.bytes = 0
        """Taken up."""
        self.found_characters = 0
        """Of pieces that were found, since the start, and"""
        self.made_characters = 0
        """of those that were not."""

    def __repr__(self) -> str:
        return f"<piece cache: {len(self._ids)} pieces, {self.bytes} B>"

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, pieces: Sequence[str]) -> list[Ids | None]:
        """The ids of each piece; None for those that are not kept."""
        with self._lock:
            found = [self._ids.get(piece) for piece in pieces]
            for piece, ids in zip(pieces, found, strict=True):
                if ids is None:
                    self.made_characters += len(piece)
                else:
                    self.found_characters += len(piece)
                    self._ids.move_to_end(piece)
        return found

    def keep(self, pieces: Sequence[str], ids: Sequence[Ids]) -> None:
        """Keep these; nothing that would take up more than an eighth of the room."""
        with self._lock:
            for piece, each in zip(pieces, ids, strict=True):
                size = _size(piece, each)
                if piece not in self._ids and size <= self._max_bytes // 8:
                    self._ids[piece] = each
                    self.bytes += size
            while self.bytes > self._max_bytes:
                piece, each = self._ids.popitem(last=False)
                self.bytes -= _size(piece, each)


def _size(piece: str, ids: Ids) -> int:
    return CHARACTER_BYTES * len(piece) + len(ids) * ids.itemsize + PIECE_BYTES


class Pieces:
    """A tokenizer that does no piece twice. For several threads."""

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int) -> None:
        """`cache_bytes` 0: keep nothing. The tokenizer must neither truncate nor pad."""
        self._tokenizer = tokenizer
        self._marks, self._cuttable = _marks(tokenizer)
        self.cache = PieceCache(cache_bytes) if cache_bytes else None

    def __repr__(self) -> str:
        return f"<tokenizer cut at {len(self._cuttable)} tokens, {self.cache!r}>"

    def ids(self, text: str) -> Ids:
        """Token ids of the text, without what is put around it.

        Raises UnicodeEncodeError for half a surrogate pair, OverflowError where a piece is too large.
        """
        pieces = list(self.cut(text))
        known = self.cache.find(pieces) if self.cache is not None else [None] * len(pieces)
        missing = list(dict.fromkeys(piece for piece, ids in zip(pieces, known, strict=True) if ids is None))
        new = dict(zip(missing, self._encoded(missing), strict=True))
        if new and self.cache is not None:
            self.cache.keep(list(new), list(new.values()))
        whole = array(_CODE)
        for piece, ids in zip(pieces, known, strict=True):
            whole.extend(new[piece] if ids is None else ids)
        return whole

    def cut(self, text: str) -> Iterator[str]:
        """The text in pieces that are tokenized alone; none is empty."""
        if self._marks is None:
            places: Iterator[int] = iter(())
        else:
            found = self._marks.finditer(text)
            places = (match.start() for match in found if match.group() in self._cuttable)
        start = 0
        for place in islice(places, MAX_CUTS):
            if place > start:
                yield text[start:place]
                start = place
        if start < len(text):
            yield text[start:]

    def _encoded(self, pieces: Sequence[str]) -> Iterator[Ids]:
        """In batches even if it is one piece: only this lets other threads run meanwhile."""
        for batch in _batches(pieces):
            found: Sequence[Any] = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            yield from (array(_CODE, each.ids) for each in found)


def _batches(pieces: Sequence[str]) -> Iterator[list[str]]:
    """Of `MAX_PIECE` at most. Raises OverflowError where one piece is larger, UnicodeEncodeError for half a surrogate pair."""
    batch: list[str] = []
    room = MAX_PIECE
    for piece in pieces:
        size = len(piece.encode())
        if size > MAX_PIECE:
            raise OverflowError(f"a piece of {size} bytes")
        if size > room:
            yield batch
            batch, room = [], MAX_PIECE
        batch.append(piece)
        room -= size
    if batch:
        yield batch


def _marks(tokenizer: Tokenizer) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """What finds the added tokens in raw text, and those before which it may be cut."""
    tokens = [each for each in tokenizer.get_added_tokens_decoder().values() if each.content]
    looked_for = [each for each in tokens if not (each.special and tokenizer.encode_special_tokens)]
    raw = [each for each in looked_for if not each.normalized]
    cuttable = frozenset(each.content for each in raw if not each.lstrip)
    if not cuttable or any(each.single_word for each in raw):
        return None, frozenset()
    return re.compile(_any_of({each.content for each in raw}), re.DOTALL), cuttable


def _any_of(words: set[str]) -> str:
    """A pattern for the longest of these at a place. As a tree, for a model may have a thousand, which would be tried one by one."""
    heads: dict[str, set[str]] = {}
    for word in sorted(words - {""}):
        heads.setdefault(word[0], set()).add(word[1:])
    branches = []
    for head, tails in heads.items():
        shared = _shared(tails)
        rest = {tail[len(shared) :] for tail in tails}
        after = "" if rest == {""} else _any_of(rest)
        branches.append(re.escape(head + shared) + after)
    pattern = f"(?:{'|'.join(branches)})"
    return f"{pattern}?" if "" in words else pattern


def _shared(words: set[str]) -> str:
    """What all of them begin with."""
    first, last = min(words), max(words)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
