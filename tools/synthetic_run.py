"""Write a finished run of any size within seconds, to measure what reading it costs.

    python tools/synthetic_run.py runs/quickstart /tmp/large --rows 1e6

Plan, packed commit records, `metadata.parquet` and manifest are as a run writes them. Rows are those of a finished run
again and again, with keys and seeds of their own and scores moved at random; tars and parquet files of shards are
sparse files of the recorded size, so that there are no images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.run.commit_packs import PACKS, write_pack
from engine.data.run.commit_record import CommitRecord
from engine.data.run.commits import list_commits
from engine.data.run.counts import ShardCounts, count_rows
from engine.data.run.file_names import CARD, MANIFEST, METADATA
from engine.data.run.finalise import mark_success
from engine.data.run.manifest import build_manifest
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.metadata_table import MAX_ROWS_PER_FILE, ROWS_PER_GROUP, write_surplus
from engine.data.run.reader_indexes import write_indexes
from engine.data.run.resume import open_output
from engine.data.run.schema import arrow_schema
from engine.data.run.shards import shard_name
from engine.data.run.stored_plan import stored_plan
from engine.data.run.summary import summarise
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.checks import plan_job
from engine.job.plan import Plan, ShardSpec
from engine.job.spec import JobSpec

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLES_PER_SHARD = 256
RECORDS_PER_PACK = 40_000
TAR_BYTES, PARQUET_BYTES = 1_048_576, 65_536
# Scores that are moved; risk and what follows from it need not agree, as nobody computes with both.
MOVED = ("risk", "kldb", "entropy", "conformity", "duration_seconds")


def write_run(template: Path, output: Path, num_rows: int, *, seed: int = 0, samples_per_shard: int = 256) -> Store:
    """A finished run of about `num_rows` attempts, without its report.

    Args:
        template: a finished run without quotas, whose rows are repeated.
        seed: of the scores; runs of two seeds have the same noise and other outcomes.
    """
    job, plan, store = open_run(template, output, num_rows, samples_per_shard)
    rows = _TemplateRows(template, plan, seed)
    write_packs(store, job, plan, rows.counts)
    write_sparse_files(store, job, plan)
    _write_metadata(store, plan, rows)
    write_surplus(store)
    write_indexes(store, job)
    close(store, read_manifest(open_store(str(template))))
    return store


def open_run(template: Path, output: Path, num_rows: int, samples_per_shard: int) -> tuple[JobSpec, Plan, Store]:
    """Job, plan and output of a run without a shard."""
    origin, _ = stored_plan(open_store(str(template)))
    factor = max(1, round(num_rows / plan_job(origin).num_samples))
    requests = tuple(one.model_copy(update={"count": one.count * factor}) for one in origin.requests)
    output_spec = origin.output.model_copy(update={"uri": str(output), "samples_per_shard": samples_per_shard})
    job = origin.model_copy(update={"requests": requests, "output": output_spec})
    plan = plan_job(job)
    store = open_store(str(output))
    return job, open_output(store, plan, job, "never", confirmed=False), store


def write_packs(
    store: Store, job: JobSpec, plan: Plan, counts: Callable[[ShardSpec], ShardCounts] | None = None
) -> None:
    """Commit records of every shard in packs.

    Args:
        counts: of a shard; every sample is accepted where not given.
    """
    staged = store.staging() / "pack.parquet"
    counts = counts or _all_accepted
    for number, first in enumerate(range(0, plan.num_shards, RECORDS_PER_PACK)):
        shards = map(plan.shard, range(first, min(first + RECORDS_PER_PACK, plan.num_shards)))
        records = (_record(job, plan, shard, counts(shard)) for shard in shards)
        write_pack(staged, ((record.file_name, record) for record in records))
        store.publish(f"{PACKS}/{number:06d}.parquet", staged)
        staged.unlink()


def _all_accepted(shard: ShardSpec) -> ShardCounts:
    number = shard.num_samples
    return ShardCounts(ok=number, accepted=number, accepted_per_class={"003": number})


def write_sparse_files(store: Store, job: JobSpec, plan: Plan) -> None:
    """Empty files of the recorded size in place of those of the shards."""
    folder = Path(store.uri) / "shards"
    folder.mkdir(exist_ok=True)
    for number in range(plan.num_shards):
        for extension, size in (("tar", TAR_BYTES), ("parquet", PARQUET_BYTES)):
            with (folder / f"{shard_name(job.name, number)}.{extension}").open("wb") as file:
                file.truncate(size)


def _record(job: JobSpec, plan: Plan, shard: ShardSpec, counts: ShardCounts) -> CommitRecord:
    digest = hashlib.sha256(str(shard.number).encode()).hexdigest()
    return CommitRecord(
        shard=shard.number,
        name=shard_name(job.name, shard.number),
        plan_digest=plan.digest,
        request=shard.request,
        start=shard.start,
        stop=shard.stop,
        attempt=1,
        worker=f"host-{shard.number % 16}",
        counts=counts,
        tar_sha256=digest,
        tar_md5=hashlib.md5(digest.encode(), usedforsecurity=False).hexdigest(),
        tar_bytes=TAR_BYTES,
        parquet_sha256=digest[::-1],
        parquet_bytes=PARQUET_BYTES,
        timing={"sampling_seconds": 20.0 + int(digest[:8], 16) / 2**32},
    )


class _TemplateRows:
    """The rows of a run by request, from which those of a larger one are made."""

    def __init__(self, template: Path, plan: Plan, seed: int) -> None:
        import pyarrow.parquet as pq

        self._plan, self._random = plan, np.random.default_rng(seed)
        table = pq.read_table(template / METADATA)
        names = table["request"].to_pylist()
        self._tables = {
            request.number: table.filter([name == request.spec.name for name in names]) for request in plan.requests
        }
        self._brief = {
            number: some.select(["key", "status", "accepted"]).to_pylist() for number, some in self._tables.items()
        }

    def counts(self, shard: ShardSpec) -> ShardCounts:
        """Counts of a shard."""
        rows = self._brief[shard.request]
        return count_rows(rows[place % len(rows)] for place in range(shard.start, shard.stop))

    def batch(self, request: int, start: int, stop: int) -> pa.Table:
        """Rows of a request by their places in its sequence."""
        import pyarrow as pa

        table, cells = self._tables[request], len(self._plan.requests[request].cells)
        places = np.arange(start, stop)
        rows = table.take(pa.array(places % len(table)))
        index = places // cells
        heads = [key.rpartition("-")[0] for key in table["key"].to_pylist()]
        pairs = zip((places % len(table)).tolist(), index.tolist(), strict=True)
        keys = [f"{heads[place]}-{number:08d}" for place, number in pairs]
        # Any function of group, class and index that gives no seed twice.
        groups = [one.spec.seed_group or one.spec.name for one in self._plan.requests]
        seeds = (index * cells + places % cells) * 64 + groups.index(groups[request])
        new: dict[str, Any] = {"key": keys, "index": index, "seed": seeds}
        for name in MOVED:
            new[name] = rows[name].to_numpy() * np.exp(0.4 * self._random.standard_normal(len(places)))
        errs = self._random.random(len(places)) < 0.1
        labels = rows["class_index"].to_numpy()
        others = (labels + self._random.integers(1, 10, len(places))) % 10
        new["predicted_class"] = np.where(errs, others, rows["predicted_class"].to_numpy())
        new["is_error"] = new["predicted_class"] != labels
        for name, values in new.items():
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, rows.schema.field(place), pa.array(values, rows.schema.field(place).type))
        return rows.cast(arrow_schema(surplus=True, version=self._plan.schema_version))


def _tables(plan: Plan, rows: _TemplateRows) -> Iterator[pa.Table]:
    for extent in plan.extents:
        for start in range(extent.start, extent.stop, ROWS_PER_GROUP):
            yield rows.batch(extent.request, start, min(start + ROWS_PER_GROUP, extent.stop))


def _write_metadata(store: Store, plan: Plan, rows: _TemplateRows) -> None:
    import pyarrow.parquet as pq

    path = Path(store.uri) / METADATA
    is_folder = plan.num_samples > MAX_ROWS_PER_FILE
    path.mkdir() if is_folder else None
    schema = arrow_schema(surplus=True, version=plan.schema_version)
    writer, written, part = None, 0, 0
    for table in _tables(plan, rows):
        if writer is None or written + len(table) > MAX_ROWS_PER_FILE:
            if writer:
                writer.close()
            writer = pq.ParquetWriter(
                path / f"part-{part:06d}.parquet" if is_folder else path, schema, compression="zstd"
            )
            written, part = 0, part + 1
        writer.write_table(table)
        written += len(table)
    if writer:
        writer.close()


def close(store: Store, manifest: dict[str, Any]) -> None:
    """Write manifest, card and marker as the end of a run does, with models and versions of another manifest."""
    job, plan = stored_plan(store)
    parts = {name: manifest[name] for name in ("models", "versions", "hardware", "timing")}
    groups = summarise(store.fetch(METADATA))
    document = build_manifest(store, job, plan, list_commits(store), groups, **parts)
    store.replace(MANIFEST, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode())
    store.replace(CARD, b"# A synthetic run\n")
    store.replace("report.html", b"<html></html>")
    mark_success(store, plan)


def main() -> None:
    """Write a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("template", type=Path, help="a finished run without quotas")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=float, default=1e5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    store = write_run(arguments.template, arguments.output, math.ceil(arguments.rows), seed=arguments.seed)
    print(f"{store.uri}: {stored_plan(store)[1].num_samples:,} rows")


if __name__ == "__main__":
    main()
