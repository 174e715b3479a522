"""The demo's own file: fleet, load and ports. Everything else follows from it; nothing is written into the code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from extproc.config import Config, ConfigError, Section, mistakes, parse, yaml_mistake
from extproc.sim.spec import BackendSpec
from extproc.sim.workload import Workload

DEFAULT = Path("deploy/demo.yaml")
HOST = "127.0.0.1"


class Group(Section):
    """Replicas of one kind."""

    gpu: str = "h100"
    """a100, h100 or h200: sets the time of a step."""
    tp: int = Field(default=1, ge=1)
    """Tensor parallelism."""
    pp: int = Field(default=1, ge=1)
    """Pipeline stages."""
    count: int = Field(default=1, ge=1, le=100)
    """How many of them."""
    num_blocks: int = Field(default=25_000, ge=1)
    """KV cache in blocks of 16 tokens."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences in one step."""
    max_num_batched_tokens: int = Field(default=8192, ge=256)
    """Tokens in one step."""
    weight: float = Field(default=1.0, gt=0)
    """Share under the `weighted` policy."""


class DemoSettings(Section):
    """The whole file."""

    model: str = "llama-3.1-8b"
    """Name that the replicas serve."""
    model_size: str = "8b"
    """Size of that model; with GPU and parallelism it sets the time of a step."""
    fleet: tuple[Group, ...] = Field(default=(Group(),), min_length=1)
    """The replicas, by kind."""
    time_scale: float = Field(default=1.0, gt=0, le=1000)
    """Above 1 the simulated GPUs are slower than real by this factor, so that a small machine keeps up with them."""
    workload: Workload = Workload()
    ports: int = Field(default=10_000, ge=1, le=65_000)
    """First port: Envoy; then its admin, extproc's gRPC and HTTP, and from ten above it one for each replica."""
    baselines: tuple[Literal["round_robin", "least_request", "random"], ...] = ("round_robin",)
    """Envoy's own policies that the same load meets afterwards, one run each."""
    extproc: dict[str, Any] = Field(default={})
    """Merged over the configuration made for extproc, key by key; lists are replaced. `pools` may be left out: `pool` changes the one there is."""
    pool: dict[str, Any] = Field(default={})
    """Merged over the pool's configuration: `{policy: round_robin}`, say."""
    run_limit_s: float = Field(default=75.0, gt=0)
    """Longest time for one run of the load, seconds; what is not finished then counts as an error."""

    @property
    def replicas(self) -> int:
        return sum(group.count for group in self.fleet)


@dataclass(frozen=True, slots=True)
class Ports:
    """Where everything listens, counted from the first."""

    first: int
    replicas: int

    @property
    def envoy(self) -> str:
        return f"{HOST}:{self.first}"

    @property
    def admin(self) -> str:
        return f"{HOST}:{self.first + 1}"

    @property
    def grpc(self) -> str:
        return f"{HOST}:{self.first + 2}"

    @property
    def http(self) -> str:
        return f"{HOST}:{self.first + 3}"

    def replica(self, number: int) -> int:
        return self.first + 10 + number

    def all(self) -> list[int]:
        return [*range(self.first, self.first + 4), *map(self.replica, range(self.replicas))]


def load_settings(path: Path) -> DemoSettings:
    """Read the file. Raises ConfigError with one line for each mistake."""
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; pass --config with the path of a demo file") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not YAML: {yaml_mistake(e)}") from None
    try:
        return DemoSettings.model_validate(raw or {})
    except ValidationError as e:
        raise ConfigError("\n".join(f"{path}: {mistake}" for mistake in mistakes(e, DemoSettings))) from None


# --- what follows from it -------------------------------------------------------------------------------------------------


def backends(settings: DemoSettings) -> list[BackendSpec]:
    """The fleet as simulated replicas, in the order of the file."""
    ports = Ports(settings.ports, settings.replicas)
    return [
        BackendSpec(
            port=ports.replica(number),
            host=HOST,
            labels=_labels(settings, group),
            model=settings.model,
            num_blocks=group.num_blocks,
            max_num_seqs=group.max_num_seqs,
            max_num_batched_tokens=group.max_num_batched_tokens,
            mean_output_tokens=settings.workload.output_tokens,
            time_scale=settings.time_scale,
        )
        for number, group in enumerate(_each(settings))
    ]


def extproc_config(settings: DemoSettings) -> dict[str, Any]:
    """Configuration of extproc itself, with `extproc` and `pool` merged in; relative paths mean the directory of the file."""
    ports = Ports(settings.ports, settings.replicas)
    pool = {
        "models": [settings.model],
        "replicas": [
            {"address": f"{HOST}:{ports.replica(n)}", "labels": _labels(settings, group), "weight": group.weight}
            for n, group in enumerate(_each(settings))
        ],
    }
    generated = {
        "listen": {"grpc": ports.grpc, "http": ports.http},
        "pools": [merged(pool, settings.pool)],
        "envoy": {
            "listen": ports.envoy,
            "admin": ports.admin,
            "endpoints_file": "endpoints.json",
            "bootstrap_file": "envoy.json",
        },
    }
    return merged(generated, settings.extproc)


def checked(config: dict[str, Any], directory: Path) -> Config:
    """The same, typed. Raises ConfigError for mistakes in `extproc` or `pool`."""
    return parse(yaml.safe_dump(config), source="demo, with extproc and pool merged in", base=directory)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings key by key, at any depth; everything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def _each(settings: DemoSettings) -> Iterator[Group]:
    for group in settings.fleet:
        yield from (group,) * group.count


def _labels(settings: DemoSettings, group: Group) -> dict[str, str]:
    return {"gpu": group.gpu, "tp": str(group.tp), "pp": str(group.pp), "model_size": settings.model_size}
