"""What closes a run: metadata of all shards, indexes for other readers, manifest, card and, last, `_SUCCESS`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from engine.data.run.card import dataset_card
from engine.data.run.commits import CommitRecord, CommitSummary, compact_commits, list_commits, read_commits
from engine.data.run.counts import ShardCounts
from engine.data.run.schema import arrow_schema, check_rows
from engine.data.run.shards import SHARDS, shard_name
from engine.data.run.state import CARD, MANIFEST, METADATA, SUCCESS, SURPLUS_LIST, TIMM_INFO, WIDS_INDEX
from engine.data.run.summary import (
    GroupSummary,
    count_classes,
    count_guidance,
    count_requests,
    plain,
    read_dials,
    summarise,
)
from engine.data.run.surplus import Surplus, quotas_of, surplus_lines
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained, shown
from engine.errors import CorruptShardError, OutputError
from engine.job.class_names import planned_names
from engine.job.columns import SCHEMA_VERSION
from engine.job.plan import Plan
from engine.job.quotas import Quotas, replay
from engine.job.spec import JobSpec
from engine.methods.conditioning.tally import ScreeningTally

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_GROUP = 65_536
MAX_ROWS_PER_FILE = 10**7
MAX_LISTED_SHARDS = 10_000
_TOTALS = ("attempted", "ok", "rejected", "failed", "accepted")
PACKAGES = (
    "riskforge", "torch", "diffusers", "transformers", "accelerate", "ray", "pyarrow", "numpy", "pillow", "webdataset",
    "xformers",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """What `finalise` found and wrote.

    Attributes:
        manifest: the content of manifest.json.
        groups: the summary per request and context.
        complete: whether every shard of the plan is committed, and no quota asks for more.
    """

    manifest: dict[str, Any]
    groups: list[GroupSummary]
    complete: bool


def finalise(
    store: Store,
    job: JobSpec,
    plan: Plan,
    *,
    models: dict[str, Any],
    timing: dict[str, float],
    versions: dict[str, str],
    hardware: dict[str, Any],
    rows_per_file: int = MAX_ROWS_PER_FILE,
) -> FinishedRun:
    """Write metadata, list of surplus, indexes, manifest and card over the committed shards, whether or not all are.

    The caller writes its report and then calls `mark_success`.

    Args:
        models: by role, each with address and digest, for the manifest and the card.
        rows_per_file: above this number of rows `metadata.parquet` is a folder of parts.

    Raises:
        OutputError: the store refuses.
        CorruptShardError: a committed shard is missing or has other rows than its record says.

    Side effects:
        Removes `_SUCCESS`; packs the commit records when there are many.
    """
    store.remove(SUCCESS)
    compact_commits(store)
    commits = list_commits(store)
    write_metadata(store, job.name, commits, rows_per_file, schema_version=plan.schema_version, quotas=quotas_of(plan))
    write_surplus(store)
    write_indexes(store, job)
    groups = summarise(store.fetch(METADATA))
    manifest = build_manifest(
        store, job, plan, commits, groups, models=models, timing=timing, versions=versions, hardware=hardware
    )
    store.replace(MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    store.replace(CARD, dataset_card(job, manifest, groups, _data_files(job, commits)).encode())
    return FinishedRun(manifest=manifest, groups=groups, complete=manifest["complete"])


def _data_files(job: JobSpec, commits: dict[int, CommitSummary]) -> list[str]:
    """Patterns of the tars that hold images: readers that look into the first tar stumble over an empty one."""
    filled = [number for number in sorted(commits) if num_stored(job, commits[number].counts)]
    if len(filled) == len(commits) or len(filled) > MAX_LISTED_SHARDS:
        return [f"{SHARDS}/*.tar"]
    return [f"{SHARDS}/{shard_name(job.name, number)}.tar" for number in filled]


def mark_success(store: Store, plan: Plan) -> None:
    """Write `_SUCCESS`: the run is complete and everything else is written.

    Raises:
        OutputError: shards of the plan are not committed.
    """
    missing = plan.num_shards - len(list_commits(store))
    if missing > 0:
        raise OutputError(f"output {store.uri}: {missing} of {plan.num_shards} shards are not committed; run again")
    store.replace(SUCCESS, f"{plan.digest}\n".encode())


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
        CorruptShardError: a shard's parquet is missing, damaged or of another length than its record says.
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
    store: Store, job_name: str, commits: dict[int, CommitSummary], schema: pa.Schema, beyond: Surplus
) -> Iterator[pa.Table]:
    """The rows of each shard in order, with the column `surplus`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = sorted(commits)
    paths = store.fetch_each(f"{SHARDS}/{shard_name(job_name, number)}.parquet" for number in numbers)
    for number, path in zip(numbers, paths, strict=True):
        try:
            table = pq.read_table(path, partitioning=None)
            check_rows(table, shown(path))
            surplus = pa.array(beyond.mark(table), pa.bool_())
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
        f"{shown(path)}: {what}, but the shard is committed; restore the file, or let `riskforge repair` take the shard"
        " out and run again"
    ) from None


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of about `ROWS_PER_GROUP`: small row groups are slow to read."""
    import pyarrow as pa

    held: list[pa.Table] = []
    num_rows = 0
    for table in tables:
        held.append(table)
        num_rows += len(table)
        if num_rows >= ROWS_PER_GROUP:
            yield pa.concat_tables(held).combine_chunks()
            held, num_rows = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def write_surplus(store: Store) -> None:
    """Write the list of keys beyond their quota next to the shards; it is empty where there are none."""
    staged = store.staging() / "surplus.txt"
    with explained(staged), staged.open("wb") as file:
        file.writelines(surplus_lines(store.fetch(METADATA)))
    store.replace(SURPLUS_LIST, staged)


def num_stored(job: JobSpec, counts: ShardCounts) -> int:
    """Images in a shard's tar: those of rejected samples too, where the job stores them."""
    return counts.ok + (counts.rejected if job.output.store_rejected else 0)


class IndexEntry(NamedTuple):
    """A tar with images, as the indexes list it."""

    name: str
    num_images: int
    md5: str
    num_bytes: int


def write_indexes(store: Store, job: JobSpec) -> None:
    """Write the index of `wids` and the info of timm beside the shards; shards without an image are left out.

    Raises:
        CorruptShardError: a commit record cannot be read.
    """
    entries = (
        IndexEntry(f"{record.name}.tar", num_images, record.tar_md5, record.tar_bytes)
        for record in read_commits(store)
        if (num_images := num_stored(job, record.counts))
    )
    write_index_files(store, entries)


def write_index_files(store: Store, entries: Iterable[IndexEntry]) -> None:
    """Write the index of `wids` and the info of timm over the given tars, in constant memory but for their names."""
    staged = store.staging() / "wids.json"
    names: list[str] = []
    lengths: list[int] = []
    with explained(staged), staged.open("w", encoding="utf-8") as file:
        file.write('{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [')
        for entry in entries:
            names.append(entry.name)
            lengths.append(entry.num_images)
            file.write((",\n" if names[1:] else "\n") + json.dumps(_wids_entry(entry)))
        file.write("\n]}\n")
    store.replace(WIDS_INDEX, staged)
    split = {"name": "train", "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    store.replace(TIMM_INFO, (json.dumps({"splits": {"train": split}}) + "\n").encode())


def _wids_entry(entry: IndexEntry) -> dict[str, Any]:
    return {
        "url": entry.name,
        "md5sum": entry.md5,
        "nsamples": entry.num_images,
        "filesize": entry.num_bytes,
    }


def build_manifest(
    store: Store,
    job: JobSpec,
    plan: Plan,
    commits: dict[int, CommitSummary],
    groups: list[GroupSummary],
    *,
    models: dict[str, Any],
    timing: dict[str, float],
    versions: dict[str, str],
    hardware: dict[str, Any],
) -> dict[str, Any]:
    """The content of manifest.json. The shards are listed one by one up to 10,000 of them."""
    counts = [commit.counts for commit in commits.values()]
    totals = {name: sum(getattr(one, name) for one in counts) for name in _TOTALS}
    quotas = replay(
        plan, {number: commit.counts for number, commit in commits.items()}, (), job.output.samples_per_shard
    )
    return {
        "schema_version": plan.schema_version,
        "name": job.name,
        "complete": len(commits) == plan.num_shards and not quotas.advance(),
        "plan_digest": plan.digest,
        "job": job.model_dump(mode="json", exclude_none=True),
        "models": models,
        "versions": versions,
        "hardware": hardware,
        "timing": timing,
        "counts": {
            "shards": {"planned": plan.num_shards, "committed": len(commits)},
            "samples": {"planned": plan.num_samples, **totals},
            "requests": count_requests(groups),
            "classes": count_classes(store.fetch(METADATA)),
            "quotas": quota_rows(plan, quotas),
            "screening": screening_by_request(read_commits(store), job),
            "guidance": count_guidance(store.fetch(METADATA)),
        },
        "summary": [plain(group) for group in groups],
        "dials": read_dials(store.fetch(METADATA), job),
        "shards": [_listed(record, job) for record in read_commits(store)] if len(commits) <= MAX_LISTED_SHARDS else [],
    }


def quota_rows(plan: Plan, quotas: Quotas) -> dict[str, list[dict[str, Any]]]:
    """How far the quotas of every request are, class by class."""
    rows: dict[str, list[dict[str, Any]]] = {}
    names = planned_names(plan)
    for one in quotas.standings():
        request = plan.requests[one.request]
        cell = request.cells[one.cell]
        about = {
            "class": " and ".join(names[index] for index in cell.classes),
            "code": cell.code,
            "wanted": one.wanted,
            "accepted": one.accepted,
        }
        counts = {"surplus": max(0, one.accepted - one.wanted), "attempted": one.attempted, "missing": one.missing}
        rows.setdefault(request.spec.name, []).append(about | counts)
    return rows


def screening_by_request(records: Iterable[CommitRecord], job: JobSpec) -> dict[str, list[dict[str, Any]]]:
    """Screening of every request that screens: of each class its samples, draws and the share of draws that passed."""
    tallies: dict[str, ScreeningTally] = {}
    for record in records:
        if record.screening:
            name = job.requests[record.request].name
            tallies.setdefault(name, ScreeningTally()).add_rows(record.screening)
    return {
        name: [
            {
                "class_index": index,
                "samples": count.num_samples,
                "screened": count.num_screened,
                "draws": count.num_draws,
                "acceptance_rate": count.acceptance_rate,
            }
            for index, count in sorted(tally.per_class.items())
        ]
        for name, tally in tallies.items()
    }


def _listed(record: CommitRecord, job: JobSpec) -> dict[str, Any]:
    return {
        "name": record.name,
        "num_images": num_stored(job, record.counts),
        "num_attempts": record.counts.attempted,
        "tar_bytes": record.tar_bytes,
        "tar_sha256": record.tar_sha256,
        "parquet_sha256": record.parquet_sha256,
    }


def software_versions() -> dict[str, str]:
    """Versions of the packages that decide the samples, as far as they are installed, without importing them."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(packages.PackageNotFoundError):
            found[name] = packages.version(name)
    return found
