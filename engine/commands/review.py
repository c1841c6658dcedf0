"""The command that lets people say what the images of a run show."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands.arguments import JsonOption, RunArgument, written_here
from engine.commands.output import complain, make_display, print_json
from engine.errors import JobError
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.driver.progress import Display
    from engine.studies.review.program import Review
    from engine.studies.review.returned import Imported

SamplesOption = Annotated[
    int, typer.Option("--samples", metavar="N", help="Images to review, or pairs; all where there are fewer.")
]
ControlsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Controls of each kind: real images, prompt-only samples. Default: N / 10."),
]
RepeatsOption = Annotated[
    int | None, typer.Option(metavar="N", help="Items that come twice, as attention checks. Default: N / 20.")
]
RealOption = Annotated[
    str | None,
    typer.Option(metavar="IMAGES", help="Labelled real images for controls. Default: the starts of the run."),
]
RequestOption = Annotated[
    list[str] | None,
    typer.Option("--request", metavar="NAME", help="Request to review; repeatable. Default: those with guidance."),
]
FilterOption = Annotated[
    str | None, typer.Option("--filter", metavar="EXPR", help='Filter samples, e.g. "is_error"; see docs/reading.md.')
]
ImportOption = Annotated[
    list[Path] | None,
    typer.Option("--import", metavar="FILE", help="Store the answers of a file that a rater sent back; repeatable."),
]


# Options that each command goes by besides RUN, --json and its own; the page and the file go by a design.
_DESIGN_OPTIONS = {
    "samples", "controls", "repeats", "real", "request", "filter_", "is_all", "pairs", "seed", "design", "rater",
}  # fmt: skip
_OPTIONS = {
    "results": {"goal"}, "import_": set[str](), "preferences": {"rater"}, "html": _DESIGN_OPTIONS,
    "": _DESIGN_OPTIONS | {"port", "open_"},
}  # fmt: skip


def review(
    context: typer.Context,
    run: RunArgument,
    samples: SamplesOption = 200,
    controls: ControlsOption = None,
    repeats: RepeatsOption = None,
    real: RealOption = None,
    request: RequestOption = None,
    filter_: FilterOption = None,
    is_all: Annotated[
        bool, typer.Option("--all", help="Draw from all scored attempts with an image, not the accepted ones alone.")
    ] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="Compare two images of a class.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the draw.")] = 0,
    design: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Go on with a stored design in place of drawing one.")
    ] = None,
    rater: Annotated[str | None, typer.Option(metavar="NAME", help="Who answers. Default: asked on the page.")] = None,
    port: Annotated[
        int | None, typer.Option(metavar="P", help="Port on 127.0.0.1. Default: the same one for a run each time.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=written_here, help="Write a page that holds its images, for others."),
    ] = None,
    import_: ImportOption = None,
    preferences: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=written_here,
            help="Write answers to pairs as preference records (.jsonl) for `curate`.",
        ),
    ] = None,
    results: Annotated[
        bool, typer.Option("--results", help="Print what the answers so far say of labels, oracles and rules.")
    ] = False,
    goal: Annotated[
        float | None,
        typer.Option(metavar="P", help="With --results: precision that a recommended threshold reaches. Default: 0.9."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let people say what a run's images show: a page on this machine, or a file for others."""
    from engine.studies.review.options import DrawOptions

    if sum(option is not None for option in (html, import_, preferences)) + results > 1:
        raise JobError("--html, --import, --preferences, --results: each is a command of its own; give one of them")
    if goal is not None and not (results and 0 < goal < 1):
        raise JobError(
            f"--goal: {goal} is not between 0 and 1, or --results is not there; give such as --results --goal 0.95"
        )
    _check_used(context)
    if results:
        _print_results(run, goal, as_json)
        return
    if import_ is not None:
        _import(run, import_, as_json)
        return
    if preferences is not None:
        _write_preferences(run, preferences, rater or "", as_json)
        return
    options = DrawOptions(
        num_samples=samples, num_controls=controls, num_repeats=repeats, real=real, requests=tuple(request or ()),
        condition=filter_ or "", is_all=is_all, is_pairs=pairs, seed=seed,
    )  # fmt: skip
    if design is not None and options != DrawOptions():
        raise JobError("--design: a stored design is drawn already; omit the options of the draw")
    with contextlib.closing(make_display()) as display:
        from engine.studies.review.program import check_outlet, open_review

        # A command that fails leaves no design behind.
        check_outlet(rater or "", html, port)
        opened = open_review(run, options, design or "", notice=display.notice, advance=display.advance)
        if html is not None:
            _write_file(opened, html, rater or "", as_json)
        else:
            _serve(opened, rater or "", port, open_, as_json, display)


def _check_used(context: typer.Context) -> None:
    """Refuse options that the command does not go by, which would look as if they limited it.

    Raises:
        JobError: a line for each.
    """
    given = {
        str(param.name): param.opts[0]
        for param in context.command.params
        if (source := context.get_parameter_source(str(param.name))) is not None and source.name == "COMMANDLINE"
    }
    command = next((name for name in _OPTIONS if name in given), "")
    used = {"run", "as_json", command, *_OPTIONS[command]}
    if unused := [option for name, option in given.items() if name not in used]:
        shown = given.get(command, "the page")
        raise JobError([f"{option}: {shown} does not go by it; omit it" for option in unused])


def _import(run: str, paths: list[Path], as_json: bool) -> None:
    from dataclasses import asdict

    from engine.studies.review.program import open_reviewed
    from engine.studies.review.returned import import_files

    imported = import_files(open_reviewed(run), paths)
    if as_json:
        print_json([asdict(one) for one in imported])
        return
    for one in imported:
        print(f"{one.path}: {_import_line(one)}")


def _import_line(one: Imported) -> str:
    known = one.num_answers - one.num_new
    stored_before = f", {known} were stored before" if known else ""
    return (
        f"{one.num_new} of {one.num_answers} answers of {one.rater} stored{stored_before}; {one.num_answered} of"
        f" {one.num_items} items are answered"
    )


def _print_results(run: str, goal: float | None, as_json: bool) -> None:
    from engine.data.reading.corpus import open_run
    from engine.data.reading.people.review import people_results
    from engine.data.reading.people.rules import GOAL

    found = people_results(open_run(run), goal=GOAL if goal is None else goal, notice=complain)
    if as_json:
        print_json(None if found is None else found.to_document())
        return
    if found is None:
        print("nobody has said yet what an image shows; `riskforge review RUN` asks")
        return
    from engine.commands.people import print_people

    print_people(found)


def _write_preferences(run: str, path: Path, rater: str, as_json: bool) -> None:
    from engine.studies.review.preferences import write_preferences
    from engine.studies.review.program import open_reviewed

    number = write_preferences(open_reviewed(run), path, rater)
    if as_json:
        print_json({"preferences": str(path), "num_records": number})
    else:
        print(f"{number} preference records: {path}")


def _write_file(review: Review, path: Path, rater: str, as_json: bool) -> None:
    from engine.studies.review.program import write_file

    num_bytes = write_file(review, path, rater)
    if as_json:
        print_json(_document(review) | {"html": str(path), "num_bytes": num_bytes})
        return
    print(_design_line(review))
    print(f"page: {path}, {num_bytes / 1e6:.1f} MB; answers come back by `riskforge review RUN --import FILE`")


def _serve(review: Review, rater: str, port: int | None, is_opened: bool, as_json: bool, display: Display) -> None:
    """Serve the page until the command is interrupted, which is its regular end."""
    from engine.studies.review.program import serving

    total, lock = len(review.design.items), threading.Lock()
    finished: set[str] = set()

    def progress(name: str, number: int) -> None:
        with lock:
            if number < total:
                finished.discard(name)
                display.advance(f"{name}: {number} of {total} answered")
            elif name not in finished:
                finished.add(name)
                display.notice(f"{name}: all {total} answered")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serving(review, rater=rater, port=port, notice=display.notice, progress=progress) as server:
        with contextlib.suppress(KeyboardInterrupt):
            _announce(review, server.url, is_opened, as_json)
            server.serve_forever(poll_interval=0.2)
        server.book.refresh()
        answered = server.book.num_answered()
    if as_json:
        print_json(_document(review) | {"answered": answered})
        return
    for name, number in answered.items():
        print(f"{name}: {number} of {total} answered")
    if not answered:
        print("no answers yet")


def _announce(review: Review, url: str, is_opened: bool, as_json: bool) -> None:
    if as_json:
        complain(f"page: {url}")
    else:
        print(_design_line(review))
        print(f"page: {url}")
        print("Ctrl-C ends it; answers are stored one by one, and the same command goes on", flush=True)
    if is_opened:
        import webbrowser

        webbrowser.open(url)


def _document(review: Review) -> dict[str, object]:
    return {
        "design": review.design.digest,
        "mode": review.design.mode,
        "population": review.design.population,
        "items": review.counts(),
    }


def _design_line(review: Review) -> str:
    kinds = {
        "sample": "pairs of samples" if review.design.mode == "pair" else "samples", "control-plain": "prompt-only",
        "control-real": "real", "repeat": "shown twice",
    }  # fmt: skip
    counts = ", ".join(f"{number} {kinds[kind]}" for kind, number in review.counts().items())
    return f"design {review.design.digest}: {len(review.design.items)} items ({counts}) of {review.design.population}"
