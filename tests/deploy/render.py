"""The files of deploy/ that come from others. `python -m tests.deploy.render` writes them again; a test says when they differ.

* Envoy's bootstraps, from the extproc.yaml beside them, as `extproc envoy` renders them.
* The alerts as a PrometheusRule, from deploy/prometheus/alerts.yaml.
* The lock file of the image: the part of requirements.lock that the service needs.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import requires
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from extproc.config import load
from extproc.envoy import bootstrap

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"

HEAD = "# Written by `python -m tests.deploy.render` from {source}; do not edit.\n"

EXTRAS = ("kubernetes", "dns", "events")
"""Of extproc's own, those that the image has."""
IMAGE = {"sys_platform": "linux", "os_name": "posix", "platform_system": "Linux", "implementation_name": "cpython"}
"""Of the environment for which the image is built, what decides in markers of packages; both architectures have the same."""


def envoy(config: Path) -> str:
    """The bootstrap for a configuration of extproc."""
    rendered = bootstrap.text(bootstrap.render(load(config)), as_yaml=True)
    return HEAD.format(source=config.name) + rendered


def rules() -> str:
    """The alerts in the shape that Prometheus' operator takes."""
    source = DEPLOY / "prometheus" / "alerts.yaml"
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "extproc"},
        "spec": yaml.safe_load(source.read_text()),
    }
    return HEAD.format(source="deploy/prometheus/alerts.yaml") + yaml.safe_dump(rule, sort_keys=False, width=120)


# --- the lock file ----------------------------------------------------------------------------------------------------


def image_lock() -> str:
    """Blocks of requirements.lock, with their hashes, for what the service needs and for what builds it.

    What a package needs is read from those installed here. Raises KeyError for a package that requirements.lock lacks.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    wanted += [text for extra in EXTRAS for text in optional.get(extra, ())]
    blocks = _blocks((ROOT / "requirements.lock").read_text())
    return HEAD.format(source="requirements.lock") + "".join(blocks[name] for name in sorted(_closure(wanted)))


def _closure(wanted: list[str]) -> set[str]:
    found: set[str] = set()
    open_ends = [Requirement(text) for text in wanted]
    while open_ends:
        requirement = open_ends.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            found.add(name)
            open_ends += _needs(name, requirement.extras)
    return found


def _needs(name: str, extras: set[str]) -> Iterator[Requirement]:
    for text in requires(name) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**IMAGE, "extra": extra}) for extra in ("", *extras)):
            yield requirement


def _blocks(lock: str) -> dict[str, str]:
    """Package -> its line and its hashes, without the comments on who wanted it."""
    lines = "\n".join(line for line in lock.splitlines() if not line.lstrip().startswith("#"))
    blocks = re.findall(r"^(?=\S)(?:.+\\\n)*.+(?:\n|\Z)", lines, re.MULTILINE)
    return {canonicalize_name(re.split(r"[=\[ ;]", block)[0]): block.rstrip("\n") + "\n" for block in blocks}


FILES: dict[Path, Callable[[], str]] = {
    DEPLOY / "compose" / "envoy.yaml": partial(envoy, DEPLOY / "compose" / "extproc.yaml"),
    KUBERNETES / "overlays" / "sidecar" / "envoy.yaml": partial(
        envoy, KUBERNETES / "overlays" / "sidecar" / "extproc.yaml"
    ),
    **{
        DEPLOY / "interplay" / system / "envoy.yaml": partial(envoy, DEPLOY / "interplay" / system / "extproc.yaml")
        for system in ("production-stack", "dynamo")
    },
    KUBERNETES / "components" / "monitoring" / "rules.yaml": rules,
    DEPLOY / "requirements.lock": image_lock,
}


def main() -> None:
    for path, content in FILES.items():
        path.write_text(content())


if __name__ == "__main__":
    main()
