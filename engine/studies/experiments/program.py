"""A study from its fields to its files: runs and kept steps in its folder, resumable at any point."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
from engine.data.run.file_names import STUDY
from engine.data.run.manifest import software_versions
from engine.data.run.study_document import (
    COMPLETE,
    RUNNING,
    VERSION,
    StudyDocument,
    StudyFigure,
    StudyTable,
    document_bytes,
    keep_study,
    read_study,
)
from engine.data.stores.base import STATE, Store
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store, refuse_objects
from engine.driver.executors.base import Executor
from engine.driver.progress import Display
from engine.driver.run import run_job
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.json_values import difference, digest_of
from engine.job.spec import JobSpec
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, read_whole
from engine.studies.experiments.files import file_names, write_files
from engine.studies.experiments.parsing import Study
from engine.studies.experiments.registry import StudyRecord
from engine.studies.nested_display import NestedDisplay
from engine.studies.samples import StudiedRun, open_study

RUNS, STEPS = "runs", "steps"
MAX_DIFFERENCES = 20
MAX_SHOWN = 5
MakeExecutor = Callable[[JobSpec], Executor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOutcome:
    """What a study found.

    Attributes:
        tables: the main one first, called `table`.
        figures: the main one first, called `figure`.
        findings: sentences with their figures, negative ones too.
        notes: what was left out, and what limits the findings.
    """

    tables: tuple[StudyTable, ...]
    figures: tuple[StudyFigure, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """A study that has ended.

    Attributes:
        home: its folder.
        was_complete: whether there was nothing to do.
    """

    home: Path
    document: StudyDocument
    was_complete: bool


class StudyContext:
    """What the program of a study works with.

    Attributes:
        home: the folder of the study.
        display: of its progress.
        notes: limitations that were met on the way, which end in the document.
        runs: names of those that were made.
    """

    def __init__(self, home: Path, prefix: str, make_executor: MakeExecutor, display: Display) -> None:
        self.home = home
        self.display = display
        self.notes: list[str] = []
        self.runs: list[str] = []
        self._prefix = prefix
        self._make_executor = make_executor

    def make_run(self, name: str, job: JobSpec) -> StudiedRun:
        """Make what is missing of a run of the study, in `runs/NAME`.

        Args:
            name: lower case letters, digits and hyphens, unique in the study.
            job: what it makes; its name and output become the study's.

        Raises:
            RiskforgeError: as `run_job`.
            KeyboardInterrupt: it was stopped; the same command continues it.
        """
        uri = str(self.home / RUNS / name)
        output = job.output.model_copy(update={"uri": uri})
        job = job.model_copy(update={"name": f"{self._prefix}-{name}", "output": output})
        nested = NestedDisplay(self.display, f"run {name}")
        summary = run_job(job, executor=self._make_executor(job), resume="auto", confirmed=False, display=nested)
        if summary.drained:
            raise KeyboardInterrupt
        if summary.exit_code:
            reason = summary.failure or "; ".join(summary.short) or "shards are in quarantine"
            self.notes.append(f"run {name} has fewer samples than asked for: {reason}")
            self.display.notice(self.notes[-1])
        self.runs.append(name)
        return open_study(uri)

    def once(self, name: str, inputs: Any, make: Callable[[], Any]) -> Any:
        """The value of a step that is no run, from `steps/NAME.json` where it is kept of equal inputs, else made.

        Args:
            name: of the step; slashes make folders.
            inputs: all that decides the value, as JSON, such as digests of runs and the fields used.
            make: gives the value, as JSON without numbers that are not finite.
        """
        store, file, digest = open_store(str(self.home)), f"{STEPS}/{name}.json", digest_of(inputs)
        if (kept := _kept_step(self.home / file)) is not None and kept.get("inputs") == digest:
            return kept["value"]
        self.display.phase(name.replace("/", ", "))
        value = make()
        store.replace(file, document_bytes({"inputs": digest, "value": value}))
        return value


def _kept_step(path: Path) -> dict[str, Any] | None:
    """The content of a step's file; None where there is none, or it is damaged: then it is made again."""
    try:
        value = parse_json(read_whole(path, MAX_DOCUMENT_BYTES))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and value.keys() == {"inputs", "value"} else None


def check_study(record: StudyRecord, study: Study[Any]) -> str:
    """Check what files can tell of a study, its folder too, and say in a line what will be made.

    Raises:
        RiskforgeError: fields, models, images or folder are not as they must be.
    """
    refuse_objects(study.home, "output.uri", "a study")
    text: str = record.load("check")(study.spec, study.job)
    _open_document(open_store(study.home), record, study)
    return text


def run_study(
    record: StudyRecord, study: Study[Any], *, command: str, make_executor: MakeExecutor, display: Display
) -> StudyResult:
    """Make what is missing of a study, then its tables, figures, page and paragraph.

    Args:
        command: that the user gave, for the document.
        make_executor: makes the executor of each run.
        display: closed at the end.

    Raises:
        RiskforgeError: fields, models, images or folder are not as they must be.
        OwnedError: another process is at work in the folder.
        KeyboardInterrupt: it was stopped; the same command continues it.
    """
    started = time.monotonic()
    try:
        display.phase("checking the study")
        check_study(record, study)
        store = open_store(study.home)
        home = Path(store.place)
        with hold(store, notice=display.notice):
            earlier = _open_document(store, record, study)
            if earlier is not None and _is_complete(store, earlier, study):
                return StudyResult(home=home, document=earlier, was_complete=True)
            document = _begun(study, command, earlier)
            keep_study(store, document)
            context = StudyContext(home, study.job.name, make_executor, display)
            with _timed(store, document, started):
                outcome: StudyOutcome = record.load("program")(study.spec, study.job, context)
            display.phase("writing tables and figures")
            document = _ended(document, outcome, context, document.seconds + time.monotonic() - started)
            _show_in_runs(document, context)
            write_files(store, document)
            return StudyResult(home=home, document=document, was_complete=False)
    finally:
        display.close()


def _arguments(study: Study[Any]) -> dict[str, Any]:
    """What decides a study: its fields and its job, without where it is stored."""
    fields = study.spec.model_dump(mode="json", exclude={"output", "job"})
    job = study.job.model_dump(mode="json", exclude={"name", "seed"})
    job["output"].pop("uri")
    job["runtime"].pop("workers", None)
    return fields | {"job": job}


def _open_document(store: Store, record: StudyRecord, study: Study[Any]) -> StudyDocument | None:
    """The document of an earlier call.

    Raises:
        OutputError: the folder holds another study, or something else.
    """
    if not store.is_there():
        return None
    try:
        document = read_study(store)
    except CorruptShardError as error:
        fault = str(error).rpartition("; remove it")[0]
        raise OutputError(f"{fault}; remove it, and the same command makes it again from its runs") from None
    if document is None:
        names = [name for name in store.list() if name != STATE]
        # Its document was lost: runs and steps say themselves what they are of.
        if names and not {RUNS, STEPS} & set(names):
            shown = ", ".join(map(repr, names[:MAX_SHOWN]))
            raise OutputError(
                f"output {store.uri}: holds files ({shown}) and no {STUDY} of a study; choose another --output"
            )
        return None
    if document.study != record.kind:
        raise OutputError(
            f"output {store.uri}: holds a study of kind '{document.study}', not '{record.kind}'; choose another"
            " --output"
        )
    old, new = dict(document.arguments), _arguments(study)
    for field in record.growing:
        if _has_grown(old.get(field), new.get(field)):
            old.pop(field, None), new.pop(field, None)
    if lines := difference(old, new):
        raise OutputError(
            f"output {store.uri}: holds a study that differs ({'; '.join(lines[:MAX_DIFFERENCES])}); choose another"
            " --output, or give the same fields"
        )
    return document


def _has_grown(old: Any, new: Any) -> bool:
    return isinstance(old, int) and isinstance(new, int) and new >= old


def _is_complete(store: Store, document: StudyDocument, study: Study[Any]) -> bool:
    same = document.arguments == _arguments(study) and document.status == COMPLETE
    return same and all(store.exists(name) for name in file_names(document))


def _begun(study: Study[Any], command: str, earlier: StudyDocument | None) -> StudyDocument:
    return StudyDocument(
        study=study.spec.study,
        version=VERSION,
        riskforge=engine.__version__,
        status=RUNNING,
        name=study.job.name,
        command=command,
        date=_today(),
        hardware=machine(),
        seconds=0.0 if earlier is None or earlier.status == COMPLETE else earlier.seconds,
        versions=software_versions(),
        arguments=_arguments(study),
    )


@contextlib.contextmanager
def _timed(store: Store, document: StudyDocument, started: float) -> Iterator[None]:
    """Keep the time that a call took which does not end: the next one adds to it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OutputError):
            seconds = document.seconds + time.monotonic() - started
            keep_study(store, document.model_copy(update={"seconds": seconds}))
        raise


def _ended(document: StudyDocument, outcome: StudyOutcome, context: StudyContext, seconds: float) -> StudyDocument:
    return StudyDocument.model_validate(
        document.model_dump()
        | {
            "status": COMPLETE,
            "date": _today(),
            "seconds": seconds,
            "runs": tuple(dict.fromkeys(context.runs)),
            "findings": outcome.findings,
            "notes": (*outcome.notes, *context.notes),
            "tables": outcome.tables,
            "figures": outcome.figures,
        }
    )


def _show_in_runs(document: StudyDocument, context: StudyContext) -> None:
    """Give every run the study, and its report the section."""
    from engine.report.render import write_report

    for name in document.runs:
        store = open_store(str(context.home / RUNS / name))
        keep_study(store, document)
        try:
            write_report(store)
        except (JobError, OutputError, CorruptShardError) as error:
            context.display.notice(f"run {name}: its report is not written again ({error})")


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def machine() -> str:
    """The hardware of this machine in words."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cores} CPU core{'s' * (cores != 1)}, {gpu}"
