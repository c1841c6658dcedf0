"""`riskforge study sweep`: fields of a job crossed, by `FIELD=VALUE,VALUE` on the command line or in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.commands.arguments import AddressOption, ExecutorOption, JsonOption
from engine.commands.experiments import (
    CountOption,
    StudyCall,
    StudyFileArgument,
    StudyOutputOption,
    StudySetOption,
    ValidateOption,
    call_study,
)
from engine.driver.executors.registry import DEFAULT_EXECUTOR
from engine.errors import JobError
from engine.terminal import redacted

_OPENING, _CLOSING = "[{", "]}"

FieldsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FIELD=VALUE,VALUE...]...",
        help="Fields to cross, such as guidance.risky.scale=3,10,30; values in YAML, commas inside brackets are theirs."
        " In place of those that FILE has of the same name.",
        show_default=False,
    ),
]
RequestsOption = Annotated[
    list[str] | None,
    typer.Option("--request", metavar="NAME", help="Request of the job that makes cells; repeatable. Default: all."),
]
BaselineOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Request or cell that others are compared with. Default: an unguided one, or else the first cell.",
    ),
]
SweepRealOption = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Real images of the classes, for kernel distance, recall and coverage."),
]


def sweep(
    file: StudyFileArgument,
    fields: FieldsArgument = None,
    request: RequestsOption = None,
    baseline: BaselineOption = None,
    real: SweepRealOption = None,
    count: CountOption = None,
    output: StudyOutputOption = None,
    executor: ExecutorOption = DEFAULT_EXECUTOR,
    address: AddressOption = None,
    validate: ValidateOption = False,
    set_: StudySetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cross fields of a job on shared noise, and mark the cells that no other beats; the same command resumes."""
    crossed = parse_fields(fields or ())
    if not crossed and not _is_study(file):
        raise JobError("fields: none are given; name one or more with values, such as guidance.risky.scale=3,10,30")
    call_study(
        StudyCall(
            kind="sweep",
            file=file,
            fields={
                "fields": _with_those_of(file, crossed) if crossed else None,
                "requests": request,
                "baseline": baseline,
                "real": real,
                "count": count,
            },
            output=output,
            executor=executor,
            address=address,
            validate=validate,
            sets=set_,
            as_json=as_json,
        )
    )


def _is_study(file: Path) -> bool:
    """Whether a file is one of a study, which has fields of its own."""
    from engine.commands.jobfile import read_raw

    raw = read_raw(file, [])
    return not isinstance(raw, dict) or "study" in raw


def _with_those_of(file: Path, crossed: dict[str, list[Any]]) -> dict[str, Any]:
    """The fields of a study's file with those of the command line in their place."""
    from engine.commands.jobfile import read_raw

    raw = read_raw(file, [])
    own = raw.get("fields") if isinstance(raw, dict) and "study" in raw else None
    return {**own, **crossed} if isinstance(own, dict) else dict(crossed)


def parse_fields(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Fields with their values, as `FIELD=VALUE,VALUE` of the command line has them.

    Raises:
        JobError: with all problems, a line each.
    """
    from engine.commands.jobfile import credential_problems, parse_value

    fields: dict[str, list[Any]] = {}
    problems: list[str] = []
    for text in texts:
        field, equals, rest = text.partition("=")
        field = field.strip()
        shown = redacted(repr(text)) if len(text) <= 100 else f"{redacted(repr(text[:100]))}..."
        if not equals or not field:
            problems.append(f"{shown}: write it as FIELD=VALUE,VALUE, such as guidance.risky.scale=3,10,30")
        elif field in fields:
            problems.append(f"{field}: is given twice; give all its values together, with commas between them")
        else:
            fields[field] = []
            for piece in split_values(rest):
                try:
                    fields[field].append(_value(piece, field, parse_value))
                except JobError as error:
                    problems += error.problems
    if problems := [*problems, *credential_problems(fields, "")]:
        raise JobError(problems)
    return fields


def _value(piece: str, field: str, parse: Any) -> Any:
    if not piece.strip():
        raise JobError(
            f"{field}: has an empty value; leave the comma out, or write null for nothing and '' for no text"
        )
    return parse(piece, field)


def split_values(text: str) -> Iterator[str]:
    """The parts of a text between commas, but for those inside brackets and quotes."""
    start, depth, quote, previous = 0, 0, "", ","
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote and previous != "\\" else quote
        elif char in "'\"" and (previous in ",:[{" or previous == char):
            # A quote inside a word, as in `cat's`, is a letter; two of them inside quotes are one.
            quote = char
        elif char in _OPENING:
            depth += 1
        elif char in _CLOSING:
            depth = max(0, depth - 1)
        elif char == "," and not depth:
            yield text[start:place]
            start = place + 1
        previous = char if not char.isspace() or quote else previous
    yield text[start:]
