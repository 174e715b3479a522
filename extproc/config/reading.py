"""From the text of the file to its sections, or to one line for each mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from extproc.config.base import (
    ConfigError,
    Section,
)
from extproc.config.discovery import (
    Discovery,
)
from extproc.config.pools import (
    PoolConfig,
)
from extproc.config.root import (
    Config,
)
from extproc.core.policies import PolicyError, create

S = TypeVar("S", bound="Section")


def load(path: Path) -> Config:
    """Read and validate a configuration file.

    Relative paths in it are taken from the directory of the file. Raises ConfigError with one line for each mistake.
    """
    try:
        text = path.read_text()
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; pass --config with the path of a YAML file") from None
    return parse(text, source=str(path), base=path.parent)


def parse(text: str, source: str = "config", base: Path = Path()) -> Config:
    """Validate YAML text. `source` is how errors name it; relative paths in it are taken from `base`."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"{source}: not YAML: {yaml_mistake(e)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: must be a mapping with the key pools; see docs/configuration.md")
    try:
        config = Config.model_validate(raw)
    except ValidationError as e:
        raise ConfigError("\n".join(f"{source}: {mistake}" for mistake in mistakes(e, Config))) from None
    _check_policies(config, source)
    return _absolute(_with_pool_labels(config), base)


def mistakes(error: ValidationError, root: type[Section]) -> list[str]:
    """What is wrong, one line each: dotted path below `root`, the mistake, the remedy. For every file and option that is a Section."""
    return list(dict.fromkeys(_line(each, root) for each in _causes(error.errors())))


def yaml_mistake(error: yaml.YAMLError) -> str:
    """Where the text stops being YAML, and why, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else " ".join(str(error).split())


def _check_policies(config: Config, source: str) -> None:
    for i, pool in enumerate(config.pools):
        try:
            create(pool.policy, pool.policy_options)
        except PolicyError as e:
            raise ConfigError(f"{source}: pools[{i}].policy: {e}") from None


def _causes(errors: Sequence[Any]) -> list[Any]:
    """Without the lists called too short only because an item in them is wrong."""
    places = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(p != error["loc"] and p[: len(error["loc"])] == error["loc"] for p in places)
    ]


def _line(error: Any, root: type[Section]) -> str:
    """One mistake: dotted path, what is wrong, what to do."""
    loc = [part for part in error["loc"] if part != "function-before"]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    text = re.sub(r"^Value error, ", "", error["msg"])
    if error["type"] == "extra_forbidden":
        return f"{where}: no such key{_suggestion(loc, root)}"
    text = text[0].lower() + text[1:]
    if error["type"] == "missing":
        text = "is missing; add it"
    elif error["type"] == "too_short":
        text = f"needs at least {error['ctx']['min_length']} item"
    elif not error["type"].startswith("value_error"):
        text += f", not {_shown(error['input'])}"
    return f"{where}: {text}" if where else text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _suggestion(loc: list[Any], root: type[Section]) -> str:
    """The keys that stand there, nearest first."""
    section: Any = root
    for part in loc[:-1]:
        if isinstance(part, str) and (field := getattr(section, "model_fields", {}).get(part)):
            section = _section_in(field.annotation)
    keys = list(getattr(section, "model_fields", {}))
    if near := difflib.get_close_matches(str(loc[-1]), keys, n=1):
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(keys)}" if keys else "; remove it"


def _section_in(annotation: Any) -> Any:
    """The Section class inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_in(inner)) is not None:
            return found
    return None


def _with_pool_labels(config: Config) -> Config:
    """Give each fixed replica its pool's labels."""
    pools = tuple(
        pool.model_copy(
            update={
                "replicas": tuple(r.model_copy(update={"labels": {**pool.labels, **r.labels}}) for r in pool.replicas)
            }
        )
        for pool in config.pools
    )
    return config.model_copy(update={"pools": pools})


def _absolute(config: Config, base: Path) -> Config:
    """Resolve relative paths against the directory of the file."""

    def absolute(path: Path) -> Path:
        return path if path.is_absolute() else (base / path).absolute()

    def placed(source: S | None) -> S | None:
        if source is None:
            return None
        paths = {n: absolute(v) for n in type(source).model_fields if isinstance(v := getattr(source, n), Path)}
        return source.model_copy(update=paths)

    def found(discovery: Discovery) -> Discovery:
        return discovery.model_copy(update={n: placed(getattr(discovery, n)) for n in Discovery.model_fields})

    def of_pool(pool: PoolConfig) -> PoolConfig:
        found_in = found(pool.discovery) if pool.discovery else None
        return pool.model_copy(update={"discovery": found_in, "tokenizer": placed(pool.tokenizer)})

    pools = tuple(map(of_pool, config.pools))
    envoy = config.envoy.model_copy(
        update={
            "endpoints_file": absolute(config.envoy.endpoints_file),
            "bootstrap_file": absolute(config.envoy.bootstrap_file),
            "access_log": absolute(config.envoy.access_log) if config.envoy.access_log else None,
        }
    )
    shared = placed(config.shared)
    if shared is not None:
        shared = shared.model_copy(update={"tls": placed(shared.tls)})
    providers = tuple(placed(provider) for provider in config.providers)
    tenants = placed(config.tenants)
    return config.model_copy(
        update={"pools": pools, "providers": providers, "envoy": envoy, "shared": shared, "tenants": tenants}
    )
