"""The schema of KubeRay's RayJob as plain JSON Schema, which refuses fields that it does not know.

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay
    uv run python tools/kuberay_schema.py kuberay/helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml \
        --release v1.7.0 --output deploy/crds/rayjobs.json

A Kubernetes server drops unknown fields of a resource without a word, so that a misspelt one has no effect; the schema
in the CRD therefore lets them pass. Here every object that lists its fields is closed. What occurs more than once (the
template of a pod occurs three times) is stored once, below `$defs`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

VERSION = "v1"
# Shorter schemas than this take less room than a reference to them would save.
MIN_SHARED_CHARACTERS = 120
CREDIT = (
    "Made by tools/kuberay_schema.py from helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of "
    "https://github.com/ray-project/kuberay, {release}, Copyright the KubeRay authors, Apache License 2.0. Changed: "
    "only the schema of version " + VERSION + "; objects are closed; equal parts are stored once."
)


def closed(schema: Any) -> Any:
    """The same schema, with objects that have no other fields than those listed, and without Kubernetes' own keys."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # Keys of `properties` are names of fields, whatever they look like.
    result = {
        key: {name: closed(part) for name, part in value.items()} if key == "properties" else closed(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-")
    }
    is_open = "additionalProperties" in result or schema.get("x-kubernetes-preserve-unknown-fields")
    return result if "properties" not in result or is_open else result | {"additionalProperties": False}


def shared(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, with parts that occur more than once below `$defs`, in the order of their first occurrence."""
    counts: Counter[str] = Counter(_texts(schema))
    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}

    def replace(part: Any) -> Any:
        if isinstance(part, list):
            return [replace(one) for one in part]
        if not isinstance(part, dict):
            return part
        text = _text(part)
        if counts[text] < 2 or len(text) < MIN_SHARED_CHARACTERS or not _is_schema(part):
            return {key: replace(value) for key, value in part.items()}
        if text not in names:
            names[text] = f"s{len(names)}"
            definitions[names[text]] = {key: replace(value) for key, value in part.items()}
        return {"$ref": f"#/$defs/{names[text]}"}

    return {key: replace(value) for key, value in schema.items()} | {"$defs": definitions}


def _is_schema(part: dict[str, Any]) -> bool:
    """Whether it is a schema, and not a table of fields."""
    return isinstance(part.get("type"), str) or isinstance(part.get("anyOf"), list)


def _text(part: Any) -> str:
    return json.dumps(part, sort_keys=True, separators=(",", ":"))


def _texts(part: Any) -> list[str]:
    """The text of a part and of all that it contains."""
    if isinstance(part, list):
        return [text for one in part for text in _texts(one)]
    if not isinstance(part, dict):
        return []
    return [_text(part), *(text for value in part.values() for text in _texts(value))]


def schema_of(crd: dict[str, Any], release: str) -> dict[str, Any]:
    """The schema of a RayJob, from the custom resource definition."""
    [version] = [one for one in crd["spec"]["versions"] if one["name"] == VERSION]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["apiVersion"] = {"const": f"{crd['spec']['group']}/{VERSION}"}
    schema["properties"]["kind"] = {"const": crd["spec"]["names"]["kind"]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": CREDIT.format(release=release)}
    return head | shared(schema) | {"required": ["apiVersion", "kind", "metadata", "spec"]}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="The schema of a RayJob as JSON Schema.")
    parser.add_argument("crd", type=Path, help="ray.io_rayjobs.yaml")
    parser.add_argument("--release", required=True, help="what it was taken from, as v1.7.0")
    parser.add_argument("--output", type=Path, default=Path("deploy/crds/rayjobs.json"))
    options = parser.parse_args()
    schema = schema_of(yaml.safe_load(options.crd.read_text(encoding="utf-8")), options.release)
    options.output.write_text(json.dumps(schema, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
