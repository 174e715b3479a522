"""What a replica does where prefill and decode are apart, by its labels."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

ROLE: Final = "role"
"""Label of a replica."""
BOOTSTRAP_PORT: Final = "bootstrap_port"
"""Label of a replica of SGLang's that prefills: its `--disaggregation-bootstrap-port`."""


class Role(StrEnum):
    """What a replica does where prefill and decode are apart."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


ROLES: Final[Mapping[str | None, Role]] = {
    None: Role.BOTH,
    **{role.value: role for role in Role},
    "prefill-decode": Role.BOTH,
    "encode-prefill-decode": Role.BOTH,
    "encode-prefill": Role.PREFILL,
}
"""By the label, with llm-d's names for the same."""


def role(labels: Mapping[str, str]) -> Role | None:
    """What a replica with these labels does.

    None for a role that is not known, such as llm-d's `encode`: it gets nothing, for nobody knows what it can do.
    """
    return ROLES.get(labels.get(ROLE))


def bootstrap_port(labels: Mapping[str, str]) -> int | None:
    """The port that the labels name; None where they name none, and for what is none."""
    text = labels.get(BOOTSTRAP_PORT, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 5):
        return None
    port = int(text)
    return port if 0 < port < 65_536 else None


def unknown_role(labels: Mapping[str, str]) -> str:
    """What is wrong with labels whose role is not known, and the remedy."""
    known = ", ".join(name for name in ROLES if name)
    return f"unknown role {labels.get(ROLE)}, so it would get nothing; known are {known}, or no label for both"
