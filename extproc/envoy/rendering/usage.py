"""Token counts of responses into dynamic metadata, inside Envoy: no response byte goes through Python.

One Lua script (usage.lua) and not Envoy's two filters for it, because (Envoy 1.40, measured)
* json_to_metadata holds the response back to parse it, and makes a 500 of one above the buffer limit: embeddings of a batch, say;
* sse_to_metadata costs as much per event as the script (3.5 us of Envoy's CPU), which must read marked streams anyway, and is marked
  as work in progress, outside of Envoy's threat model.
"""

from __future__ import annotations

from importlib import resources

import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.extensions.filters.http.lua.v3 as lua
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm

from extproc.envoy import names
from extproc.envoy.rendering.messages import http_filter


def reader() -> hcm.HttpFilter:
    """The filter that runs the script."""
    return http_filter("envoy.filters.http.lua", lua.Lua(default_source_code=core.DataSource(inline_string=script())))


def script() -> str:
    """usage.lua with the names that it shares with us put in."""
    text = resources.files("extproc.envoy.rendering").joinpath("usage.lua").read_text()
    for key in (
        "USAGE_NAMESPACE",
        "NAMESPACE",
        "STRIP_USAGE",
        "PROMPT_TOKENS",
        "COMPLETION_TOKENS",
        "CACHED_TOKENS",
        "BROKEN",
    ):
        text = text.replace(f"@{key}@", getattr(names, key))
    return text
