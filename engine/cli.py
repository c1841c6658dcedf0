"""The command line. Imports what a command needs when it runs, so that help and checks start at once."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import engine
from engine.errors import EXIT_DAMAGED, EXIT_DRAINED, EXIT_INCOMPLETE, JobError, RiskforgeError

# What is printed here is full of names and paths from outside.
from engine.terminal import printable
from engine.terminal import show as print

if TYPE_CHECKING:
    from rich.console import Console

    from engine.artefact import Conditioning
    from engine.conditioning.evaluation import Quality
    from engine.cost import Cost, RequestCost
    from engine.dataset.export import ExportOptions
    from engine.executors.base import Executor
    from engine.inspection import Inspection
    from engine.messages import Rules
    from engine.plan import Plan
    from engine.prepare import Prepared
    from engine.progress import Display
    from engine.run import RunSummary
    from engine.spec import JobSpec
    from engine.studies.nights import Limits, NightComparison
    from engine.studies.rescoring import Rescored
    from engine.studies.retrain import Retrained

MAX_LISTED = 20
DEFAULT_GRACE = "60s"
WATCH_SECONDS = 2.0

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

JobArgument = Annotated[Path, typer.Argument(metavar="JOB", help="Job file in YAML.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="K=V", help="Replace a value of the job, such as requests.0.count=6; repeatable."),
]
OutputOption = Annotated[str | None, typer.Option(metavar="URI", help="Folder of the run; replaces output.uri.")]

AddressOption = Annotated[
    str | None, typer.Option(metavar="A", help="Running Ray cluster: `auto` or HOST:PORT. Default: start one here.")
]
WorkersOption = Annotated[int | None, typer.Option(metavar="N", help="Workers; replaces runtime.workers.")]


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
ExecutorOption = Annotated[Literal["ray", "local"], typer.Option(help="Ray actors, or threads of this process.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
GraceOption = Annotated[
    str, typer.Option(metavar="TIME", help="What is in work at the end, by signal or deadline, has so long to finish.")
]
DeadlineOption = Annotated[
    str | None, typer.Option(metavar="MOMENT", help="End in good order then: 06:00, or 2026-11-22T06:00.")
]
DurationOption = Annotated[str | None, typer.Option(metavar="TIME", help="End in good order after it, such as 8h.")]


def main() -> None:
    """Run the command line: exit codes and messages as the contract has them."""
    code: Any = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except RiskforgeError as error:
        code = error.exit_code
        _print_error(error)
    except KeyboardInterrupt:
        # While the commands are still being built; later ones answer it themselves.
        code = 128 + signal.SIGINT
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has left; the interpreter's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def console() -> None:
    """The installed command: `main`, in a process that is ours to end."""
    try:
        main()
    except SystemExit as end:
        if end.code == EXIT_DRAINED:
            # Threads that still compute would abort the interpreter's own end.
            sys.stderr.flush()
            os._exit(EXIT_DRAINED)
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"riskforge {engine.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Manufacture labelled images on which a classifier fails or hesitates."""


@app.command()
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
    spec = _load(job, set_, output=output, workers=workers, continues=resume != "overwrite")
    _run(spec, executor, address, resume=resume, confirmed=yes, rules=rules)


@app.command()
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
    from engine.dataset.state import stored_plan
    from engine.dataset.store import open_store
    from engine.jobfile import let_import

    rules = _rules(grace, deadline, max_duration)
    _check_address(address, executor)
    spec, _ = stored_plan(open_store(run))
    let_import(spec, Path.cwd())
    if workers is not None:
        spec = spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"workers": workers})})
    _run(spec, executor, address, resume="auto", confirmed=False, rules=rules, retry=True)


@app.command()
def status(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until the run ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell how far a run is, from its folder alone."""
    import time

    from engine.dataset.store import open_store
    from engine.status import read_status, status_fields, status_lines

    store = open_store(run)
    try:
        while True:
            found = read_status(store)
            if as_json:
                _print_json(status_fields(found), indent=None if watch else 2)
            else:
                print("\n".join(status_lines(found)), flush=True)
            if not watch or found.state != "running":
                return
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return


@app.command()
def verify(
    run: RunArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Score a sample of the images again, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read a run to the last byte and hold it against its records and plan. Exit code 1 where it is damaged."""
    import contextlib
    import dataclasses

    from engine.dataset.store import open_store
    from engine.dataset.verify import verify as verify_run

    store = open_store(run)
    with contextlib.closing(_make_display()) as display:
        verdict = verify_run(store, display.advance)
        if deep and not verdict.damage:
            from engine.dataset.state import stored_plan
            from engine.jobfile import let_import
            from engine.rescore import rescore

            let_import(stored_plan(store)[0], Path.cwd())
            verdict = dataclasses.replace(
                verdict, findings=verdict.findings + tuple(rescore(store, advance=display.advance))
            )
    if as_json:
        _print_json(dataclasses.asdict(verdict) | {"damaged": bool(verdict.damage)})
    else:
        for finding in verdict.findings:
            print(f"{finding.kind}: {finding.text}")
        found = f"{len(verdict.damage)} damaged" if verdict.damage else "no damage"
        print(f"{verdict.num_committed} of {verdict.num_shards} shards, {verdict.num_samples} samples: {found}")
    raise typer.Exit(EXIT_DAMAGED if verdict.damage else 0)


@app.command()
def repair(run: RunArgument, as_json: JsonOption = False) -> None:
    """Take out what is damaged, so that the next run makes it again."""
    import contextlib
    import dataclasses

    from engine.dataset.lease import hold
    from engine.dataset.state import stored_plan
    from engine.dataset.store import open_store
    from engine.dataset.verify import repair as repair_run

    store = open_store(run)
    # Before the lease, whose file would make a folder where there is none.
    stored_plan(store)
    with contextlib.closing(_make_display()) as display, hold(store, notice=display.notice):
        repaired = repair_run(store, display.advance)
    if as_json:
        _print_json(dataclasses.asdict(repaired))
        return
    for line in repaired.actions or ("nothing to repair",):
        print(line)
    if repaired.actions:
        print(f"{len(repaired.to_make)} shards are to be made again: `riskforge run` with the same job does so")


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
    from engine.run import run_job

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = run_job(
            spec,
            executor=_make_executor(executor, spec, address),
            resume=resume,
            confirmed=confirmed,
            display=_make_display(),
            rules=rules,
            retry=retry,
        )
    except KeyboardInterrupt:
        _complain("stopped; the same command continues")
        raise typer.Exit(EXIT_DRAINED) from None
    _print_summary(summary)
    raise typer.Exit(summary.exit_code)


def _rules(grace: str, deadline: str | None, max_duration: str | None) -> Rules:
    """The options about time, on the clock that is not turned."""
    import time
    from datetime import datetime

    from engine.messages import Rules
    from engine.moments import parse_duration, seconds_until

    ends = [] if deadline is None else [seconds_until(deadline, "--deadline", datetime.now())]
    ends += [] if max_duration is None else [parse_duration(max_duration, "--max-duration")]
    return Rules(
        grace_seconds=parse_duration(grace, "--grace"), deadline=time.monotonic() + min(ends) if ends else None
    )


def _check_address(address: str | None, executor: str) -> None:
    if address and executor == "local":
        raise JobError("--address: is for --executor ray; leave one of the two out")


@app.command()
def plan(
    job: JobArgument,
    validate: Annotated[bool, typer.Option("--validate", help="Only check the job.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure a batch of every request here.")] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Price of a device for an hour; with --calibrate.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Show what a job will make and cost, without making it."""
    if validate and calibrate:
        raise JobError("--calibrate: makes samples, and --validate only checks; leave one of the two out")
    if price_per_hour is not None and not calibrate:
        raise JobError("--price-per-hour: needs the hours of a measurement; add --calibrate")
    spec = _load(job, set_)
    if validate:
        _validate(job, spec, as_json)
        return
    from engine.cost import job_cost
    from engine.run import plan_job

    try:
        planned = plan_job(spec, _make_display()) if calibrate else plan_job(spec)
        cost = job_cost(spec, planned, _measure(spec, planned) if calibrate else None)
    except KeyboardInterrupt:
        _complain("stopped; nothing is stored")
        raise typer.Exit(EXIT_DRAINED) from None
    if as_json:
        _print_json(_cost_fields(spec, cost, price_per_hour))
    else:
        _print_cost(spec, cost, price_per_hour)


@app.command()
def prepare(
    job: JobArgument,
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="Labelled images: a folder with a folder for each class (by name or index), WebDataset tars, a run,"
            " parquet, or a named set such as digits:validation.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the artefact conditioning-DIGEST goes; by default OUTPUT-conditioning, beside the job's"
            " output.uri.",
        ),
    ] = None,
    components: Annotated[int, typer.Option(metavar="K", min=1, max=100, help="Gaussians of a class.")] = 1,
    executor: Annotated[
        Literal["auto", "ray", "local"],
        typer.Option(
            help="Ray actors, or this process alone; auto takes Ray for large sets, and with --workers or --address."
        ),
    ] = "auto",
    address: AddressOption = None,
    workers: WorkersOption = None,
    set_: SetOption = None,
) -> None:
    """Make class statistics, error predictor and calibration of the target from labelled images."""
    is_divided = address is not None or workers is not None
    if is_divided and executor == "local":
        raise JobError("--address and --workers: are for --executor ray; leave them or `--executor local` out")
    spec = _load(job, set_, workers=workers)
    from engine.run import check_hardware

    check_hardware(spec, is_here=address is None)
    from engine.prepare import prepare_conditioning

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prepared = prepare_conditioning(
            spec,
            data,
            display=_make_display(),
            folder=output,
            components=components,
            executor=None if executor == "local" else _make_executor("ray", spec, address),
            only_large=executor == "auto" and not is_divided,
        )
    except KeyboardInterrupt:
        _complain("stopped; nothing is stored, the same command begins again")
        raise typer.Exit(EXIT_DRAINED) from None
    _print_prepared(prepared)


@app.command()
def retrain(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    real: Annotated[
        str, typer.Option(metavar="DATA", help="Labelled images to train on, as for prepare.", show_default=False)
    ],
    test: Annotated[
        str, typer.Option(metavar="DATA", help="Labelled images to test on, with contexts.", show_default=False)
    ],
    plain: Annotated[
        list[str] | None,
        typer.Option(metavar="REQUEST", help="The plain baseline; default: prompt-only requests without a rule."),
    ] = None,
    risky: Annotated[
        list[str] | None,
        typer.Option(metavar="REQUEST", help="Whose samples to add; default: requests with an `accept` rule."),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Trainings of every arm.")] = 5,
    steps: Annotated[int, typer.Option(metavar="N", help="Batches of a training.")] = 200,
    mix: Annotated[float, typer.Option(metavar="X", help="Share of a batch that is generated.")] = 0.2,
    labels: Annotated[
        Literal["hard", "soft"], typer.Option(help="Of generated samples: their class, or their soft label.")
    ] = "hard",
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images of a batch.")] = 64,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="Highest rate of AdamW.")] = 3e-4,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Images unknown to the target, for the model's temperature; default: keep it."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where figures and model go; default: RUN-retrained, beside the run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fine-tune a run's target on its samples, and compare with what it was and with plain samples."""
    from engine.studies.retrain import RetrainOptions
    from engine.studies.retrain import retrain as retrain_target

    options = RetrainOptions(
        real=real,
        test=test,
        calibrate=calibrate,
        plain=tuple(plain or ()),
        risky=tuple(risky or ()),
        num_seeds=seeds,
        num_steps=steps,
        mix=mix,
        labels=labels,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        retrained = retrain_target(run, options, display=_make_display(), folder=output)
    except KeyboardInterrupt:
        _complain("stopped; nothing is stored, the same command begins again")
        raise typer.Exit(EXIT_DRAINED) from None
    if as_json:
        _print_json(retrained.document)
    else:
        _print_retrained(retrained)


@app.command()
def evaluate(
    run: RunArgument,
    real: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Real labelled images to hold the samples against, as for prepare."),
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="DATA", help="The diffusion model's training images, to look for copies of.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="REQUEST", help="A request whose samples the others are held against.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="CLIP model that looks at the images; default: the job's.")
    ] = None,
    features: Annotated[
        Literal["auto", "clip", "inception"],
        typer.Option(help="What distances are measured in; auto takes Inception where its weights are here."),
    ] = "auto",
    inception: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="File or folder of inception-2015-12-05.pt; default: look in TORCH_HOME."),
    ] = None,
    failures: Annotated[
        Literal["accepted", "all"],
        typer.Option(help="Which failures to cluster: those that count, or rejected ones too."),
    ] = "accepted",
    limit: Annotated[int, typer.Option(metavar="N", help="Images of each request that are read.")] = 2000,
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where evaluation.json and the report go; default: into the run."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Hold a run's images against real ones, the training set and their texts; show where they fail in the report."""
    import contextlib

    from engine.jobfile import let_import
    from engine.studies.evaluate import EvaluateOptions, summary_lines
    from engine.studies.evaluate import evaluate as evaluate_run
    from engine.studies.samples import open_study

    options = EvaluateOptions(
        real=real, train=train, reference=reference, clip=clip, features=features, inception=inception,
        failures=failures, limit=limit,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    let_import(open_study(run).job, Path.cwd())
    try:
        with contextlib.closing(_make_display()) as display:
            found = evaluate_run(run, options, display=display, folder=output)
    except KeyboardInterrupt:
        _complain("stopped; nothing is stored, the same command begins again")
        raise typer.Exit(EXIT_DRAINED) from None
    if as_json:
        _print_json(found.evaluation.model_dump(mode="json", exclude={"images"}))
        return
    for line in summary_lines(found.evaluation):
        print(line)
    print(f"figures: {found.document}")
    print(f"report: {found.report}")


@app.command()
def rescore(
    run: RunArgument,
    target: Annotated[str, typer.Option(metavar="A", help="The classifier to score by.", show_default=False)],
    transfer: Annotated[
        list[str] | None, typer.Option(metavar="A", help="In the place of the run's transfer models; repeatable.")
    ] = None,
    oracle: Annotated[str | None, typer.Option(metavar="A", help="In the place of the run's oracle.")] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="For the new scores; default: RUN/rescored/TARGET-DIGEST.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score the images of a run by another target: new metadata beside the old, nothing is sampled again."""
    import contextlib

    from engine.jobfile import import_factories
    from engine.studies.rescoring import rescore_run

    import_factories([target, *(transfer or ()), oracle], Path.cwd())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.closing(_make_display()) as display:
        try:
            rescored = rescore_run(
                run,
                target,
                transfer=transfer or (),
                oracle=oracle,
                output=output,
                advance=display.advance,
                notice=display.notice,
            )
        except KeyboardInterrupt:
            display.notice("stopped; the same command continues")
            raise typer.Exit(EXIT_DRAINED) from None
    _print_rescored(rescored, as_json)
    raise typer.Exit(0 if rescored.is_complete else EXIT_INCOMPLETE)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_A [RUN_B]", help="The older and the newer run, or rescoring.", show_default=False),
    ],
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="In the place of the older run: what --pin wrote.")
    ] = None,
    pin: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare nothing; write the run as a baseline.")
    ] = None,
    max_error_increase: Annotated[
        float | None, typer.Option(metavar="X", help="Exit code 1 where a request's error rate grew by more.")
    ] = None,
    max_valid_failure_increase: Annotated[
        float | None, typer.Option(metavar="X", help="The same for its share of valid failures.")
    ] = None,
    max_risk_increase: Annotated[
        float | None, typer.Option(metavar="X", help="The same for its median risk, in nats.")
    ] = None,
    fail_on: Annotated[
        Literal["never", "significant-increase", "any-significant"],
        typer.Option(help="Exit code 1 also where failures or risk grew, or anything changed, significantly."),
    ] = "never",
    confidence: Annotated[
        float, typer.Option(metavar="P", help="Of the intervals; one less it is the level of all tests together.")
    ] = 0.95,
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[request|class|context]",
            help="Compare at these levels only; repeatable. Fewer tests find smaller differences.",
        ),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as Markdown, too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a target fails on now and did not before: two runs, or a run and a pinned baseline."""
    import contextlib

    from engine.studies.nights import (
        LEVELS,
        PAGE_BEGINNING,
        Limits,
        breaches,
        check_limits,
        check_replaces,
        compare_nights,
        open_nights,
        pin_night,
        read_night,
    )

    increases = {
        "error_rate": max_error_increase, "valid_failures": max_valid_failure_increase, "risk": max_risk_increase,
    }  # fmt: skip
    limits = Limits(increases={key: one for key, one in increases.items() if one is not None}, fail_on=fail_on)
    check_limits(limits, confidence, by or ())
    if markdown is not None:
        check_replaces("--markdown", markdown, PAGE_BEGINNING)
    if pin is not None:
        if len(runs) != 1 or baseline is not None:
            raise JobError("--pin: takes one run and compares nothing; leave the other one out")
        pin_night(read_night(runs[0]), pin)
        print(f"baseline: {pin}")
        return
    # Limits are held against the requests.
    levels = [one for one in LEVELS if by is None or one in by or (one == "request" and limits.increases)]
    with contextlib.closing(_make_display()) as display:
        old, new = open_nights(runs, baseline)
        comparison = compare_nights(old, new, confidence=confidence, levels=levels, advance=display.advance)
    crossed = breaches(comparison, limits)
    _print_nights(comparison, limits, crossed, markdown, as_json)
    raise typer.Exit(EXIT_DAMAGED if crossed else 0)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a job file."""
    from engine.spec import job_schema

    _print_json(job_schema())


@app.command()
def report(run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]) -> None:
    """Write the report of a run anew."""
    from engine.dataset.state import REPORT
    from engine.dataset.store import open_store
    from engine.report.render import write_report

    store = open_store(run)
    write_report(store)
    print(str(store.path(REPORT)))


RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN", help="Folders of runs or merged data sets.", show_default=False)
]
ExportOutput = Annotated[
    str, typer.Option("--output", metavar="URI", help="Folder of the new data set; must be empty.", show_default=False)
]
FilterOption = Annotated[
    str | None, typer.Option("--filter", metavar="EXPR", help='Such as "risk > 2 and oracle_agrees"; docs/reading.md.')
]
NameOption = Annotated[str, typer.Option(metavar="NAME", help="Prefix of shards and of keys of real images.")]
OrderOption = Annotated[int, typer.Option("--seed", metavar="N", help="Decides the order, and which real images.")]
ReshardOption = Annotated[int, typer.Option(metavar="N", help="Samples in each tar or parquet file.")]
DeduplicateOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Leave out samples as near as this cosine to an earlier one of their class."),
]
ClipOption = Annotated[
    str | None, typer.Option("--clip", metavar="A", help="CLIP model for --deduplicate. Default: the runs' own.")
]
MixOption = Annotated[
    str | None, typer.Option(metavar="DATA", help="Labelled images to mix in, as for prepare.", show_default=False)
]
RatioOption = Annotated[
    float | None, typer.Option(metavar="X", help="Share of the images that is real, with --mix-real. Default: 0.5.")
]
RejectedOption = Annotated[bool, typer.Option("--with-rejected", help="Stored images of rejected samples, too.")]
SurplusOption = Annotated[bool, typer.Option("--with-surplus", help="Accepted samples beyond their quota, too.")]
TargetsOption = Annotated[
    bool, typer.Option("--allow-different-targets", help="Scores of different targets may stand side by side.")
]


@app.command()
def inspect(
    runs: RunsArgument,
    filter_: FilterOption = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="One sample, with its whole record.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="With --key: write its image.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in runs, finished or not."""
    from engine import inspection

    if save is not None and key is None:
        raise JobError("--save: writes the image of one sample; name it by --key")
    corpus = engine.open_run(*runs)
    corpus = corpus if filter_ is None else corpus.filter(filter_, "--filter")
    if key is None:
        found = inspection.inspect(corpus)
        if as_json:
            _print_json(found.document)
        else:
            _print_inspection(found)
        return
    source, row = inspection.find_sample(corpus, key)
    if save is not None:
        data, _ = inspection.read_image(source, row)
        inspection.save_image(save, data)
    if as_json:
        _print_json(row)
        return
    for name, value in row.items():
        print(f"{name:<20} {printable(str(value))}")
    if save is not None:
        print(f"image written to {save}")


@app.command()
def merge(
    runs: RunsArgument,
    output: ExportOutput,
    samples_per_shard: ReshardOption = 1000,
    seed: OrderOption = 0,
    name: NameOption = "corpus",
    deduplicate: DeduplicateOption = None,
    clip: ClipOption = None,
    mix_real: MixOption = None,
    real_ratio: RatioOption = None,
    with_rejected: RejectedOption = False,
    with_surplus: SurplusOption = False,
    allow_different_targets: TargetsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make one data set of the accepted samples of runs: `export` to WebDataset without a filter."""
    from engine.dataset.export import ExportOptions

    options = ExportOptions(
        output=output,
        name=name,
        seed=seed,
        samples_per_shard=samples_per_shard,
        with_rejected=with_rejected,
        with_surplus=with_surplus,
        deduplicate=deduplicate,
        clip=clip,
        real=mix_real,
        real_ratio=_real_ratio(real_ratio, mix_real),
        allow_different_targets=allow_different_targets,
    )
    _export(runs, options, as_json)


@app.command()
def export(
    runs: RunsArgument,
    output: ExportOutput,
    filter_: FilterOption = None,
    format_: Annotated[
        Literal["webdataset", "imagefolder", "parquet"], typer.Option("--format", help="How images are stored.")
    ] = "webdataset",
    samples_per_shard: ReshardOption = 1000,
    seed: OrderOption = 0,
    name: NameOption = "corpus",
    deduplicate: DeduplicateOption = None,
    clip: ClipOption = None,
    mix_real: MixOption = None,
    real_ratio: RatioOption = None,
    with_rejected: RejectedOption = False,
    with_surplus: SurplusOption = False,
    allow_different_targets: TargetsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the samples of runs that pass a filter as a data set of their own."""
    from engine.dataset.export import ExportOptions

    options = ExportOptions(
        output=output,
        format=format_,
        condition=filter_ or "",
        name=name,
        seed=seed,
        samples_per_shard=samples_per_shard,
        with_rejected=with_rejected,
        with_surplus=with_surplus,
        deduplicate=deduplicate,
        clip=clip,
        real=mix_real,
        real_ratio=_real_ratio(real_ratio, mix_real),
        allow_different_targets=allow_different_targets,
    )
    _export(runs, options, as_json)


def _real_ratio(given: float | None, mix_real: str | None) -> float:
    from engine.dataset.export import DEFAULT_REAL_RATIO

    if given is not None and mix_real is None:
        raise JobError("--real-ratio: is for --mix-real; give both, or leave it out")
    return DEFAULT_REAL_RATIO if given is None else given


def _export(runs: list[str], options: ExportOptions, as_json: bool) -> None:
    import contextlib

    from engine.dataset.export import export as export_runs

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.closing(_make_display()) as display:
            done = export_runs(tuple(runs), options, display.advance)
    except KeyboardInterrupt:
        _complain("stopped; nothing is stored, the same command begins again")
        raise typer.Exit(EXIT_DRAINED) from None
    if as_json:
        _print_json(done.manifest)
        return
    for line in done.remarks:
        print(line)
    counts = done.manifest["counts"]
    real = f", {counts['real']} of them real" if counts["real"] else ""
    print(f"{counts['images']} images{real} in {done.path}")


def _print_inspection(found: Inspection) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from engine.inspection import QUANTILES
    from engine.progress import byte_size, medians_table

    document, console = found.document, _console()
    for run in document["runs"]:
        print(printable(f"{run['uri']}: {run['name']}, {run['state']}; {run['shards']} shards with images"))
        print(f"  disk       {byte_size(run['disk_bytes'])}, of which tars and rows {byte_size(run['data_bytes'])}")
        print(f"  digest     {printable(run['digest']) or 'unknown'}")
        for role, about in run["models"].items():
            for one in about if isinstance(about, list) else [about]:
                print(f"  {role:<10} {printable(_model_line(one))}")
    print(f"rows         {document['rows']}, {_listed(document['status'])}; {document['accepted']} accepted")
    print(f"samples      {document['samples']} accepted, with an image, within their quota")
    print(f"surplus      {document['surplus']}")
    print(f"schema       version {', '.join(document['schema_versions']) or 'unknown'}")
    if image := document["image"]:
        size = f"{image['width']} x {image['height']} pixels, {byte_size(image['bytes'])}"
        print(f"image        {size} ({image['format']}, the first one)")
    print(f"classes      {_listed(document['classes'])}")
    print(f"contexts     {_listed(document['contexts'])}")
    if found.groups:
        console.print(medians_table(found.groups))
    if document["quantiles"]:
        table = Table(title="Quantiles over scored rows", title_justify="left", box=box.SIMPLE_HEAD)
        for head in ("score", *(f"{share:.0%}" for share in QUANTILES)):
            table.add_column(head, justify="left" if head == "score" else "right")
        for score, values in document["quantiles"].items():
            table.add_row(Text(score), *(f"{value:.3g}" for value in values))
        console.print(table)


def _model_line(about: Any) -> str:
    return ", ".join(map(str, about.values())) if isinstance(about, dict) else str(about)


def _listed(counts: dict[str, int]) -> str:
    some = [f"{printable(name) or 'none'} {count}" for name, count in list(counts.items())[:MAX_LISTED]]
    more = [f"and {len(counts) - MAX_LISTED} more"] if len(counts) > MAX_LISTED else []
    return ", ".join(some + more) or "none"


def _load(
    path: Path,
    sets: list[str] | None,
    *,
    output: str | None = None,
    workers: int | None = None,
    continues: bool = True,
) -> JobSpec:
    """The job of a file with the overrides of the command line."""
    from engine.jobfile import parse_override, read_job

    overrides = [parse_override(text) for text in sets or ()]
    overrides += [("output.uri", output)] if output is not None else []
    overrides += [("runtime.workers", workers)] if workers is not None else []
    return read_job(path, overrides, continues=continues)


def _make_executor(kind: str, job: JobSpec, address: str | None) -> Executor:
    from engine.run import check_hardware

    workers = None if job.runtime.workers == "auto" else job.runtime.workers
    if kind == "local":
        check_hardware(job, is_here=True)
        from engine.executors.local import LocalExecutor

        return LocalExecutor(workers or 1)
    check_hardware(job, is_here=address is None)
    from engine.executors.ray import RayExecutor

    return RayExecutor(address=address, num_workers=workers, device=job.runtime.device)


def _make_display() -> Display:
    from engine.progress import LiveDisplay, PlainDisplay

    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return LiveDisplay(_console(stderr=True))
    return PlainDisplay(sys.stderr)


def _console(*, stderr: bool = False) -> Console:
    """A console; without a terminal, lines are as long as tables need."""
    from engine.progress import TABLE_WIDTH
    from engine.terminal import safe_console

    stream = sys.stderr if stderr else sys.stdout
    return safe_console(stream, width=None if stream.isatty() else TABLE_WIDTH)


def _validate(path: Path, job: JobSpec, as_json: bool) -> None:
    """Check all that can be checked without a model being loaded or fetched."""
    from engine.dataset.store import open_store
    from engine.models.addresses import check_addresses, missing_artefacts, read_labels
    from engine.plan import resolve_requests
    from engine.run import check_hardware

    check_addresses(job)
    check_hardware(job, is_here=False)
    open_store(job.output.uri)
    labels = read_labels(job.models.target)
    if labels is not None:
        resolve_requests(job, labels)
    missing = missing_artefacts(job)
    if as_json:
        _print_json({"valid": True, "classes_checked": labels is not None, "to_prepare": missing})
        return
    print(f"{path} is valid")
    for line in missing:
        print(f"to prepare before it runs: {line}")
    if labels is None:
        print(f"the classes are not checked: {job.models.target} is not on this machine yet")


def _measure(job: JobSpec, planned: Plan) -> Any:
    from engine.calibrate import measure

    _complain("measuring a batch of every request")
    return measure(job, planned)


def _cost_fields(job: JobSpec, cost: Cost, price_per_hour: float | None) -> dict[str, Any]:
    import dataclasses

    hours = cost.device_hours
    return {
        "name": job.name,
        "shards": cost.num_shards,
        "samples": cost.num_samples,
        "bytes": cost.num_bytes,
        "device": cost.device or None,
        "load_seconds": cost.load_seconds if cost.device else None,
        "device_hours": hours,
        "price": None if hours is None or price_per_hour is None else hours * price_per_hour,
        "requests": [
            dataclasses.asdict(request) | {"hours_per_accepted": request.hours_per_accepted}
            for request in cost.requests
        ],
    }


def _print_cost(job: JobSpec, cost: Cost, price_per_hour: float | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from engine.progress import byte_size, duration

    table = Table(box=box.SIMPLE_HEAD, show_footer=len(cost.requests) > 1)
    hours = cost.device_hours
    total_seconds = "" if hours is None else duration(sum(request.seconds or 0 for request in cost.requests))
    footers = ("all", f"{cost.num_shards}", f"{cost.num_samples}", byte_size(cost.num_bytes), total_seconds)
    for name, footer in zip(("request", "shards", "samples", "bytes", "one device"), footers, strict=True):
        if name != "one device" or hours is not None:
            table.add_column(name, footer, justify="left" if name == "request" else "right")
    for request in cost.requests:
        row = [str(request.num_shards), str(request.num_samples), byte_size(request.num_bytes)]
        table.add_row(Text(request.name), *row, *([] if request.seconds is None else [duration(request.seconds)]))
    _console().print(table)
    print(f"output: {job.output.uri}")
    if hours is not None:
        print(
            f"measured on {cost.device}: {hours:.2g} device-hours, of which {cost.load_seconds:.0f} s load the models"
        )
        for request in cost.requests:
            _print_yield(request)
        if price_per_hour is not None:
            print(f"price at {price_per_hour:g} an hour: {hours * price_per_hour:.2f}")


def _print_yield(request: RequestCost) -> None:
    """What an accepted sample costs, where there is a rule; of one batch, so roughly."""
    if request.measured is None:
        return
    accepted, attempted = request.measured
    cost = request.hours_per_accepted
    text = "none, so what one costs is not known" if cost is None else f"{cost:.2g} device-hours for each"
    print(f"{request.name}: {accepted} of {attempted} accepted in the measured batch: {text}")


def _print_summary(summary: RunSummary) -> None:
    from engine.progress import duration, medians_table

    if summary.was_complete:
        print(f"{summary.uri} is complete: all {summary.num_shards} shards are there, nothing to do")
    if summary.groups:
        _console().print(medians_table(summary.groups))
    _print_some(summary.remarks, "manifest.json")
    if not summary.was_complete:
        print(f"{summary.num_committed} of {summary.num_shards} shards in {summary.uri} ({duration(summary.seconds)})")
    if summary.sampling_share is not None:
        print(f"{summary.sampling_share:.0%} of the workers' time went into sampling and scoring")
    if summary.report and summary.drained in ("", "deadline"):
        print(f"report: {summary.report}")
    if summary.short:
        _complain(f"error: {len(summary.short)} quotas are not filled within max_attempts:")
        for line in summary.short[:MAX_LISTED]:
            _complain(f"  {line}")
        if len(summary.short) > MAX_LISTED:
            _complain(f"  and {len(summary.short) - MAX_LISTED} more, in the manifest under counts.quotas")
    if summary.drained:
        _complain(f"stopped ({summary.drained}); the same command continues")
    if summary.num_failed:
        _complain(f"error: {summary.num_failed} of {summary.num_samples} samples failed: {summary.failure}")
    if summary.quarantined:
        some = ", ".join(str(number) for number in summary.quarantined[:MAX_LISTED])
        more = len(summary.quarantined) - MAX_LISTED
        _complain(f"error: shards in quarantine: {some}{f' and {more} more' if more > 0 else ''}")
        _complain(
            f"the reasons are in {summary.uri}/_state/quarantine; `riskforge retry {summary.uri}` tries them again"
        )


def _print_prepared(prepared: Prepared) -> None:
    """What the images say, class by class and over all, and where it is stored."""
    from engine.progress import duration

    found = prepared.conditioning
    num_images, num_errors, fit = sum(found.counts), sum(found.num_errors), found.temperature
    _print_classes(found)
    with_images = sum(count > 0 for count in found.counts)
    print(f"images         {num_images} in {with_images} of {len(found.labels)} classes, from {prepared.source}")
    print(f"statistics     {_statistics_text(found)}")
    print(f"encoder        {prepared.encoder}")
    print(f"unusable       {len(found.unusable)}")
    _print_some([f"{one.name}: {one.reason}" for one in found.unusable])
    print(f"target errors  {num_errors} ({num_errors / num_images:.1%})")
    print(f"predictor      {found.fit.verdict}")
    if found.fit.evaluation is not None:
        pooled, threshold = found.fit.evaluation.pooled, found.fit.evaluation.threshold
        precision = "not defined (no alarm)" if pooled.precision is None else f"{pooled.precision:.2f}"
        print(f"               precision {precision}, recall {pooled.recall:.2f} above a confidence of {threshold:g}")
    fitted = f"fitted {fit.fitted:.4g}, NLL {fit.fitted_nll:.4f}"
    print(f"temperature    {fit.current:.4g}, NLL {fit.current_nll:.4f}; {fitted}")
    print(f"               {fit.verdict}")
    _print_some(found.notes())
    there = "was there already, equal" if prepared.was_there else duration(prepared.seconds)
    print(f"artefact       {prepared.path} ({there})")


def _statistics_text(found: Conditioning) -> str:
    components = found.options["statistics"]["components"]
    return "one Gaussian a class" if components == 1 else f"a mixture of up to {components} Gaussians a class"


def _print_classes(found: Conditioning) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from engine.progress import ABSENT

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("class", "images", "errors", "error rate", "AUC of the predictor, held out"):
        table.add_column(name, justify="left" if name == "class" else "right")
    judged = {one.class_index: one for one in found.fit.evaluation.per_class} if found.fit.evaluation else {}
    for index, (label, count, errors) in enumerate(zip(found.labels, found.counts, found.num_errors, strict=True)):
        rate = f"{errors / count:.1%}" if count else ABSENT
        if index < MAX_LISTED:
            table.add_row(escape(label), str(count), str(errors), rate, _auc_text(judged.get(index)))
    _console().print(table)
    if len(found.labels) > MAX_LISTED:
        print(f"and {len(found.labels) - MAX_LISTED} more classes in conditioning.json")


def _auc_text(quality: Quality | None) -> str:
    from engine.progress import ABSENT

    if quality is None:
        return ABSENT
    if quality.auc is None:
        return f"too few ({quality.num_errors} errors, {quality.num_right} right)"
    return f"{quality.auc:.2f} ({quality.auc_low:.2f} to {quality.auc_high:.2f})"


def _print_retrained(retrained: Retrained) -> None:
    """Tables by context, findings, what was trained on, and where it is stored."""
    from engine.studies.retrain import DOCUMENT, MODEL
    from engine.studies.tables import comparison_table, found_table

    document, console = retrained.document, _console()
    console.print(comparison_table(retrained.comparison))
    if retrained.found.rows:
        console.print(found_table(retrained.found))
    for finding in retrained.findings:
        print(finding)
    print()
    print(f"generated    {retrained.arms.num_samples} samples in each of {', '.join(retrained.arms.pools)}")
    for arm, reason in retrained.arms.left_out.items():
        print(f"left out     {arm}: {reason}")
    for name, data in (("real", document["data"]["real"]), ("test", document["data"]["test"])):
        print(f"{name:<13}{data['images']} images from {data['kind']}, {data['num_unusable']} unusable")
        _print_some([f"{one['name']}: {one['reason']}" for one in data["unusable"]], "retrain.json")
    temperature = document["temperature"]
    origin = "fitted on --calibrate" if temperature["fit"] else "the target's; --calibrate DATA fits it"
    print(f"temperature  {temperature['used']:.4g}, {origin}")
    print(f"model        {retrained.path / MODEL}")
    print(f"figures      {retrained.path / DOCUMENT}")


def _print_rescored(rescored: Rescored, as_json: bool) -> None:
    """Before and after, and where the new scores are."""
    from engine.studies.night_tables import night_table, summary_document

    if as_json:
        comparison = None if rescored.comparison is None else summary_document(rescored.comparison)
        names = ("target", "num_scored", "num_images", "num_rows", "num_accepted", "is_complete", "reason")
        fields = {name: getattr(rescored, name) for name in names}
        _print_json({"folder": str(rescored.folder), **fields, "comparison": comparison})
        return
    if rescored.comparison is not None:
        _console().print(night_table(rescored.comparison))
    else:
        print(f"not compared: {rescored.reason}")
    print(
        f"{rescored.num_images} of {rescored.num_rows} samples have an image and a new score, {rescored.num_scored} of"
        f" them made now; {rescored.num_accepted} meet their request's rule under {rescored.target}"
    )
    print(f"scores: {rescored.folder}")
    if not rescored.is_complete:
        _complain("the run is not complete; the same command scores what is added to it")


def _print_nights(
    comparison: NightComparison, limits: Limits, crossed: list[str], markdown: Path | None, as_json: bool
) -> None:
    """A comparison of two runs, in every form that was asked for."""
    from engine.dataset.store import explained
    from engine.studies.night_tables import night_document, night_markdown, night_table

    if markdown is not None:
        with explained(markdown):
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(night_markdown(comparison, crossed), encoding="utf-8")
    if as_json:
        _print_json(night_document(comparison, limits, crossed))
    else:
        _console().print(night_table(comparison))
        for title, changes in (("new failures", comparison.arisen), ("mended", comparison.mended)):
            if changes:
                print(f"{title}: {len(changes)}")
                _print_some([one.key for one in changes], "--json")
        _print_some(list(comparison.notes), "--json")
    for line in crossed:
        _complain(f"past a limit: {line}")


def _print_some(lines: list[str], where: str = "conditioning.json") -> None:
    """The first lines of a list that may be long."""
    for line in lines[:MAX_LISTED]:
        print(f"  {line}")
    if len(lines) > MAX_LISTED:
        print(f"  and {len(lines) - MAX_LISTED} more in {where}")


def _print_json(value: Any, indent: int | None = 2) -> None:
    from engine.terminal import json_text

    print(json_text(value, indent), flush=True)


def _print_error(error: RiskforgeError) -> None:
    lines = error.problems if isinstance(error, JobError) else str(error).splitlines()
    for line in lines:
        _complain(f"error: {printable(line)}")


def _complain(line: str) -> None:
    print(line, file=sys.stderr)
