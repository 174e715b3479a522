"""What one run of `make chaos` is: fleet, load and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MODEL = "sim"
TENANT_HEADER = "x-tenant"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who sends a share of the load."""

    share: float
    priority: int


@dataclass(frozen=True, slots=True)
class Settings:
    """Defaults are what docs/chaos.md shows."""

    replicas: int = 6
    labels: Mapping[str, str] = field(default_factory=lambda: {"gpu": "a100", "tp": "2", "model_size": "70b"})
    """Slow enough that two shared cores carry the clients, Envoy and all replicas at twice the load that saturates them."""
    rate: float = 10.0
    """Requests a second of the steady load (Poisson), about half of what saturates the fleet."""
    saturation: float = 20.0
    """Requests of this kind a second that the fleet can just carry; see `python -m tests.chaos.run --saturation`."""
    groups: int = 8
    """System prompts, each shared by several sessions."""
    sessions: int = 24
    system_tokens: int = 600
    session_tokens: int = 400
    question_tokens: int = 500
    """What is new in each request."""
    alone_share: float = 0.25
    """Requests that share nothing with any other: the cheapest place for them is the least loaded, not the best known."""
    output_tokens: tuple[int, int] = (8, 24)
    """Fewest and most; uniform."""
    stream_share: float = 0.7
    tenants: Mapping[str, Tenant] = field(
        default_factory=lambda: {"gold": Tenant(0.2, 10), "silver": Tenant(0.5, 0), "batch": Tenant(0.3, -10)}
    )
    request_timeout_s: float = 30.0
    """The clients' patience."""
    lead_s: float = 2.5
    """Load before each fault."""
    tail_s: float = 1.5
    """Load after the recovery."""
    recovery_limit_s: float = 15.0
    """A recovery that takes longer is not waited for."""
    settle_s: float = 40.0
    """For the last flights to end after the load: `requests.flight_ttl_s`, and some."""
    max_open: int = 1500
    """Requests open at one time; beyond, the clients stop sending."""
    limit_s: float = 585.0
    """For the whole run."""
    seed: int = 1
