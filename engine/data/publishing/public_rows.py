"""Rows without the names of machines: `worker` holds host and process, and messages of errors hold paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.publishing.private_text import PrivatePlaces
from engine.data.reading.source import reading_rows
from engine.data.stores.file_errors import explained, shown_path

if TYPE_CHECKING:
    import pyarrow as pa

WORKER, MESSAGE = "worker", "error_message"


class PublicRows:
    """Writes the rows of a data set again, worker by worker numbered in the order of their first rows.

    Args:
        folder: where the new files are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._workers: dict[str, str] = {"": ""}
        self._num_files = 0

    def write(self, source: Path) -> Path:
        """A file with the rows of another one, in constant memory; the same file where it names no workers.

        Raises:
            CorruptShardError: it cannot be read as parquet.
            OutputError: the new file cannot be written.
        """
        import pyarrow.parquet as pq

        with reading_rows(shown_path(source)):
            schema = pq.read_schema(source)
        if WORKER not in schema.names:
            return source
        target = self._folder / f"rows-{self._num_files:06d}.parquet"
        self._num_files += 1
        with explained(target), pq.ParquetWriter(target, schema, compression="zstd") as writer:
            for table in _row_groups(source):
                writer.write_table(self._public(table))
        return target

    def _public(self, table: pa.Table) -> pa.Table:
        for name, change in ((WORKER, self._number), (MESSAGE, PrivatePlaces.message)):
            if name in table.column_names:
                table = _changed(table, name, change)
        return table

    def _number(self, worker: str) -> str:
        return self._workers.setdefault(worker, f"w{len(self._workers)}")


def _changed(table: pa.Table, name: str, change: Callable[[str], str]) -> pa.Table:
    """A table with another text in a column for each distinct one; few are distinct."""
    import pyarrow as pa

    field = table.schema.field(name)
    coded = table[name].combine_chunks().cast(pa.string()).dictionary_encode()
    words = pa.array([None if word is None else change(word) for word in coded.dictionary.to_pylist()], pa.string())
    return table.set_column(table.schema.get_field_index(name), field, words.take(coded.indices).cast(field.type))


def _row_groups(source: Path) -> Iterator[pa.Table]:
    import pyarrow.parquet as pq

    with reading_rows(shown_path(source)):
        file = pq.ParquetFile(source)
    with file:
        for number in range(file.num_row_groups):
            with reading_rows(shown_path(source)):
                table = file.read_row_group(number)
            yield table
