"""Commands that learn from a finished run: retraining, evaluation, new scores, comparison."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.commands.arguments import JsonOption, RunArgument
from engine.commands.output import complain, make_console, make_display, print_json, print_some
from engine.errors import EXIT_DAMAGED, EXIT_DRAINED, EXIT_INCOMPLETE, JobError
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.studies.compare.limits import Limits
    from engine.studies.compare.program import RunComparison
    from engine.studies.rescore.program import Rescored
    from engine.studies.retrain.results import Retrained


def retrain(
    run: RunArgument,
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
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a run's target on its samples, and compare with what it was and with plain samples."""
    from engine.studies.retrain.options import RetrainOptions
    from engine.studies.retrain.program import retrain as retrain_target

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
        retrained = retrain_target(run, options, display=make_display(), folder=output)
    except KeyboardInterrupt:
        complain("stopped; nothing is stored, the same command begins again")
        raise typer.Exit(EXIT_DRAINED) from None
    if as_json:
        print_json(retrained.document)
    else:
        _print_retrained(retrained)


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

    from engine.commands.jobfile import let_import
    from engine.studies.evaluate.options import EvaluateOptions
    from engine.studies.evaluate.program import evaluate as evaluate_run
    from engine.studies.evaluate.summary_lines import summary_lines
    from engine.studies.samples import open_study

    options = EvaluateOptions(
        real=real, train=train, reference=reference, clip=clip, features=features, inception=inception,
        failures=failures, limit=limit,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    let_import(open_study(run).job, Path.cwd())
    try:
        with contextlib.closing(make_display()) as display:
            found = evaluate_run(run, options, display=display, folder=output)
    except KeyboardInterrupt:
        complain("stopped; nothing is stored, the same command begins again")
        raise typer.Exit(EXIT_DRAINED) from None
    if as_json:
        print_json(found.evaluation.model_dump(mode="json", exclude={"images"}))
        return
    for line in summary_lines(found.evaluation):
        print(line)
    print(f"figures: {found.document}")
    print(f"report: {found.report}")


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

    from engine.commands.jobfile import import_factories
    from engine.studies.rescore.program import rescore_run

    import_factories([target, *(transfer or ()), oracle], Path.cwd())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.closing(make_display()) as display:
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
    raise typer.Exit(0 if rescored.is_complete and not rescored.num_failed else EXIT_INCOMPLETE)


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

    from engine.studies.compare.baseline import open_pair, pin_run
    from engine.studies.compare.limits import Limits, check_limits, crossed_limits
    from engine.studies.compare.program import LEVELS, compare_runs
    from engine.studies.compare.scored_run import read_scored_run, unfinished
    from engine.studies.compare.tables import PAGE_BEGINNING
    from engine.studies.output_folders import check_replaces

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
        pin_run(read_scored_run(runs[0]), pin)
        print(f"baseline: {pin}")
        return
    # Limits are held against the requests.
    levels = [one for one in LEVELS if by is None or one in by or (one == "request" and limits.increases)]
    with contextlib.closing(make_display()) as display:
        old, new = open_pair(runs, baseline)
        for one in unfinished(runs):
            display.notice(f"{one}: is not complete; its figures are of what was there when it was last closed")
        comparison = compare_runs(old, new, confidence=confidence, levels=levels, advance=display.advance)
    crossed = crossed_limits(comparison, limits)
    _print_nights(comparison, limits, crossed, markdown, as_json)
    raise typer.Exit(EXIT_DAMAGED if crossed else 0)


def _print_retrained(retrained: Retrained) -> None:
    """Tables by context, findings, what was trained on, and where it is stored."""
    from engine.studies.retrain.inputs import DOCUMENT, MODEL
    from engine.studies.retrain.tables import accuracy_table, agreement_table

    document, console = retrained.document, make_console()
    console.print(accuracy_table(retrained.comparison))
    if retrained.agreement.rows:
        console.print(agreement_table(retrained.agreement))
    for finding in retrained.findings:
        print(finding)
    print()
    print(f"generated    {retrained.arms.num_samples} samples in each of {', '.join(retrained.arms.pools)}")
    for arm, reason in retrained.arms.left_out.items():
        print(f"left out     {arm}: {reason}")
    for name, data in document["data"].items():
        print(f"{name:<13}{data['images']} images from {data['kind']}, {data['num_unusable']} unusable")
        print_some([f"{one['name']}: {one['reason']}" for one in data["unusable"]], "retrain.json")
    temperature = document["temperature"]
    origin = "fitted on --calibrate" if temperature["fit"] else "the target's; --calibrate DATA fits it"
    print(f"temperature  {temperature['used']:.4g}, {origin}")
    print(f"model        {retrained.path / MODEL}")
    print(f"figures      {retrained.path / DOCUMENT}")


def _print_rescored(rescored: Rescored, as_json: bool) -> None:
    """Before and after, and where the new scores are."""
    from engine.studies.compare.tables import comparison_table, summary_document

    if as_json:
        comparison = None if rescored.comparison is None else summary_document(rescored.comparison)
        names = (
            "target", "num_scored", "num_images", "num_rows", "num_accepted", "num_failed", "failure", "is_complete",
            "reason",
        )  # fmt: skip
        fields = {name: getattr(rescored, name) for name in names}
        print_json({"folder": str(rescored.folder), **fields, "comparison": comparison})
        return
    if rescored.comparison is not None:
        make_console().print(comparison_table(rescored.comparison))
    else:
        print(f"not compared: {rescored.reason}")
    print(
        f"{rescored.num_images} of {rescored.num_rows} samples have an image and a new score, {rescored.num_scored} of"
        f" them made now; {rescored.num_accepted} meet their request's rule under {rescored.target}"
    )
    print(f"scores: {rescored.folder}")
    if rescored.num_failed:
        total = rescored.num_images + rescored.num_failed
        complain(f"error: {rescored.num_failed} of {total} images have no new score: {rescored.failure}")
    if not rescored.is_complete:
        complain("the run is not complete; the same command scores what is added to it")


def _print_nights(
    comparison: RunComparison, limits: Limits, crossed: list[str], markdown: Path | None, as_json: bool
) -> None:
    """A comparison of two runs, in every form that was asked for."""
    from engine.data.stores.file_errors import explained
    from engine.studies.compare.tables import comparison_document, comparison_markdown, comparison_table

    if markdown is not None:
        with explained(markdown):
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(comparison_markdown(comparison, crossed), encoding="utf-8")
    if as_json:
        print_json(comparison_document(comparison, limits, crossed))
    else:
        make_console().print(comparison_table(comparison))
        for title, changes in (("new failures", comparison.new_failures), ("mended", comparison.fixed)):
            if changes:
                print(f"{title}: {len(changes)}")
                print_some([one.key for one in changes], "--json")
        print_some(list(comparison.notes), "--json")
    for line in crossed:
        complain(f"past a limit: {line}")
