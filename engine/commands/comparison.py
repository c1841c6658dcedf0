"""Commands that compare runs: new scores by another target, and the difference between two runs."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from engine.commands.arguments import JsonOption, RunArgument, written_here
from engine.commands.output import MAX_LISTED, complain, make_console, make_display, print_json
from engine.commands.stopping import stop_on_signals
from engine.errors import EXIT_DAMAGED, EXIT_INCOMPLETE, JobError, RiskforgeError
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.studies.compare.limits import Crossing
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
        typer.Option(metavar="URI", help="Folder or address for the new scores. Default: RUN/rescored/TARGET-DIGEST."),
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
    if as_json:
        from engine.studies.rescore.program import rescored_document

        print_json(rescored_document(rescored))
    else:
        print_rescored(rescored)
    if rescored.num_failed:
        total = rescored.num_images + rescored.num_failed
        complain(f"error: {rescored.num_failed} of {total} images have no new score: {rescored.failure}")
    if not rescored.is_complete:
        complain("the run is not complete; the same command scores samples that are added later")
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
    Path | None,
    typer.Option(metavar="FILE", callback=written_here, help="Write the run as a baseline, without a comparison."),
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
MarkdownOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=written_here, help="Also write the comparison as Markdown."),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=written_here,
        help="Also write a page: new and fixed failures with the images of both nights, and all figures.",
    ),
]
ExamplesOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="New failures, and fixed ones, that the page of --html shows.")
]


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
    html: HtmlOption = None,
    examples: ExamplesOption = 50,
    markdown: MarkdownOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a target newly fails on: compare two runs, or a run with a pinned baseline."""
    from engine.studies.compare.baseline import open_pair, pin_run
    from engine.studies.compare.limits import Limits, check_limits, crossed_limits
    from engine.studies.compare.program import LEVELS, compare_runs
    from engine.studies.compare.scored_run import read_scored_run, unfinished
    from engine.studies.compare.tables import comparison_document

    increases = {
        "error_rate": max_error_increase, "valid_failures": max_valid_failure_increase, "risk": max_risk_increase,
    }  # fmt: skip
    limits = Limits(
        increases={key: increase for key, increase in increases.items() if increase is not None}, fail_on=fail_on
    )
    check_limits(limits, confidence, by or ())
    _check_pages(markdown, html)
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
        document = comparison_document(comparison, limits, crossed, str(baseline or ""))
        if markdown is not None:
            _write_markdown(comparison, crossed, markdown)
        if html is not None:
            display.advance("writing the page")
            _write_page(document, html, examples)
        if baseline is not None:
            _keep(runs[0], document, display.notice)
    if as_json:
        print_json(document)
    else:
        _print_comparison(comparison)
        if html is not None:
            print(f"page: {html}")
    for crossing in crossed:
        _print_wrapped(f"limit exceeded: {crossing.text}", complain)
    raise typer.Exit(EXIT_DAMAGED if crossed else 0)


def _check_pages(markdown: Path | None, html: Path | None) -> None:
    """Check before the work that pages replace only what their options wrote."""
    from engine.report.nights import PAGE_BEGINNING as HTML_BEGINNING
    from engine.studies.compare.tables import PAGE_BEGINNING
    from engine.studies.output_folders import check_replaces

    if markdown is not None:
        check_replaces("--markdown", markdown, PAGE_BEGINNING)
    if html is not None:
        check_replaces("--html", html, HTML_BEGINNING)


def _write_markdown(comparison: RunComparison, crossed: list[Crossing], path: Path) -> None:
    from engine.studies.compare.tables import comparison_markdown

    _write(path, comparison_markdown(comparison, crossed).encode())


def _write_page(document: dict[str, Any], path: Path, examples: int) -> None:
    from engine.data.run.comparison import Comparison
    from engine.report.render import comparison_page

    _write(path, comparison_page(Comparison.model_validate(document), examples))


def _write(path: Path, data: bytes) -> None:
    from engine.data.stores.file_errors import explained

    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _keep(run: str, document: dict[str, Any], notice: Callable[[str], None]) -> None:
    """Keep the comparison with the baseline in the run, and write its report again; a run may be read-only."""
    from engine.studies.compare.pinned import keep_in_run

    try:
        keep_in_run(run, document)
    except RiskforgeError as error:
        notice(f"{run}: the comparison is not kept in the run, so its report does not have it ({error})")


def print_rescored(rescored: Rescored, *, has_groups: bool = True) -> None:
    """Print the scores before and after, and the folder of the new ones.

    Args:
        has_groups: with rows for classes and contexts, not for requests alone.
    """
    comparison = rescored.comparison
    if comparison is not None:
        rows = tuple(row for row in comparison.rows if has_groups or row.level == "request")
        _print_tables(replace(comparison, rows=rows))
    else:
        print(f"not compared: {rescored.reason}")
    print(
        f"{rescored.num_images} of {rescored.num_rows} samples have an image and a new score, {rescored.num_scored} of"
        f" them made now; {rescored.num_accepted} satisfy their request's rule under {rescored.target}"
    )
    if rescored.temperature:
        print(f"temperature: {rescored.temperature}")
    print(f"scores: {rescored.folder}")


def _print_comparison(comparison: RunComparison) -> None:
    """Print the tables, then what is new, fixed and left out."""
    from engine.studies.compare.tables import curation_lines, failure_lists, human_lines

    _print_tables(comparison)
    for title, changes in failure_lists(comparison):
        if changes:
            print(f"{title.lower()}: {len(changes)}, the largest risk first")
            for key, *words in changes[:MAX_LISTED]:
                _print_wrapped(f"  {key}  {'; '.join(word for word in words if word)}")
            if len(changes) > MAX_LISTED:
                print(f"  and {len(changes) - MAX_LISTED} more in --json; --html FILE shows their images")
    for line in (*curation_lines(comparison), *(f"people: {line}" for line in human_lines(comparison))):
        _print_wrapped(line)
    if comparison.notes:
        print("notes:")
    for note in comparison.notes[:MAX_LISTED]:
        _print_wrapped(f"  {note}")
    if len(comparison.notes) > MAX_LISTED:
        print(f"  and {len(comparison.notes) - MAX_LISTED} more in --json")


def _print_tables(comparison: RunComparison) -> None:
    from engine.studies.compare.tables import TERMINAL_WIDTH, comparison_tables, comparison_title

    _print_wrapped(comparison_title(comparison))
    console = make_console()
    for table in comparison_tables(comparison):
        console.print(table, width=min(console.width, TERMINAL_WIDTH))


def _print_wrapped(line: str, show: Callable[[str], None] = print) -> None:
    """Print a line in as many as `TERMINAL_WIDTH` takes."""
    from engine.studies.compare.tables import TERMINAL_WIDTH

    for part in textwrap.wrap(line, TERMINAL_WIDTH, subsequent_indent="    ", break_on_hyphens=False):
        show(part)
