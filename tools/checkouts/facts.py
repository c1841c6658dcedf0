"""What must be equal in the files and documents of two checkouts, and how they differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

# Phase -> kind -> name -> text or digest, in the order of the commands.
Facts = dict[str, dict[str, dict[str, str]]]

# The columns that depend on the run and not on the plan (docs/metadata.md), with the reason.
UNSTABLE_COLUMNS = {
    "batch_size": "depends on the memory of the machine",
    "duration_seconds": "time",
    "attempt": "depends on faults of workers",
    "worker": "host and process",
}
# The same for the keys of manifests, commit records and `--json`.
UNSTABLE_KEYS = {
    "attempt": "depends on faults of workers",
    "worker": "host and process",
    "driver": "host, process and time",
    "timing": "time",
    "samples_per_second": "time",
    "eta_seconds": "time",
    "last_event": "contains a time",
    "versions": "depends on the installed packages",
    "hardware": "depends on the machine",
    "notices": "says what the hardware forced",
    "parquet_sha256": "covers columns that depend on the run",
    "parquet_bytes": "covers columns that depend on the run",
    "rows_sha256": "covers columns that depend on the run",
    "data_bytes": "covers columns that depend on the run",
    "disk_bytes": "covers the report, whose wording may change",
}
# Compared byte by byte.
INDEXES = ("wids.json", "_info.json", "surplus.txt", "classes.json", "folders.json", "class_map.txt", "duplicates.csv")
IMAGES = (".png", ".jpg", ".webp")
# Of the state of a run only these: leases, locks and events depend on time.
STATE, STATE_COMPARED = "_state", ("plan", "commits")
ARTEFACT = "conditioning-"
# Stands for the path of the working folder.
HOME = "HOME"
MAX_SHOWN_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How many facts of a kind were compared, how many differ, and the first that does, in words."""

    job: str
    phase: str
    kind: str
    num_compared: int
    num_different: int
    first: str


def folder_facts(folder: Path, home: Path) -> Iterator[tuple[str, str, str]]:
    """Kind, name and fact of everything in a folder that must be equal.

    Args:
        home: the working folder, whose path is not part of the facts.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if name.parts[0] == STATE and name.parts[1] not in STATE_COMPARED:
            continue
        yield "files", str(name), "exists"
        if name.parts[:2] == (STATE, "plan"):
            yield "plans", str(name), path.read_text(encoding="utf-8").replace(str(home), HOME)
        elif kind := _kind_of_bytes(name):
            yield kind, str(name), file_digest(path)
        elif path.suffix == ".json":
            yield from json_facts(path.read_text(encoding="utf-8"), str(name), home)
        elif path.suffix == ".parquet":
            yield from parquet_facts(path, str(name))


def _kind_of_bytes(name: Path) -> str:
    """The kind of a file that is compared byte by byte; empty for other files."""
    if name.parts[0].startswith(ARTEFACT):
        return "artefacts"
    if name.suffix == ".tar":
        return "tars"
    if name.suffix in IMAGES:
        return "images"
    return "indexes" if name.name in INDEXES else ""


def json_facts(text: str, name: str, home: Path) -> Iterator[tuple[str, str, str]]:
    """The digest of the job in a manifest or commit record, and all of it that does not depend on the run."""
    if digest := json.loads(text).get("plan_digest"):
        yield "job digests", name, digest
    yield "records", name, stable_json(text, home)


def parquet_facts(path: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """The schema with its metadata, and a digest of each deterministic column, order of rows included."""
    table = pq.read_table(path)
    schema = table.schema.to_string(truncate_metadata=False, show_field_metadata=True, show_schema_metadata=True)
    yield "schemas", name, schema
    for column in table.column_names:
        if column not in UNSTABLE_COLUMNS:
            values = repr(table.column(column).to_pylist())
            yield "columns", f"{name} {column}", hashlib.sha256(values.encode()).hexdigest()


def stable_json(text: str, home: Path) -> str:
    """A JSON document without the keys that depend on the run and without the path of the working folder."""
    return json.dumps(_stable(json.loads(text.replace(str(home), HOME))), indent=1)


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(inner) for key, inner in value.items() if key not in UNSTABLE_KEYS}
    return [_stable(inner) for inner in value] if isinstance(value, list) else value


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare_facts(job: str, before: Facts, after: Facts) -> Iterator[Comparison]:
    """For each phase and kind how many facts there are, and which are unequal, missing or new."""
    for phase, kinds in before.items():
        observed = after.get(phase, {})
        for kind in {**kinds, **observed}:
            old, new = kinds.get(kind, {}), observed.get(kind, {})
            names = list({**old, **new})
            different = [name for name in names if old.get(name) != new.get(name)]
            yield Comparison(
                job=job, phase=phase, kind=kind, num_compared=len(names), num_different=len(different),
                first=describe(different[0], old, new) if different else "",
            )  # fmt: skip


def describe(name: str, before: dict[str, str], after: dict[str, str]) -> str:
    """A fact that differs, in words: of long texts the first line that is not equal."""
    if name not in before or name not in after:
        return f"{name}: only in {'BEFORE' if name in before else 'AFTER'}"
    pairs = zip([*before[name].splitlines(), ""], [*after[name].splitlines(), ""], strict=False)
    old, new = next(((old, new) for old, new in pairs if old != new), (before[name], after[name]))
    # Where lines are long, like those of stored plans, the place counts.
    place = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
    shown = slice(max(0, place - MAX_SHOWN_CHARS // 3), place + MAX_SHOWN_CHARS)
    return f"{name}: BEFORE has {old[shown].strip()!r}, AFTER {new[shown].strip()!r}"
