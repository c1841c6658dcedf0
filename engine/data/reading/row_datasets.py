"""The rows of runs as `pyarrow` data sets of one schema, whatever version they are of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.reading.source import RunSource, reading_rows
from engine.data.run.outcomes import scored_rows
from engine.data.run.schema import arrow_schema
from engine.job.columns import RECORD_COLUMNS, RUN_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.dataset import Dataset


def with_scored(table: pa.Table) -> pa.Table:
    """Rows of any schema version with `scored` filled in."""
    import pyarrow as pa

    place = table.column_names.index("scored")
    return table.set_column(place, table.schema.field(place), pa.array(scored_rows(table)))


def unified_schema(sources: tuple[RunSource, ...]) -> pa.Schema:
    """The columns of all runs; nullable, as earlier schema versions lack some.

    Those are there nevertheless, so that a filter means the same for every run; what any run should have is not.
    """
    import pyarrow as pa

    schemas = [source.schema() for source in sources]
    kept = arrow_schema(surplus=True)
    present = {name for schema in schemas for name in schema.names}
    always = {column.name for column in (*RECORD_COLUMNS, *RUN_COLUMNS) if column.since == 1}
    fields = [field.with_nullable(True) for field in kept if field.name in present or field.name not in always]
    names = {field.name for field in fields}
    for schema in schemas:
        for field in schema:
            if field.name not in names:
                fields.append(field.with_nullable(True))
                names.add(field.name)
    return pa.schema(fields)


def rows_dataset(source: RunSource, schema: pa.Schema) -> Dataset:
    """The rows of a run as a lazy data set, in a schema of all runs.

    Raises:
        CorruptShardError: a file of rows is missing or damaged.
    """
    import pyarrow.dataset

    with reading_rows(source.uri):
        files = source.rows_files()
        if source.surplus is not None:
            flags = [source.surplus.get(str(row)) for row in source.rows]
            return _marked(list(zip(files, flags, strict=True)), schema)
        return pyarrow.dataset.dataset([str(path) for path in files], schema=schema, format="parquet")


def _marked(rows: Sequence[tuple[Path, Sequence[bool] | None]], schema: pa.Schema) -> Dataset:
    """Rows of shards, which have no column `surplus`, with it.

    It is a constant of the files that have no surplus; the few others are held in memory.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset
    import pyarrow.fs
    import pyarrow.parquet as pq

    form, files = pyarrow.dataset.ParquetFileFormat(), pyarrow.fs.LocalFileSystem()
    within = pc.field("surplus") == pc.scalar(False)
    parts: list[Dataset] = []
    for has_surplus, group in itertools.groupby(rows, key=lambda row: row[1] is not None):
        if not has_surplus:
            fragments = [form.make_fragment(str(path), files, partition_expression=within) for path, _ in group]
            parts.append(pyarrow.dataset.FileSystemDataset(fragments, schema, form, files))
            continue
        for path, flags in group:
            table = pq.read_table(path, partitioning=None).append_column("surplus", pa.array(flags))
            missing = [name for name in schema.names if name not in table.column_names]
            for name in missing:
                table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
            parts.append(pyarrow.dataset.dataset(table.select(schema.names).cast(schema)))
    return pyarrow.dataset.dataset(parts)
