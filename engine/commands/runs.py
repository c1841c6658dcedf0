"""Commands that make a run and look after it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.commands.arguments import (
    AddressOption,
    ExecutorOption,
    JobArgument,
    JsonOption,
    OutputOption,
    RunArgument,
    SetOption,
    WorkersOption,
    load_job,
    make_executor,
)
from engine.commands.output import MAX_LISTED, complain, make_console, make_display, print_json, print_some
from engine.errors import EXIT_DAMAGED, EXIT_DRAINED, JobError
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.driver.run import RunSummary
    from engine.generation.messages import Rules
    from engine.job.spec import JobSpec

DEFAULT_GRACE = "60s"
WATCH_SECONDS = 2.0
GraceOption = Annotated[
    str, typer.Option(metavar="TIME", help="What is in work at the end, by signal or deadline, has so long to finish.")
]
DeadlineOption = Annotated[
    str | None, typer.Option(metavar="MOMENT", help="End in good order then: 06:00, or 2026-11-22T06:00.")
]
DurationOption = Annotated[str | None, typer.Option(metavar="TIME", help="End in good order after it, such as 8h.")]


def run(
    job: JobArgument,
    output: OutputOption = None,
    executor: ExecutorOption = "ray",
    address: AddressOption = None,
    workers: WorkersOption = None,
    resume: Annotated[
        Literal["auto", "never", "overwrite"],
        typer.Option(help="Continue the output's run, refuse an output that is not empty, or remove its run first."),
    ] = "auto",
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the removal by --resume overwrite.")] = False,
    grace: GraceOption = DEFAULT_GRACE,
    deadline: DeadlineOption = None,
    max_duration: DurationOption = None,
    set_: SetOption = None,
) -> None:
    """Make the samples of a job; the same command continues what was interrupted."""
    rules = _rules(grace, deadline, max_duration)
    _check_address(address, executor)
    spec = load_job(job, set_, output=output, workers=workers, continues=resume != "overwrite")
    _run(spec, executor, address, resume=resume, confirmed=yes, rules=rules)


def retry(
    run: RunArgument,
    executor: ExecutorOption = "ray",
    address: AddressOption = None,
    workers: WorkersOption = None,
    grace: GraceOption = DEFAULT_GRACE,
    deadline: DeadlineOption = None,
    max_duration: DurationOption = None,
) -> None:
    """Give the shards in quarantine a fresh start, and make what else is missing."""
    from engine.commands.jobfile import let_import
    from engine.data.run.stored_plan import stored_plan
    from engine.data.stores.opening import open_store
    from engine.job.parsing import apply_overrides, parse_job

    rules = _rules(grace, deadline, max_duration)
    _check_address(address, executor)
    spec, _ = stored_plan(open_store(run))
    let_import(spec, Path.cwd())
    if workers is not None:
        spec = parse_job(apply_overrides(spec.model_dump(mode="json"), [("runtime.workers", workers)]))
    _run(spec, executor, address, resume="auto", confirmed=False, rules=rules, retry=True)


def status(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until the run ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell how far a run is, from its folder alone."""
    import time

    from engine.data.stores.opening import open_store
    from engine.driver.status import read_status, status_fields, status_lines

    store = open_store(run)
    try:
        while True:
            found = read_status(store)
            if as_json:
                print_json(status_fields(found), indent=None if watch else 2)
            else:
                print("\n".join(status_lines(found)), flush=True)
            if not watch or found.state != "running":
                return
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return


def verify(
    run: RunArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Score a sample of the images again, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read a run to the last byte and hold it against its records and plan. Exit code 1 where it is damaged."""
    import contextlib
    import dataclasses

    from engine.data.run.verify import verify as verify_run
    from engine.data.stores.opening import open_store

    store = open_store(run)
    with contextlib.closing(make_display()) as display:
        verdict = verify_run(store, display.advance)
        if deep and not verdict.damage:
            from engine.commands.jobfile import let_import
            from engine.data.run.stored_plan import stored_plan
            from engine.generation.rescorer import rescore

            let_import(stored_plan(store)[0], Path.cwd())
            verdict = dataclasses.replace(
                verdict, findings=verdict.findings + tuple(rescore(store, advance=display.advance))
            )
    if as_json:
        print_json(dataclasses.asdict(verdict) | {"damaged": bool(verdict.damage)})
    else:
        for finding in verdict.findings:
            print(f"{finding.kind}: {finding.text}")
        found = f"{len(verdict.damage)} damaged" if verdict.damage else "no damage"
        print(f"{verdict.num_committed} of {verdict.num_shards} shards, {verdict.num_samples} samples: {found}")
    raise typer.Exit(EXIT_DAMAGED if verdict.damage else 0)


def repair(run: RunArgument, as_json: JsonOption = False) -> None:
    """Take out what is damaged, so that the next run makes it again."""
    import contextlib
    import dataclasses

    from engine.data.run.repair import repair as repair_run
    from engine.data.run.stored_plan import stored_plan
    from engine.data.stores.lease import hold
    from engine.data.stores.opening import open_store

    store = open_store(run)
    # Before the lease, whose file would make a folder where there is none.
    stored_plan(store)
    with contextlib.closing(make_display()) as display, hold(store, notice=display.notice):
        repaired = repair_run(store, display.advance)
    if as_json:
        print_json(dataclasses.asdict(repaired))
        return
    for line in repaired.actions or ("nothing to repair",):
        print(line)
    if repaired.actions:
        print(f"{len(repaired.to_make)} shards are to be made again: `riskforge run` with the same job does so")


def report(run: RunArgument) -> None:
    """Write the report of a run anew."""
    from engine.data.run.file_names import REPORT
    from engine.data.stores.opening import open_store
    from engine.report.render import write_report

    store = open_store(run)
    write_report(store)
    print(store.address(REPORT))


def _run(
    spec: JobSpec,
    executor: str,
    address: str | None,
    *,
    resume: str,
    confirmed: bool,
    rules: Rules,
    retry: bool = False,
) -> None:
    """Run a job and end the command with its exit code."""
    from engine.driver.run import run_job

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = run_job(
            spec,
            executor=make_executor(executor, spec, address),
            resume=resume,
            confirmed=confirmed,
            display=make_display(),
            rules=rules,
            retry=retry,
        )
    except KeyboardInterrupt:
        complain("stopped; the same command continues")
        raise typer.Exit(EXIT_DRAINED) from None
    _print_summary(summary)
    raise typer.Exit(summary.exit_code)


def _rules(grace: str, deadline: str | None, max_duration: str | None) -> Rules:
    """The options about time, on the clock that is not turned."""
    import time
    from datetime import datetime

    from engine.driver.durations import parse_duration, seconds_until
    from engine.generation.messages import Rules

    ends = [] if deadline is None else [seconds_until(deadline, "--deadline", datetime.now())]
    ends += [] if max_duration is None else [parse_duration(max_duration, "--max-duration")]
    return Rules(
        grace_seconds=parse_duration(grace, "--grace"), deadline=time.monotonic() + min(ends) if ends else None
    )


def _check_address(address: str | None, executor: str) -> None:
    if address and executor == "local":
        raise JobError("--address: is for --executor ray; leave one of the two out")


def _print_summary(summary: RunSummary) -> None:
    from engine.driver.progress import duration, medians_table

    if summary.was_complete:
        print(f"{summary.uri} is complete: all {summary.num_shards} shards are there, nothing to do")
    if summary.groups:
        make_console().print(medians_table(summary.groups))
    print_some(summary.remarks, "manifest.json")
    if not summary.was_complete:
        print(f"{summary.num_committed} of {summary.num_shards} shards in {summary.uri} ({duration(summary.seconds)})")
    if summary.sampling_share is not None:
        print(f"{summary.sampling_share:.0%} of the workers' time went into sampling and scoring")
    if summary.report and summary.drained in ("", "deadline"):
        print(f"report: {summary.report}")
    if summary.short:
        complain(f"error: {len(summary.short)} quotas are not filled within max_attempts:")
        for line in summary.short[:MAX_LISTED]:
            complain(f"  {line}")
        if len(summary.short) > MAX_LISTED:
            complain(f"  and {len(summary.short) - MAX_LISTED} more, in the manifest under counts.quotas")
    if summary.drained:
        complain(f"stopped ({summary.drained}); the same command continues")
    if summary.num_failed:
        complain(f"error: {summary.num_failed} of {summary.num_samples} samples failed: {summary.failure}")
    if summary.quarantined:
        some = ", ".join(str(number) for number in summary.quarantined[:MAX_LISTED])
        more = len(summary.quarantined) - MAX_LISTED
        complain(f"error: shards in quarantine: {some}{f' and {more} more' if more > 0 else ''}")
        complain(
            f"the reasons are in {summary.uri}/_state/quarantine; `riskforge retry {summary.uri}` tries them again"
        )
