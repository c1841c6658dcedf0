"""The candidates of a curation: the samples of a finished run that are stored, accepted and within their quota."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.data.run.commit_record import CommitRecord, file_pair
from engine.data.run.commits import read_commits
from engine.data.run.curated import Curation, ParentRun, is_curated, read_curation, remake_command
from engine.data.run.file_names import CARD, METADATA, REPORT, SUCCESS
from engine.data.run.manifest_reading import check_is_run, read_manifest
from engine.data.run.presence import loss_lines, lost_files, torn_files
from engine.data.run.schema import check_rows
from engine.data.run.shards import read_shard
from engine.data.run.stored_plan import read_digest, stored_plan
from engine.data.stores.base import Store
from engine.errors import CorruptShardError, JobError, OutputError, first_line
from engine.job.plan import Plan
from engine.job.spec import JobSpec

if TYPE_CHECKING:
    import PIL.Image
    import pyarrow as pa
    from pyarrow.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A finished run to select from.

    Attributes:
        models: as its manifest describes them.
        hardware: on which its samples were made.
        commits: the records of its shards, in order.
        curation: how it was curated itself; None of a run that was sampled.
    """

    store: Store
    job: JobSpec
    plan: Plan
    models: dict[str, Any]
    hardware: dict[str, Any]
    commits: tuple[CommitRecord, ...]
    curation: Curation | None

    @functools.cached_property
    def shards_digest(self) -> str:
        """Digest of the committed tars."""
        return hashlib.sha256("".join(record.tar_sha256 for record in self.commits).encode()).hexdigest()[:32]

    def lineage(self, uri: str) -> tuple[ParentRun, ...]:
        """The run itself, under an address for its curated run, and before it all that it was selected from."""
        own = ParentRun(uri=uri, name=self.job.name, plan_digest=self.plan.digest, shards_digest=self.shards_digest)
        return (own, *((self.curation.parent, *self.curation.ancestors) if self.curation else ()))


def open_parent(store: Store) -> Parent:
    """A run to select from, which is finished and whole by its listings; images are verified when they are copied.

    Raises:
        JobError: there is no such folder.
        OutputError: it is no run, or one that is not finished.
        CorruptShardError: files are missing or torn.
    """
    if not store.is_there():
        raise JobError(f"RUN: there is no folder '{store.uri}'; give the output folder of a finished run")
    if read_digest(store) is None:
        check_is_run(store)
    job, plan = stored_plan(store)
    if not store.exists(SUCCESS):
        raise OutputError(
            f"RUN: '{store.uri}' is not finished; let {remake_command(plan)} finish it first: what is selected depends"
            " on all of its samples"
        )
    if lost := lost_files(store):
        first, *lines = loss_lines(store.uri, lost, remake_command(plan))
        raise CorruptShardError("\n".join([f"RUN: {store.uri}: {first}", *lines]))
    # What is written for human readers alone is no part of the data.
    if torn := [name for name in torn_files(store, plan) if name not in (CARD, REPORT)]:
        raise CorruptShardError(
            f"RUN: {store.address(torn[0])}: is missing or not whole; {remake_command(plan)} writes it again"
        )
    commits = tuple(read_commits(store))
    if len(commits) != plan.num_shards:
        raise CorruptShardError(
            f"RUN: {store.uri}: {plan.num_shards - len(commits)} of {plan.num_shards} shards are not committed,"
            f" although it is marked as finished; {remake_command(plan)} makes them again"
        )
    manifest = read_manifest(store)
    models, hardware = (manifest.get(name) for name in ("models", "hardware"))
    return Parent(
        store=store,
        job=job,
        plan=plan,
        models=models if isinstance(models, dict) else {},
        hardware=hardware if isinstance(hardware, dict) else {},
        commits=commits,
        curation=read_curation(store) if is_curated(plan) else None,
    )


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Samples to select from, in the order of the run.

    Attributes:
        keys: [N].
        class_indices: [N]; of a sample with a joint prompt the class that it came closest to.
        column_names: of the records.
        parent: the run that has their images.
    """

    keys: tuple[str, ...]
    class_indices: tuple[int, ...]
    column_names: tuple[str, ...]
    parent: Parent

    def __len__(self) -> int:
        return len(self.keys)

    def column(self, name: str) -> list[Any]:
        """A column of the records, [N]; the others are not read."""
        values: list[Any] = self._rows([name])[name].to_pylist()
        return values

    @functools.cached_property
    def records(self) -> list[dict[str, Any]]:
        """The records, [N], with the columns that depend on the run; all in memory."""
        records: list[dict[str, Any]] = self._rows(list(self.column_names)).to_pylist()
        return records

    def _rows(self, columns: list[str]) -> pa.Table:
        rows = _candidate_rows(self.parent, columns)
        if len(rows) != len(self):
            raise CorruptShardError(f"{self.parent.store.address(METADATA)}: has changed meanwhile; run again")
        return rows

    def images(self) -> Iterator[tuple[str, PIL.Image.Image]]:
        """Key and decoded image of each, in their order, one at a time.

        Raises:
            CorruptShardError: an image is missing or cannot be decoded.
        """
        from engine.data.images.decode import decode_stored

        wanted = iter(self.keys)
        key = next(wanted, None)
        for record in self.parent.commits:
            for stored, data, _, _ in read_shard(self.parent.store.fetch(file_pair(record.name)[0])):
                if stored == key:
                    yield key, decode_stored(data, f"{key}: its image")
                    key = next(wanted, None)
        if key is not None:
            raise CorruptShardError(
                f"{self.parent.store.uri}: has no image of {key}; `riskforge verify` reports what is damaged"
            )


def open_candidates(store: Store) -> Candidates:
    """The candidates of a finished run.

    Raises:
        JobError, OutputError, CorruptShardError: as `open_parent`, or no sample is a candidate.
    """
    return candidates_of(open_parent(store))


def candidates_of(parent: Parent) -> Candidates:
    """The candidates of a run: its stored, accepted samples within their quota.

    Raises:
        JobError: it has none.
        CorruptShardError: its metadata cannot be read.
    """
    rows = _candidate_rows(parent, ["key", "class_index"])
    keys, classes = (tuple(column.to_pylist()) for column in rows.columns)
    if not keys:
        raise JobError(f"RUN: '{parent.store.uri}' has no accepted sample with an image, so there is nothing to select")
    names = tuple(_metadata(parent).schema.names)
    return Candidates(keys=keys, class_indices=classes, column_names=names, parent=parent)


def _candidate_rows(parent: Parent, columns: list[str]) -> pa.Table:
    """Some columns of the candidates.

    Raises:
        CorruptShardError: the metadata cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    where = parent.store.address(METADATA)
    try:
        dataset = _metadata(parent)
        wanted = pc.field("accepted") & (pc.field("sha256") != "")
        # Without that column no sample is marked as beyond a quota.
        if "surplus" in dataset.schema.names:
            wanted &= ~pc.field("surplus")
        rows = dataset.to_table(columns, filter=wanted)
        check_rows(rows, where)
    except (pa.ArrowException, OSError) as error:
        raise CorruptShardError(
            f"{where}: cannot be read as the metadata of a run ({first_line(error)}); `riskforge verify` says more"
        ) from None
    return rows


def _metadata(parent: Parent) -> Dataset:
    import pyarrow.dataset

    path = parent.store.fetch(METADATA, keep=True)
    return pyarrow.dataset.dataset(path, format="parquet", partitioning=None)
