"""What is recorded of a sample: a value for each of `engine.job.columns.RECORD_COLUMNS`.

A record is a plain dict with every field of its `schema_version` present, in the order of the table, and no nulls
(contract: sample metadata). The run-dependent fields are stored next to it and never enter the tar. Records of earlier
versions lack later fields; all are read, and a run that began with one continues in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from engine.job.columns import NO_CLASS, RECORD_COLUMNS, SCHEMA_VERSION, Column
from engine.job.plan import SampleSpec
from engine.job.spec import JOINT_SEPARATOR

STATUS_OK = "ok"
STATUS_REJECTED = "rejected"
STATUS_FAILED = "failed"
# The `method` of real images in a merged data set, which no model has scored.
REAL = "real"


# Tars beside those of the samples, with the same keys: the images that samples started from, and unguided twins.
STARTS, TWINS = "starts", "twins"


class Companion(NamedTuple):
    """A second image of a sample, stored under its key in a tar of its own.

    Attributes:
        record: complete; of a start that of a real image.
        image: the encoded file, or what encodes it.
    """

    record: dict[str, Any]
    image: Callable[[], bytes]


class SampleResult:
    """A finished sample.

    Attributes:
        record: the deterministic fields, complete.
        run: the run-dependent fields but `sha256`, which the shard writer adds.
        num_draws: embeddings drawn until one conditioned it; 0 without screening.
        companions: by `STARTS` and `TWINS`, where it has them; none where its own image is not stored.

    Args:
        image: the encoded file, empty where the sample failed; or what encodes it when it is first asked for, which
            is the thread that writes.
    """

    __slots__ = ("_image", "companions", "num_draws", "record", "run")

    def __init__(
        self,
        record: dict[str, Any],
        image: bytes | Callable[[], bytes] = b"",
        run: dict[str, Any] | None = None,
        num_draws: int = 0,
        companions: Mapping[str, Companion] | None = None,
    ) -> None:
        self.record, self.run, self.num_draws = record, run or {}, num_draws
        self.companions = companions or {}
        self._image = image

    @property
    def image(self) -> bytes:
        """The encoded image file, empty where there is none."""
        if not isinstance(self._image, bytes):
            self._image = self._image()
        return self._image


def columns_of(version: int) -> dict[str, Column]:
    """The columns of the records of a schema version by name, in order.

    Raises:
        ValueError: a version that is not read here.
    """
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"schema_version {version!r} is not one of 1 to {SCHEMA_VERSION}")
    return {column.name: column for column in RECORD_COLUMNS if column.since <= version}


def in_version(record: dict[str, Any], version: int) -> dict[str, Any]:
    """A record as a schema version has it: fields of later ones are left out."""
    return {name: record[name] for name in columns_of(version)} | {"schema_version": version}


def upgraded(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of any schema version in the present one; what it lacks is empty, and `scored` as `is_scored` says."""
    kept = {
        column.name: column.empty if record.get(column.name) is None else record[column.name]
        for column in RECORD_COLUMNS
    }
    return kept | {"schema_version": SCHEMA_VERSION, "scored": is_scored(kept | {"scored": record.get("scored")})}


def is_scored(record: Mapping[str, Any]) -> bool:
    """Whether models have scored the image of a record of any schema version.

    Versions before 3 do not say so: there every row is scored but failed ones and real images.
    """
    if record["status"] == STATUS_FAILED:
        return False
    known = record.get("scored")
    return record["method"] != REAL if known is None else bool(known)


def new_record(spec: SampleSpec) -> dict[str, Any]:
    """A record with the identity of a sample and the empty value everywhere else, which the scorer replaces.

    A joint prompt has no class before it is scored: `class_name` then holds its classes joined by "and".
    """
    record = {column.name: column.empty for column in RECORD_COLUMNS}
    record.update(
        schema_version=SCHEMA_VERSION,
        key=spec.key,
        request=spec.request,
        method=spec.method,
        class_name=JOINT_SEPARATOR.join(spec.cell.names),
        class_index=NO_CLASS if spec.cell.is_joint else spec.cell.classes[0],
        prompt=spec.prompt,
        context=spec.context,
        seed=spec.seed,
        index=spec.index,
        scored=True,
    )
    return record


def failed_record(spec: SampleSpec, message: str) -> dict[str, Any]:
    """The record of a sample of which there is no image."""
    return new_record(spec) | {"status": STATUS_FAILED, "error_message": message, "scored": False}


def check_record(record: dict[str, Any]) -> None:
    """Check that a record has every field of its schema version, of its type, in order, and nothing that JSON lacks.

    Raises:
        ValueError: naming the field and its value.
    """
    columns = columns_of(record.get("schema_version", SCHEMA_VERSION))
    if list(record) != list(columns):
        odd = set(record).symmetric_difference(columns)
        raise ValueError(f"record {record.get('key')!r}: fields missing, unknown or out of order: {sorted(odd)}")
    for name, column in columns.items():
        if not _fits(record[name], column):
            raise ValueError(f"record {record['key']!r}: {name} = {record[name]!r} is not a valid {column.type}")


def _fits(value: Any, column: Column) -> bool:
    """Whether a value is of a column's type."""
    if column.parts:
        return isinstance(value, list) and all(_fits_parts(entry, column) for entry in value)
    if column.type in ("ints", "floats"):
        return isinstance(value, list) and all(_is_plain(item, column.type.removesuffix("s")) for item in value)
    return _is_plain(value, column.type)


def _fits_parts(entry: Any, column: Column) -> bool:
    """Whether an entry of a list has the column's parts, in order, each of its type."""
    if not isinstance(entry, dict) or list(entry) != [part.name for part in column.parts]:
        return False
    return all(_is_plain(entry[part.name], part.type) for part in column.parts)


def _is_plain(value: Any, kind: str) -> bool:
    """Whether a value is of a plain type; numbers must be finite."""
    if kind == "float":
        return type(value) is float and math.isfinite(value)
    return type(value) is {"int": int, "bool": bool, "str": str}[kind]
