"""One run as a source of rows and images, with its metadata.

A run that has ended is read from `metadata.parquet`. One that has not is read from the parquet files of its committed
shards. A rescored folder (`rescored_from` in its manifest) has rows, and the images of another run.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.reading.origins import Origin, origin_of, origins_of
from engine.data.run.commits import list_commits
from engine.data.run.file_names import EXPORT_KIND, MANIFEST, METADATA, RESCORED_FROM, SUCCESS
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.origin import origin_address
from engine.data.run.schema import REQUIRED
from engine.data.run.shards import SHARDS, file_digest, shard_name
from engine.data.run.stored_plan import StoredRun, read_run, stored_plan
from engine.data.run.surplus import MARKED, Surplus, quotas_of
from engine.data.stores.base import Store, StoredFile
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError, JobError, OutputError, StoreLostError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

SOURCES = "sources"
_MAX_RESCORED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSource:
    """A run, finished or not, or a data set that was merged from some.

    Attributes:
        uri: as it was given.
        name: of the job, or of the merged data set.
        state: in words: `finished`, or how many shards there are so far.
        is_finished: whether `_SUCCESS` is there.
        rows: the parquet files of its attempts, in order.
        tars: the tars of its images, in order; those of the original run where this one is rescored.
        surplus: of shards that have samples beyond their quota, the column `surplus` by the file of their rows, as far
            as the run is; None where the files have that column.
        is_rescored: whether the rows are not those that the tars hold.
        is_export: whether its images are those of an export, which has no starts and twins beside them.
        labels: class names of the target in index order; empty where they are not known.
        models: by role, as in the manifest; empty where there is none.
        targets: digests of the targets that its scores are of.
        clips: addresses of the CLIP models that its conformity is of.
        digest: of the plan, or of the merged content; empty where it is not known.
        stores: its own, and that of the run which it was scored from.
        origins: the runs that its samples come from: itself, or those that it was merged from.
    """

    uri: str
    name: str
    store: Store
    state: str
    is_finished: bool
    rows: tuple[StoredFile, ...]
    tars: tuple[StoredFile, ...]
    surplus: Mapping[str, tuple[bool, ...]] | None
    is_rescored: bool
    is_export: bool
    labels: tuple[str, ...]
    models: dict[str, Any]
    targets: frozenset[str]
    clips: frozenset[str]
    digest: str
    stores: tuple[Store, ...]
    origins: tuple[Origin, ...]

    def schema(self) -> pa.Schema:
        """The columns of its rows.

        Raises:
            CorruptShardError: the first file is not a parquet file.
            JobError: a column is missing without which nothing can be read.
        """
        import pyarrow.parquet as pq

        with reading_rows(str(self.rows[0])):
            schema = pq.read_schema(self.rows[0].fetch(keep=True))
        if missing := [name for name in REQUIRED if name not in schema.names]:
            raise JobError(f"RUN: {self.rows[0]} has no column {', '.join(missing)}; give the output folder of a run")
        return schema

    def rows_files(self) -> list[Path]:
        """Local files with its rows, which are fetched whole where they lie on an object store."""
        return list(self.store.fetch_each([file.name for file in self.rows], keep=True))

    def rows_digest(self) -> str:
        """Checksum of the files of its rows, which include the checksums of its images."""
        digests = [file_digest(path, "sha256") for path in self.rows_files()]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def known_models(self) -> dict[str, Any]:
        """What is known of the models of a run that has no manifest yet."""
        known = {"target": ("digest", self.targets), "clip": ("address", self.clips)}
        return {role: {field: next(iter(values))} for role, (field, values) in known.items() if len(values) == 1}


def open_source(uri: str) -> RunSource:
    """A run by its address.

    Raises:
        RiskforgeError: there is no run, nothing is committed, or its files cannot be read.
    """
    return _open(uri, depth=0)


def _open(uri: str, depth: int) -> RunSource:
    store = open_store(uri)
    if not store.is_there():
        raise JobError(
            f"RUN: there is no folder '{uri}'; give the output folder of `riskforge run` or `riskforge merge`"
        )
    stored = read_run(store)
    manifest = read_manifest(store) if store.exists(MANIFEST) else {}
    rows, shards, state = _rows(store, stored, uri)
    origin = _origin(store, manifest, depth)
    is_export = manifest.get("kind") == EXPORT_KIND
    return RunSource(
        uri=uri,
        name=str(manifest.get("name") or (stored.job["name"] if stored else store.name)),
        store=store,
        state=state,
        is_finished=store.exists(SUCCESS),
        rows=rows,
        tars=origin.tars if origin else shards,
        surplus=_surplus(store, rows) if stored and rows != _metadata_files(store) else None,
        is_rescored=origin is not None,
        is_export=origin.is_export if origin else is_export,
        labels=_labels(manifest, stored) or (origin.labels if origin else ()),
        models=_models(manifest),
        targets=_of_sources(manifest, "target", "digest") or _stored_target(stored),
        clips=_of_sources(manifest, "clip", "address") or (origin.clips if origin else _stored_clip(stored)),
        digest=str(manifest.get("plan_digest") or manifest.get("digest") or (stored.digest if stored else "")),
        stores=(store, *(origin.stores if origin else ())),
        origins=origins_of(manifest) if is_export else (origin_of(uri, manifest, stored),),
    )


@contextlib.contextmanager
def reading_rows(where: Path | str) -> Iterator[None]:
    """Turn an error of Arrow into one that names the file or run and the remedy.

    Raises:
        CorruptShardError: in the block, a file is missing, damaged or of other columns.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        remedy = "`riskforge verify` reports what is damaged"
        raise CorruptShardError(f"{where}: the rows cannot be read ({reason}); {remedy}") from None


def _rows(
    store: Store, stored: StoredRun | None, uri: str
) -> tuple[tuple[StoredFile, ...], tuple[StoredFile, ...], str]:
    """Files of rows, tars, and the state of the run."""
    metadata = _metadata_files(store)
    if stored is None:
        if not metadata:
            raise JobError(f"RUN: '{uri}' holds no run: neither {METADATA} nor the engine's own files are there")
        tars = tuple(StoredFile(store, name) for name in store.list(SHARDS) if name.endswith(".tar"))
        return metadata, tars, "finished" if store.exists(SUCCESS) else f"without {SUCCESS}"
    commits = list_commits(store)
    if not commits:
        raise JobError(f"RUN: '{uri}' has no committed shard yet; let `riskforge run` make some first")
    names = [f"{SHARDS}/{shard_name(str(stored.job['name']), number)}" for number in sorted(commits)]
    tars = tuple(StoredFile(store, f"{name}.tar") for name in names)
    if store.exists(SUCCESS):
        if not metadata:
            raise CorruptShardError(f"{store.address(METADATA)}: is missing; `riskforge run` writes it again")
        return metadata, tars, "finished"
    state = f"not finished: {len(commits)} committed shards so far"
    if metadata and _num_rows(metadata) == sum(commit.counts.attempted for commit in commits.values()):
        return metadata, tars, state
    return tuple(StoredFile(store, f"{name}.parquet") for name in names), tars, state


def _surplus(store: Store, rows: tuple[StoredFile, ...]) -> dict[str, tuple[bool, ...]]:
    """The column `surplus` of those committed shards that have samples beyond their quota, by the file of their rows.

    By the counts of the commit records: other shards are not read.
    """
    import pyarrow.parquet as pq

    job, plan = stored_plan(store)
    surplus, flags, wanted = Surplus(quotas_of(plan)), dict[str, tuple[bool, ...]](), set(rows)
    for number, commit in sorted(list_commits(store).items()):
        file = StoredFile(store, f"{SHARDS}/{shard_name(job.name, number)}.parquet")
        # Others were committed after the rows were listed, or are not in the plan, which `verify` reports.
        if file not in wanted or number >= plan.num_shards:
            continue
        request = plan.requests[plan.shard(number).request].spec.name
        if not surplus.is_within(request, commit.counts.accepted_per_class):
            with reading_rows(str(file)):
                table = pq.read_table(file.fetch(keep=True), columns=list(MARKED), partitioning=None)
                flags[str(file)] = tuple(surplus.mark(table))
    return flags


def _metadata_files(store: Store) -> tuple[StoredFile, ...]:
    if store.is_folder(METADATA):
        return tuple(StoredFile(store, name) for name in store.list(METADATA) if name.endswith(".parquet"))
    return (StoredFile(store, METADATA),) if store.exists(METADATA) else ()


def _num_rows(files: tuple[StoredFile, ...]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return sum(pq.read_metadata(file.fetch()).num_rows for file in files)
    except (pa.ArrowException, OSError):
        return -1


def _origin(store: Store, manifest: dict[str, Any], depth: int) -> RunSource | None:
    """The run whose images a rescored folder is about."""
    address = origin_address(store, manifest)
    if address is None:
        return None
    if depth >= _MAX_RESCORED:
        raise JobError(f"RUN: {store.address(MANIFEST)}: {RESCORED_FROM} is not the address of a run ({address!r})")
    try:
        return _open(address, depth + 1)
    except (JobError, OutputError) as error:
        if depth or isinstance(error, StoreLostError):
            raise
        raise JobError(f"RUN: '{store.uri}' was scored from '{address}', which cannot be opened: {error}") from None


def _labels(manifest: dict[str, Any], stored: StoredRun | None) -> tuple[str, ...]:
    """Class names from the manifest; of a run that has none yet, from the files of its target, running no code."""
    target = _models(manifest).get("target")
    labels = target.get("labels") if isinstance(target, dict) else None
    labels = labels or manifest.get("labels")
    if isinstance(labels, list):
        return tuple(map(str, labels))
    if stored is None:
        return ()
    from engine.models.labels import read_labels
    from engine.models.programs import is_program

    address = str(stored.job["models"]["target"])
    with contextlib.suppress(JobError, OSError):
        return () if is_program(address) else tuple(read_labels(address) or ())
    return ()


def _models(document: Any) -> dict[str, Any]:
    models = document.get("models") if isinstance(document, dict) else None
    kept = models.items() if isinstance(models, dict) else ()
    return {role: value for role, value in kept if isinstance(value, dict) or _are_models(value)}


def _are_models(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(model, dict) for model in value)


def _of_sources(manifest: dict[str, Any], role: str, field: str) -> frozenset[str]:
    """An attribute of a model in the manifest, over all sources of a merged data set."""
    values = set()
    sources = manifest.get(SOURCES)
    for document in [manifest, *(sources if isinstance(sources, list) else [])]:
        model = _models(document).get(role)
        if isinstance(model, dict) and isinstance(model.get(field), str):
            values.add(model[field])
    return frozenset(values)


def _stored_target(stored: StoredRun | None) -> frozenset[str]:
    return frozenset([str(stored.identity["models"]["target"])]) if stored else frozenset()


def _stored_clip(stored: StoredRun | None) -> frozenset[str]:
    return frozenset([str(stored.job["models"]["clip"])]) if stored else frozenset()
