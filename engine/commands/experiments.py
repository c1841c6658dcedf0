"""What the commands of studies share that end in a table: `riskforge study sweep`, `transfer`, `ablate`, `rounds`."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands.arguments import check_address, make_executor
from engine.commands.output import make_console, make_display, print_json
from engine.commands.stopping import stop_on_signals
from engine.terminal import redacted
from engine.terminal import show as print

if TYPE_CHECKING:
    from rich.table import Table

    from engine.data.run.study_document import StudyTable
    from engine.studies.experiments.parsing import Study
    from engine.studies.experiments.program import StudyResult
    from engine.studies.experiments.registry import StudyRecord

# Where long headings are broken, as in `guidance_scale`.
_BREAK = re.compile(r"([._])(?=\w{4})")
CONSOLE_WIDTH, MIN_COLUMN, MAX_COLUMN = 100, 3, 24
STOPPED = "stopped; what is finished is kept, run the same command again to continue"
StudyFileArgument = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="Job file, or a file of this study (YAML) that names one.", show_default=False),
]
StudyOutputOption = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Folder of the study. Default: OUTPUT-STUDY, next to the job's output."),
]
CountOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Samples of a cell. Default: the file's, or 24; papers have 500."),
]
ValidateOption = Annotated[bool, typer.Option("--validate", help="Only validate, and say what would be made.")]
StudySetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="K=V",
        help="Override a value of FILE, such as guidance.risky.scale=5 of a job, or job.guidance.risky.scale=5 of the"
        " job in a study's file; repeatable.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyCall:
    """How the command of a study was called.

    Attributes:
        kind: of study.
        file: job file or study file.
        fields: of the study by options; None where an option is not given.
    """

    kind: str
    file: Path
    fields: dict[str, Any]
    output: str | None
    executor: str
    address: str | None
    validate: bool
    sets: list[str] | None
    as_json: bool


def call_study(call: StudyCall) -> None:
    """Check a study, make it, and print its tables, findings and files."""
    from engine.studies.experiments.program import check_study, run_study
    from engine.studies.experiments.registry import STUDIES

    check_address(call.address, call.executor)
    record = STUDIES[call.kind]
    study = _load(call, record)
    if call.validate:
        text = check_study(record, study)
        if call.as_json:
            print_json({"valid": True, "makes": text})
        else:
            print(f"{call.file} is valid: {text}")
        return
    with stop_on_signals(STOPPED):
        result = run_study(
            record,
            study,
            command=redacted(shlex.join(["riskforge", *sys.argv[1:]])),
            make_executor=lambda job: make_executor(call.executor, job, call.address),
            display=make_display(),
        )
    if call.as_json:
        print_json(result.document.model_dump(mode="json", exclude={"figures"}) | {"folder": str(result.home)})
    else:
        _print_result(result)


def _load(call: StudyCall, record: StudyRecord) -> Study[Any]:
    from engine.commands.jobfile import beside, import_factories, let_import, parse_override, read_raw
    from engine.studies.experiments.parsing import parse_study

    options = [(field, value) for field, value in call.fields.items() if value is not None]
    options += [("output.uri", call.output)] if call.output is not None else []
    study = parse_study(
        call.kind,
        record.spec_class(),
        read_raw(call.file, []),
        lambda given: read_raw(beside(call.file, given), []),
        options=options,
        sets=[parse_override(text) for text in call.sets or ()],
    )
    let_import(study.job, Path.cwd(), call.file.parent)
    import_factories(study.spec.models, Path.cwd(), call.file.parent)
    return study


def _print_result(result: StudyResult) -> None:
    from engine.studies.experiments.files import MARKDOWN

    document = result.document
    if result.was_complete:
        print("complete already; nothing was done")
    for table in document.tables[:1]:
        drawn, left_out = _console_table(table)
        make_console().print(drawn)
        if left_out:
            print(f"{left_out} more columns are in {table.name}.csv and in the report")
    for sentence in document.findings:
        print(_wrapped(f"- {sentence}"))
    for note in document.notes:
        print(_wrapped(f"note: {note}"))
    names = ", ".join(f"{table.name}.csv" for table in document.tables)
    print(f"tables: {result.home} ({names}; also as .parquet)")
    print(f"paragraph: {result.home / MARKDOWN}")
    print(f"report: {result.home / 'report.html'}")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, CONSOLE_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _console_table(table: StudyTable) -> tuple[Table, int]:
    """The first columns of the main table, as many as a terminal has room for, and the number of the others.

    Intervals are below their values. Its notes are on the page.
    """
    from rich.table import Table
    from rich.text import Text

    columns = [_BREAK.sub(r"\1\n", column.heading) for column in table.columns]
    rows = [[text.replace(" (", "\n").removesuffix(")") for text in table.texts(row)] for row in table.rows]
    widths = [
        max(MIN_COLUMN, *(len(word) for text in (heading, *texts) for word in _lines(text, heading)))
        for heading, *texts in zip(columns, *rows, strict=True)
    ]
    room = list(itertools.accumulate(width + 3 for width in widths))
    shown = max(1, sum(end < CONSOLE_WIDTH for end in room))
    drawn = Table(title=Text(table.title), title_justify="left")
    for heading, width in zip(columns[:shown], widths, strict=False):
        drawn.add_column(Text(heading), overflow="fold", max_width=width)
    for row in rows:
        drawn.add_row(*map(Text, row[:shown]))
    return drawn, len(columns) - shown


def _lines(text: str, heading: str) -> list[str]:
    """What has to stay on one line: of a heading each word, of a cell each of its lines up to a bound."""
    return text.split() if text is heading else [line[:MAX_COLUMN] for line in text.split("\n")]
