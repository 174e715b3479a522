"""What tenants need around the core: the secret, the file of keys, and, where routers share, the leases of their limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from extproc.adapters.keys import KeyFile, read_secret
from extproc.adapters.leasing import Leasing
from extproc.adapters.metrics_tenants import TenantCollector
from extproc.adapters.tasks import Tasks
from extproc.config import Config, Shared, Tenants
from extproc.core.account import Account
from extproc.core.admission.limits import Limits, Loss, Sharing


class Tenancy:
    """Of one process. Does nothing where no tenants are configured."""

    def __init__(self, config: Config, limits: Limits, clock: Callable[[], float], router: str) -> None:
        """`router` is this process's name among others. Raises KeyFileError where the secret or the keys cannot be read."""
        tenants = config.tenants
        self._tenants, self._limits, self._clock, self._router = tenants, limits, clock, router
        self.secret = None if tenants is None or tenants.secret_file is None else read_secret(tenants.secret_file)
        self.keys = None if tenants is None or tenants.keys_file is None else KeyFile(tenants.keys_file)
        if self.keys is not None:
            self.keys.load()
        self._leasing: Leasing | None = None

    def __repr__(self) -> str:
        return f"<Tenancy {self.keys!r}, {self._limits!r}>"

    @property
    def waits(self) -> bool:
        """Whether requests may have to wait for leases."""
        return self._tenants is not None and self._tenants.sharing.strict

    def start(self, tasks: Tasks, shared: Shared | None) -> None:
        """Follow the file of keys, and share limits where told to."""
        if self.keys is not None:
            tasks.start("keys", self.keys.run)
        if shared is not None:
            self.share(tasks, shared)

    def share(self, tasks: Tasks, shared: Shared | None) -> None:
        """From now on keep limits with these settings, or alone where there are none."""
        if self._tenants is None:
            return
        told = self._tenants.sharing
        self._limits.sharing = None if shared is None else Sharing(loss=Loss(told.on_loss), strict=told.strict)
        self._limits.away = True
        tasks.start("limits", partial(self._lease, shared, self._tenants))

    async def _lease(self, shared: Shared | None, tenants: Tenants) -> None:
        if shared is None:
            self._leasing = None
            return
        from extproc.adapters.shared.redis_limits import RedisStore  # 40 ms and 5 MB, which only those pay who share

        self._leasing = Leasing(
            self._limits,
            RedisStore(shared, self._router),
            self._clock,
            strict_wait_s=tenants.sharing.strict_wait_s,
            max_pause_s=shared.max_pause_s,
        )
        await self._leasing.run()

    async def before(self, accounts: list[Account]) -> None:
        """Wait for leases, where limits are strict; see Leasing."""
        if self._leasing is not None and accounts:
            await self._leasing.before(accounts)

    def collector(self, sources: Callable[[], Mapping[str, int]]) -> TenantCollector:
        """Metrics of all this. `sources` counts clients by how they were known."""

        def rounds() -> tuple[int, int]:
            leasing = self._leasing
            return (0, 0) if leasing is None else (leasing.rounds, leasing.failures)

        return TenantCollector(self._limits, sources, lambda: self.keys.errors if self.keys else 0, rounds)
