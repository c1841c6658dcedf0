"""Arguments and options shared by several commands, and the objects made from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.driver.executors.registry import EXECUTORS
from engine.errors import JobError

if TYPE_CHECKING:
    from engine.driver.executors.base import Executor
    from engine.job.spec import JobSpec

    # A type checker takes no literals that are computed.
    ExecutorName = str
else:
    ExecutorName = Literal[tuple(EXECUTORS)]

JobArgument = Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML).", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="K=V", help="Override a value of the job, e.g. requests.0.count=6; repeatable."),
]
OutputOption = Annotated[
    str | None, typer.Option(metavar="URI", help="Folder or address of the run; overrides output.uri.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="A", help="Address of a running Ray cluster: `auto` or HOST:PORT. Default: start Ray on this machine."
    ),
]
WorkersOption = Annotated[int | None, typer.Option(metavar="N", help="Number of workers; overrides runtime.workers.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Folder or address of a run.", show_default=False)]
ExecutorOption = Annotated[
    ExecutorName,
    typer.Option(help=f"Run workers as {', or as '.join(record.workers for record in EXECUTORS.values())}."),
]
DateOption = Annotated[
    str | None,
    typer.Option(
        metavar="DATE",
        help="Date for {date} in the output and for `fresh: true`, such as 2026-11-21. Default: today.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_job(
    path: Path,
    sets: list[str] | None,
    *,
    output: str | None = None,
    workers: int | None = None,
    continues: bool = True,
    date: str | None = None,
) -> JobSpec:
    """Load a job file and apply the overrides of the command line.

    Args:
        continues: as in `engine.commands.jobfile.read_job`.
        date: of the night, as the option has it; today where not given.

    Raises:
        JobError: the file cannot be read, or is not valid.
    """
    from engine.commands.jobfile import parse_date, parse_override, read_job

    night = parse_date(date)
    overrides = [parse_override(text) for text in sets or ()]
    overrides += [("output.uri", output)] if output is not None else []
    overrides += [("runtime.workers", workers)] if workers is not None else []
    return read_job(path, overrides, continues=continues, date=night)


def make_executor(kind: str, job: JobSpec, address: str | None) -> Executor:
    """An executor by its name, after a check of the hardware.

    Raises:
        JobError: the job requests hardware that this machine lacks, or the executor takes no address.
    """
    from engine.driver.checks import check_hardware

    check_address(address, kind)
    check_hardware(job, is_local=address is None)
    workers = None if job.runtime.workers == "auto" else job.runtime.workers
    return EXECUTORS[kind].make(address=address, num_workers=workers, device=job.runtime.device)


def check_address(address: str | None, kind: str) -> None:
    """Refuse an address with an executor that takes none.

    Raises:
        JobError: with the executors that take one.
    """
    if address and not EXECUTORS[kind].takes_address:
        names = " or ".join(record.name for record in EXECUTORS.values() if record.takes_address)
        raise JobError(f"--address: applies to --executor {names} alone; omit it, or --executor {kind}")
