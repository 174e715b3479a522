"""A model's chat template: messages to the text that the engine tokenizes, in the same sandbox, to the byte.

The environment is that of transformers 5 (`chat_template_utils.py`), which vLLM uses: Jinja's immutable sandbox, block tags without the
white space around them, `break` and `continue`, and four names of its own. Templates come with the model and are trusted as far as
that sandbox goes; what clients write are values to it. How long a text may become, and how long that may take, is bounded all the same: a
template with a loop inside another one takes a minute for a conversation of 4,096 messages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from extproc.openai.tokens import MAX_TEXT, CannotTokenize, Untokenized

LIMIT_S: Final = 1.0
"""Longest that one rendering may take, seconds. It shares the interpreter with the event loop; 4,096 short messages take 0.02 s."""
_IN_TIME: Final = "_extproc_in_time"
"""Filter that loops and macros apply at every turn, and variable with what it asks."""
_CONTINUED: Final = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where the final message ends in the text, as transformers does; the space shows whether the template trims."""


class ContentFormat(StrEnum):
    """How a template takes the content of messages; vLLM's `--chat-template-content-format`."""

    STRING = "string"
    OPENAI = "openai"  # a list of parts


class _Generation(Extension):
    """`{% generation %}`, which marks what to train on: a scope of its own, and nothing else."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_through"), [], [], body).set_lineno(line)

    def _through(self, caller: Macro) -> str:
        return str(caller())


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _in_time(clock: Callable[[], float]) -> Callable[[], None]:
    """For one rendering, from now on. Raises CannotTokenize when its time is over."""
    until = clock() + LIMIT_S

    def check() -> None:
        if clock() >= until:
            raise CannotTokenize(Untokenized.LATE)

    return check


@pass_context
def _check(context: Context, _value: None) -> None:
    context[_IN_TIME]()


def _checked(root: nodes.Template) -> nodes.Template:
    """With a look at the clock wherever something may happen again: in loops, and in macros, which may call themselves."""
    again: list[nodes.For | nodes.Macro] = [*root.find_all(nodes.For), *root.find_all(nodes.Macro)]
    for each in again:
        # A filter, for a call goes through the sandbox, which takes 2 microseconds.
        check = nodes.Filter(nodes.Const(None), _IN_TIME, [], [], None, None)
        each.body.insert(0, nodes.ExprStmt(check).set_lineno(each.lineno))
    return root


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    found.filters[_IN_TIME] = _check
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = lambda form: now().strftime(form)
    return found


class ChatTemplate:
    """One template, compiled."""

    def __init__(self, source: str, now: Callable[[], datetime], clock: Callable[[], float] = time.monotonic) -> None:
        """`now` is the engine's local time, which some templates write into the prompt. Raises jinja2.TemplateSyntaxError."""
        self.source = source
        self._clock = clock
        self._environment = _environment(now)
        self._compiled = self._environment.from_string(_checked(self._environment.parse(source)))

    def __repr__(self) -> str:
        return f"<chat template of {len(self.source)} characters, {self.content_format}>"

    @cached_property
    def content_format(self) -> ContentFormat:
        """Whether content is handed over as text or in parts: in parts where the template loops over them."""
        return _content_format(self._environment.parse(self.source))

    @cached_property
    def knows_developers(self) -> bool:
        """Whether it takes messages of the role `developer`, by vLLM's rule."""
        return '"developer"' in self.source or "'developer'" in self.source

    def render(
        self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], continue_final: bool = False
    ) -> str:
        """The text of a conversation. `continue_final`: without what would end the last message.

        Raises CannotTokenize where the template does not take it, or it becomes too long, or that takes too long.
        """
        try:
            if not continue_final:
                return self._rendered(messages, values)
            return self._continued(messages, values)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, IndexError) as e:
            raise CannotTokenize(Untokenized.REFUSED) from e
        except RecursionError as e:
            raise CannotTokenize(Untokenized.LARGE) from e

    def _rendered(self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
        found, room = [], MAX_TEXT
        for text in self._compiled.generate({**values, "messages": messages, _IN_TIME: _in_time(self._clock)}):
            room -= len(text)
            if room < 0:
                raise CannotTokenize(Untokenized.LARGE)
            found.append(text)
        return "".join(found)

    def _continued(self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
        *before, final = messages
        said, marked = _marked(final.get("content"))
        text = self._rendered([*before, {**final, "content": marked}], values)
        tag = _CONTINUED.strip()
        if said.strip() not in text or tag not in text:
            raise CannotTokenize(Untokenized.REFUSED)
        at = text.rindex(tag)
        return text[:at] if text[at:].startswith(_CONTINUED) else text[:at].rstrip()


def _marked(content: Any) -> tuple[str, Any]:
    """The text that is to be continued, and the content with the mark behind it."""
    if isinstance(content, str):
        return content, content + _CONTINUED
    parts = list(content or ())
    for i in reversed(range(len(parts))):
        if "text" in parts[i]:
            said = parts[i]["text"]
            parts[i] = {**parts[i], "text": said + _CONTINUED}
            return said, parts
    raise CannotTokenize(Untokenized.REFUSED)


# --- does it loop over the parts of a message? vLLM 0.32, `renderers/hf.py`, and by its rules, whatever one may think of them -----------


def _content_format(root: nodes.Template) -> ContentFormat:
    try:
        found = any(True for _ in _content_loops(root))
    except _UnusualError:
        return ContentFormat.STRING
    return ContentFormat.OPENAI if found else ContentFormat.STRING


class _UnusualError(Exception):
    """Something else than one name is assigned to."""


def _content_loops(root: nodes.Template) -> Iterator[nodes.For]:
    messages = list(_message_names(root))
    in_macros, of_content = _macro_loops(root, messages)
    for loop in root.find_all(nodes.For):
        names = of_content.get(id(loop), set())
        over = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        plain = over is not None and (over in names or (over == "content" and id(loop) not in in_macros))
        if any(_reads(loop.iter, name, "content") for name in messages) or plain:
            _name_of(loop.target)
            yield loop


def _message_names(root: nodes.Template) -> Iterator[str]:
    """Names that stand for one message in a loop over all."""
    lists = list(_aliases(root, "messages"))
    for loop in root.find_all(nodes.For):
        if any(_reads(loop.iter, name) for name in lists):
            yield _name_of(loop.target)


def _aliases(root: nodes.Template, name: str) -> Iterator[str]:
    """The name, and those that it, or a part of it, is assigned to."""
    seen, waiting = {name}, [name]
    while waiting:
        known = waiting.pop(0)
        yield known
        for assign in root.find_all(nodes.Assign):
            if _reads(assign.node, known) and (new := _name_of(assign.target)) not in seen:
                seen.add(new)
                waiting.append(new)


def _macro_loops(root: nodes.Template, messages: Sequence[str]) -> tuple[set[int], dict[int, set[str]]]:
    """Loops inside macros, and for each the parameters that are given the content of a message somewhere."""
    inside: set[int] = set()
    given: dict[int, set[str]] = {}
    for macro in root.find_all(nodes.Macro):
        names = set(_given_content(root, macro, messages))
        for loop in macro.find_all(nodes.For):
            inside.add(id(loop))
            if names:
                given[id(loop)] = names
    return inside, given


def _given_content(root: nodes.Template, macro: nodes.Macro, messages: Sequence[str]) -> Iterator[str]:
    parameters = [each.name for each in macro.args]
    for call in root.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        pairs = [*zip(parameters, call.args, strict=False)]
        pairs += [(each.key, each.value) for each in call.kwargs if isinstance(each, nodes.Keyword)]
        for parameter, value in pairs:
            if parameter in parameters and any(_reads(value, name, "content") for name in messages):
                yield parameter


def _name_of(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _UnusualError
    return target.name


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether it is the name, or its `key`, whatever filters, tests and slices stand around it."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if key is not None:
        if (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == key) or (
            isinstance(node, nodes.Getattr) and node.attr == key
        ):
            node = node.node
        else:
            return False
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
