"""Token counts of responses into dynamic metadata, inside Envoy: no response byte goes through Python.

chat, completions, embeddings   {"usage": {"prompt_tokens", "completion_tokens", "prompt_tokens_details": {"cached_tokens"}}}
/v1/responses                   {"usage": {"input_tokens", "output_tokens", "input_tokens_details": {"cached_tokens"}}}
                                and in its stream the same one level down, under "response" of the event `response.completed`
"""

from __future__ import annotations

import envoy_data_plane.envoy.extensions.content_parsers.json.v3 as parser
import envoy_data_plane.envoy.extensions.filters.http.json_to_metadata.v3 as to_metadata
import envoy_data_plane.envoy.extensions.filters.http.sse_to_metadata.v3 as sse
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm
import envoy_data_plane.envoy.type.matcher.v3 as matcher

from extproc.envoy import names
from extproc.envoy.rendering.messages import extension, http_filter

COMPLETIONS = (
    (names.PROMPT_TOKENS, ("usage", "prompt_tokens")),
    (names.COMPLETION_TOKENS, ("usage", "completion_tokens")),
    (names.CACHED_TOKENS, ("usage", "prompt_tokens_details", "cached_tokens")),
)
RESPONSES = (
    (names.PROMPT_TOKENS, ("usage", "input_tokens")),
    (names.COMPLETION_TOKENS, ("usage", "output_tokens")),
    (names.CACHED_TOKENS, ("usage", "input_tokens_details", "cached_tokens")),
)
RESPONSES_STREAM = tuple((key, ("response", *path)) for key, path in RESPONSES)

MAX_EVENT_BYTES = 1024 * 1024
"""Longest server-sent event that is read. `response.completed` repeats the whole output, and a first chunk may carry the prompt's token ids; the default of 8 KiB would lose the usage of both."""


def filters() -> list[hcm.HttpFilter]:
    """Where several rules find their value in one response, the last one to do so wins."""
    return [
        http_filter("envoy.filters.http.json_to_metadata", _from_json()),
        http_filter("envoy.filters.http.sse_to_metadata", _from_events()),
    ]


def _from_json() -> to_metadata.JsonToMetadata:
    rules = [_rule(key, path) for key, path in (*COMPLETIONS, *RESPONSES)]
    # By regex: the plain list of types does not match `application/json; charset=utf-8`.
    json = matcher.RegexMatcher(regex="application/json(;.*)?")
    return to_metadata.JsonToMetadata(
        response_rules=to_metadata.JsonToMetadataMatchRules(rules=rules, allow_content_types_regex=json)
    )


def _from_events() -> sse.SseToMetadata:
    # No limit on matches: with continuous_usage_stats every event has a usage, and only the last is whole.
    rules = [
        parser.JsonContentParserRuleConfig(rule=_rule(key, path)) for key, path in (*COMPLETIONS, *RESPONSES_STREAM)
    ]
    return sse.SseToMetadata(
        response_rules=sse.SseToMetadataProcessingRules(
            content_parser=extension("envoy.content_parsers.json", parser.JsonContentParser(rules=rules)),
            max_event_size=MAX_EVENT_BYTES,
        )
    )


def _rule(key: str, path: tuple[str, ...]) -> to_metadata.JsonToMetadataRule:
    return to_metadata.JsonToMetadataRule(
        selectors=[to_metadata.JsonToMetadataSelector(key=part) for part in path],
        on_present=to_metadata.JsonToMetadataKeyValuePair(
            metadata_namespace=names.USAGE_NAMESPACE, key=key, type=to_metadata.JsonToMetadataValueType.NUMBER
        ),
    )
