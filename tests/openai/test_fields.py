"""Leniency: whatever pydantic's lax mode takes, which vLLM uses, is taken here with the same value."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from extproc.openai import fields
from extproc.openai.fields import MAX_INT, Invalid

INTEGER: TypeAdapter[int | None] = TypeAdapter(int | None)
BOOLEAN: TypeAdapter[bool | None] = TypeAdapter(bool | None)

numerals = st.from_regex(r"\A[ +-]?[0-9_]{0,4}(\.[0-9]{0,2})?[ ]?\Z")
words = st.sampled_from(["true", "False", "ON", "off", "t", "F", "yes", "n", "1", "0", "2", " true", "maybe", ""])
values = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63) + 1, MAX_INT), st.floats(-1e6, 1e6), numerals, words, st.text(),
    st.just([]), st.just({}),
)  # fmt: skip


def verdict(read: Any, *arguments: Any) -> Any:
    """What a reader returns, or `Invalid`."""
    try:
        return read(*arguments)
    except (Invalid, ValidationError):
        return Invalid


@given(values)
@example("5.0")
@example("5.")
@example("1_000")
@example(" +7 ")
@example(3.0)
def test_integers_are_read_as_pydantic_reads_them(value: Any) -> None:
    if (theirs := verdict(INTEGER.validate_python, value)) is not Invalid:
        assert verdict(fields.integer, {"k": value}, "k") == theirs


@given(values)
def test_booleans_are_read_as_pydantic_reads_them(value: Any) -> None:
    theirs = verdict(BOOLEAN.validate_python, value)
    assert verdict(fields.boolean, {"k": value}, "k") == (False if theirs is None else theirs)


@pytest.mark.parametrize("value", ["five", "5.5", "", 5.5, float("nan"), float("inf"), [], {}, "0x10"])
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(Invalid):
        fields.integer({"k": value}, "k")


@pytest.mark.parametrize(("value", "read"), [(10**4000, MAX_INT), (-(10**30), -MAX_INT), (1e300, MAX_INT)])
def test_integers_are_clamped_to_64_bits(value: Any, read: int) -> None:
    assert fields.integer({"k": value}, "k") == read


@pytest.mark.parametrize("read", [fields.string, fields.array, fields.mapping, fields.integer])
def test_null_and_absence_are_none(read: Any) -> None:
    assert read({}, "k") is None
    assert read({"k": None}, "k") is None


@given(st.text(min_size=30, alphabet="abc"))
def test_text_of_the_client_is_never_repeated(text: str) -> None:
    for read in (fields.integer, fields.boolean, fields.array, fields.mapping, fields.objects):
        with pytest.raises(Invalid) as caught:
            read({"k": text}, "k")
        assert text not in caught.value.bad.message
