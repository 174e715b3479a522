"""The libraries are imported where a pool wants them, and missed by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from extproc.adapters.tokenizing.starting import tokenizing
from extproc.config import ConfigError, PoolConfig, ReplicaConfig, TokenizerConfig
from tests.adapters.tokenizing.models import TEMPLATE, folder

PLAIN = PoolConfig(name="plain", replicas=(ReplicaConfig(address="10.0.0.1:80"),))


def wanting(path: Path) -> PoolConfig:
    return PLAIN.model_copy(update={"name": "m", "tokenizer": TokenizerConfig(path=path)})


def nothing(_pool: str, _seconds: float) -> None:
    pass


def test_nothing_where_no_pool_wants_it() -> None:
    assert tokenizing([PLAIN], nothing) is None
    code = "import sys, extproc.app; sys.exit('tokenizers' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_pool_that_wants_it(tmp_path: Path) -> None:
    found = tokenizing([PLAIN, wanting(folder(tmp_path, chat_template=TEMPLATE))], nothing)
    assert found is not None
    assert list(found.engines) == ["m"]
    found.close()


def test_what_is_missing_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("extproc.adapters.tokenizing.")]:
        if not name.endswith(".starting"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError) as e:
        tokenizing([wanting(tmp_path)], nothing)
    assert str(e.value) == "pool m: tokenizer needs the package tokenizers; pip install 'extproc[tokenizers]'"
