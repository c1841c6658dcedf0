"""New scores of a run's images by another target: new metadata next to the old, nothing is sampled again.

A folder of a rescoring holds `shards/NAME-000000.parquet` for every committed shard of the run, published one by one,
so that the same command continues after a kill or after the run has grown; then `metadata.parquet`, `manifest.json`
with `rescored_from`, and `_SUCCESS` last. It holds no images: those are the run's. Rows are the run's, in its order.
What depends on the target is scored again, `accepted`, `status` and `surplus` by the run's own rules; the rest is
kept. A row whose image is not stored is `failed` with `NOT_STORED` as its message; a row for which a classifier gives
non-finite values is `failed` with a message that names the classifier.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from engine.data.run.commits import list_commits
from engine.data.run.file_names import METADATA, RESCORING, SUCCESS
from engine.data.run.manifest_reading import read_manifest
from engine.data.stores.lease import hold
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.records import STATUS_OK, STATUS_REJECTED
from engine.models.calibration import temperature_text
from engine.models.job_label_maps import Maps
from engine.studies.compare.program import RunComparison, compare_runs
from engine.studies.compare.scored_run import read_scored_run
from engine.studies.compare.tables import summary_document
from engine.studies.rescore.inputs import Rescoring, open_rescoring
from engine.studies.rescore.results import failures_of, write_manifest, write_results
from engine.studies.rescore.scoring import Scoring, rescore_shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """The results of a rescoring.

    Attributes:
        folder: its address.
        temperature: of the target, and where it is from.
        num_scored: images scored by this call; those of an earlier one are not counted.
        num_images: images with a new score, of `num_rows` rows.
        num_failed: images without one, because a classifier gives non-finite values.
        failure: the most frequent reason, which names the classifier.
        is_complete: whether the run is complete, so that no shard will be added.
        comparison: before and after; None where nothing could be compared, for this `reason`.
    """

    folder: str
    target: str
    temperature: str
    num_scored: int
    num_images: int
    num_rows: int
    num_accepted: int
    num_failed: int
    failure: str
    is_complete: bool
    comparison: RunComparison | None
    reason: str


def rescore_run(
    address: str,
    target: str,
    *,
    transfer: Sequence[str] = (),
    oracles: Sequence[str] = (),
    calibration: str | None = None,
    output: str | None = None,
    named: str | None = None,
    label_map: Maps | None = None,
    advance: Callable[[str], None] = lambda text: None,
    notice: Callable[[str], None] = lambda text: None,
) -> Rescored:
    """Score all stored images of a run by another target.

    Args:
        address: folder of the run.
        target: address of the classifier, with the classes of the run's.
        transfer: classifiers that replace the run's transfer models; without any, those and their scores are kept.
        oracles: the same for the oracles.
        calibration: an artefact whose temperature the target has; without one it has its own, or that of the run where
            it is the run's target.
        output: the folder; by default `RUN/rescored/TARGET-DIGEST`.
        named: address of the target that the results have in place of `target`, where it is about to be moved there.
        label_map: by address of a classifier its class names to those of the run, as `models.label_map` of a job.
        advance: progress callback.
        notice: called with messages for the user.

    Raises:
        JobError: a model is not there or has other classes.
        OutputError: there is no run, or the folder holds something else.
        CorruptShardError: a shard of the run is damaged.
        OwnedError: another process rescores into this folder, or it lies in the run and a driver is at work there.
    """
    rescoring = open_rescoring(address, target, transfer, oracles, output, calibration, named, label_map)
    if rescoring.models.digests["target"] in rescoring.models.guided:
        notice(f"'{target}' is one of several targets that guided this run: its scores show no transfer")
    with ExitStack() as leases:
        if rescoring.is_inside_run:
            leases.enter_context(hold(rescoring.run, notice=notice))
        leases.enter_context(hold(rescoring.folder, notice=notice))
        num_scored = _score(rescoring, advance)
        is_complete = rescoring.run.exists(SUCCESS)
        comparison, reason = _compare(rescoring, advance)
        samples = _close(rescoring, comparison, is_complete)
    num_failed, failure = failures_of(rescoring.folder.fetch(METADATA))
    return Rescored(
        folder=rescoring.folder.uri,
        target=named or target,
        temperature=temperature_text(rescoring.models.described),
        num_scored=num_scored,
        num_images=samples[STATUS_OK] + samples[STATUS_REJECTED],
        num_rows=samples["attempted"],
        num_accepted=samples["accepted"],
        num_failed=num_failed,
        failure=failure,
        is_complete=is_complete,
        comparison=comparison,
        reason=reason,
    )


def rescored_document(rescored: Rescored) -> dict[str, Any]:
    """A rescoring as `--json` prints it."""
    comparison = None if rescored.comparison is None else summary_document(rescored.comparison)
    names = (
        "folder", "target", "temperature", "num_scored", "num_images", "num_rows", "num_accepted", "num_failed",
        "failure", "is_complete", "reason",
    )  # fmt: skip
    return {name: getattr(rescored, name) for name in names} | {"comparison": comparison}


def _score(rescoring: Rescoring, advance: Callable[[str], None]) -> int:
    """Score the shards that are not scored yet, and write metadata and manifest; returns the number of images."""
    rescoring.folder.clean_staging()
    rescoring.folder.replace(RESCORING, (json.dumps(rescoring.identity, indent=1) + "\n").encode())
    commits = list_commits(rescoring.run)
    if not commits:
        raise OutputError(f"{rescoring.run.uri}: no shard is committed yet; there is nothing to score")
    scoring, started = Scoring(rescoring.job, rescoring.models, rescoring.labels, advance), time.time()
    for place, number in enumerate(sorted(commits)):
        advance(f"shard {place + 1} of {len(commits)}, {scoring.num_scored} images scored")
        rescore_shard(rescoring, number, scoring)
    write_results(rescoring, commits, started)
    return scoring.num_scored


def _close(rescoring: Rescoring, comparison: RunComparison | None, is_complete: bool) -> dict[str, int]:
    """Add the comparison to the manifest, and mark the folder as complete; returns the counts of samples."""
    manifest = read_manifest(rescoring.folder)
    if comparison is not None:
        manifest["comparison"] = summary_document(comparison)
    write_manifest(rescoring.folder, manifest)
    if is_complete:
        rescoring.folder.replace(SUCCESS, f"{rescoring.plan.digest}\n".encode())
    samples: dict[str, int] = manifest["counts"]["samples"]
    return samples


def _compare(rescoring: Rescoring, advance: Callable[[str], None]) -> tuple[RunComparison | None, str]:
    """Old and new scores compared, or why there is nothing to compare."""
    try:
        old, new = (read_scored_run(store.uri) for store in (rescoring.run, rescoring.folder))
        return compare_runs(old, new, advance=advance), ""
    except (JobError, OutputError, CorruptShardError) as error:
        return None, str(error)
