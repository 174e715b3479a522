"""Values that nobody changes: frozen for the type checker, plain at run time.

`dataclass(frozen=True)` sets each field through `object.__setattr__`, 70 ns apiece, and one request makes some twenty such
values of 125 fields. mypy refuses every assignment to them, which is what freezing is for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, dataclass_transform

T = TypeVar("T")

if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, field_specifiers=(field,))
    def record(cls: type[T]) -> type[T]:
        """Class decorator: a slotted dataclass with equality, hash and no changes."""
        return cls

else:

    def record(cls):
        """Class decorator: a slotted dataclass with equality and hash."""
        return dataclass(slots=True, unsafe_hash=True)(cls)
