"""`metadata.parquet`, the rows of all committed shards, and the list of surplus keys that follows from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engine.data.run.commits import CommitSummary
from engine.data.run.file_names import METADATA, SURPLUS_LIST
from engine.data.run.schema import arrow_schema, check_rows
from engine.data.run.shards import SHARDS, shard_name
from engine.data.run.surplus import Surplus, surplus_lines
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained, shown_path
from engine.errors import CorruptShardError
from engine.job.columns import SCHEMA_VERSION

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_GROUP = 65_536
MAX_ROWS_PER_FILE = 10**7


def write_metadata(
    store: Store,
    job_name: str,
    commits: dict[int, CommitSummary],
    rows_per_file: int = MAX_ROWS_PER_FILE,
    *,
    schema_version: int = SCHEMA_VERSION,
    quotas: Mapping[str, int] | None = None,
) -> None:
    """Write the rows of all committed shards in their order, in constant memory.

    Args:
        schema_version: of the columns of the shards.
        quotas: by request, how many accepted samples of a class count; later ones are marked as surplus.

    Raises:
        CorruptShardError: a shard's parquet is missing, damaged or of another length than its record states.
    """
    num_rows = sum(commit.counts.attempted for commit in commits.values())
    schema = arrow_schema(surplus=True, version=schema_version)
    tables = _row_groups(_shard_tables(store, job_name, commits, schema, Surplus(quotas or {})))
    staged = store.staging() / "metadata.parquet"
    if num_rows <= rows_per_file:
        with _writer(staged, schema) as writer:
            for table in tables:
                writer.write_table(table)
        if store.is_folder(METADATA):
            store.remove_tree(METADATA)
        store.replace(METADATA, staged)
        return
    if store.exists(METADATA) and not store.is_folder(METADATA):
        store.remove(METADATA)
    names = _write_parts(store, staged, tables, schema, rows_per_file)
    store.remove_all(set(store.list(METADATA)) - set(names))


def _write_parts(
    store: Store, staged: Path, tables: Iterator[pa.Table], schema: pa.Schema, rows_per_file: int
) -> list[str]:
    """Write the tables as files of at most `rows_per_file` rows, or of one table where that is more."""
    names: list[str] = []
    table = next(tables, None)
    while table is not None:
        names.append(f"{METADATA}/part-{len(names):06d}.parquet")
        with _writer(staged, schema) as writer:
            num_rows = 0
            while table is not None and (not num_rows or num_rows + len(table) <= rows_per_file):
                writer.write_table(table)
                num_rows += len(table)
                table = next(tables, None)
        store.replace(names[-1], staged)
    return names


@contextlib.contextmanager
def _writer(path: Path, schema: pa.Schema) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with explained(path), pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield writer


def _shard_tables(
    store: Store, job_name: str, commits: dict[int, CommitSummary], schema: pa.Schema, quotas: Surplus
) -> Iterator[pa.Table]:
    """The rows of each shard in order, with the column `surplus`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = sorted(commits)
    paths = store.fetch_each(f"{SHARDS}/{shard_name(job_name, number)}.parquet" for number in numbers)
    for number, path in zip(numbers, paths, strict=True):
        try:
            table = pq.read_table(path, partitioning=None)
            check_rows(table, shown_path(path))
            surplus = pa.array(quotas.mark(table), pa.bool_())
            table = table.append_column("surplus", surplus).cast(schema)
        except FileNotFoundError:
            _damaged(path, "is missing")
        except (pa.ArrowException, ValueError) as error:
            _damaged(path, f"cannot be read ({error})")
        if table.num_rows != commits[number].counts.attempted:
            _damaged(path, f"has {table.num_rows} rows, not the {commits[number].counts.attempted} committed")
        yield table


def _damaged(path: Path, what: str) -> NoReturn:
    raise CorruptShardError(
        f"{shown_path(path)}: {what}, but the shard is committed; restore the file, or let `riskforge repair` take the"
        " shard out and run again"
    ) from None


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of about `ROWS_PER_GROUP`: small row groups are slow to read."""
    import pyarrow as pa

    group: list[pa.Table] = []
    num_rows = 0
    for table in tables:
        group.append(table)
        num_rows += len(table)
        if num_rows >= ROWS_PER_GROUP:
            yield pa.concat_tables(group).combine_chunks()
            group, num_rows = [], 0
    if group:
        yield pa.concat_tables(group).combine_chunks()


def write_surplus(store: Store) -> None:
    """Write the list of keys beyond their quota next to the shards; it is empty where there are none."""
    staged = store.staging() / "surplus.txt"
    with explained(staged), staged.open("wb") as file:
        file.writelines(surplus_lines(store.fetch(METADATA)))
    store.replace(SURPLUS_LIST, staged)
