"""URLs of Redis: what they say, and that a mistake is told without the password."""

from __future__ import annotations

import pytest

from extproc.redis_url import Kind, RedisUrl, parse


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("redis://r", RedisUrl(Kind.ALONE, False, (("r", 6379),))),
        ("rediss://r:7000/3", RedisUrl(Kind.ALONE, True, (("r", 7000),), database=3)),
        ("redis://:p%40ss@[::1]:7", RedisUrl(Kind.ALONE, False, (("::1", 7),), password="p@ss")),
        ("redis://me:a%2Fb@r", RedisUrl(Kind.ALONE, False, (("r", 6379),), username="me", password="a/b")),
        ("unix:///run/r.sock?db=2", RedisUrl(Kind.ALONE, False, (), path="/run/r.sock", database=2)),
        (
            "redis+sentinel://u:p@a,b:7/main/1",
            RedisUrl(Kind.SENTINEL, False, (("a", 26379), ("b", 7)), None, "main", 1, "u", "p"),
        ),
        ("rediss+cluster://a,b:7", RedisUrl(Kind.CLUSTER, True, (("a", 6379), ("b", 7)))),
    ],
)
def test_parts(url: str, found: RedisUrl) -> None:
    assert parse(url) == found


@pytest.mark.parametrize(
    ("url", "mistake"),
    [
        ("http://:Sesame@r", "is no Redis URL"),
        ("Sesame", "is no Redis URL"),
        ("redis://:Sesame@", "has no host"),
        ("redis://:Sesame@r:x", "has a port that is no number"),
        ("redis://:Sesame@r/x", "has a database that is no number"),
        ("redis://:Sesame@a,b", "names several hosts"),
        ("redis+sentinel://:Sesame@a", "names no service"),
        ("redis+cluster://:Sesame@a/1", "has a path"),
        ("unix://:Sesame@run/r.sock", "needs an absolute path"),
    ],
)
def test_mistakes(url: str, mistake: str) -> None:
    with pytest.raises(ValueError, match=mistake) as caught:
        parse(url)
    assert "Sesame" not in str(caught.value)


def test_what_is_shown_has_no_secret() -> None:
    url = parse("redis+sentinel://me:Sesame@a,[::1]:7/main")
    assert str(url) == "sentinel a:26379,[::1]:7 main"
    assert "Sesame" not in repr(url)
    assert "me" not in repr(url).replace("main", "")
