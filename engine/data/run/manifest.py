"""The content of `manifest.json`: job, models, versions, counts and summary of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from importlib import metadata as packages
from typing import TYPE_CHECKING, Any

from engine.data.run.commit_record import CommitRecord
from engine.data.run.commits import CommitSummary, read_commits
from engine.data.run.companions import KEY_COLUMNS, companions_of
from engine.data.run.counts import num_stored
from engine.data.run.curated import manifest_part
from engine.data.run.file_names import METADATA
from engine.data.run.notices import count_notices
from engine.data.run.run_warnings import run_warnings
from engine.data.run.summary import (
    GroupSummary,
    count_classes,
    count_guidance,
    count_requests,
    group_document,
    read_dials,
)
from engine.data.stores.base import Store
from engine.job.class_names import planned_names
from engine.job.plan import Plan
from engine.job.quotas import Quotas, replay
from engine.job.spec import JobSpec
from engine.methods.conditioning.screening_tally import ScreeningTally

if TYPE_CHECKING:
    pass

MAX_LISTED_SHARDS = 10_000
_TOTALS = ("attempted", "ok", "rejected", "failed", "accepted")
PACKAGES = (
    "riskforge", "torch", "diffusers", "transformers", "accelerate", "ray", "pyarrow", "numpy", "pillow", "webdataset",
    "xformers",
)  # fmt: skip


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
    totals = {name: sum(getattr(shard_counts, name) for shard_counts in counts) for name in _TOTALS}
    quotas = replay(
        plan, {number: commit.counts for number, commit in commits.items()}, (), job.output.samples_per_shard
    )
    counted = {
        "shards": {"planned": plan.num_shards, "committed": len(commits)},
        "samples": {"planned": plan.num_samples, **totals},
        "requests": count_requests(groups),
        "classes": count_classes(store.fetch(METADATA)),
        "quotas": quota_rows(plan, quotas),
        "screening": screening_by_request(read_commits(store), job),
        "guidance": count_guidance(store.fetch(METADATA)),
    }
    warnings = run_warnings(counted, planned_names(plan))
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
        "notices": count_notices(record.notices for record in read_commits(store)),
        "counts": counted,
        **({"warnings": warnings} if warnings else {}),
        "summary": [group_document(group) for group in groups],
        "dials": read_dials(store.fetch(METADATA), job),
        "shards": [_listed(record, job) for record in read_commits(store)] if len(commits) <= MAX_LISTED_SHARDS else [],
        **_companions(store, job),
        **manifest_part(store, plan),
    }


def _companions(store: Store, job: JobSpec) -> dict[str, Any]:
    """Of each folder of tars with second images how many images, tars and bytes; nothing where a run has none."""
    if not any(map(companions_of, job.requests)):
        return {}
    totals: dict[str, dict[str, Any]] = {}
    for record in read_commits(store):
        for kind, tar in record.companions.items():
            total = totals.setdefault(kind, {"folder": kind, "images": 0, "tars": 0, "bytes": 0})
            total["tars"] += 1
            total["bytes"] += tar.bytes
    for kind, total in totals.items():
        total["images"] = _num_images(store, kind)
    return {"companions": totals} if totals else {}


def _num_images(store: Store, kind: str) -> int:
    """Images in the companions of a run."""
    import pyarrow.compute as pc
    import pyarrow.dataset

    rows = pyarrow.dataset.dataset(store.fetch(METADATA), format="parquet", partitioning=None)
    return rows.count_rows(filter=(pc.field("sha256") != "") & (pc.field(KEY_COLUMNS[kind]) != ""))


def quota_rows(plan: Plan, quotas: Quotas) -> dict[str, list[dict[str, Any]]]:
    """How far the quotas of every request are, class by class."""
    rows: dict[str, list[dict[str, Any]]] = {}
    names = planned_names(plan)
    for standing in quotas.standings():
        request = plan.requests[standing.request]
        cell = request.cells[standing.cell]
        row = {
            "class": " and ".join(names[index] for index in cell.classes),
            "code": cell.code,
            "wanted": standing.wanted,
            "accepted": standing.accepted,
            "surplus": max(0, standing.accepted - standing.wanted),
            "attempted": standing.attempted,
            "missing": standing.missing,
        }
        rows.setdefault(request.spec.name, []).append(row)
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
        **({"companions": _listed_companions(record)} if record.companions else {}),
    }


def _listed_companions(record: CommitRecord) -> dict[str, dict[str, Any]]:
    return {kind: {"bytes": tar.bytes, "sha256": tar.sha256} for kind, tar in record.companions.items()}


def software_versions() -> dict[str, str]:
    """Versions of the packages that decide the samples, as far as they are installed, without importing them."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(packages.PackageNotFoundError):
            versions[name] = packages.version(name)
    return versions
