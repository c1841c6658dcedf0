"""Commands that compare runs: new scores by another target, and the difference between two runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.commands.arguments import JsonOption, RunArgument
from engine.commands.output import complain, make_console, make_display, print_json, print_some
from engine.commands.stopping import stop_on_signals
from engine.errors import EXIT_DAMAGED, EXIT_INCOMPLETE, JobError
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.studies.compare.limits import Limits
    from engine.studies.compare.program import RunComparison
    from engine.studies.rescore.program import Rescored


def rescore(
    run: RunArgument,
    target: Annotated[str, typer.Option(metavar="A", help="Classifier that scores the images.", show_default=False)],
    transfer: Annotated[
        list[str] | None, typer.Option(metavar="A", help="Transfer model in place of the run's; repeatable.")
    ] = None,
    oracle: Annotated[
        list[str] | None, typer.Option(metavar="A", help="Oracle in place of the run's; repeatable.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Artefact of `prepare` whose temperature the target has. Default: its own; of the run's target the"
            " run's.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder for the new scores. Default: RUN/rescored/TARGET-DIGEST."),
    ] = None,
    label_map: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of classifiers with other class names than the run, by address: {ADDRESS: {theirs: the run's}}.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a run's images with another target: writes new metadata next to the old, samples nothing."""
    from engine.commands.jobfile import import_factories, read_label_maps
    from engine.studies.rescore.program import rescore_run

    import_factories([target, *(transfer or ()), *(oracle or ())], Path.cwd())
    maps = read_label_maps(label_map, "--label-map") if label_map else None
    with stop_on_signals("stopped; the same command continues"), contextlib.closing(make_display()) as display:
        rescored = rescore_run(
            run,
            target,
            transfer=transfer or (),
            oracles=oracle or (),
            calibration=calibration,
            output=output,
            label_map=maps,
            advance=display.advance,
            notice=display.notice,
        )
    _print_rescored(rescored, as_json)
    raise typer.Exit(0 if rescored.is_complete and not rescored.num_failed else EXIT_INCOMPLETE)


RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN_A [RUN_B]", help="The older and the newer run, or a rescoring of one.", show_default=False
    ),
]
BaselineOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Baseline written by --pin, in place of the older run.")
]
PinOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the run as a baseline, without a comparison.")
]
MaxErrorIncreaseOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Exit with code 1 if a request's error rate grew by more than this."),
]
MaxValidFailureIncreaseOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Exit with code 1 if a request's share of valid failures grew by more than this."),
]
MaxRiskIncreaseOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Exit with code 1 if a request's median risk grew by more than this, in nats."),
]
FailOnOption = Annotated[
    Literal["never", "significant-increase", "any-significant"],
    typer.Option(
        help="significant-increase: exit with code 1 if failures or risk grew significantly; any-significant: if"
        " anything changed significantly, for the better too."
    ),
]
ConfidenceOption = Annotated[
    float,
    typer.Option(
        metavar="P", help="Confidence of the intervals; 1 - P is the family-wise significance level of the tests."
    ),
]
ByOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[request|class|context]",
        help="Compare at these levels only; repeatable. Fewer tests detect smaller differences.",
    ),
]
MarkdownOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the comparison as Markdown.")]


def compare(
    runs: RunsArgument,
    baseline: BaselineOption = None,
    pin: PinOption = None,
    max_error_increase: MaxErrorIncreaseOption = None,
    max_valid_failure_increase: MaxValidFailureIncreaseOption = None,
    max_risk_increase: MaxRiskIncreaseOption = None,
    fail_on: FailOnOption = "never",
    confidence: ConfidenceOption = 0.95,
    by: ByOption = None,
    markdown: MarkdownOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a target newly fails on: compare two runs, or a run with a pinned baseline."""
    from engine.studies.compare.baseline import open_pair, pin_run
    from engine.studies.compare.limits import Limits, check_limits, crossed_limits
    from engine.studies.compare.program import LEVELS, compare_runs
    from engine.studies.compare.scored_run import read_scored_run, unfinished
    from engine.studies.compare.tables import PAGE_BEGINNING
    from engine.studies.output_folders import check_replaces

    increases = {
        "error_rate": max_error_increase, "valid_failures": max_valid_failure_increase, "risk": max_risk_increase,
    }  # fmt: skip
    limits = Limits(
        increases={key: increase for key, increase in increases.items() if increase is not None}, fail_on=fail_on
    )
    check_limits(limits, confidence, by or ())
    if markdown is not None:
        check_replaces("--markdown", markdown, PAGE_BEGINNING)
    if pin is not None:
        if len(runs) != 1 or baseline is not None:
            raise JobError("--pin: takes one run and compares nothing; leave the other one out")
        pin_run(read_scored_run(runs[0]), pin)
        print(f"baseline: {pin}")
        return
    # The limits apply to requests.
    levels = [level for level in LEVELS if by is None or level in by or (level == "request" and limits.increases)]
    with contextlib.closing(make_display()) as display:
        old, new = open_pair(runs, baseline)
        for run in unfinished(runs):
            display.notice(f"{run}: is not complete; its figures cover what existed when it was last closed")
        comparison = compare_runs(old, new, confidence=confidence, levels=levels, advance=display.advance)
    crossed = crossed_limits(comparison, limits)
    _print_comparison(comparison, limits, crossed, markdown, as_json)
    raise typer.Exit(EXIT_DAMAGED if crossed else 0)


def _print_rescored(rescored: Rescored, as_json: bool) -> None:
    """Print the scores before and after, and the folder of the new ones."""
    from engine.studies.compare.tables import comparison_table, summary_document

    if as_json:
        comparison = None if rescored.comparison is None else summary_document(rescored.comparison)
        names = (
            "target", "temperature", "num_scored", "num_images", "num_rows", "num_accepted", "num_failed", "failure",
            "is_complete", "reason",
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
        f" them made now; {rescored.num_accepted} satisfy their request's rule under {rescored.target}"
    )
    if rescored.temperature:
        print(f"temperature: {rescored.temperature}")
    print(f"scores: {rescored.folder}")
    if rescored.num_failed:
        total = rescored.num_images + rescored.num_failed
        complain(f"error: {rescored.num_failed} of {total} images have no new score: {rescored.failure}")
    if not rescored.is_complete:
        complain("the run is not complete; the same command scores samples that are added later")


def _print_comparison(
    comparison: RunComparison, limits: Limits, crossed: list[str], markdown: Path | None, as_json: bool
) -> None:
    """Print a comparison of two runs, and write it in every format that was requested."""
    from engine.data.stores.file_errors import explained
    from engine.studies.compare.tables import (
        comparison_document,
        comparison_markdown,
        comparison_table,
        curation_lines,
        human_lines,
    )

    if markdown is not None:
        with explained(markdown):
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(comparison_markdown(comparison, crossed), encoding="utf-8")
    if as_json:
        print_json(comparison_document(comparison, limits, crossed))
    else:
        make_console().print(comparison_table(comparison))
        for title, changes in (("new failures", comparison.new_failures), ("fixed", comparison.fixed)):
            if changes:
                print(f"{title}: {len(changes)}")
                print_some([change.key for change in changes], "--json")
        for line in curation_lines(comparison):
            print(line)
        for line in human_lines(comparison):
            print(f"people: {line}")
        print_some(list(comparison.notes), "--json")
    for line in crossed:
        complain(f"limit exceeded: {line}")
