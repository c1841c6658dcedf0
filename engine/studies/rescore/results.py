"""What closes a rescoring: metadata and manifest over all shards."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.run.commits import CommitSummary
from engine.data.run.manifest import software_versions, write_metadata
from engine.data.run.state import (
    MANIFEST,
    METADATA,
    RESCORED_FROM,
    SUCCESS,
    read_manifest,
)
from engine.data.run.summary import count_classes, count_requests, plain, summarise
from engine.data.run.surplus import quotas_of
from engine.data.stores.base import Store
from engine.errors import CorruptShardError, OutputError
from engine.job.plan import Plan
from engine.job.records import STATUS_FAILED
from engine.job.spec import JobSpec
from engine.studies.rescore.inputs import Models, is_inside

if TYPE_CHECKING:
    pass


def finish(
    store: Store,
    folder: Store,
    job: JobSpec,
    plan: Plan,
    commits: dict[int, CommitSummary],
    models: Models,
    labels: list[str],
    started: float,
) -> None:
    """Write metadata and manifest over all shards."""
    folder.remove(SUCCESS)
    write_metadata(folder, job.name, commits, schema_version=plan.schema_version, quotas=quotas_of(plan))
    groups = summarise(folder.fetch(METADATA))
    counts = count_requests(groups)
    totals = {name: sum(one[name] for one in counts.values()) for name in next(iter(counts.values()))}
    new_job = job.model_copy(update={"models": job.models.model_copy(update=_new_addresses(models))})
    manifest = {
        "schema_version": plan.schema_version,
        "name": job.name,
        "complete": store.exists(SUCCESS),
        "plan_digest": plan.digest,
        RESCORED_FROM: _origin(store, folder, job, plan, len(commits)),
        "job": new_job.model_dump(mode="json", exclude_none=True),
        "models": _described(store, job, plan, models, labels),
        "versions": software_versions(),
        "hardware": {"machine": platform.machine()},
        "timing": {"run_seconds": time.time() - started, "finished": time.time()},
        "counts": {
            "shards": {"planned": plan.num_shards, "committed": len(commits)},
            "samples": {"planned": plan.num_samples, **totals},
            "requests": counts,
            "classes": count_classes(folder.fetch(METADATA)),
            "quotas": {},
            "screening": {},
        },
        "summary": [plain(group) for group in groups],
        "dials": {},
        "shards": [],
    }
    folder.replace(MANIFEST, json_bytes(manifest))


def _origin(store: Store, folder: Store, job: JobSpec, plan: Plan, num_shards: int) -> dict[str, Any]:
    """Where images and old scores are: relative to the folder where that lies inside the run."""
    relative = Path(os.path.relpath(store.place, folder.place)).as_posix()
    return {
        "uri": relative if is_inside(folder, store) else store.uri,
        "plan_digest": plan.digest,
        "num_shards": num_shards,
        "target": {"address": job.models.target, "digest": plan.identity["models"]["target"]},
    }


def _new_addresses(models: Models) -> dict[str, Any]:
    transfer = {"transfer": models.transfer} if models.transfer else {}
    return {"target": models.target} | transfer | ({"oracle": models.oracle} if models.oracle else {})


def _described(store: Store, job: JobSpec, plan: Plan, models: Models, labels: list[str]) -> dict[str, Any]:
    """The models of the manifest: the run's, with those that scored anew in their places."""
    digests = plan.identity["models"]
    described: dict[str, Any] = {"clip": {"address": job.models.clip, "digest": digests["clip"]}}
    with suppress(OutputError, CorruptShardError, KeyError, TypeError):
        described = read_manifest(store)["models"]
    described["target"] = {"address": models.target, "digest": models.digests["target"], "labels": labels}
    if models.transfer:
        pairs = zip(models.transfer, models.digests["transfer"], strict=True)
        described["transfer"] = [{"address": address, "digest": digest} for address, digest in pairs]
    if models.oracle:
        described["oracle"] = {"address": models.oracle, "digest": models.digests["oracle"]}
    return described


def failures_of(metadata: Path) -> tuple[int, str]:
    """How many stored images have no new score, and the most frequent reason."""
    import pyarrow.compute as pc

    from engine.report.data import failures, open_metadata

    dataset, is_stored = open_metadata(metadata), pc.field("sha256") != ""
    counted = failures(dataset, is_stored)
    num_failed = dataset.count_rows(filter=is_stored & (pc.field("status") == STATUS_FAILED))
    return num_failed, counted[0][0] if counted else ""


def json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
