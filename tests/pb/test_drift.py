"""Our trimmed .proto files agree with the schema inside the installed Envoy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from extproc.pb.envoy.config.core.v3 import address_pb2, base_pb2
from extproc.pb.envoy.data.accesslog.v3 import accesslog_pb2
from extproc.pb.envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from extproc.pb.envoy.service.accesslog.v3 import als_pb2
from extproc.pb.envoy.service.ext_proc.v3 import external_processor_pb2
from extproc.pb.envoy.type.v3 import http_status_pb2
from extproc.pb.externalscaler import externalscaler_pb2
from extproc.pb.grpc.health.v1 import health_pb2
from tests.pb.binary import envoy_binary, file_descriptors
from tests.pb.schema import drift, facts

MODULES = (
    address_pb2,
    base_pb2,
    accesslog_pb2,
    processing_mode_pb2,
    als_pb2,
    external_processor_pb2,
    http_status_pb2,
)


def declared(module: object) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(proto)  # type: ignore[attr-defined]
    return proto


@pytest.fixture(scope="module")
def schema() -> dict[str, FileDescriptorProto]:
    return file_descriptors(envoy_binary())


@pytest.mark.envoy
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_all_that_we_declare_is_in_the_binary(module: object, schema: dict[str, FileDescriptorProto]) -> None:
    ours = declared(module)
    assert drift(ours, schema[ours.name]) == []


@pytest.mark.envoy
def test_the_extraction_finds_the_whole_schema(schema: dict[str, FileDescriptorProto]) -> None:
    assert len(schema) > 400
    assert len(schema["envoy/service/ext_proc/v3/external_processor.proto"].message_type) > 10


def change_number(file: FileDescriptorProto) -> None:
    field_of(file, "ProcessingRequest", "metadata_context").number = 9


def change_type(file: FileDescriptorProto) -> None:
    field_of(file, "HttpBody", "body").type = 9


def change_label(file: FileDescriptorProto) -> None:
    field_of(file, "HeaderMutation", "remove_headers").label = 1


def change_message_type(file: FileDescriptorProto) -> None:
    field_of(file, "HttpHeaders", "headers").type_name = ".envoy.config.core.v3.Metadata"


def change_json_name(file: FileDescriptorProto) -> None:
    field_of(file, "HttpBody", "end_of_stream").json_name = "eos"


def leave_the_oneof(file: FileDescriptorProto) -> None:
    field_of(file, "BodyMutation", "clear_body").ClearField("oneof_index")


def change_enum_value(file: FileDescriptorProto) -> None:
    common = next(m for m in file.message_type if m.name == "CommonResponse")
    common.enum_type[0].value[1].number = 7


def change_streaming(file: FileDescriptorProto) -> None:
    file.service[0].method[0].client_streaming = False


def change_package(file: FileDescriptorProto) -> None:
    file.package = "envoy.service.ext_proc.v4"


def field_of(file: FileDescriptorProto, message: str, field: str):  # type: ignore[no-untyped-def]
    found = next(m for m in file.message_type if m.name == message)
    return next(f for f in found.field if f.name == field)


ALTERATIONS = (
    change_number,
    change_type,
    change_label,
    change_message_type,
    change_json_name,
    leave_the_oneof,
    change_enum_value,
    change_streaming,
    change_package,
)


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda f: f.__name__)
def test_the_comparer_sees_each_kind_of_difference(alter: Callable[[FileDescriptorProto], None]) -> None:
    ours, theirs = declared(external_processor_pb2), declared(external_processor_pb2)
    assert drift(ours, theirs) == []
    alter(theirs)
    assert len(drift(ours, theirs)) == 1


def test_the_comparer_sees_a_missing_message() -> None:
    ours, theirs = declared(external_processor_pb2), declared(external_processor_pb2)
    del theirs.message_type[0]
    assert any("absent" in line for line in drift(ours, theirs))


def test_the_other_side_may_declare_more() -> None:
    ours, theirs = declared(external_processor_pb2), declared(external_processor_pb2)
    del ours.message_type[0].field[0]
    assert drift(ours, theirs) == []


def test_health_agrees_with_the_protocol_that_grpc_documents() -> None:
    """gRPC's own file is not in the binary in a readable place: its numbers are few and frozen."""
    known = {name: fact[0] for name, fact in facts(declared(health_pb2)).items()}
    assert known["package"] == "grpc.health.v1"
    assert known["HealthCheckRequest.service"] == 1
    assert known["HealthCheckResponse.status"] == 1
    statuses = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
    assert [known[f"HealthCheckResponse.ServingStatus.{s}"] for s in statuses] == [0, 1, 2, 3]
    assert health_pb2.HealthCheckResponse(status="SERVING").SerializeToString() == b"\x08\x01"


def test_the_external_scaler_agrees_with_keda() -> None:
    """KEDA's own file, `pkg/scalers/externalscaler/externalscaler.proto`."""
    file = declared(externalscaler_pb2)
    known = {name: fact[0] for name, fact in facts(file).items()}
    assert known["package"] == "externalscaler"
    numbers = {
        "ScaledObjectRef": ("name", "namespace", "scalerMetadata"),
        "IsActiveResponse": ("result",),
        "GetMetricSpecResponse": ("metricSpecs",),
        "MetricSpec": ("metricName", "targetSize", "targetSizeFloat"),
        "GetMetricsRequest": ("scaledObjectRef", "metricName"),
        "GetMetricsResponse": ("metricValues",),
        "MetricValue": ("metricName", "metricValue", "metricValueFloat"),
    }
    for message, names in numbers.items():
        assert [known[f"{message}.{name}"] for name in names] == list(range(1, len(names) + 1)), message
    (service,) = file.service
    methods = {m.name: (m.input_type, m.output_type, m.server_streaming) for m in service.method}
    assert service.name == "ExternalScaler"
    assert methods == {
        "IsActive": (".externalscaler.ScaledObjectRef", ".externalscaler.IsActiveResponse", False),
        "StreamIsActive": (".externalscaler.ScaledObjectRef", ".externalscaler.IsActiveResponse", True),
        "GetMetricSpec": (".externalscaler.ScaledObjectRef", ".externalscaler.GetMetricSpecResponse", False),
        "GetMetrics": (".externalscaler.GetMetricsRequest", ".externalscaler.GetMetricsResponse", False),
    }
