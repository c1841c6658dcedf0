"""Columns of the parquet files: the fields of `engine.job.records` as Arrow types, none of them nullable."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

from engine.errors import CorruptShardError
from engine.job.plan import SCHEMA_VERSION
from engine.job.records import ENTRY_FIELDS, RUN_FIELDS, fields_of

if TYPE_CHECKING:
    import pyarrow as pa

VERSION_KEY = "riskforge.schema_version"

# What each column means, for the data set's card and for the `description` of the Arrow fields.
DESCRIPTIONS: dict[str, str] = {
    "schema_version": "version of these columns",
    "key": "name of the sample, unique in the data set; member name in the tar",
    "request": "request of the job that asked for the sample",
    "method": "sampling method: prompt only, or the guidance",
    "class_name": "conditioned class; of a joint prompt the class of the subset with the highest conformity",
    "class_index": "its index in the target's labels; content of the .cls member; -1 where unknown",
    "prompt": "text that conditioned the diffusion model",
    "context": "context appended to the prompt, empty for none",
    "seed": "seed of the sample's first noise",
    "index": "index of the sample in its request and class",
    "status": "ok: image stored; rejected: sampled, not accepted; failed: no image",
    "error_message": "why the sample failed, empty otherwise",
    "scored": "whether models scored the image; false of failed samples and of real images, whose scores mean nothing",
    "risk": "-log p of the conditioned class under the target, in nats",
    "is_error": "whether the target predicts another class than class_name; of a joint prompt errors are counted as"
    " predictions outside its classes (kldb_classes), which is the derived name target_errs",
    "predicted_class": "class that the target predicts; -1 where it did not see the image",
    "p_label": "the target's probability of the conditioned class",
    "conformity": "cosine of the CLIP embeddings of image and class prompt",
    "conformity_margin": "conformity minus the best conformity to any other class",
    "kldb": "KL divergence from the uniform distribution over kldb_classes to the target's output, in nats",
    "kldb_classes": "classes of kldb: the request's subset, or the class and its strongest rival",
    "kldb_balance": "part of kldb: imbalance within the subset",
    "kldb_mass": "part of kldb: probability outside the subset",
    "entropy": "entropy of the target's output, in nats",
    "soft_label": "training target over all classes: uniform over the subset of a joint prompt, one-hot otherwise",
    "temperature": "calibration temperature of the target's logits",
    "screened": "whether the conditioning passed the error predictor",
    "guided_steps": "number of denoising steps that were guided",
    "zero_gradients": "number of guided steps whose gradient was zero",
    "nonfinite_gradients": "number of guided steps whose gradient was not finite and was dropped",
    "oracle_class": "class that the independent oracle predicts; -1 without an oracle",
    "accepted": "whether the sample meets the request's acceptance rule",
    "transfer": "predicted class and risk under each classifier that was scored and never guided on",
    "judge": "conformity and its margin under an independent CLIP model that was never guided on; empty without one",
    "batch_size": "number of samples sampled together",
    "duration_seconds": "sampling time of the batch divided by its size",
    "attempt": "number of the try that made the shard",
    "worker": "worker that made the shard",
    "sha256": "checksum of the image file, empty where none is stored",
    "surplus": "accepted, but beyond the quota of its request",
}

_YAML_TYPES = {"int": "int64", "float": "float64", "bool": "bool", "str": "string"}
# Without these a row cannot be brought together with its image and label.
REQUIRED = ("key", "status", "class_name", "class_index", "accepted", "sha256")

_RUN_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}


def arrow_schema(*, surplus: bool = False, version: int = SCHEMA_VERSION) -> pa.Schema:
    """The columns of a shard's parquet, or with `surplus` of the metadata of the whole data set."""
    import pyarrow as pa

    kinds = fields_of(version) | RUN_FIELDS | ({"surplus": "bool"} if surplus else {})
    fields = [
        pa.field(name, _arrow_type(kind), nullable=False, metadata={"description": DESCRIPTIONS[name]})
        for name, kind in kinds.items()
    ]
    return pa.schema(fields, metadata={VERSION_KEY: str(version)})


def check_rows(table: pa.Table, where: object, *, is_foreign: bool = False) -> None:
    """Check that rows are such as runs write them: of our types, without nulls, with finite numbers.

    Args:
        where: the file or the run, for the message.
        is_foreign: whether rows may be those of an export, which has columns of others and lacks some of ours.

    Raises:
        CorruptShardError: some are not.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = {field.name: field.type for field in arrow_schema(surplus=True)}
    for name in REQUIRED if is_foreign else DESCRIPTIONS:
        if name not in table.column_names:
            continue
        column = table.column(name)
        is_plain = not pa.types.is_nested(column.type) and not pa.types.is_dictionary(column.type)
        if is_plain and column.type != kinds[name]:
            _refuse_rows(where, f"column {name} is of type {column.type}")
        if column.null_count:
            _refuse_rows(where, f"column {name} lacks values")
        # Of lists the inner values.
        inner = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        if inner.null_count:
            _refuse_rows(where, f"column {name} lacks values")
        if pa.types.is_floating(inner.type) and pc.all(pc.is_finite(inner)).as_py() is False:
            _refuse_rows(where, f"column {name} has values that are not finite")


def _refuse_rows(where: object, what: str) -> NoReturn:
    raise CorruptShardError(f"{where}: {what}, which no run writes; `riskforge verify` tells what is damaged")


def tar_features(image_format: str, version: int = SCHEMA_VERSION) -> list[dict[str, Any]]:
    """Types of a tar's members for the header of a card, as `datasets` writes them.

    Left to itself it takes those of the first five samples, and a list that is empty in all of them for one of nulls.
    """
    record = [{"name": name, **_yaml_type(kind)} for name, kind in fields_of(version).items()]
    return [
        {"name": image_format, "dtype": "image"},
        {"name": "json", "struct": record},
        {"name": "cls", "dtype": "int64"},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def _yaml_type(kind: str) -> dict[str, Any]:
    if kind in _YAML_TYPES:
        return {"dtype": _YAML_TYPES[kind]}
    if parts := ENTRY_FIELDS.get(kind):
        return {"list": [{"name": name, "dtype": _YAML_TYPES[part]} for name, part in parts.items()]}
    return {"sequence": _YAML_TYPES[kind.removesuffix("s")]}


def check_run_fields(run: dict[str, Any]) -> None:
    """Check the run-dependent fields of a row, all but `sha256`.

    Raises:
        ValueError: a field is missing, unknown or not of its type.
    """
    wanted = {name: _RUN_TYPES[kind] for name, kind in RUN_FIELDS.items() if name != "sha256"}
    if run.keys() != wanted.keys():
        raise ValueError(f"run fields missing or unknown: {sorted(run.keys() ^ wanted.keys())}")
    for name, kind in wanted.items():
        if type(run[name]) is not kind or (kind is float and not math.isfinite(run[name])):
            raise ValueError(f"run field {name} = {run[name]!r} is not a valid {kind.__name__}")


def _arrow_type(kind: str) -> pa.DataType:
    import pyarrow as pa

    plain = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "str": pa.string()}
    if kind in plain:
        return plain[kind]
    if parts := ENTRY_FIELDS.get(kind):
        inner = pa.struct([pa.field(name, plain[part], nullable=False) for name, part in parts.items()])
    else:
        inner = plain[kind.removesuffix("s")]
    return pa.list_(pa.field("element", inner, nullable=False))
