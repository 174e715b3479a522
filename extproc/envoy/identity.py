"""Who asks: from verified claims, from an API key, or from a header that a gateway in front has set. No I/O.

Claims go before keys, for Envoy has verified them. Where either is configured the header counts for nothing: a client could write any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from hashlib import blake2b

from extproc.config import Tenants
from extproc.core.record import record
from extproc.envoy.exchange import Head
from extproc.envoy.tenants import Plan, Plans
from extproc.openai import errors
from extproc.openai.errors import HttpError
from extproc.openai.keys import HEADERS, Keys, hasher, presented

DIGEST_BYTES = 8
"""Of a tenant's hash: enough that a million tenants collide with a chance of 3e-8."""
SALT_BYTES = 16
MAX_TENANT = 256
"""Longest name of a tenant, characters; a longer one is unknown."""
ANONYMOUS = ""
"""Nobody's name; all the anonymous share it."""


class Source(StrEnum):
    """How a client was known; also a metric label."""

    JWT = "jwt"
    KEY = "key"
    HEADER = "header"
    ANONYMOUS = "anonymous"
    REFUSED = "refused"  # 401


@record
class Who:
    """A client that may go on."""

    tenant: str
    """Keyed hash of its name."""
    plan: Plan
    cache_salt: bool = False
    """The engine's cache is to be told of the tenant as well."""


Named = tuple[str, str | None]
"""A tenant and its tier."""


class Identity:
    """Tells who asks, by the configuration."""

    def __init__(
        self, tenants: Tenants, tenant_header: str | None, secret: bytes, key: bytes, keys: Keys | None
    ) -> None:
        """`secret` is that of the file of keys, `key` that of tenants' hashes; `keys` None where there are none."""
        self._tenants = tenants
        self._plans = Plans(tenants)
        self._hash, self._key, self._keys = hasher(secret), key, keys
        self._tenant_header = (tenant_header or "").lower()
        self._tier_header = (tenants.tier_header or "").lower()
        self.sources: Counter[Source] = Counter()

    @property
    def headers(self) -> frozenset[str]:
        """The request headers that are read, lower case."""
        keys = HEADERS if self._keys is not None else ()
        return frozenset({*keys, self._tenant_header, self._tier_header} - {""})

    def of(self, head: Head, counts: bool = True) -> Who | HttpError:
        """Who asks; an answer 401 to whoever may not. `counts`: it is not asked of this request again."""
        source, named = self._named(head)
        refused = named is None and self._tenants.unknown == "refuse"
        if counts:
            self.sources[Source.REFUSED if refused else source if named else Source.ANONYMOUS] += 1
        if refused:
            return errors.unauthorized(presented(head.headers or {}) is not None)
        return self._who(ANONYMOUS, self._plans.anonymous()) if named is None else self.named(*named)

    def named(self, tenant: str, tier: str | None) -> Who:
        """The client of that name, with the tier that its key or claims name."""
        return self._who(tenant, self._plans.of(tenant, tier))

    def _who(self, name: str, plan: Plan) -> Who:
        return Who(hashed(name, self._key), plan, self._tenants.send_cache_salt)

    def salt(self, who: Who, own: str | None) -> str:
        """For the engine's cache: of the tenant, and of the client's own salt, so that nobody can write another's."""
        text = f"{who.tenant}\0{own or ''}".encode("utf-8", "replace")
        return blake2b(text, digest_size=SALT_BYTES, key=self._key, person=b"cache salt").hexdigest()

    def _named(self, head: Head) -> tuple[Source, Named | None]:
        """By the first way that is configured and says something."""
        tenants, headers = self._tenants, head.headers or {}
        if tenants.jwt is not None and (named := self._by_claims(head.claims)) is not None:
            return Source.JWT, named
        if self._keys is not None:
            return Source.KEY, self._by_key(headers, self._keys)
        if tenants.jwt is not None:
            return Source.JWT, None
        name = headers.get(self._tenant_header, "") if self._tenant_header else ""
        return Source.HEADER, (name, headers.get(self._tier_header)) if 0 < len(name) <= MAX_TENANT else None

    def _by_key(self, headers: Mapping[str, str], keys: Keys) -> Named | None:
        key = presented(headers)
        entry = keys.find(self._hash(key)) if key else None
        return None if entry is None else (entry.tenant, entry.tier)

    def _by_claims(self, payloads: Mapping[str, object] | None) -> Named | None:
        jwt = self._tenants.jwt
        claims = (payloads or {}).get(jwt.payload) if jwt is not None else None
        if jwt is None or not isinstance(claims, Mapping):
            return None
        name = claim(claims, jwt.tenant_claim)
        if name is None or not 0 < len(name) <= MAX_TENANT:
            return None
        return name, claim(claims, jwt.tier_claim) if jwt.tier_claim else None


def hashed(name: str, key: bytes) -> str:
    """A tenant's name as it is kept."""
    return blake2b(name.encode("utf-8", "replace"), digest_size=DIGEST_BYTES, key=key).hexdigest()


def claim(claims: Mapping[str, object], path: str) -> str | None:
    """A claim that is text, by its name, or by a path with dots where no claim has that name."""
    value: object = claims.get(path)
    if value is None:
        value = claims
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None
