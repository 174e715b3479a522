"""What is asked of a tokenizer about one request, and what it answers: the prompt as the engine will have it, or why that is not known."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from extproc.core.prefix.exact import MAX_UNITS, UNIT
from extproc.core.record import record
from extproc.core.types import Api, TokenBlocks

MAX_TEXT: Final = 4 * MAX_UNITS * UNIT
"""Characters of a prompt: about as many tokens as are looked up."""


TOKENIZED: Final = "tokenized"
"""What became of a prompt that was; of others, one of `Untokenized`."""


@record
class Question:
    """What of a request is not in its body, or stands there in the client's words."""

    api: Api
    lora: str | None = None
    """Adapter that will run it, as the engine names it; None for the base model."""
    salt: str | None = None
    """`cache_salt` that the engine will see in place of the client's; None where it sees the client's."""


@record
class Place:
    """Where a request may go."""

    pool: str
    lora: str | None = None
    """The adapter that its model is there, as engines name it; None for a base model."""


@record
class Tokenized:
    """A prompt as the engine will have it."""

    blocks: TokenBlocks
    prompt_tokens: int


class Untokenized(StrEnum):
    """Why a prompt was not tokenized; what is cached of it is then guessed. Also a metric label."""

    API = "api"  # neither a chat nor a completion
    MEDIA = "media"  # something in it is no text
    TEMPLATE = "template"  # no chat template that can be applied here, or the request brings its own
    PROMPTS = "prompts"  # several in one request
    FIELD = "field"  # a field changes the prompt in a way that is not known here
    LARGE = "large"  # above the bounds of what is tokenized
    REFUSED = "refused"  # the template does not take it, nor will the engine
    AMBIGUOUS = "ambiguous"  # its model is served with several tokenizers, or as several adapters
    DISTRUSTED = "distrusted"  # the engine counts other tokens than the tokenizer here
    LATE = "late"  # took longer than it may
    BUSY = "busy"  # too many wait for the tokenizer
    FAILED = "failed"  # a mistake of ours


class CannotTokenize(Exception):  # noqa: N818 - says what happened
    """The prompt of this request is not understood."""

    def __init__(self, why: Untokenized) -> None:
        super().__init__(why.value)
        self.why = why
