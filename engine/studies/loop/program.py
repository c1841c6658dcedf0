"""A loop from its job to its figures: rounds of many lanes in a pool of processes, resumable at any point."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.data.images import LabelledImage, nothing_usable, open_images
from engine.data.stores.base import STATE, Store
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store, refuse_objects
from engine.driver.checks import check_hardware
from engine.driver.executors.tasks import TaskDone, TaskEvent, TaskFailed, TaskLost, TaskPool
from engine.driver.progress import Display, duration
from engine.driver.scheduler_loop import WorkersFailingError, main_line
from engine.errors import EXIT_DAMAGED, EXIT_INCOMPLETE, EXIT_OK, JobError, OutputError
from engine.job.plan import resolve_requests
from engine.models.artefacts import missing_artefacts
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from engine.studies.loop.parsing import LoopJob
from engine.studies.loop.results import (
    DOCUMENT,
    REPORT,
    ROUND_DOCUMENT,
    WAITS,
    LoopFolder,
    check_continues,
    document_bytes,
    from_a_model,
    read_document,
    read_rounds,
    recorded_rounds,
    without_stops,
)
from engine.studies.loop.spec import LoopSpec
from engine.studies.loop.state import Lane, Schedule, Status, lanes_of

POLL_SECONDS = 0.5
# Between two writes of `loop.json`.
WRITE_SECONDS = 2.0
MAX_SHOWN = 20
_MIXTURE_TASK = "engine.studies.loop.mixtures:mixture_rounds"
_PIPELINE_TASK = "engine.studies.loop.pipelines:pipeline_round"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopResult:
    """A loop that has ended.

    Attributes:
        home: its folder.
        schedule: the measures of all rounds.
        was_complete: whether there was nothing to do.
    """

    home: Path
    schedule: Schedule
    was_complete: bool

    @property
    def stopped(self) -> list[Lane]:
        """Lanes that an alarm stopped."""
        return self.schedule.lanes(Status.STOPPED)

    @property
    def exit_code(self) -> int:
        """1 where an alarm stopped a lane."""
        return EXIT_DAMAGED if self.stopped else EXIT_OK


def check_loop(job: LoopJob) -> list[str]:
    """Check what files can tell of a loop, before a model is loaded or a worker starts.

    Returns:
        The class names; of a mixture those of its modes, and none where the target is not on this machine yet.

    Raises:
        JobError: all problems that were found, a line each.
    """
    spec = job.spec
    refuse_objects(spec.output.uri, "output.uri", "a loop")
    if job.job is None:
        assert spec.generator.mixture is not None
        return [f"mode {mode}" for mode in range(spec.generator.mixture.modes)]
    problems: list[str] = []
    with _collected(problems, "generator.job."):
        check_addresses(job.job)
    with _collected(problems, "generator.job."):
        if job.job.models.adapters or job.job.models.vae:
            field = "adapters" if job.job.models.adapters else "vae"
            raise JobError(f"models.{field}: a loop fine-tunes the pipeline as its folder has it; leave it out")
    with _collected(problems, "generator.job."):
        check_hardware(job.job, is_local=False)
    with _collected(problems, "generator.job."):
        if missing := missing_artefacts(job.job):
            raise JobError(missing)
    labels: list[str] = []
    with _collected(problems, "generator.job."):
        labels = read_labels(job.job.models.target) or []
    if labels:
        with _collected(problems, "generator.job."):
            _check_samples(job, labels)
        for field, address in (("training.real", spec.training.real), ("measure.real", spec.measure.real)):
            if address is not None:
                with _collected(problems, ""):
                    _check_images(address, tuple(labels), field)
    with _collected(problems, ""):
        _check_trainable(job)
    with _collected(problems, ""):
        _check_reward(spec.curation.reward)
    problems += [
        f"curation.{field}: there is no file '{path}'; give one of preference records (JSON lines)"
        for field, path in (("preferences", spec.curation.preferences), ("trusted", spec.curation.trusted))
        if path is not None and not Path(path).expanduser().is_file()
    ]
    if problems:
        raise JobError(problems)
    return labels


@contextlib.contextmanager
def _collected(problems: list[str], prefix: str) -> Iterator[None]:
    """Collect the problems that the block raises."""
    try:
        yield
    except JobError as error:
        problems += [f"{prefix}{line}" for line in error.problems]


def _check_samples(job: LoopJob, labels: list[str]) -> None:
    assert job.job is not None
    total = sum(request.total for request in resolve_requests(job.job, labels))
    if (wanted := job.spec.curation.candidates) > total:
        raise JobError(f"requests: {total} samples are fewer than the {wanted} of curation.candidates; raise a count")


def _check_images(address: str, labels: tuple[str, ...], field: str) -> None:
    """Check that there is an image that can be used."""
    source = open_images(address, labels, field)
    unusable = []
    for item in (read() for file in source.files for read in file()):
        if isinstance(item, LabelledImage):
            return
        unusable.append(item)
    raise JobError(nothing_usable(source, field, address, unusable))


def _check_trainable(job: LoopJob) -> None:
    """Check by its files that the pipeline can be fine-tuned; not where it is not on this machine yet."""
    from engine.models.addresses import locate
    from engine.studies.loop.finetuning.program import check_trainable
    from engine.studies.loop.finetuning.recipe import FineTuneRecipe

    assert job.job is not None
    address = job.job.models.diffusion
    try:
        location = locate(address)
    except JobError:
        return
    if location.folder is None or location.is_hub:
        return
    try:
        check_trainable(location.folder, address, FineTuneRecipe(lora_rank=job.spec.training.lora_rank))
    except JobError as error:
        raise JobError(
            [
                line if line.startswith("training.") else f"generator.job.models.diffusion: {line}"
                for line in error.problems
            ]
        ) from None


def _check_reward(name: str) -> None:
    """Import the user's function, if the reward is one."""
    from engine.models.factories import find_factory, is_factory

    if is_factory(name):
        try:
            find_factory(name)
        except JobError as error:
            raise JobError([f"curation.reward: {line}" for line in error.problems]) from None


def run_loop(job: LoopJob, pool: TaskPool, display: Display) -> LoopResult:
    """Make what is missing of a loop.

    Args:
        job: the loop, checked by `check_loop`.
        pool: of processes; closed at the end.
        display: of progress; closed at the end, too.

    Raises:
        RiskforgeError: a run, a model or the output is not as it must be; what is finished is kept.
        OwnedError: another process is at work in the output.
        KeyboardInterrupt: the loop was stopped; the same command continues it.
    """
    try:
        with contextlib.closing(pool):
            classes = check_loop(job)
            store = open_store(job.spec.output.uri)
            job = _placed(job, store)
            _check_output(store, job)
            with hold(store, notice=display.notice):
                return _Program(job, store, classes, pool, display).run()
    finally:
        display.close()


def _placed(job: LoopJob, store: Store) -> LoopJob:
    """A job with the absolute address of its output."""
    output = job.spec.output.model_copy(update={"uri": str(Path(store.place))})
    return replace(job, spec=job.spec.model_copy(update={"output": output}))


def _check_output(store: Store, job: LoopJob) -> None:
    """Refuse a folder that holds another loop, or something else.

    Raises:
        OutputError: it does, with the differences.
    """
    document = read_document(store)
    if document is not None:
        # Where no round is finished, what is there is checked by the plans of its runs.
        if any(lane.rounds for lane in document.lanes) or any(Path(store.place).glob(f"*/*/*/{ROUND_DOCUMENT}")):
            check_continues(document, job, store.uri)
        return
    names = sorted(name for name in store.list() if name != STATE) if store.is_there() else []
    if names:
        shown = ", ".join(map(repr, names[:5]))
        raise OutputError(
            f"output {store.uri}: holds files ({shown}) and no {DOCUMENT} of a loop; restore it, or choose another"
            " --output"
        )


class _Program:
    """One driver's work on a loop."""

    def __init__(self, job: LoopJob, store: Store, classes: list[str], pool: TaskPool, display: Display) -> None:
        self._job, self._spec = job, job.spec
        self._store = store
        self._classes = classes
        self._pool = pool
        self._display = display
        self._folder = LoopFolder(Path(job.spec.output.uri))
        self._tasks: dict[int, _Task] = {}
        self._next_number = 0
        self._written = 0.0

    def run(self) -> LoopResult:
        """Make what is missing, and the page."""
        self._schedule = Schedule(self._spec.rounds, self._known_rounds())
        was_complete = not self._open_lanes() and self._store.exists(REPORT)
        self._write()
        if self._open_lanes():
            self._display.phase(self._pool.opening)
            num_slots = self._pool.open(len(self._open_lanes()))
            self._display.phase(f"{len(self._open_lanes())} loops to make, {num_slots} at a time")
            try:
                self._work(num_slots)
            finally:
                self._write()
        self._check_waiting()
        if not was_complete:
            self._display.phase("writing the report")
            from engine.studies.loop.page import write_page

            write_page(self._store, self._job, self._schedule, self._classes)
        return LoopResult(home=self._folder.home, schedule=self._schedule, was_complete=was_complete)

    def _check_waiting(self) -> None:
        """Refuse to go on where people have to choose first.

        Raises:
            JobError: with the runs whose samples have no record.
        """
        if not (runs := list(self._schedule.waiting.values())):
            return
        more = [f"  and {len(runs) - MAX_SHOWN} more"] if len(runs) > MAX_SHOWN else []
        raise JobError(
            f"curation.preferences: {self._spec.curation.preferences} has no pair of samples of {len(runs)} runs; let"
            " people choose between images of each, add their records, and run the same command again\n"
            + "\n".join([f"  {run}" for run in runs[:MAX_SHOWN]] + more)
        )

    def _known_rounds(self) -> dict[Lane, dict[int, dict[str, Any]]]:
        """Finished rounds of all lanes, those of lanes of other arms or seeds too."""
        document = read_document(self._store)
        recorded = recorded_rounds(document) if document is not None else {}
        lanes = lanes_of(self._spec.arms, self._spec.seeds)
        if self._job.job is None:
            known = {lane: recorded.get(lane, {}) for lane in lanes}
        else:
            known = {lane: read_rounds(self._folder, lane, self._spec.rounds) for lane in lanes}
        known = {lane: without_stops(rounds, self._spec) for lane, rounds in known.items()}
        return known if self._job.job is None else {lane: self._begun(lane, rounds) for lane, rounds in known.items()}

    def _begun(self, lane: Lane, rounds: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The rounds of a lane of pipelines that it can go on from."""
        kept = from_a_model(self._folder, lane, rounds, self._spec.rounds)
        if len(kept) < len(rounds):
            self._display.notice(f"{lane}: its last model is not there any more; made again from round {len(kept)} on")
        return kept

    def _open_lanes(self) -> list[Lane]:
        return self._schedule.lanes(Status.OPEN)

    def _work(self, num_slots: int) -> None:
        """Hand out tasks until nothing is left."""
        while True:
            for task in self._ready()[: num_slots - len(self._tasks)]:
                self._submit(task)
            if not self._tasks:
                return
            for event in self._pool.poll(POLL_SECONDS):
                self._take(event)

    def _ready(self) -> list[_Task]:
        """Tasks that can start: a round of a pipeline, or all rounds of a block of mixtures."""
        if self._job.job is not None:
            return [_RoundTask(self._job, lane, number, self._display) for lane, number in self._schedule.ready()]
        from engine.studies.loop.mixtures import BLOCK

        running = {task.name for task in self._tasks.values()}
        blocks = dict.fromkeys((lane.arm, lane.seed // BLOCK) for lane in self._open_lanes())
        tasks = [_BlockTask(self._spec, arm, block, BLOCK) for arm, block in blocks]
        return [task for task in tasks if task.name not in running]

    def _submit(self, task: _Task) -> None:
        number, self._next_number = self._next_number, self._next_number + 1
        self._tasks[number] = task
        task.begin(self._schedule)
        self._pool.submit(number, task.function, *task.arguments(self._pool))

    def _take(self, event: TaskEvent) -> None:
        task = self._tasks.pop(event.number)
        if isinstance(event, TaskDone):
            task.finish(self._schedule, event.value)
            self._note(task)
            if time.monotonic() - self._written >= WRITE_SECONDS:
                self._write()
        elif isinstance(event, TaskLost):
            if not task.lose(self._schedule):
                raise WorkersFailingError(
                    f"{task.name}: its process was lost again and again, the last time: {main_line(event.message)};"
                    " what is finished is kept, and the same command continues"
                )
            self._display.notice(f"{task.name} begins again: {main_line(event.message)}")
        else:
            self._fail(task, event)

    def _fail(self, task: _Task, event: TaskFailed) -> None:
        """Raise the error of a task; what is finished is kept."""
        if event.exit_code == EXIT_INCOMPLETE and event.message.startswith("Traceback"):
            raise WorkersFailingError(f"{task.name} failed: {main_line(event.message)}\n{event.message}")
        raise event.error

    def _note(self, task: _Task) -> None:
        rounds = self._schedule.rounds.values()
        total = len(rounds) * (self._spec.rounds + 1)
        done = sum(len(lane) for lane in rounds)
        self._display.notice(f"{task.text(self._schedule)}; {done} of {total} rounds")

    def _write(self) -> None:
        self._store.replace(DOCUMENT, document_bytes(self._job, self._schedule, self._classes))
        self._written = time.monotonic()


class _Task(ABC):
    """Work of the pool."""

    name: str
    function: str

    @abstractmethod
    def arguments(self, pool: TaskPool) -> tuple[Any, ...]:
        """Of the function."""

    @abstractmethod
    def begin(self, schedule: Schedule) -> None:
        """Note that it runs."""

    @abstractmethod
    def finish(self, schedule: Schedule, value: Any) -> None:
        """Take in its value."""

    @abstractmethod
    def lose(self, schedule: Schedule) -> bool:
        """Note that its process was lost; whether it may run again."""

    @abstractmethod
    def text(self, schedule: Schedule) -> str:
        """What came of it."""


class _RoundTask(_Task):
    """A round of a pipeline."""

    function = _PIPELINE_TASK

    def __init__(self, job: LoopJob, lane: Lane, number: int, display: Display) -> None:
        self._job, self._lane, self._number, self._display = job, lane, number, display
        self.name = f"{lane}, round {number}"

    def arguments(self, pool: TaskPool) -> tuple[Any, ...]:
        display = self._display if pool.is_here else None
        return self._job, self._lane, self._number, display

    def begin(self, schedule: Schedule) -> None:
        schedule.start(self._lane)

    def finish(self, schedule: Schedule, value: Any) -> None:
        if WAITS in value:
            schedule.wait(self._lane, value[WAITS])
        else:
            schedule.finish(self._lane, value)

    def lose(self, schedule: Schedule) -> bool:
        return schedule.lose(self._lane)

    def text(self, schedule: Schedule) -> str:
        if self._lane in schedule.waiting:
            return f"{self.name}: waits for records of its samples"
        measures = schedule.rounds[self._lane][self._number]
        seconds = sum(measures["seconds"].values())
        stopped = ", stopped by the monitor" if measures["stopped"] else ""
        return f"{self.name}: reward {measures['reward']['value']:.4g}{stopped}, {duration(seconds)}"


class _BlockTask(_Task):
    """All rounds of a block of seeds of a mixture."""

    function = _MIXTURE_TASK

    def __init__(self, spec: LoopSpec, arm: str, block: int, size: int) -> None:
        self._spec, self._arm, self._block, self._size = spec, arm, block, size
        first = block * size
        self.name = f"{arm}, seeds {first} to {min(first + size, spec.seeds) - 1}"

    def arguments(self, pool: TaskPool) -> tuple[Any, ...]:
        return self._spec, self._arm, self._block

    def begin(self, schedule: Schedule) -> None:
        """Nothing to note: a block is played whole, or again."""

    def finish(self, schedule: Schedule, value: Any) -> None:
        for offset, rounds in enumerate(value):
            lane = Lane(self._arm, self._block * self._size + offset)
            if lane in schedule.rounds:
                schedule.rounds[lane] = {measures["round"]: measures for measures in rounds}

    def lose(self, schedule: Schedule) -> bool:
        return schedule.lose(Lane(self._arm, self._block * self._size))

    def text(self, schedule: Schedule) -> str:
        return self.name
