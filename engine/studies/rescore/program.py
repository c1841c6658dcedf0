"""The images of a run under another target: new metadata beside the old, nothing sampled again.

A folder of a rescoring holds `shards/NAME-000000.parquet` for every committed shard of the run, published one by one,
so that the same command continues after a kill or after the run has grown; then `metadata.parquet`, `manifest.json`
with `rescored_from`, and `_SUCCESS` last. It holds no images: those are the run's. Rows are the run's, in its order.
What depends on the target is scored anew, `accepted`, `status` and `surplus` by the run's own rules; everything else is
kept. A row whose image is not stored is `failed` with `NOT_STORED` as its message; one of which a classifier gives
values that are not finite with a message that names the classifier.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.data.run.commits import list_commits
from engine.data.run.state import (
    MANIFEST,
    METADATA,
    RESCORED,
    RESCORING,
    SUCCESS,
    read_manifest,
    stored_plan,
)
from engine.data.stores.base import Store
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.records import STATUS_OK, STATUS_REJECTED
from engine.studies.compare.program import RunComparison, compare_runs
from engine.studies.compare.scored_run import read_scored_run
from engine.studies.compare.tables import summary_document
from engine.studies.rescore.inputs import check_folder, check_models, folder_name, is_inside, labels_of
from engine.studies.rescore.results import failures_of, finish, json_bytes
from engine.studies.rescore.scoring import Scoring, rescore_shard

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """What came of a rescoring.

    Attributes:
        folder: where it lies.
        num_scored: images scored by this call; those of an earlier one are not counted.
        num_images: images with a new score, of `num_rows` rows.
        num_failed: images without one, because a classifier gives values that are not finite.
        failure: the most frequent reason, which names the classifier.
        is_complete: whether the run is, so that no shard is to come.
        comparison: before and after; None where nothing could be compared, for this `reason`.
    """

    folder: str
    target: str
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
    oracle: str | None = None,
    output: str | None = None,
    advance: Callable[[str], None] = lambda text: None,
    notice: Callable[[str], None] = lambda text: None,
) -> Rescored:
    """Score all stored images of a run by another target.

    Args:
        address: folder of the run.
        target: address of the classifier, with the classes of the run's.
        transfer: classifiers in the place of the run's transfer models; none keeps those and their scores.
        oracle: the same for the oracle.
        output: the folder; by default `RUN/rescored/TARGET-DIGEST`.
        advance: hears how far it is.
        notice: hears what is waited for.

    Raises:
        JobError: a model is not there or has other classes.
        OutputError: there is no run, or the folder is something else's.
        CorruptShardError: a shard of the run is damaged.
        OwnedError: another process rescores into this folder, or it lies in the run and a driver is at work there.
    """
    store = open_store(address)
    job, plan = stored_plan(store)
    labels = labels_of(store, job)
    models = check_models(target, transfer, oracle, labels)
    folder = open_store(output or store.address(f"{RESCORED}/{folder_name(target, models)}"))
    about = {"plan_digest": plan.digest, "models": models.digests}
    check_folder(folder, store, about)
    with ExitStack() as held:
        if is_inside(folder, store):
            held.enter_context(hold(store, notice=notice))
        held.enter_context(hold(folder, notice=notice))
        folder.clean_staging()
        folder.replace(RESCORING, (json.dumps(about, indent=1) + "\n").encode())
        commits = list_commits(store)
        if not commits:
            raise OutputError(f"{store.uri}: no shard is committed yet; there is nothing to score")
        scoring = Scoring(job, models, advance)
        started = time.time()
        for place, number in enumerate(sorted(commits)):
            advance(f"shard {place + 1} of {len(commits)}, {scoring.num_scored} images scored")
            rescore_shard(store, folder, job, plan, number, scoring)
        finish(store, folder, job, plan, commits, models, labels, started)
        is_complete = store.exists(SUCCESS)
        manifest = read_manifest(folder)
        comparison, reason = _compare(store, folder, advance)
        if comparison is not None:
            manifest["comparison"] = summary_document(comparison)
        folder.replace(MANIFEST, json_bytes(manifest))
        if is_complete:
            folder.replace(SUCCESS, f"{plan.digest}\n".encode())
    samples = manifest["counts"]["samples"]
    num_failed, failure = failures_of(folder.fetch(METADATA))
    return Rescored(
        folder=folder.uri,
        target=target,
        num_scored=scoring.num_scored,
        num_images=samples[STATUS_OK] + samples[STATUS_REJECTED],
        num_rows=samples["attempted"],
        num_accepted=samples["accepted"],
        num_failed=num_failed,
        failure=failure,
        is_complete=is_complete,
        comparison=comparison,
        reason=reason,
    )


def _compare(store: Store, folder: Store, advance: Callable[[str], None]) -> tuple[RunComparison | None, str]:
    """Before and after, request by request and context by context, or why there is nothing to compare."""
    try:
        return compare_runs(read_scored_run(store.uri), read_scored_run(folder.uri), advance=advance), ""
    except (JobError, OutputError, CorruptShardError) as error:
        return None, str(error)
