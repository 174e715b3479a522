"""The file of API keys, followed while extproc runs, and the secret that their hashes are made with.

    keys:
    - hash: 3f0c...            # by `extproc key add` or `extproc key hash`
      tenant: acme
      tier: paid               # optional

A file that cannot be read, or is wrong, changes nothing: it is counted and logged once, and the keys stay those of the last good one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from extproc.adapters.watching import RECHECK_S, moments
from extproc.config import Name, Section, mistakes, yaml_mistake
from extproc.openai.keys import MIN_SECRET_BYTES, KeyEntry, key_hash

log = logging.getLogger(__name__)

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C where there is one: of 2,000 keys in a third of the time, which is the time of requests."""
KEY_BYTES = 32
"""Of a key that is made here: 43 characters after the prefix."""
PREFIX = "sk-"


class KeyFileError(Exception):
    """The secret or the file of keys cannot be used; the text names the path and the remedy, never a key."""


class Entry(Section):
    """One key."""

    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """BLAKE2b of the key, keyed with the secret, 20 bytes in hex."""
    tenant: str = Field(min_length=1, max_length=256)
    """Whose it is."""
    tier: Name | None = None
    """Instead of the tenant's own."""


class Listed(Section):
    """The file."""

    keys: tuple[Entry, ...] = ()
    """The keys there are."""


def read_secret(path: Path) -> bytes:
    """The secret, without white space around it. Raises KeyFileError."""
    try:
        secret = path.read_bytes().strip()
    except OSError as e:
        raise KeyFileError(f"{path}: {e.strerror}; `extproc key add` creates one") from None
    if len(secret) < MIN_SECRET_BYTES:
        raise KeyFileError(f"{path}: is shorter than {MIN_SECRET_BYTES} bytes; write more, at random")
    return secret


def read_keys(path: Path) -> dict[str, KeyEntry]:
    """Hash -> entry. Raises KeyFileError."""
    return parse_keys(path, _bytes(path))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise KeyFileError(f"{path}: {e.strerror}") from None


def parse_keys(path: Path, data: bytes) -> dict[str, KeyEntry]:
    """The same of what stands in the file. Raises KeyFileError."""
    try:
        raw: Any = yaml.load(data.decode(), Loader=LOADER)
        if raw is None:  # half written, more likely than meant
            raise KeyFileError(f"{path}: is empty; write keys: [] for none")
        listed = Listed.model_validate(raw)
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: not UTF-8") from None
    except yaml.YAMLError as e:
        raise KeyFileError(f"{path}: not YAML: {yaml_mistake(e)}") from None
    except ValidationError as e:
        # Without what stands there: it may be a key, where its hash should be.
        wrong = (re.sub(r", not .*", "", mistake) for mistake in mistakes(e, Listed))
        raise KeyFileError("; ".join(f"{path}: {mistake}" for mistake in wrong)) from None
    found = {entry.hash: KeyEntry(entry.tenant, entry.tier) for entry in listed.keys}
    if len(found) < len(listed.keys):
        raise KeyFileError(f"{path}: has a hash twice; remove one")
    return found


class KeyFile:
    """The keys as they stand in the file now."""

    def __init__(self, path: Path, recheck_s: float = RECHECK_S) -> None:
        self.path = path
        self.errors = 0
        """Versions of the file that could not be used."""
        self._recheck_s = recheck_s
        self._keys: dict[str, KeyEntry] = {}
        self._mistake: str | None = None
        self._read: bytes | None = None
        """What stood in the file when it was last looked at."""

    def __repr__(self) -> str:
        return f"<KeyFile {self.path}: {len(self._keys)} keys>"

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, digest: str) -> KeyEntry | None:
        """The entry with this hash."""
        return self._keys.get(digest)

    def load(self) -> None:
        """Read the file. Raises KeyFileError."""
        self._keys = self._looked() or {}

    async def run(self) -> None:
        """Follow the file until cancelled."""
        async with aclosing(moments(self.path, self._recheck_s)) as due:
            async for _ in due:
                await self._look()

    async def _look(self) -> None:
        try:
            keys = await asyncio.to_thread(self._looked)
        except KeyFileError as e:
            if str(e) != self._mistake:
                self._mistake = str(e)
                self.errors += 1
                log.error("the keys stay as they are: %s", e)
            return
        self._mistake = None
        if keys is None:
            return
        if keys != self._keys:
            log.info("%s: %d keys, %d before", self.path, len(keys), len(self._keys))
            self._keys = keys

    def _looked(self) -> dict[str, KeyEntry] | None:
        """The keys, or None where the file says what it said before. Raises KeyFileError."""
        data = _bytes(self.path)
        if data == self._read:
            return None
        self._read = data
        return parse_keys(self.path, data)


# --- for the command line ---------------------------------------------------------------------------------------------


def create_secret(path: Path) -> None:
    """Write a new secret that only its owner can read. Raises KeyFileError where there is one, or none can be written."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(secrets.token_hex(KEY_BYTES).encode() + b"\n")
    except OSError as e:
        raise KeyFileError(f"{path}: {e.strerror}") from None


def hashed(secret_file: Path, key: str) -> str:
    """How a key stands in the file. Raises KeyFileError."""
    return key_hash(read_secret(secret_file), key)


def new_key() -> str:
    """A key to be given to a client."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def add(path: Path, secret: bytes, key: str, tenant: str, tier: str | None) -> str:
    """Append an entry for the key to the file, by rename; returns its hash. Raises KeyFileError.

    What stands in the file stays as it is, comments too, as long as the list of keys is the last thing in it.
    """
    data = _bytes(path) if path.exists() else b""
    known = parse_keys(path, data) if data.strip() else {}
    before = data.decode()
    digest = key_hash(secret, key)
    if digest in known:
        raise KeyFileError(f"{path}: has this key already, for {known[digest].tenant}")
    written = {"hash": digest, "tenant": tenant, **({"tier": tier} if tier else {})}
    item = yaml.safe_dump([written], sort_keys=False)
    head = before if known else _comments(before) + "keys:\n"
    _replace(path, head + ("" if head.endswith("\n") else "\n") + item)
    return digest


def _comments(text: str) -> str:
    """The lines of a file without keys that are to be kept."""
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))


def _replace(path: Path, text: str) -> None:
    """Write it beside the file, see that it reads well, and rename it. It stays readable for whom it was."""
    try:
        before = path.stat() if path.exists() else None
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        beside = Path(name)
        try:
            with os.fdopen(number, "w") as out:
                out.write(text)
                out.flush()
                os.fsync(number)
            if before is not None:
                os.chown(beside, before.st_uid, before.st_gid)
                beside.chmod(before.st_mode & 0o777)
            read_keys(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except KeyFileError as e:
        raise KeyFileError(f"{path}: an entry cannot be appended: {e}") from None
    except OSError as e:
        raise KeyFileError(f"{path}: {e.strerror}") from None
