"""Chat templates: what they may use, and what shows that they loop over the parts of a message."""

from __future__ import annotations

from datetime import datetime
from itertools import count
from typing import Any

import pytest
from jinja2 import TemplateSyntaxError

from extproc.openai import chat_template
from extproc.openai.chat_template import LIMIT_S, ChatTemplate, ContentFormat
from extproc.openai.tokens import CannotTokenize, Untokenized

USER = [{"role": "user", "content": "Hi "}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, lambda: datetime(2026, 5, 4, 12))


def rendered(source: str, messages: Any = USER, continue_final: bool = False, **values: Any) -> str:
    return template(source).render(messages, values, continue_final)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "04 May 2026"),
        ("{{ {'b': 1, 'a': '<é>'} | tojson }}", '{"b": 1, "a": "<é>"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{{ nothing }}{{ tools is none }}", "True"),
        ("<{{ messages[0].content }}>", "<Hi >"),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert rendered(source, tools=None) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at_all }}",
    ],
)
def test_what_a_template_refuses(source: str) -> None:
    with pytest.raises(CannotTokenize) as e:
        rendered(source)
    assert e.value.why is Untokenized.REFUSED


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in [1] recursive %}{{ loop([1, 1]) if loop.depth < 60 else '' }}{% endfor %}",
    ],
)
def test_a_rendering_ends_in_time(source: str) -> None:
    ticks = count(step=LIMIT_S / 1000)
    bounded = ChatTemplate(source, datetime.now, lambda: next(ticks))
    for _ in range(2):  # each has its own time
        with pytest.raises(CannotTokenize) as e:
            bounded.render(USER, {})
        assert e.value.why is Untokenized.LATE


def test_a_rendering_that_a_client_would_have_unbounded() -> None:
    looped = template("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert looped.render(USER, {"_extproc_in_time": "mine", "check": "mine"}) == "Hi "


def test_a_text_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_TEXT", 10)
    doubling = "{% for m in messages %}{{ messages | map(attribute='content') | join }}{% endfor %}"
    assert rendered(doubling, USER * 1) == "Hi "
    with pytest.raises(CannotTokenize) as e:
        rendered(doubling, USER * 2)
    assert e.value.why is Untokenized.LARGE


def test_a_template_that_is_none() -> None:
    with pytest.raises(TemplateSyntaxError):
        template("{% for %}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content }}<end>", "Hi "),
        ("{{ messages[0].content | trim }}<end>", "Hi"),
        ("{% for p in messages[0].content %}{{ p }}{% endfor %}<end>", "Hi "),
    ],
)
def test_the_last_message_is_left_open(source: str, expected: str) -> None:
    assert rendered(source, continue_final=True) == expected


def test_the_last_part_is_left_open() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}]
    source = "{% for p in messages[0].content %}[{{ p.text }}]{% endfor %}"
    assert rendered(source, parts, continue_final=True) == "[A][B"


@pytest.mark.parametrize("content", ["gone", None, []])
def test_what_cannot_be_left_open(content: Any) -> None:
    with pytest.raises(CannotTokenize):
        rendered("{{ messages | length }}", [{"role": "user", "content": content}], continue_final=True)


@pytest.mark.parametrize(
    ("source", "in_parts"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for c in m['content'] | list %}{{ c }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages[1:] %}{% for c in m.content %}{% endfor %}{% endfor %}", True),
        ("{% set rest = messages %}{% for m in rest %}{% for c in m.content %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set content = m.content %}{% for c in content %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for t in m.tool_calls %}{% endfor %}{% endfor %}", False),
        ("{% macro f(content) %}{% for c in content %}{% endfor %}{% endmacro %}{{ f(1) }}", False),
        (
            "{% macro f(x) %}{% for c in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.content) }}{% endfor %}",
            True,
        ),
        (
            "{% macro f(x) %}{% for c in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(x=m.content) }}{% endfor %}",
            True,
        ),
        (
            "{% macro f(x) %}{% for c in x %}{% endfor %}{% endmacro %}{% for m in messages %}{{ f(m.role) }}{% endfor %}",
            False,
        ),
        ("{% set a, b = messages, 1 %}{% for m, n in messages %}{% endfor %}{% for c in content %}{% endfor %}", False),
        ("{% set a = messages %}{% set messages = a %}{% for m in a %}{{ m.content }}{% endfor %}", False),
    ],
)
def test_whether_parts_are_wanted(source: str, in_parts: bool) -> None:
    found = template(source)
    assert (found.content_format is ContentFormat.OPENAI) is in_parts


def test_what_is_known_of_a_template() -> None:
    found = template("{{ bos_token }}{% if x == 'developer' %}{% endif %}")
    assert found.knows_developers
    assert not template("{{ x }}").knows_developers
    assert repr(template("{{ x }}")) == "<chat template of 7 characters, string>"
