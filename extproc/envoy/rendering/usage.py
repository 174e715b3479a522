"""Token counts of responses into dynamic metadata, inside Envoy: no response byte goes through Python.

chat, completions, embeddings   {"usage": {"prompt_tokens", "completion_tokens", "prompt_tokens_details": {"cached_tokens"}}}
/v1/responses                   {"usage": {"input_tokens", "output_tokens", "input_tokens_details": {"cached_tokens"}}}
                                and in its stream the same one level down, under "response" of the event `response.completed`
"""

from __future__ import annotations

from importlib import resources

import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.extensions.content_parsers.json.v3 as parser
import envoy_data_plane.envoy.extensions.filters.http.json_to_metadata.v3 as to_metadata
import envoy_data_plane.envoy.extensions.filters.http.lua.v3 as lua
import envoy_data_plane.envoy.extensions.filters.http.sse_to_metadata.v3 as sse
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm

from extproc.envoy import names
from extproc.envoy.rendering.messages import extension, http_filter

COMPLETIONS = (
    (names.PROMPT_TOKENS, ("usage", "prompt_tokens")),
    (names.COMPLETION_TOKENS, ("usage", "completion_tokens")),
    (names.CACHED_TOKENS, ("usage", "prompt_tokens_details", "cached_tokens")),
)
RESPONSES = (
    (names.PROMPT_TOKENS, ("response", "usage", "input_tokens")),
    (names.COMPLETION_TOKENS, ("response", "usage", "output_tokens")),
    (names.CACHED_TOKENS, ("response", "usage", "input_tokens_details", "cached_tokens")),
)

MAX_EVENT_BYTES = 1024 * 1024
"""Longest server-sent event that is read. `response.completed` repeats the whole output; the default of 8 KiB would lose its usage."""


def filters() -> list[hcm.HttpFilter]:
    """Streams are read by sse_to_metadata, JSON by a Lua script that also takes out the usage event of a marked stream.

    The script is the first in the list, so the last on the response: the event has been read when it goes. For JSON there is a
    json_to_metadata, but it holds the response back to parse it, and a response above the buffer limit (embeddings of a batch, say)
    becomes a 500.
    """
    return [
        http_filter("envoy.filters.http.lua", lua.Lua(default_source_code=core.DataSource(inline_string=script()))),
        http_filter("envoy.filters.http.sse_to_metadata", _from_events()),
    ]


def script() -> str:
    """usage.lua with the names that it shares with us put in."""
    text = resources.files("extproc.envoy.rendering").joinpath("usage.lua").read_text()
    for key in ("USAGE_NAMESPACE", "NAMESPACE", "STRIP_USAGE", "PROMPT_TOKENS", "COMPLETION_TOKENS", "CACHED_TOKENS"):
        text = text.replace(f"@{key}@", getattr(names, key))
    return text


def _from_events() -> sse.SseToMetadata:
    # No limit on matches: with continuous_usage_stats every event has a usage, and only the last is whole.
    rules = [parser.JsonContentParserRuleConfig(rule=_rule(key, path)) for key, path in (*COMPLETIONS, *RESPONSES)]
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
