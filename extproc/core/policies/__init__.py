"""The policies, one small file per family, registered by name."""

from extproc.core.policies import affinity, least, predicted, rotation, token_aware
from extproc.core.policies.base import REGISTRY, Policy, PolicyError, Ranking, create, options

__all__ = [
    "REGISTRY",
    "Policy",
    "PolicyError",
    "Ranking",
    "affinity",
    "create",
    "least",
    "options",
    "predicted",
    "rotation",
    "token_aware",
]
