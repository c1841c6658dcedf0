"""A run: from a job to a finished data set, or as far as it gets.

The state of a run is read from its store and nowhere else, so a run can be stopped at any moment and continued by the
same command.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from engine.data.run.commits import compact_commits, list_commits
from engine.data.run.curated import check_not_curated
from engine.data.run.file_names import SUCCESS
from engine.data.run.foreign_files import check_unused
from engine.data.run.presence import check_committed, is_closed, lost_files
from engine.data.run.quarantine import QUARANTINE
from engine.data.run.resume import as_begun, find_plan, open_output
from engine.data.stores.journal import Journal
from engine.data.stores.lease import Lease, hold
from engine.data.stores.opening import open_store
from engine.driver.checks import CheckedJob, check_job
from engine.driver.closing import close_run, known_hardware
from engine.driver.executors.base import Executor, WorkerLike
from engine.driver.progress import Display
from engine.driver.run_loop import DEADLINE, RunLoop, RunLoopResult
from engine.driver.run_summary import RunSummary, summarise
from engine.driver.scheduling.messages import SchedulerLimits
from engine.job.plan import Plan
from engine.job.spec import JobSpec
from engine.models.copies import ModelCopy, check_copies, model_copies
from engine.models.factories import add_import_folders, import_folders
from engine.models.factory_cache import keep_import_folders

MakeWorker = Callable[[JobSpec, Plan], WorkerLike]


def run_job(
    job: JobSpec,
    *,
    executor: Executor,
    resume: str,
    confirmed: bool,
    display: Display,
    make_worker: MakeWorker | None = None,
    limits: SchedulerLimits | None = None,
    retry: bool = False,
) -> RunSummary:
    """Make the missing samples of a job, then everything that closes a run.

    Args:
        executor: runs the workers; closed at the end in any case.
        resume: `auto`, `never` or `overwrite`, as in `engine.data.run.resume.open_output`.
        confirmed: whether the user agreed to the removal of an earlier run.
        display: closed at the end, too.
        make_worker: builds a worker in its process; `engine.generation.worker.Worker` if not given. Picklable.
        limits: timeouts; the deadline is on the clock of `time.monotonic`.
        retry: give quarantined shards a fresh start.

    Raises:
        RiskforgeError: the job, its models or its output are not as they must be.
        OwnedError: another driver is running on the output.
        CorruptShardError: files of committed shards are lost.
        WorkersFailingError: workers fail repeatedly.
    """
    started = time.monotonic()
    try:
        display.phase("checking models and output")
        if resume == "auto":
            store = open_store(job.output.uri)
            check_not_curated(store)
            job = as_begun(store, job)
        checked = check_job(job, display, executor.begin)
        if resume == "auto" and (summary := _complete_summary(checked, started)):
            return summary
        check_unused(checked.store)
        keep_import_folders(checked.store.uri)
        session = _Session(checked, executor, display, limits or SchedulerLimits(), started)
        with session.open(resume, confirmed=confirmed, retry=retry):
            return session.run(make_worker or _in_this_folder(default_worker, model_copies(checked.models)))
    except KeyboardInterrupt:
        display.notice("interrupted; committed shards are kept")
        raise
    finally:
        executor.close()
        display.close()


def _complete_summary(checked: CheckedJob, started: float) -> RunSummary | None:
    """The summary of a run that is complete already; None if there is something to do."""
    store = checked.store
    if not (store.exists(SUCCESS) and (plan := find_plan(store, checked.plan, checked.job))):
        return None
    committed = list_commits(store)
    if len(committed) != plan.num_shards or not is_closed(store, plan) or lost_files(store):
        return None
    seconds = time.monotonic() - started
    return summarise(store, checked.job, committed, RunLoopResult(plan=plan), seconds=seconds, was_complete=True)


class _Session:
    """One driver's work on a run, from its lease to its summary."""

    def __init__(
        self, checked: CheckedJob, executor: Executor, display: Display, limits: SchedulerLimits, started: float
    ) -> None:
        self._checked = checked
        self._store = checked.store
        self._executor = executor
        self._display = display
        self._limits = limits
        self._started = started

    @contextlib.contextmanager
    def open(self, resume: str, *, confirmed: bool, retry: bool) -> Iterator[None]:
        """Hold the lease and keep the journal; open the run."""
        store = self._store
        with (
            hold(store, notice=self._display.notice) as lease,
            contextlib.closing(self._executor),
            contextlib.ExitStack() as cleanup,
        ):
            plan = open_output(store, self._checked.plan, self._checked.job, resume, confirmed)
            check_committed(store)
            compact_commits(store)
            if retry:
                store.remove_tree(QUARANTINE)
            self._lease: Lease = lease
            self._plan = plan
            self._journal = Journal(store, lease.number)
            cleanup.callback(self._journal.keep, is_end=True)
            yield

    def run(self, make_worker: MakeWorker) -> RunSummary:
        """Make what is missing and close the run."""
        loop = RunLoop(
            self._store,
            self._checked.job,
            self._plan,
            list_commits(self._store),
            executor=self._executor,
            display=self._display,
            lease=self._lease,
            journal=self._journal,
            limits=self._limits,
        )
        result = RunLoopResult(plan=self._plan)
        hardware = known_hardware(self._store)
        if loop.begin_rounds():
            result = loop.run(partial(make_worker, self._checked.job, loop.plan))
            hardware |= self._executor.describe()
        return self._close(result, hardware)

    def _close(self, result: RunLoopResult, hardware: dict[str, Any]) -> RunSummary:
        """Release the workers and close the run; not after a signal, whose sender may not wait."""
        closing = threading.Thread(target=self._executor.close)
        closing.start()
        finished = None
        if result.drained in ("", DEADLINE):
            self._display.phase("writing manifest and report")
            self._lease.check()
            finished = close_run(
                self._store,
                self._checked.job,
                result.plan,
                models=self._checked.models,
                run_seconds=time.monotonic() - self._started,
                hardware=hardware,
                sampling_share=result.sampling_share,
            )
        closing.join()
        self._journal.note("ended", drained=result.drained)
        committed, seconds = list_commits(self._store), time.monotonic() - self._started
        return summarise(self._store, self._checked.job, committed, result, seconds=seconds, finished=finished)


def _in_this_folder(make_worker: Callable[..., WorkerLike], models: tuple[ModelCopy, ...]) -> MakeWorker:
    return partial(make_worker, folder=str(Path.cwd()), imports=import_folders(), models=models)


def default_worker(
    job: JobSpec, plan: Plan, folder: str, imports: tuple[str, ...] = (), models: tuple[ModelCopy, ...] = ()
) -> WorkerLike:
    """The worker that makes samples, named after its machine and process.

    Args:
        folder: the driver's working folder, which relative addresses of models refer to.
        imports: folders that factories are imported from, in addition to those of the process.
        models: as the driver found them.

    Raises:
        JobError: a model is another one on this machine.

    Side effects: makes `folder` the working folder of this process if it exists, and adds to `sys.path`.
    """
    from engine.generation.worker import Worker

    with contextlib.suppress(OSError):
        os.chdir(folder)
    add_import_folders(imports)
    check_copies(models, socket.gethostname())
    return Worker(job, plan, name=f"{socket.gethostname()}-{os.getpid()}")
