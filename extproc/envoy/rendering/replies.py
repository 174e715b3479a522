"""Answers that Envoy itself gives, in the form of extproc's: OpenAI-shaped JSON. What replicas answer, errors included, passes untouched."""

from __future__ import annotations

import json
from typing import Any

import envoy_data_plane.envoy.config.accesslog.v3 as accesslog
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 as cel
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm
from envoy_data_plane.google import protobuf

from extproc.config import Config
from extproc.core.types import Refusal, Reject
from extproc.envoy import names
from extproc.openai import errors

Op = accesslog.ComparisonFilterOp

NO_KEY_DETAILS = "failed_to_inject_credential"
"""Envoy's response code details where its credential injector has nothing to put in."""

Error = dict[str, Any]
"""What stands under `error`."""


def _error(message: str, kind: str) -> Error:
    return {"message": message, "type": kind, "param": None, "code": "%RESPONSE_CODE%"}


OTHER = _error("The proxy cannot accept this request.", "BadRequestError")
"""Broken HTTP, mostly."""


def _errors(config: Config) -> dict[int, Error]:
    """By status; where extproc has the case, in its words. Envoy's own stay in its access log: they name addresses and connections."""
    return {
        408: _error("The request did not arrive in time.", "Request Timeout"),
        413: _of(errors.too_large(config.requests.max_body_bytes)),
        500: _error("The proxy could not process this request.", "InternalServerError"),
        502: _error("The answer could not be read. Please try again later.", "Bad Gateway"),
        503: _of(errors.of_refusal(Reject(Refusal.ABSENT))),
        504: _error("No answer came in time. Please try again later.", "Gateway Timeout"),
    }


def _without_key() -> hcm.ResponseMapper:
    """A provider's key is not there (yet): Envoy says 401, which the client would take for its own key."""
    mapper = _mapper(503, _of(errors.of_refusal(Reject(Refusal.ABSENT))), Op.EQ, waits=True)
    mapper.filter, mapper.status_code = _details_are(NO_KEY_DETAILS), 503
    return mapper


def _of(answer: errors.HttpError) -> Error:
    """With the code by name: numbers of such a template are floats, and Envoy reads those of a bootstrap in YAML as text."""
    error: Error = json.loads(answer.body)["error"]
    return {**error, "code": "%RESPONSE_CODE%"}


def local(config: Config) -> hcm.LocalReplyConfig:
    """The first mapper that fits counts. One without any change stands before the others, for what extproc answers through Envoy.

    There is no `body_format` of the whole: it would apply to that one as well.
    """
    # A replica that is silent for so long, or cannot be understood, may be so for the next one, too; a provider has others to serve it.
    waits = (502, 503, 504) if config.providers else (503,)
    mappers = [_mapper(status, error, Op.EQ, status in waits) for status, error in _errors(config).items()]
    others = _mapper(400, OTHER, Op.GE)
    keyless = [_without_key()] if any(provider.api_key_file for provider in config.providers) else []
    return hcm.LocalReplyConfig(mappers=[hcm.ResponseMapper(filter=_is_extprocs()), *keyless, *mappers, others])


def _mapper(status: int, error: Error, op: Op, waits: bool = False) -> hcm.ResponseMapper:
    """`waits`: the client is told to come again."""
    return hcm.ResponseMapper(
        filter=_status_is(op, status),
        body_format_override=_body(error),
        headers_to_add=[_retry_after()] if waits else [],
    )


def _body(error: Error) -> core.SubstitutionFormatString:
    return core.SubstitutionFormatString(json_format=protobuf.Struct.from_dict({"error": error}))


def _retry_after() -> core.HeaderValueOption:
    """Nothing tells when a replica is back; checks find one within a second."""
    return core.HeaderValueOption(
        header=core.HeaderValue(key="retry-after", value="1"),
        append_action=core.HeaderValueOptionHeaderAppendAction.ADD_IF_ABSENT,
    )


def _status_is(op: Op, status: int) -> accesslog.AccessLogFilter:
    value = core.RuntimeUInt32(default_value=status, runtime_key="extproc.unused")  # Envoy wants some key
    compared = accesslog.ComparisonFilter(op=op, value=value)
    return accesslog.AccessLogFilter(status_code_filter=accesslog.StatusCodeFilter(comparison=compared))


def _is_extprocs() -> accesslog.AccessLogFilter:
    """Immediate responses of ext_proc are local replies to Envoy; no response flag tells them apart, only their details."""
    return _details_are(names.REFUSED_DETAILS)


def _details_are(details: str) -> accesslog.AccessLogFilter:
    config = cel.ExpressionFilter(expression=f'response.code_details == "{details}"')
    extension = accesslog.ExtensionFilter(
        name="envoy.access_loggers.extension_filters.cel", typed_config=protobuf.Any.pack(config)
    )
    return accesslog.AccessLogFilter(extension_filter=extension)
