"""Commands that make, continue, monitor, verify and repair a run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.commands.arguments import (
    AddressOption,
    DateOption,
    ExecutorOption,
    JobArgument,
    JsonOption,
    MetricsPortOption,
    OutputOption,
    RunArgument,
    SetOption,
    WorkersOption,
    check_address,
    load_job,
    make_executor,
    serve_metrics,
)
from engine.commands.output import MAX_LISTED, complain, make_console, make_display, print_json, print_some, warn
from engine.commands.stopping import stop_on_signals
from engine.driver.executors.registry import DEFAULT_EXECUTOR
from engine.errors import EXIT_DAMAGED, EXIT_INCOMPLETE, EXIT_OK, RiskforgeError
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.driver.run_summary import RunSummary
    from engine.driver.scheduling.messages import SchedulerLimits
    from engine.job.spec import JobSpec

DEFAULT_GRACE = "60s"
WATCH_SECONDS = 2.0
GraceOption = Annotated[
    str,
    typer.Option(
        metavar="DURATION", help="How long shards in flight may take to finish after a signal or the deadline."
    ),
]
DeadlineOption = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Stop in an orderly way at this time, e.g. 06:00 or 2026-11-22T06:00."),
]
DurationOption = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Stop in an orderly way after this long, e.g. 8h.")
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict", help="End with exit code 3 where a request's draws never pass, or its rule accepts nothing."
    ),
]


def run(
    job: JobArgument,
    output: OutputOption = None,
    executor: ExecutorOption = DEFAULT_EXECUTOR,
    address: AddressOption = None,
    workers: WorkersOption = None,
    resume: Annotated[
        Literal["auto", "never", "overwrite"],
        typer.Option(
            help="auto: continue the run in the output; never: refuse an output that is not empty; overwrite: remove"
            " the run first."
        ),
    ] = "auto",
    yes: Annotated[bool, typer.Option("--yes", help="Confirm the removal by --resume overwrite.")] = False,
    grace: GraceOption = DEFAULT_GRACE,
    deadline: DeadlineOption = None,
    max_duration: DurationOption = None,
    date: DateOption = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Compare the run with this baseline at its end (see `compare --pin`), in its report."
        ),
    ] = None,
    strict: StrictOption = False,
    metrics_port: MetricsPortOption = None,
    set_: SetOption = None,
) -> None:
    """Make the samples of a job; run the same command again to continue after an interruption."""
    limits = _limits(grace, deadline, max_duration)
    check_address(address, executor)
    spec = load_job(job, set_, output=output, workers=workers, continues=resume != "overwrite", date=date)
    from engine.commands.jobfile import quoting_comments

    if baseline is not None:
        from engine.studies.compare.baseline import read_baseline

        # Refused now and not at the end of the night.
        read_baseline(baseline)
    with quoting_comments(job):
        _run(
            spec,
            executor,
            address,
            resume=resume,
            confirmed=yes,
            limits=limits,
            strict=strict,
            metrics_port=metrics_port,
            baseline=baseline,
        )


def retry(
    run: RunArgument,
    executor: ExecutorOption = DEFAULT_EXECUTOR,
    address: AddressOption = None,
    workers: WorkersOption = None,
    grace: GraceOption = DEFAULT_GRACE,
    deadline: DeadlineOption = None,
    max_duration: DurationOption = None,
    strict: StrictOption = False,
    metrics_port: MetricsPortOption = None,
) -> None:
    """Retry the shards in quarantine, and make everything else that is missing."""
    from engine.commands.jobfile import let_import_of_run
    from engine.data.run.stored_plan import stored_plan
    from engine.data.stores.opening import open_store
    from engine.job.parsing import apply_overrides, parse_job

    limits = _limits(grace, deadline, max_duration)
    check_address(address, executor)
    spec, _ = stored_plan(open_store(run))
    let_import_of_run(run, spec)
    if workers is not None:
        spec = parse_job(apply_overrides(spec.model_dump(mode="json"), [("runtime.workers", workers)]))
    _run(
        spec,
        executor,
        address,
        resume="auto",
        confirmed=False,
        limits=limits,
        retry=True,
        strict=strict,
        metrics_port=metrics_port,
    )


def status(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat every two seconds until the run ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the status of a run and of its workers, from its folder alone."""
    import time

    from engine.data.stores.opening import open_store
    from engine.driver.status import read_status, status_fields, status_lines

    store = open_store(run)
    try:
        while True:
            current = read_status(store)
            if as_json:
                print_json(status_fields(current), indent=None if watch else 2)
            else:
                if watch:
                    # On a terminal alone.
                    make_console().clear()
                print("\n".join(status_lines(current)), flush=True)
            if not watch or current.state != "running":
                return
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return


def verify(
    run: RunArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Also score a sample of the images again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a run and verify it against its records and plan; exit code 1 if it is damaged."""
    import dataclasses

    from engine.data.run.verify import verify as verify_run
    from engine.data.stores.opening import open_store

    store = open_store(run)
    with contextlib.closing(make_display()) as display:
        verdict = verify_run(store, display.advance)
        if deep and not verdict.damage:
            from engine.commands.jobfile import let_import_of_run
            from engine.data.run.stored_plan import stored_plan
            from engine.generation.rescorer import rescore

            let_import_of_run(run, stored_plan(store)[0])
            verdict = dataclasses.replace(
                verdict, findings=verdict.findings + tuple(rescore(store, advance=display.advance))
            )
    if as_json:
        print_json(dataclasses.asdict(verdict) | {"damaged": bool(verdict.damage)})
    else:
        for finding in verdict.findings:
            print(f"{finding.kind}: {finding.text}")
        result = f"{len(verdict.damage)} damaged" if verdict.damage else "no damage"
        print(f"{verdict.num_committed} of {verdict.num_shards} shards, {verdict.num_samples} samples: {result}")
    raise typer.Exit(EXIT_DAMAGED if verdict.damage else 0)


def repair(run: RunArgument, as_json: JsonOption = False) -> None:
    """Remove what is damaged, so that the next run makes it again."""
    import dataclasses

    from engine.data.run.curated import remake_command
    from engine.data.run.repair import repair as repair_run
    from engine.data.run.stored_plan import stored_plan
    from engine.data.stores.lease import hold
    from engine.data.stores.opening import open_store

    store = open_store(run)
    # Before the lease, whose file would create a folder where there is none.
    _, plan = stored_plan(store)
    with contextlib.closing(make_display()) as display, hold(store, notice=display.notice):
        repaired = repair_run(store, display.advance)
    if as_json:
        print_json(dataclasses.asdict(repaired))
        return
    for line in repaired.actions or ("nothing to repair",):
        print(line)
    if repaired.actions:
        print(f"{len(repaired.to_make)} shards are missing now; {remake_command(plan)} makes them again")


def report(run: RunArgument) -> None:
    """Write the report of a run again."""
    from engine.data.run.file_names import REPORT
    from engine.data.stores.opening import open_store
    from engine.report.render import write_report

    store = open_store(run)
    if problem := write_report(store):
        complain(problem)
    print(store.address(REPORT))


def _run(
    spec: JobSpec,
    executor: str,
    address: str | None,
    *,
    resume: str,
    confirmed: bool,
    limits: SchedulerLimits,
    strict: bool,
    metrics_port: int | None,
    retry: bool = False,
    baseline: Path | None = None,
) -> None:
    """Run a job and exit with its exit code."""
    from dataclasses import replace

    from engine.driver.run import run_job
    from engine.driver.scheduling.endgame import SECOND_ATTEMPT_FACTOR

    made = make_executor(executor, spec, address)
    serve_metrics(made, metrics_port, executor)
    if address is not None:
        limits = replace(limits, second_attempt_factor=SECOND_ATTEMPT_FACTOR)
    with stop_on_signals("stopped; the same command continues"):
        summary = run_job(
            spec,
            executor=made,
            resume=resume,
            confirmed=confirmed,
            display=make_display(),
            limits=limits,
            retry=retry,
        )
    _print_summary(summary)
    if baseline is not None and summary.report and summary.drained in ("", "deadline"):
        _compare_with_pin(summary.uri, baseline)
    is_failed = strict and summary.warnings and summary.exit_code == EXIT_OK
    raise typer.Exit(EXIT_INCOMPLETE if is_failed else summary.exit_code)


def _compare_with_pin(run: str, baseline: Path) -> None:
    """Print how a run differs from its baseline, which is then in its report; the run's exit code is not changed."""
    from engine.report.text import many
    from engine.studies.compare.nights import night_names
    from engine.studies.compare.pinned import compare_with_pin

    try:
        comparison = compare_with_pin(run, baseline)
    except RiskforgeError as error:
        complain(f"not compared with the baseline: {error}")
        return
    night, _ = night_names(comparison.old, comparison.new)
    new = many(len(comparison.new_failures), "new failure")
    print(
        f"against {night} ({baseline}): {new}, {len(comparison.fixed)} fixed,"
        f" {len(comparison.unpaired_failures)} without a pair; `riskforge compare` says more"
    )


def _limits(grace: str, deadline: str | None, max_duration: str | None) -> SchedulerLimits:
    """The limits of a run from its options, with the deadline on the monotonic clock."""
    import time
    from datetime import datetime

    from engine.driver.durations import parse_duration, seconds_until
    from engine.driver.scheduling.messages import SchedulerLimits

    ends = [] if deadline is None else [seconds_until(deadline, "--deadline", datetime.now())]
    ends += [] if max_duration is None else [parse_duration(max_duration, "--max-duration")]
    return SchedulerLimits(
        grace_seconds=parse_duration(grace, "--grace"), deadline=time.monotonic() + min(ends) if ends else None
    )


def _print_summary(summary: RunSummary) -> None:
    """Print what was made on stdout, and what is missing on stderr."""
    from engine.driver.progress import duration, medians_table

    if summary.was_complete:
        print(f"{summary.uri} is complete: all {summary.num_shards} shards exist, nothing to do")
    if summary.groups:
        make_console().print(medians_table(summary.groups))
    print_some(summary.quotas, "manifest.json")
    print_some(summary.remarks, "manifest.json")
    if not summary.was_complete:
        print(f"{summary.num_committed} of {summary.num_shards} shards in {summary.uri} ({duration(summary.seconds)})")
    if summary.sampling_share is not None:
        print(f"{summary.sampling_share:.0%} of the workers' time was spent sampling and scoring")
    if summary.report and summary.drained in ("", "deadline"):
        print(f"report: {summary.report}")
    _complain_summary(summary)


def _complain_summary(summary: RunSummary) -> None:
    """Print on stderr what is missing from a run, and why."""
    for text in summary.warnings[:MAX_LISTED]:
        warn(text)
    if len(summary.warnings) > MAX_LISTED:
        complain(f"and {len(summary.warnings) - MAX_LISTED} more warnings, in the manifest")
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
        listed = ", ".join(str(number) for number in summary.quarantined[:MAX_LISTED])
        num_more = len(summary.quarantined) - MAX_LISTED
        complain(f"error: shards in quarantine: {listed}{f' and {num_more} more' if num_more > 0 else ''}")
        complain(f"the reasons are in {summary.uri}/_state/quarantine; `riskforge retry {summary.uri}` retries them")
