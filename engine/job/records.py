"""What is recorded of a sample: the fields of the present `schema_version`, their types and their empty values.

A record is a plain dict with every deterministic field present, in this order, and no nulls (contract: sample
metadata). The run-dependent fields are added beside it and never enter the tar. Earlier versions lack the fields of
`SINCE`; all are read, and a run that began with one goes on in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.job.plan import SCHEMA_VERSION, SampleSpec
from engine.job.spec import JOINT_SEPARATOR

STATUS_OK = "ok"
STATUS_REJECTED = "rejected"
STATUS_FAILED = "failed"
NO_CLASS = -1
# The `method` of real images in a merged data set, which no model has scored.
REAL = "real"

# Name -> type: "int", "float", "bool", "str", "ints", "floats", or a list of one of `ENTRY_FIELDS`.
DETERMINISTIC_FIELDS: dict[str, str] = {
    "schema_version": "int",
    "key": "str",
    "request": "str",
    "method": "str",
    "class_name": "str",
    "class_index": "int",
    "prompt": "str",
    "context": "str",
    "seed": "int",
    "index": "int",
    "status": "str",
    "error_message": "str",
    "scored": "bool",
    "risk": "float",
    "is_error": "bool",
    "predicted_class": "int",
    "p_label": "float",
    "conformity": "float",
    "conformity_margin": "float",
    "kldb": "float",
    "kldb_classes": "ints",
    "kldb_balance": "float",
    "kldb_mass": "float",
    "entropy": "float",
    "soft_label": "floats",
    "temperature": "float",
    "screened": "bool",
    "guided_steps": "int",
    "zero_gradients": "int",
    "nonfinite_gradients": "int",
    "oracle_class": "int",
    "accepted": "bool",
    "transfer": "transfers",
    "judge": "judges",
}
RUN_FIELDS: dict[str, str] = {
    "batch_size": "int",
    "duration_seconds": "float",
    "attempt": "int",
    "worker": "str",
    "sha256": "str",
}
# Entries of a list: a classifier that was scored and never guided on, and a CLIP model that was never guided on.
ENTRY_FIELDS: dict[str, dict[str, str]] = {
    "transfers": {"model": "str", "predicted_class": "int", "risk": "float"},
    "judges": {"model": "str", "conformity": "float", "conformity_margin": "float"},
}
# Fields that came with a later version than the first.
SINCE = {"judge": 2, "scored": 3}
# Fields that models measured: of a row that is not scored they have the empty value, which means nothing.
MEASURED = frozenset(
    ["risk", "is_error", "predicted_class", "p_label", "conformity", "conformity_margin", "kldb", "kldb_classes",
     "kldb_balance", "kldb_mass", "entropy", "temperature", "oracle_class", "transfer", "judge"]
)  # fmt: skip

_EMPTY: dict[str, Any] = {
    "int": 0, "float": 0.0, "bool": False, "str": "", "ints": [], "floats": [], "transfers": [], "judges": [],
}  # fmt: skip
_CLASS_FIELDS = ("class_index", "predicted_class", "oracle_class")


class SampleResult:
    """A finished sample.

    Attributes:
        record: the deterministic fields, complete.
        run: the run-dependent fields but `sha256`, which the shard writer adds.
        num_draws: embeddings drawn until one conditioned it; 0 without screening.

    Args:
        image: the encoded file, empty where the sample failed; or what encodes it when it is first asked for, which
            is the thread that writes.
    """

    __slots__ = ("_image", "num_draws", "record", "run")

    def __init__(
        self,
        record: dict[str, Any],
        image: bytes | Callable[[], bytes] = b"",
        run: dict[str, Any] | None = None,
        num_draws: int = 0,
    ) -> None:
        self.record, self.run, self.num_draws = record, run or {}, num_draws
        self._image = image

    @property
    def image(self) -> bytes:
        """The encoded image file, empty where there is none."""
        if not isinstance(self._image, bytes):
            self._image = self._image()
        return self._image


def fields_of(version: int) -> dict[str, str]:
    """Name and type of the deterministic fields of a schema version, in order.

    Raises:
        ValueError: a version that is not read here.
    """
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"schema_version {version!r} is not one of 1 to {SCHEMA_VERSION}")
    return {name: kind for name, kind in DETERMINISTIC_FIELDS.items() if SINCE.get(name, 1) <= version}


def in_version(record: dict[str, Any], version: int) -> dict[str, Any]:
    """A record as a schema version has it: fields of later ones are left out."""
    return {name: record[name] for name in fields_of(version)} | {"schema_version": version}


def upgraded(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of any schema version in the present one; what it lacks is empty, and `scored` as `is_scored` says."""
    kept = {
        name: _empty(kind) if record.get(name) is None else record[name] for name, kind in DETERMINISTIC_FIELDS.items()
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
    """A record with the identity of a sample and the empty value everywhere else, to be filled by whoever scores.

    A joint prompt has no class before it is scored: `class_name` then holds its classes joined by "and".
    """
    record = {name: _empty(kind) for name, kind in DETERMINISTIC_FIELDS.items()}
    record.update(dict.fromkeys(_CLASS_FIELDS, NO_CLASS))
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
    fields = fields_of(record.get("schema_version", SCHEMA_VERSION))
    if list(record) != list(fields):
        odd = set(record).symmetric_difference(fields)
        raise ValueError(f"record {record.get('key')!r}: fields missing, unknown or out of order: {sorted(odd)}")
    for name, kind in fields.items():
        if not _fits(record[name], kind):
            raise ValueError(f"record {record['key']!r}: {name} = {record[name]!r} is not a valid {kind}")


def _empty(kind: str) -> Any:
    value = _EMPTY[kind]
    return list(value) if isinstance(value, list) else value


def _fits(value: Any, kind: str) -> bool:
    if parts := ENTRY_FIELDS.get(kind):
        return isinstance(value, list) and all(
            list(entry) == list(parts) and all(_fits(entry[key], parts[key]) for key in entry) for entry in value
        )
    if kind in ("ints", "floats"):
        return isinstance(value, list) and all(_fits(one, kind[:-1]) for one in value)
    if kind == "float":
        return type(value) is float and math.isfinite(value)
    return type(value) is {"int": int, "bool": bool, "str": str}[kind]
