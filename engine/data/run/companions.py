"""Companions of a shard: tars beside its own with a second image of its samples, under the same keys in the same order.

`twins/NAME.tar` has the unguided twins of the samples of `shards/NAME.tar`, `starts/NAME.tar` the real images that they
started from. Their members are those of every shard, so that every reader of one reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.run.outcomes import asked_classes
from engine.job.records import REAL, STARTS, TWINS
from engine.job.spec import RequestSpec
from engine.methods.registry import UNGUIDED

# The folders, in the order in which their tars are published.
COMPANIONS = (STARTS, TWINS)
# The column that names a companion; empty where a sample has none.
KEY_COLUMNS = {STARTS: "start_key", TWINS: "twin_key"}
# What the record of a companion says too.
_EQUAL = {
    STARTS: ("schema_version", "start_key", "start_sha256"),
    TWINS: (
        "schema_version", "request", "prompt", "context", "seed", "index", "screened", "start_key", "start_sha256",
        "strength",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TarFacts:
    """What a commit record states of a companion."""

    sha256: str
    md5: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompanionTar:
    """A companion on this machine."""

    path: Path
    facts: TarFacts


def companion_name(kind: str, shard_name: str) -> str:
    """Name of a companion in the store."""
    return f"{kind}/{shard_name}.tar"


def companions_of(request: RequestSpec) -> tuple[str, ...]:
    """The companions that every shard of a request has; at strength 1 a start is left out."""
    has = {STARTS: request.used_start is not None, TWINS: request.twin}
    return tuple(kind for kind in COMPANIONS if has[kind])


def difference_to_row(kind: str, record: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The field in which the record of a companion contradicts the row of its sample; empty where none does."""
    differing = [name for name in _EQUAL[kind] if record.get(name) != row.get(name)]
    if kind == STARTS:
        differing += _differing(record, {"method": REAL, "scored": False})
        differing += [] if record["class_index"] in asked_classes(row) else ["class_index"]
    else:
        wanted = {"predicted_class": row["twin_predicted_class"], "risk": row["twin_risk"]}
        differing += _differing(record, {"method": UNGUIDED.name, "scored": True, "twin_key": ""} | wanted)
    return next(iter(differing), "")


def _differing(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterable[str]:
    return [name for name, value in wanted.items() if record.get(name) != value]


def parse_companions(raw: Any) -> dict[str, TarFacts]:
    """The companions of a commit record.

    Raises:
        ValueError: they are of another form.
        TypeError: they have other fields.
    """
    if not isinstance(raw, dict) or not raw.keys() <= set(COMPANIONS):
        raise ValueError(f"companions are not of {', '.join(COMPANIONS)}: {raw!r}")
    parsed = {kind: TarFacts(**raw[kind]) for kind in COMPANIONS if kind in raw}
    for kind, facts in parsed.items():
        is_size = type(facts.bytes) is int and facts.bytes >= 0
        if not is_size or not isinstance(facts.sha256, str) or not isinstance(facts.md5, str):
            raise ValueError(f"companions.{kind} is not a size and checksums: {facts!r}")
    return parsed
