"""Tenants of one process: what is read at the start, and what /metrics tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from extproc.adapters.keys import KeyFileError
from extproc.adapters.metrics_tenants import TenantCollector
from extproc.adapters.tasks import Tasks
from extproc.adapters.tenancy import Tenancy
from extproc.app import App, StartError
from extproc.config import Config, Shared
from extproc.core.account import Account, Rate
from extproc.core.admission.limits import Limits, Loss
from extproc.core.types import Request
from tests.e2e.stack import configured
from tests.support.redis import RedisServer
from tests.support.waiting import until

POOL = {"replicas": ["127.0.0.1:9"]}


def config(directory: Path, **tenants: Any) -> Config:
    return configured(directory, POOL, tenants={"unknown": "anonymous", **tenants})


def test_without_tenants_there_is_nothing_to_do(tmp_path: Path) -> None:
    made = Tenancy(configured(tmp_path, POOL), Limits(), lambda: 0.0, "r")
    assert (made.secret, made.keys, made.waits) == (None, None, False)


def test_files_are_read_at_the_start_and_their_absence_told(tmp_path: Path) -> None:
    files = {"secret_file": "secret", "keys_file": "keys.yaml"}
    with pytest.raises(KeyFileError, match="secret: No such file"):
        Tenancy(config(tmp_path, **files), Limits(), lambda: 0.0, "r")
    (tmp_path / "secret").write_text("0123456789abcdef\n")
    with pytest.raises(StartError, match=r"tenants: .*keys\.yaml: No such file"):
        App(config(tmp_path, **files))
    (tmp_path / "keys.yaml").write_text("keys: []\n")
    made = Tenancy(config(tmp_path, **files), Limits(), lambda: 0.0, "r")
    assert made.secret == b"0123456789abcdef"
    assert made.keys is not None


async def test_limits_are_shared_as_long_as_there_are_settings(tmp_path: Path) -> None:
    limits, tasks = Limits(), Tasks()
    async with RedisServer() as redis:
        told = {"on_loss": "closed", "strict": True}
        (tmp_path / "secret").write_text("0123456789abcdef\n")
        with_shared = config(tmp_path, secret_file="secret", sharing=told)
        made = Tenancy(with_shared, limits, lambda: 0.0, "r")
        made.start(tasks, Shared(url=redis.url))
        assert limits.sharing is not None
        assert (limits.sharing.loss, limits.sharing.strict, made.waits) == (Loss.CLOSED, True, True)
        await until(lambda: not limits.away)
        made.share(tasks, None)
        assert not shares(limits)
        await tasks.stop()


def shares(limits: Limits) -> bool:
    return limits.sharing is not None


def test_labels_are_tiers_and_tenants_only_where_they_are_named() -> None:
    limits, registry = Limits(), CollectorRegistry()
    registry.register(TenantCollector(limits, lambda: {"key": 3}, lambda: 2, lambda: (5, 1)))
    for tenant, label in (("t1", ""), ("t2", "acme")):
        account = Account(tenant, "free", label, requests=Rate(1, 1))
        for i in range(3):
            if limits.check(Request(account=account), 1, 0.0, 0.0) is None:
                limits.take(f"{tenant}{i}", account, 1.0, 0.0)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    for label in ("", "acme"):
        assert value("extproc_tenant_requests_total", tier="free", tenant=label, result="admitted") == 1
        assert value("extproc_tenant_requests_total", tier="free", tenant=label, result="rate_limited") == 2
    assert value("extproc_clients_total", source="key") == 3
    assert value("extproc_key_file_errors_total") == 2
    assert value("extproc_limit_rounds_total", result="ok") == 4
    assert value("extproc_limits_shared") == 0
