"""Closing a run: everything that is written over all shards, the report and the marker of a complete run."""

from __future__ import annotations

import contextlib
import platform
import time
from typing import Any

from engine.data.run.commits import list_commits, read_commits
from engine.data.run.file_names import MANIFEST
from engine.data.run.finalise import FinishedRun, finalise, mark_success
from engine.data.run.manifest import software_versions
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.presence import check_committed
from engine.data.stores.base import Store
from engine.data.stores.file_errors import is_no_file
from engine.errors import CorruptShardError, OutputError
from engine.job.plan import Plan
from engine.job.spec import JobSpec


def close_run(
    store: Store,
    job: JobSpec,
    plan: Plan,
    *,
    models: dict[str, Any],
    run_seconds: float,
    hardware: dict[str, Any],
    sampling_share: float | None = None,
) -> FinishedRun | None:
    """Write the files over all shards, then the report and, if no shard is missing, the marker.

    Args:
        run_seconds: duration of this session; the sampling time is the sum over all sessions.
        sampling_share: share of the workers' time in this session; None if nothing was made.

    Returns:
        None if no shard is committed.

    Raises:
        CorruptShardError: files of committed shards are lost.
    """
    if not list_commits(store):
        return None
    check_committed(store)
    from engine.report.render import write_report

    timing = {
        "sampling_seconds": sum(record.timing.get("sampling_seconds", 0.0) for record in read_commits(store)),
        "run_seconds": run_seconds,
        "finished": time.time(),
    }
    timing |= {} if sampling_share is None else {"sampling_share": sampling_share}
    finished = finalise(store, job, plan, models=models, timing=timing, versions=software_versions(), hardware=hardware)
    write_report(store)
    if finished.complete:
        mark_success(store, plan)
    return finished


def known_hardware(store: Store) -> dict[str, Any]:
    """This machine, and the hardware of earlier sessions as the manifest records it."""
    earlier: dict[str, Any] = {}
    try:
        with contextlib.suppress(CorruptShardError, AttributeError, TypeError):
            earlier = dict(read_manifest(store).get("hardware") or {}) if store.exists(MANIFEST) else {}
    except OutputError as error:
        # The manifest is written again, whatever is at its path.
        if not is_no_file(error):
            raise
    return earlier | {"machine": platform.machine()}
