"""`riskforge study`: programs that make runs of their own; `loop` is the self-consuming loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from engine.commands.arguments import (
    AddressOption,
    ExecutorOption,
    JobArgument,
    JsonOption,
    SetOption,
    check_address,
)
from engine.commands.output import complain, make_display, print_json
from engine.commands.stopping import stop_on_signals
from engine.driver.executors.registry import DEFAULT_EXECUTOR
from engine.errors import JobError
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.driver.executors.tasks import TaskPool
    from engine.studies.loop.parsing import LoopJob
    from engine.studies.loop.program import LoopResult

study = typer.Typer(name="study", help="Studies that make runs of their own.", no_args_is_help=True)
STOPPED = "stopped; finished rounds are kept, run the same command again to continue"
LoopOutputOption = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Folder of the loop; overrides output.uri.")
]
LoopWorkersOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=100_000, help="Loops at a time. Default: one a GPU, or a CPU core."),
]
AlarmOption = Annotated[
    Literal["stop", "continue"] | None,
    typer.Option(help="At an alarm of the monitor an arm without a defence stops, or goes on; overrides on_alarm."),
]


@study.callback()
def studies() -> None:
    """Studies that make runs of their own."""


@study.command()
def loop(
    job: JobArgument,
    output: LoopOutputOption = None,
    executor: ExecutorOption = DEFAULT_EXECUTOR,
    address: AddressOption = None,
    workers: LoopWorkersOption = None,
    on_alarm: AlarmOption = None,
    validate: Annotated[bool, typer.Option("--validate", help="Only validate the job.")] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate, curate, retrain, and again: the same command resumes; exit code 1 where an alarm stopped a loop."""
    check_address(address, executor)
    if executor == "local" and workers is not None and workers > 1:
        raise JobError("--workers: applies to --executor ray alone, the local one makes one loop at a time; omit it")
    spec = _load(job, set_, output, on_alarm)
    if validate:
        _validate(job, spec, as_json)
        return
    from engine.studies.loop.program import check_loop, run_loop

    check_loop(spec)
    with stop_on_signals(STOPPED):
        result = run_loop(spec, _make_pool(executor, spec, address, workers), make_display())
    if as_json:
        print_json(_summary(spec, result))
    else:
        _print_result(spec, result)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _load(path: Path, sets: list[str] | None, output: str | None, on_alarm: str | None) -> LoopJob:
    from engine.commands.jobfile import beside, import_factories, let_import, parse_override, read_raw
    from engine.studies.loop.parsing import parse_loop

    overrides: list[tuple[str, Any]] = [parse_override(text) for text in sets or ()]
    overrides += [("output.uri", output)] if output is not None else []
    overrides += [("on_alarm", on_alarm)] if on_alarm is not None else []
    loop_job = parse_loop(read_raw(path, overrides), lambda given: read_raw(beside(path, given), []))
    if loop_job.job is not None:
        let_import(loop_job.job, Path.cwd(), path.parent)
        import_factories([loop_job.spec.curation.reward], Path.cwd(), path.parent)
    return loop_job


def _make_pool(kind: str, job: LoopJob, address: str | None, workers: int | None) -> TaskPool:
    from engine.driver.checks import check_hardware
    from engine.driver.executors.tasks import LocalTasks

    if job.job is not None:
        check_hardware(job.job, is_local=address is None)
    if kind == "local":
        return LocalTasks()
    from engine.driver.executors.ray_tasks import RayTasks

    device = "cpu" if job.job is None else job.job.runtime.device
    return RayTasks(address=address, num_workers=workers, device=device)


def _validate(path: Path, job: LoopJob, as_json: bool) -> None:
    from engine.studies.loop.program import check_loop

    classes = check_loop(job)
    spec = job.spec
    if as_json:
        print_json({"valid": True, "classes_checked": bool(classes), "loops": len(spec.arms) * spec.seeds})
        return
    print(f"{path} is valid: {spec.size}")
    if not classes and job.job is not None:
        print(f"the classes are not checked: {job.job.models.target} is not on this machine yet")


def _summary(job: LoopJob, result: LoopResult) -> dict[str, Any]:
    """The figures by arm."""
    from engine.studies.loop.results import DOCUMENT, REPORT
    from engine.studies.loop.summary import arm_figures

    return {
        "status": "stopped" if result.stopped else "complete",
        "exit_code": result.exit_code,
        "arms": {arm: arm_figures(result.schedule, arm) for arm in job.spec.arms},
        "document": str(result.home / DOCUMENT),
        "report": str(result.home / REPORT),
    }


def _print_result(job: LoopJob, result: LoopResult) -> None:
    from engine.studies.loop.results import DOCUMENT, REPORT
    from engine.studies.loop.summary import arm_line

    if result.was_complete:
        print("complete already; nothing was done")
    for arm in job.spec.arms:
        print(arm_line(result.schedule, arm))
    print(f"figures: {result.home / DOCUMENT}")
    print(f"report: {result.home / REPORT}")
    if result.stopped:
        lane, others = result.stopped[0], len(result.stopped) - 1
        more = f" and {others} more" if others else ""
        complain(
            f"alarm: the learned reward no longer follows the trusted choices in {lane}{more}; nothing more is curated"
            " there. Look at the records, add a defence, or continue with --on-alarm continue"
        )
