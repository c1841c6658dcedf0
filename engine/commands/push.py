"""The command that pushes a run or an export to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands.arguments import JsonOption
from engine.commands.output import MAX_LISTED, TERMINAL_COLUMNS, complain, make_display, print_json
from engine.commands.stopping import stop_on_signals
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.data.publishing.push import Push, PushOptions


def push(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder or address of a complete run or export.", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", metavar="ADDRESS", help="hf://datasets/USER/NAME.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Branch, which is made where there is none. Default: main."),
    ] = None,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Message of the commits. Default: the name of the run.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace other content under names that this push writes.")
    ] = False,
    with_report: Annotated[
        bool, typer.Option("--with-report", help="Push report.html, too; it may name folders of this machine.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be pushed and what is there already; send nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Push a complete run or export to the Hugging Face Hub; the same command continues a broken push."""
    from engine.data.publishing.push import PushOptions

    options = PushOptions(
        to=to, public=public, revision=revision, message=message or "", overwrite=overwrite, with_report=with_report
    )
    if dry_run:
        _preview(run, options, as_json)
    else:
        _push(run, options, as_json)


def _preview(run: str, options: PushOptions, as_json: bool) -> None:
    from engine.data.publishing.push import preview

    plan = preview(run, options, lambda line: complain(_wrapped(line)))
    if as_json:
        print_json(_document(plan))
        return
    if plan.unknown:
        print(_wrapped(f"{plan.repository.uri}: not looked at, as {plan.unknown}; a new one would be {_privacy(plan)}"))
    else:
        print(_wrapped(f"{plan.repository.uri}: {_state(plan)}"))
    for notice in plan.notices:
        print(_wrapped(notice))
    _print_files(plan)
    print(f"{_counted(plan)} would be pushed{_there(plan)}; nothing is sent")


def _push(run: str, options: PushOptions, as_json: bool) -> None:
    from engine.data.publishing.push import Sent
    from engine.data.publishing.push import push as push_run
    from engine.driver.progress import byte_size

    # Before work begins, whatever becomes of it.
    say = complain if as_json else print
    with stop_on_signals("stopped; the same command continues"), contextlib.closing(make_display()) as display:

        def advance(sent: Sent) -> None:
            sizes = f"{byte_size(sent.num_bytes)} of {byte_size(sent.total_bytes)}"
            display.advance(f"{sent.num_files} of {sent.total_files} files, {sizes}")

        done = push_run(run, options, advance, lambda notice: say(_wrapped(notice)))
    if as_json:
        print_json(_document(done))
        return
    print(f"{_counted(done)} pushed to {done.repository.uri} ({_privacy(done)}){_there(done)}")
    print(done.url)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, TERMINAL_COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _privacy(plan: Push) -> str:
    return "private" if plan.private else "public"


def _state(plan: Push) -> str:
    """The repository in words."""
    if plan.is_new:
        return f"there is none yet; it would be made, {_privacy(plan)}"
    return f"is there, {_privacy(plan)}"


def _counted(plan: Push) -> str:
    from engine.driver.progress import byte_size

    files = [*plan.differences.missing, *plan.differences.changed]
    size = byte_size(sum(file.num_bytes for file in files))
    return f"{len(files)} file{'' if len(files) == 1 else 's'} ({size})" if files else "nothing new"


def _there(plan: Push) -> str:
    from engine.driver.progress import byte_size

    differences = plan.differences
    if not differences.num_equal:
        return ""
    count = differences.num_equal
    return f", {count} file{' is' if count == 1 else 's are'} there already ({byte_size(differences.equal_bytes)})"


def _print_files(plan: Push) -> None:
    """List what would be pushed, the documents first."""
    from engine.driver.progress import byte_size

    data = {file.name for file in plan.contents.data}
    rows = [(file, "new") for file in plan.differences.missing] + [(file, "other") for file in plan.differences.changed]
    rows.sort(key=lambda row: (row[0].name in data, row[0].name))
    for file, state in rows[:MAX_LISTED]:
        print(f"  {byte_size(file.num_bytes):>8}  {state:<5}  {file.name}")
    if len(rows) > MAX_LISTED:
        print(f"  and {len(rows) - MAX_LISTED} more (--json lists all)")


def _document(plan: Push) -> dict[str, Any]:
    differences = plan.differences
    return {
        "repository": plan.repository.uri,
        "revision": plan.revision,
        "url": plan.url,
        "private": plan.private,
        "is_new": plan.is_new,
        "files": [
            {"name": file.name, "bytes": file.num_bytes, "is_new": is_new}
            for files, is_new in ((differences.missing, True), (differences.changed, False))
            for file in files
        ],
        "there": {"files": differences.num_equal, "bytes": differences.equal_bytes},
        "deleted": differences.stale,
        "kept": differences.kept,
        "not_pushed": plan.contents.left_out,
        "notices": [*plan.notices, *([plan.unknown] if plan.unknown else [])],
    }
