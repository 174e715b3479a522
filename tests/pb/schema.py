"""Compares what we declare of a protocol with what the other side declares."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)

Fact = tuple[str, tuple[object, ...]]
"""A dotted name, and everything about it that must agree."""


def facts(file: FileDescriptorProto) -> dict[str, tuple[object, ...]]:
    """Each message, field, enum, enum value and method of a file by its dotted name."""
    found: dict[str, tuple[object, ...]] = {"package": (file.package, file.syntax)}
    for message in file.message_type:
        found.update(_message(message, ""))
    for enum in file.enum_type:
        found.update(_enum(enum, ""))
    for service in file.service:
        found.update(_service(service))
    return found


def drift(ours: FileDescriptorProto, theirs: FileDescriptorProto) -> list[str]:
    """One line for each thing of ours that is absent or different in theirs; theirs may hold more."""
    other = facts(theirs)
    return [
        f"{ours.name}: {name}: ours {mine}, theirs {other.get(name, 'absent')}"
        for name, mine in facts(ours).items()
        if other.get(name) != mine
    ]


def _message(message: DescriptorProto, prefix: str) -> Iterator[Fact]:
    name = f"{prefix}{message.name}"
    yield name, ("message", message.options.map_entry)
    for field in message.field:
        yield f"{name}.{field.name}", _field(field, message)
    for nested in message.nested_type:
        yield from _message(nested, f"{name}.")
    for enum in message.enum_type:
        yield from _enum(enum, f"{name}.")


def _field(field: FieldDescriptorProto, message: DescriptorProto) -> tuple[object, ...]:
    """Number, type, label, names; the oneof by its name, because its index depends on which others are declared."""
    group = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None
    names = (field.json_name or _camel(field.name), field.type_name, group)
    return (field.number, field.type, field.label, *names, field.proto3_optional)


def _camel(name: str) -> str:
    """The JSON name that protoc gives where none is written; not every descriptor spells it out."""
    head, *tail = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in tail)


def _enum(enum: EnumDescriptorProto, prefix: str) -> Iterator[Fact]:
    name = f"{prefix}{enum.name}"
    yield name, ("enum",)
    for value in enum.value:
        yield f"{name}.{value.name}", (value.number,)


def _service(service: ServiceDescriptorProto) -> Iterator[Fact]:
    for method in service.method:
        streams = (method.client_streaming, method.server_streaming)
        yield f"{service.name}.{method.name}", (method.input_type, method.output_type, *streams)
