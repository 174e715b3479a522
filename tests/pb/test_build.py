"""The committed generated code is what the sources compile to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from extproc.pb.build import HERE, ROOTS, SOURCES, write


def test_the_committed_files_are_what_the_sources_compile_to(tmp_path: Path) -> None:
    names = write(SOURCES, tmp_path)
    committed = sorted(
        p.relative_to(HERE).as_posix() for root in ROOTS for p in (HERE / root).rglob("*.py*") if p.suffix != ".pyc"
    )
    assert committed == names
    for name in names:
        assert (HERE / name).read_bytes() == (tmp_path / name).read_bytes(), f"{name} is stale; run make protos"


def test_a_file_whose_source_is_gone_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / "envoy" / "old_pb2.py"
    stale.parent.mkdir()
    stale.write_text("")
    write(SOURCES, tmp_path)
    assert not stale.exists()


def test_a_source_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.proto").write_text('syntax = "proto3"; message {')
    with pytest.raises(RuntimeError, match="protoc refused"):
        write(tmp_path, tmp_path / "out")


def test_generated_imports_stay_inside_our_package() -> None:
    for path in (HERE / root for root in ROOTS):
        for file in path.rglob("*_pb2.py"):
            text = file.read_text()
            assert "\nfrom envoy" not in text
            assert "\nimport envoy" not in text


def test_our_messages_load_beside_the_other_users_of_the_name_envoy() -> None:
    """In a process of its own, since an earlier import would hide a clash."""
    code = (
        "import envoy, envoy_data_plane.envoy.config.bootstrap.v3, grpc;"
        "from extproc.pb.envoy.service.ext_proc.v3 import external_processor_pb2;"
        "from extproc.pb.grpc.health.v1 import health_pb2"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
