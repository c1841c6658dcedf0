"""Columns of the parquet files: those of `engine.job.columns` as Arrow types, none of them nullable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from engine.errors import CorruptShardError
from engine.job.class_names import label_names
from engine.job.columns import COLUMNS, RUN_COLUMNS, SCHEMA_VERSION, SURPLUS, Column
from engine.job.records import columns_of

if TYPE_CHECKING:
    import pyarrow as pa

VERSION_KEY = "riskforge.schema_version"

_YAML_TYPES = {"int": "int64", "float": "float64", "bool": "bool", "str": "string"}
# Without these a row cannot be joined with its image and label.
REQUIRED = ("key", "status", "class_name", "class_index", "accepted", "sha256")

_RUN_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}


def arrow_schema(*, surplus: bool = False, version: int = SCHEMA_VERSION) -> pa.Schema:
    """The columns of a shard's parquet, or with `surplus` of the metadata of the whole data set."""
    import pyarrow as pa

    columns = [*columns_of(version).values(), *RUN_COLUMNS, *([SURPLUS] if surplus else [])]
    fields = [
        pa.field(column.name, _arrow_type(column), nullable=False, metadata={"description": column.description})
        for column in columns
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
    for name in REQUIRED if is_foreign else [column.name for column in COLUMNS]:
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
    raise CorruptShardError(f"{where}: {what}, which no run writes; `riskforge verify` reports what is damaged")


def tar_features(image_format: str, version: int = SCHEMA_VERSION, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Types of a tar's members for the header of a card, as `datasets` writes them.

    Without them it infers types from the first five samples, and takes a list that is empty in all for a list of nulls.

    Args:
        labels: class names in index order, which make `cls` a `ClassLabel`; empty where they are not known.
    """
    record = [{"name": column.name, **_yaml_type(column)} for column in columns_of(version).values()]
    return [
        {"name": image_format, "dtype": "image"},
        {"name": "json", "struct": record},
        {"name": "cls", "dtype": _label_type(labels)},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def _label_type(labels: Sequence[str]) -> str | dict[str, Any]:
    if not labels:
        return "int64"
    return {"class_label": {"names": {str(index): name for index, name in enumerate(label_names(labels))}}}


def _yaml_type(column: Column) -> dict[str, Any]:
    if column.parts:
        return {"list": [{"name": part.name, "dtype": _YAML_TYPES[part.type]} for part in column.parts]}
    if column.type in _YAML_TYPES:
        return {"dtype": _YAML_TYPES[column.type]}
    return {"sequence": _YAML_TYPES[column.type.removesuffix("s")]}


def check_run_fields(run: dict[str, Any]) -> None:
    """Check the run-dependent fields of a row, all but `sha256`.

    Raises:
        ValueError: a field is missing, unknown or not of its type.
    """
    wanted = {column.name: _RUN_TYPES[column.type] for column in RUN_COLUMNS if column.name != "sha256"}
    if run.keys() != wanted.keys():
        raise ValueError(f"run fields missing or unknown: {sorted(run.keys() ^ wanted.keys())}")
    for name, kind in wanted.items():
        if type(run[name]) is not kind or (kind is float and not math.isfinite(run[name])):
            raise ValueError(f"run field {name} = {run[name]!r} is not a valid {kind.__name__}")


def _arrow_type(column: Column) -> pa.DataType:
    import pyarrow as pa

    plain = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "str": pa.string()}
    if column.type in plain:
        return plain[column.type]
    if column.parts:
        inner = pa.struct([pa.field(part.name, plain[part.type], nullable=False) for part in column.parts])
    else:
        inner = plain[column.type.removesuffix("s")]
    return pa.list_(pa.field("element", inner, nullable=False))
