"""Names and sizes of the files that the commit records list, without parsing a million records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.data.run.commit_packs import Pack, opened_packs, reading_pack
from engine.data.run.commit_record import COMMITS, file_pair, parse_record
from engine.data.run.companions import COMPANIONS, companion_name
from engine.data.run.counts import parse_record_name
from engine.data.stores.base import Store
from engine.data.stores.file_errors import shown_path
from engine.errors import CorruptShardError, OutputError

# The files of a record as `CommitRecord.to_json` writes it.
_FILES = (
    r'^\{"record_version": 1, "shard": (?P<shard>\d{1,15}), "name": "(?P<name>[a-z0-9-]+)", .*'
    r'"tar_bytes": (?P<tar>\d{1,18}), .*"parquet_bytes": (?P<parquet>\d{1,18}),'
    # A text in a record has no quotes without a backslash before them.
    r'(?:.*, "companions": \{'
    + "".join(rf'(?:"{kind}": \{{[^}}]*"bytes": (?P<{kind}>\d{{1,18}})\}}(?:, )?)?' for kind in COMPANIONS)
    + r"\})?"
)


def recorded_files(store: Store) -> Iterator[tuple[int, str, int] | CorruptShardError]:
    """Shard, name and bytes of every file that the records list; an error instead of a record that cannot be read."""
    names = (name for name in store.list(COMMITS) if parse_record_name(Path(name).name))
    for name, data in store.read_each(names, listed=True):
        yield from _files_of(store.address(name), data)
    with opened_packs(store) as packs:
        for pack in packs:
            yield from _packed_files(pack)


def _files_of(where: str, text: str | bytes | OutputError) -> Iterator[tuple[int, str, int] | CorruptShardError]:
    try:
        record = parse_record(where, text)
    except CorruptShardError as error:
        yield error
        return
    for name, (_, num_bytes) in record.files.items():
        yield record.shard, name, num_bytes


def _packed_files(pack: Pack) -> Iterator[tuple[int, str, int] | CorruptShardError]:
    """As `recorded_files`, of a pack: there may be a million, so that JSON is only read where a pattern fails."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with reading_pack(pack.path), pq.ParquetFile(pack.file, pre_buffer=False) as file:
        for batch in file.iter_batches(columns=["record"]):
            matches = pc.extract_regex(batch.column(0), _FILES).to_pylist()
            for place, fields in enumerate(matches):
                if fields is None:
                    yield from _files_of(shown_path(pack.path), batch.column(0)[place].as_py())
                    continue
                tar, parquet = file_pair(fields["name"])
                yield int(fields["shard"]), tar, int(fields["tar"])
                yield int(fields["shard"]), parquet, int(fields["parquet"])
                for kind in COMPANIONS:
                    if fields[kind]:
                        yield int(fields["shard"]), companion_name(kind, fields["name"]), int(fields[kind])
