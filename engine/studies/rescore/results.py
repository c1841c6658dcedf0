"""What ends a rescoring: metadata and manifest over all shards."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.data.run.commits import CommitSummary
from engine.data.run.file_names import MANIFEST, METADATA, RESCORED_FROM, SUCCESS
from engine.data.run.manifest import software_versions
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.metadata_table import write_metadata
from engine.data.run.summary import GroupSummary, count_classes, count_requests, group_document, summarise
from engine.data.run.surplus import quotas_of
from engine.data.stores.base import Store
from engine.errors import CorruptShardError, OutputError
from engine.job.records import STATUS_FAILED
from engine.job.spec import JobSpec
from engine.studies.rescore.inputs import Rescoring


def write_results(rescoring: Rescoring, commits: dict[int, CommitSummary], started: float) -> None:
    """Write metadata and manifest over all shards."""
    folder, plan = rescoring.folder, rescoring.plan
    folder.remove(SUCCESS)
    write_metadata(folder, rescoring.job.name, commits, schema_version=plan.schema_version, quotas=quotas_of(plan))
    groups = summarise(folder.fetch(METADATA))
    manifest = {
        "schema_version": plan.schema_version,
        "name": rescoring.job.name,
        "complete": rescoring.run.exists(SUCCESS),
        "plan_digest": plan.digest,
        RESCORED_FROM: _origin(rescoring, len(commits)),
        "job": _new_job(rescoring).model_dump(mode="json", exclude_none=True),
        "models": _described(rescoring),
        "versions": software_versions(),
        "hardware": {"machine": platform.machine()},
        "notices": [],
        "timing": {"run_seconds": time.time() - started, "finished": time.time()},
        "counts": _counts(rescoring, groups, len(commits)),
        "summary": [group_document(group) for group in groups],
        "dials": {},
        "shards": [],
    }
    write_manifest(folder, manifest)


def write_manifest(folder: Store, manifest: dict[str, Any]) -> None:
    """Replace the manifest of a rescoring."""
    folder.replace(MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _counts(rescoring: Rescoring, groups: list[GroupSummary], num_committed: int) -> dict[str, Any]:
    """Counts of the manifest, as a run has them."""
    counts, plan = count_requests(groups), rescoring.plan
    totals = {name: sum(request[name] for request in counts.values()) for name in next(iter(counts.values()))}
    return {
        "shards": {"planned": plan.num_shards, "committed": num_committed},
        "samples": {"planned": plan.num_samples, **totals},
        "requests": counts,
        "classes": count_classes(rescoring.folder.fetch(METADATA)),
        "quotas": {},
        "screening": {},
    }


def _origin(rescoring: Rescoring, num_shards: int) -> dict[str, Any]:
    """Where images and old scores are: relative to the folder where that lies inside the run."""
    run, folder, plan = rescoring.run, rescoring.folder, rescoring.plan
    relative = Path(os.path.relpath(run.place, folder.place)).as_posix()
    return {
        "uri": relative if rescoring.is_inside_run else run.uri,
        "plan_digest": plan.digest,
        "num_shards": num_shards,
        "target": {"address": rescoring.job.models.target, "digest": plan.identity["models"]["target"]},
    }


def _new_job(rescoring: Rescoring) -> JobSpec:
    """The run's job with the addresses of the new classifiers."""
    job, models = rescoring.job, rescoring.models
    addresses: dict[str, Any] = {"target": models.named, "calibration": models.calibration}
    addresses |= {"transfer": models.transfer} if models.transfer else {}
    addresses |= _oracle_fields(models.oracles) if models.oracles else {}
    addresses |= {"validity": None} if models.validity is None else {}
    new = job.models.model_copy(update=addresses)
    maps = {**job.models.label_map, **models.label_map}
    kept = {address: one for address, one in maps.items() if address in new.mappable}
    return job.model_copy(update={"models": new.model_copy(update={"label_map": kept})})


def _oracle_fields(addresses: Sequence[str]) -> dict[str, Any]:
    """Oracles as a job has them: one, or a list."""
    if len(addresses) == 1:
        return {"oracle": addresses[0], "oracles": ()}
    return {"oracle": None, "oracles": tuple(addresses)}


def _described(rescoring: Rescoring) -> dict[str, Any]:
    """The models of the manifest: the run's, replaced by the new classifiers where there are any."""
    models, clip_digest = rescoring.models, rescoring.plan.identity["models"]["clip"]
    described: dict[str, Any] = {"clip": {"address": rescoring.job.models.clip, "digest": clip_digest}}
    with suppress(OutputError, CorruptShardError, KeyError, TypeError):
        described = read_manifest(rescoring.run)["models"]
    target = {"address": models.named, "digest": models.digests["target"]}
    described["target"] = target | models.described | {"labels": rescoring.labels}
    if models.transfer:
        pairs = zip(models.transfer, models.digests["transfer"], strict=True)
        described["transfer"] = [{"address": address, "digest": digest} for address, digest in pairs]
    if models.oracles:
        digests = models.digests.get("oracles", [models.digests["oracle"]])
        oracles: list[dict[str, Any]] = [
            {"address": address, "digest": digest} for address, digest in zip(models.oracles, digests, strict=True)
        ]
        if rescoring.job.oracle_guides:
            oracles[-1]["guides"] = True
        replaced = {"oracle", "oracles", *(() if models.validity else ("validity",))}
        described = {role: value for role, value in described.items() if role not in replaced}
        described |= {"oracle": oracles[0]} if len(oracles) == 1 else {"oracles": oracles}
    return described


def failures_of(metadata: Path) -> tuple[int, str]:
    """How many stored images have no new score, and the most frequent reason."""
    import pyarrow.compute as pc

    from engine.report.data import failures, open_metadata

    dataset, is_stored = open_metadata(metadata), pc.field("sha256") != ""
    counted = failures(dataset, is_stored)
    num_failed = dataset.count_rows(filter=is_stored & (pc.field("status") == STATUS_FAILED))
    return num_failed, counted[0][0] if counted else ""
