"""Schemas of the kinds of Kubernetes that deploy/ uses: a trimmed copy, so that checking against them needs no package of 100 MiB.

`python -m tests.deploy.schemas` writes the copy again, from the package kubernetes-validate where that is installed (no part of the
development packages). It has what kubernetes-validate has, strictly: no key that a kind does not know. Descriptions are left out, and
`status`, which no manifest sets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tests.deploy.render import ROOT

Json = dict[str, Any]

VERSION = "1.34"
PATH = ROOT / "tests" / "fixtures" / "kubernetes" / f"schemas-{VERSION}.json"
KINDS = (
    "configmap-v1",
    "deployment-apps-v1",
    "horizontalpodautoscaler-autoscaling-v2",
    "namespace-v1",
    "networkpolicy-networking-v1",
    "poddisruptionbudget-policy-v1",
    "role-rbac-v1",
    "rolebinding-rbac-v1",
    "service-v1",
    "serviceaccount-v1",
)
"""As `name` makes them."""


def name(each: Json) -> str:
    """Of an object's schema: its kind, and its group without the domain."""
    group, _, version = str(each["apiVersion"]).rpartition("/")
    return "-".join(filter(None, (each["kind"].lower(), group.partition(".")[0], version)))


def validate(each: Json) -> None:
    """Raises jsonschema.ValidationError, or LookupError for a kind without a schema."""
    known = _schemas()
    if name(each) not in known["$defs"]:
        raise LookupError(f"no schema of {name(each)}: add it to KINDS and run `python -m tests.deploy.schemas`")
    Draft202012Validator({**known, "$ref": f"#/$defs/{name(each)}"}).validate(each)


@cache
def _schemas() -> Json:
    schemas: Json = json.loads(PATH.read_text())
    return schemas


# --- the copy ---------------------------------------------------------------------------------------------------------


def trimmed(directory: Path) -> Json:
    """The schemas of KINDS and of all that they refer to, from a directory of kubernetes-validate."""
    everything = json.loads((directory / "_definitions.json").read_text())["$defs"]
    found = {kind: _without_status(json.loads((directory / f"{kind}.json").read_text())) for kind in KINDS}
    open_ends = [ref for schema in found.values() for ref in _refs(schema)]
    while open_ends:
        ref = open_ends.pop()
        if ref not in found:
            found[ref] = _bare(everything[ref])
            open_ends += _refs(found[ref])
    return {"$defs": dict(sorted(found.items()))}


def _without_status(schema: Json) -> Json:
    bare: Json = _bare(schema)
    bare["properties"].pop("status", None)
    return {key: value for key, value in bare.items() if key not in ("$id", "$schema")}


def _bare(value: Any, within: str = "") -> Any:
    """Without descriptions; a property may have that name, too. References are to the one file that comes out."""
    if isinstance(value, list):
        return [_bare(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return {"$ref": "#/$defs/" + value["$ref"].rpartition("/")[2]}
    keep = {
        k: v for k, v in value.items() if within == "properties" or not k.startswith(("description", "x-kubernetes"))
    }
    return {key: _bare(each, key) for key, each in keep.items()}


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from _refs(each)
    elif isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        for each in value.values():
            yield from _refs(each)


def main() -> None:
    spec = find_spec("kubernetes_validate")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the package kubernetes-validate")
    directory = Path(spec.origin).parent / "kubernetes-json-schema" / f"v{VERSION}.0-local-strict"
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in trimmed(directory)["$defs"].items())
    PATH.write_text('{"$defs": {\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
