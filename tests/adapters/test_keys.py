from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from extproc.adapters import keys
from extproc.adapters.keys import KeyFile, KeyFileError
from extproc.openai.keys import KeyEntry, key_hash
from tests.support.waiting import until

SECRET = b"0123456789abcdef"
HASH = key_hash(SECRET, "sk-a")
GOOD = f"# ours\nkeys:\n- hash: {HASH}\n  tenant: acme\n"


@asynccontextmanager
async def following(file: KeyFile) -> AsyncIterator[None]:
    task = asyncio.create_task(file.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "keys.yaml"
    found.write_text(GOOD)
    return found


def write(path: Path, text: str) -> None:
    """At once, whoever looks on."""
    path.write_text(text)


def test_a_key_is_found_by_its_hash(path: Path) -> None:
    file = KeyFile(path)
    file.load()
    assert file.find(HASH) == KeyEntry("acme")
    assert file.find(key_hash(b"another secret..", "sk-a")) is None


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("keys: [{hash: 12, tenant: a}]", "keys[0].hash: input should be a valid string"),
        ("keys: [{hash: sk-secret, tenant: a}]", "keys[0].hash"),
        (f"keys: [{{hash: {HASH}}}]", "keys[0].tenant: is missing; add it"),
        (f"keys: [{{hash: {HASH}, tenant: a}}, {{hash: {HASH}, tenant: b}}]", "has a hash twice; remove one"),
        ("keys: [{hash: x, tenant: a, teir: b}]", "keys[0].teir: no such key; did you mean tier?"),
        ("keys: [", "not YAML: line"),
        ("", "is empty; write keys: [] for none"),
        ("# half", "is empty"),
        ("- 1", "input should be"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(path: Path, text: str, mistake: str) -> None:
    path.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        KeyFile(path).load()
    assert str(path) in str(caught.value)
    assert mistake in str(caught.value)


def test_a_key_that_stands_in_the_file_by_mistake_is_not_repeated(path: Path) -> None:
    path.write_text("keys: [{hash: sk-secret, tenant: a}]")
    with pytest.raises(KeyFileError) as caught:
        KeyFile(path).load()
    assert "sk-secret" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"nowhere\.yaml: No such file"):
        KeyFile(tmp_path / "nowhere.yaml").load()


async def test_the_file_is_followed(path: Path) -> None:
    file = KeyFile(path, recheck_s=0.05)
    file.load()
    async with following(file):
        keys.add(path, SECRET, "sk-b", "other", "paid")
        await until(lambda: file.find(key_hash(SECRET, "sk-b")) == KeyEntry("other", "paid"))
        write(path, "keys: []\n")
        await until(lambda: len(file) == 0)


async def test_a_broken_file_changes_nothing_and_is_counted_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = KeyFile(path, recheck_s=0.02)
    file.load()
    with caplog.at_level(logging.ERROR):
        async with following(file):
            write(path, "keys: [{hash: sk-secret, tenant: a}]")
            await until(lambda: file.errors == 1)
            await file._look()
            assert (file.errors, len(file)) == (1, 1)
            write(path, GOOD + f"- hash: {key_hash(SECRET, 'sk-c')}\n  tenant: c\n")
            await until(lambda: len(file) == 2)
    assert "the keys stay as they are" in caplog.text
    assert "sk-secret" not in caplog.text


async def test_a_file_that_is_cut_off_or_gone_changes_nothing(path: Path) -> None:
    """Whoever writes it in place makes it empty first."""
    file = KeyFile(path)
    file.load()
    for spoil in (lambda: path.write_text(""), lambda: path.write_bytes(b"\xff"), path.unlink):
        spoil()
        await file._look()
        assert len(file) == 1
    assert file.errors == 3
    write(path, "keys: []\n")
    await file._look()
    assert (file.errors, len(file)) == (3, 0)


async def test_a_file_is_parsed_only_when_it_says_something_else(path: Path) -> None:
    file = KeyFile(path)
    file.load()
    kept = file._keys
    write(path, GOOD + "# a comment\n")
    write(path, GOOD)
    assert file._looked() is None
    await file._look()
    assert file._keys is kept


def test_the_first_key_leaves_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("# for clients of team a\nkeys: []\n")
    keys.add(path, SECRET, "sk-a", "acme", None)
    assert path.read_text().startswith("# for clients of team a\nkeys:\n- hash:")
    assert keys.read_keys(path) == {HASH: KeyEntry("acme")}


def test_whoever_could_read_the_file_still_can(path: Path) -> None:
    """The service that reads it is seldom who adds a key."""
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12345, 54321)
    before = path.stat()
    keys.add(path, SECRET, "sk-b", "b", None)
    after = path.stat()
    assert after.st_ino != before.st_ino, "by rename"
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


def test_adding_keeps_what_stands_there(path: Path) -> None:
    digest = keys.add(path, SECRET, "sk-b", "b", None)
    text = path.read_text()
    assert text.startswith("# ours\nkeys:\n- hash:")
    assert keys.read_keys(path) == {HASH: KeyEntry("acme"), digest: KeyEntry("b")}
    assert "sk-b" not in text


def test_a_key_is_not_added_twice(path: Path) -> None:
    with pytest.raises(KeyFileError, match="has this key already, for acme"):
        keys.add(path, SECRET, "sk-a", "b", None)


def test_a_file_to_which_nothing_can_be_appended_stays_as_it_is(path: Path) -> None:
    before = f"keys: [{{hash: {HASH}, tenant: acme}}]\n"
    path.write_text(before)
    with pytest.raises(KeyFileError, match="an entry cannot be appended"):
        keys.add(path, SECRET, "sk-b", "b", None)
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_secret_is_for_its_owner_alone_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    keys.create_secret(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(keys.read_secret(path)) == 64
    with pytest.raises(KeyFileError, match="File exists"):
        keys.create_secret(path)


def test_a_short_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("short\n")
    with pytest.raises(KeyFileError, match="shorter than 16 bytes"):
        keys.read_secret(path)
