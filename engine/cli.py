"""The command line `riskforge`: its arguments, errors and exit codes. The commands are in `engine.commands`."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading
import warnings
from typing import Annotated, Any, TextIO

import typer

import engine
from engine.commands import (
    ablations,
    comparison,
    curation,
    datasets,
    jobs,
    loops,
    push,
    review,
    rounds,
    runs,
    studies,
    sweeps,
    transfer,
)
from engine.commands.output import complain
from engine.errors import EXIT_DRAINED, EXIT_USER, JobError, RiskforgeError, RunWarning
from engine.terminal import open_closed_streams, printable, redacted
from engine.terminal import show as print

# Errors of a write without free space.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    name="riskforge",
    help="Manufacture labelled images on which a classifier fails or hesitates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


def main() -> None:
    """Run the command line; documented exit codes, and messages without tracebacks."""
    code: Any = 0
    unwritable: OSError | None = None
    open_closed_streams()
    warnings.showwarning = _show_warning
    try:
        _check_arguments(sys.argv[1:])
        app()
    except SystemExit as end:
        code = end.code
    except RiskforgeError as error:
        code = error.exit_code
        _print_error(error)
    except KeyboardInterrupt:
        # While the commands are still being imported; afterwards they handle it themselves.
        code = 128 + signal.SIGINT
    except OSError as error:
        # Commands report errors of files themselves; standard output and error have no name.
        if error.errno not in FULL or error.filename is not None:
            raise
        unwritable = error
    try:
        sys.stdout.flush()
    except OSError as error:
        # The reader has closed the pipe, or the disk is full; the interpreter's flush at exit must not fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        unwritable = None if isinstance(error, BrokenPipeError) else error
    if unwritable is not None:
        code = code or EXIT_USER
        with contextlib.suppress(OSError):
            complain(f"error: standard output or error cannot be written to ({unwritable.strerror}); free some space")
    sys.exit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print the product's own warnings as lines, and those of libraries as Python does."""
    if issubclass(category, RunWarning):
        complain(f"note: {message}")
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n"), file=file or sys.stderr)


def console() -> None:
    """Entry point of the installed command: `main`, in a process that may be ended."""
    try:
        main()
    except SystemExit as end:
        # Threads that are still computing would abort the interpreter's shutdown.
        if end.code == EXIT_DRAINED:
            sys.stderr.flush()
            os._exit(EXIT_DRAINED)
        if any(thread.daemon for thread in threading.enumerate()):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else bool(end.code))
        raise


def _check_arguments(arguments: list[str]) -> None:
    """Refuse passwords in addresses: none is supported, and other users can see a command line.

    Raises:
        JobError: naming the option of each.
    """
    problems: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        value, option = (value, option) if equals and option.startswith("-") else (argument, previous)
        is_bare = option == "--address" and "@" in value
        if is_bare or redacted(argument) != argument:
            name = option if option.startswith("-") else "the command line"
            problems.append(
                f"{name}: an address contains a user name or password; leave it out, and pass credentials by the"
                " environment (docs/operations.md)"
            )
    if problems:
        raise JobError(problems)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"riskforge {engine.__version__}")
        raise typer.Exit


def _print_error(error: RiskforgeError) -> None:
    lines = error.problems if isinstance(error, JobError) else str(error).splitlines()
    for line in lines:
        complain(f"error: {printable(line)}")


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Manufacture labelled images on which a classifier fails or hesitates."""


# In the order in which `--help` lists them.
for _command in (
    runs.run, runs.retry, runs.status, runs.verify, runs.repair, jobs.plan, jobs.prepare, studies.retrain,
    studies.evaluate, curation.curate, comparison.rescore, comparison.compare, jobs.schema, runs.report,
    review.review, datasets.inspect, datasets.merge, datasets.export, push.push,
):  # fmt: skip
    app.command()(_command)
for _study in (sweeps.sweep, transfer.transfer, ablations.ablate, rounds.rounds):
    loops.study.command()(_study)
app.add_typer(loops.study)

if __name__ == "__main__":
    console()
