"""Files by which Envoy finds the API keys of providers: each names the file of a key, and no key is read here.

Envoy (1.40) reads a key again when its file is replaced only for secrets that it was told of by such a file; one that stands in the
bootstrap it reads at its start alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from extproc.config import Config, ProviderConfig
from extproc.envoy import names
from extproc.envoy.endpoints import EndpointsError, remedy, replace_file

SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"


def file_of(endpoints_file: Path, provider: str) -> Path:
    """Beside the files of members, where extproc writes and Envoy reads: `provider_<name>_key.json`."""
    return endpoints_file.with_name(f"{names.provider_key(provider)}.json")


def write(config: Config) -> None:
    """Write the file of each provider that wants a key, where it says something else. Raises EndpointsError.

    Envoy refuses to start without them.
    """
    for provider in config.providers:
        if provider.api_key_file is not None:
            _write(file_of(config.envoy.endpoints_file, provider.name), render(provider, provider.api_key_file))


def render(provider: ProviderConfig, key_file: Path) -> bytes:
    """A DiscoveryResponse in JSON with the one secret."""
    secret = {
        "@type": SECRET,
        "name": names.provider_key(provider.name),
        "generic_secret": {"secret": {"filename": str(key_file)}},
    }
    return json.dumps({"resources": [secret]}).encode() + b"\n"


def _write(path: Path, text: bytes) -> None:
    try:
        if not path.exists() or path.read_bytes() != text:
            replace_file(path, text)
    except OSError as e:
        raise EndpointsError(remedy(path, e)) from e
