"""What connections are made with: passwords as they are at that moment, and for whom."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import AuthenticationError

from extproc.adapters.shared.redis_client import Credentials, connect, disconnect
from extproc.config import Shared
from extproc.redis_url import parse


def credentials(**settings: object) -> Credentials:
    shared = Shared.model_validate({"url": "redis://r", **settings})
    return Credentials(shared, parse(shared.url))


def test_password_is_read_when_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "password"
    from_file = credentials(password_file=path)
    with pytest.raises(AuthenticationError, match=r"shared\.password_file: No such file"):
        from_file.get_credentials()
    path.write_text("Sesame\n")
    assert from_file.get_credentials() == ("Sesame",)
    path.write_bytes(b"\xff")
    with pytest.raises(AuthenticationError, match="not UTF-8"):
        from_file.get_credentials()

    from_env = credentials(password_env="REDIS_SECRET", username="me")
    with pytest.raises(AuthenticationError, match=r"shared\.password_env: no such"):
        from_env.get_credentials()
    monkeypatch.setenv("REDIS_SECRET", "Sesame")
    assert from_env.get_credentials() == ("me", "Sesame")
    assert credentials(url="redis://me:other@r").get_credentials() == ("me", "other")
    assert "Sesame" not in repr(from_env)


@pytest.mark.parametrize("wanted", [True, False])
async def test_sentinels_get_the_password_only_where_they_want_it(wanted: bool) -> None:
    url = "redis+sentinel://me:Sesame@a,b/main"
    client = connect(Shared(url=url, sentinel_auth=wanted), "name")
    assert isinstance(client, Redis)
    pool = client.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert isinstance(pool.connection_kwargs["credential_provider"], Credentials)
    for sentinel in pool.sentinel_manager.sentinels:
        assert (sentinel.connection_pool.connection_kwargs.get("credential_provider") is not None) == wanted
    await disconnect(client)
