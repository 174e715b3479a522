"""The configuration file: typed, frozen, a default and a docstring for each field, unknown keys refused with their dotted path.

`load(path)` is the only reader. docs/configuration.md is generated from the docstrings of the sections.
"""

from __future__ import annotations

from extproc.config.base import Address as Address
from extproc.config.base import ConfigError as ConfigError
from extproc.config.base import Name as Name
from extproc.config.base import Section as Section
from extproc.config.base import zmq_endpoint as zmq_endpoint
from extproc.config.discovery import DnsDiscovery as DnsDiscovery
from extproc.config.discovery import InferencePoolDiscovery as InferencePoolDiscovery
from extproc.config.discovery import KubernetesDiscovery as KubernetesDiscovery
from extproc.config.models import ModelConfig as ModelConfig
from extproc.config.models import ProviderConfig as ProviderConfig
from extproc.config.models import TargetConfig as TargetConfig
from extproc.config.models import WhenConfig as WhenConfig
from extproc.config.pools import DisaggregationConfig as DisaggregationConfig
from extproc.config.pools import Gpus as Gpus
from extproc.config.pools import Health as Health
from extproc.config.pools import KvEvents as KvEvents
from extproc.config.pools import PoolConfig as PoolConfig
from extproc.config.pools import ReplicaConfig as ReplicaConfig
from extproc.config.pools import Scrape as Scrape
from extproc.config.pools import TokenizerConfig as TokenizerConfig
from extproc.config.reading import load as load
from extproc.config.reading import mistakes as mistakes
from extproc.config.reading import parse as parse
from extproc.config.reading import yaml_mistake as yaml_mistake
from extproc.config.root import READING_LIMIT_S as READING_LIMIT_S
from extproc.config.root import Config as Config
from extproc.config.root import EnvoyConfig as EnvoyConfig
from extproc.config.root import Requests as Requests
from extproc.config.root import Shared as Shared
from extproc.config.scaling import Scaling as Scaling
from extproc.config.tenants import Limits as Limits
from extproc.config.tenants import Tenants as Tenants
from extproc.config.tenants import Tier as Tier
