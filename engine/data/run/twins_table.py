"""`twins.parquet`: unguided twins that an evaluation found among a run's own samples, for rows that have none.

A guided sample's twin is then the sample of an unguided request of its seed group. The columns are those of samples.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.run.file_names import TWINS_TABLE
from engine.data.run.schema import arrow_schema, check_rows
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained, is_no_file
from engine.errors import CorruptShardError, OutputError, first_line
from engine.job.columns import BY_NAME, TWIN_COLUMNS
from engine.methods.strict_json import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = ("key", *TWIN_COLUMNS)
_ABOUT = "riskforge.twins"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTwins:
    """The twins that an evaluation found.

    Attributes:
        rows: `key` of the guided sample, and `TWIN_COLUMNS`.
        plan_digest: of the run.
        num_attempts: rows of the metadata that they are of; another number means that the run went on since.
        clip: address of the CLIP model that measured distances.
    """

    rows: pa.Table
    plan_digest: str
    num_attempts: int
    clip: str


def twins_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of the columns of `FoundTwins`."""
    import pyarrow as pa

    fields = {field.name: field for field in arrow_schema()}
    return pa.Table.from_pylist(rows, schema=pa.schema([fields[name] for name in _COLUMNS]))


def write_twins(into: Store, found: FoundTwins) -> None:
    """Write the table, or replace the one that is there."""
    import pyarrow.parquet as pq

    about = {"plan_digest": found.plan_digest, "num_attempts": found.num_attempts, "clip": found.clip}
    staged = into.staging() / TWINS_TABLE
    with explained(staged):
        pq.write_table(found.rows.replace_schema_metadata({_ABOUT: json.dumps(about)}), staged, compression="zstd")
    into.replace(TWINS_TABLE, staged)


def read_twins(store: Store, plan_digest: str) -> FoundTwins | None:
    """The twins that the last evaluation of a run found; None where there is no such file.

    Raises:
        CorruptShardError: it cannot be read, or is of another run.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not store.exists(TWINS_TABLE):
        return None
    try:
        table = pq.read_table(_fetched(store), partitioning=None)
        about = parse_json((table.schema.metadata or {})[_ABOUT.encode()])
        found = FoundTwins(
            rows=table.select(_COLUMNS),
            plan_digest=str(about["plan_digest"]),
            num_attempts=int(about["num_attempts"]),
            clip=str(about["clip"]),
        )
        check_rows(found.rows, "its table")
        if found.plan_digest != plan_digest:
            raise ValueError("it is of another run")
        if len(found.rows["key"].unique()) != len(found.rows):
            raise ValueError("it has a key twice")
    except (pa.ArrowException, CorruptShardError, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptShardError(
            f"{store.address(TWINS_TABLE)}: cannot be read as the twins of this run ({first_line(error)}); remove it,"
            f" or run `riskforge evaluate {store.uri}` again"
        ) from None
    return found


def _fetched(store: Store) -> Path:
    """Where the file can be read.

    Raises:
        ValueError: something else has its name, such as a pipe.
    """
    try:
        return store.fetch(TWINS_TABLE, keep=True)
    except OutputError as error:
        if is_no_file(error):
            raise ValueError(first_line(error)) from None
        raise


def with_twins(table: pa.Table, found: FoundTwins | None) -> pa.Table:
    """Rows with the twins that were found, where they have none of their own.

    Args:
        table: with `key`, and those of `TWIN_COLUMNS` that its schema version has.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if found is None:
        return table
    place = pc.index_in(table["key"], value_set=found.rows["key"].combine_chunks())
    if "twin_key" in table.column_names:
        is_free = pc.equal(pc.coalesce(table["twin_key"], pa.scalar("")), "")
        place = pc.if_else(is_free, place, pa.scalar(None, place.type))
    for name in TWIN_COLUMNS:
        column, there = BY_NAME[name], table.schema.get_field_index(name)
        given = found.rows[name].combine_chunks().take(place)
        values = pc.coalesce(given, pa.scalar(column.empty, given.type) if there < 0 else table[name])
        field = pa.field(name, values.type)
        table = table.append_column(field, values) if there < 0 else table.set_column(there, field, values)
    return table
