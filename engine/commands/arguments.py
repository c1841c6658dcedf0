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
MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        metavar="PORT",
        min=1,
        max=65535,
        help="Export metrics to Prometheus at this port of 127.0.0.1; running clusters have their own ports.",
    ),
]
DateOption = Annotated[
    str | None,
    typer.Option(
        metavar="DATE",
        help="Date for {date} in the output and for `fresh: true`, such as 2026-11-21. Default: today.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def written_here(parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """Refuse an address where a command writes a file or folder of this machine; of an option with a path.

    Raises:
        JobError: with the option. A path has one of the two slashes of an address; a folder may be called `s3`.
    """
    from engine.data.stores.opening import OBJECT_SCHEMES

    scheme, is_address, rest = str(value or "").partition(":/")
    if is_address and scheme.lower() in OBJECT_SCHEMES:
        option = f"--{(parameter.name or '').strip('_').replace('_', '-')}"
        raise JobError(
            f"{option} {scheme}://{rest}: is written on this machine alone; give a path, and copy it from there"
        )
    return value


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


def make_executor(kind: str, job: JobSpec, address: str | None, *, measures: bool = True) -> Executor:
    """An executor by its name, after a check of the hardware.

    Args:
        measures: whether workers report batches, whose memory decides how many share a GPU; else each has one.

    Raises:
        JobError: the job requests hardware that this machine lacks, or the executor takes no address, or does not place
            workers.
    """
    from engine.driver.checks import check_hardware

    check_address(address, kind)
    check_hardware(job, is_local=address is None)
    runtime = job.runtime
    asked = runtime.resources if measures else runtime.resources.without_measuring()
    if not asked.is_default and not EXECUTORS[kind].takes_resources:
        names = " or ".join(record.name for record in EXECUTORS.values() if record.takes_resources)
        raise JobError(
            f"runtime.resources: --executor {kind} does not place workers; leave it out, or --executor {names}"
        )
    workers = None if runtime.workers == "auto" else runtime.workers
    return EXECUTORS[kind].make(address=address, num_workers=workers, device=runtime.device, resources=asked)


def check_address(address: str | None, kind: str) -> None:
    """Refuse an address with an executor that takes none.

    Raises:
        JobError: with the executors that take one.
    """
    if address and not EXECUTORS[kind].takes_address:
        names = " or ".join(record.name for record in EXECUTORS.values() if record.takes_address)
        raise JobError(f"--address: applies to --executor {names} alone; omit it, or --executor {kind}")


def serve_metrics(executor: Executor, port: int | None, kind: str) -> None:
    """Let an executor export metrics at a port, if one is given.

    Raises:
        JobError: this executor exports none, or not at this port.
    """
    from engine.driver.metrics import MetricsPublisher

    if port is None:
        return
    if not isinstance(executor, MetricsPublisher):
        raise JobError(f"--metrics-port: --executor {kind} exports no metrics; omit one of the two options")
    executor.serve_metrics(port)
