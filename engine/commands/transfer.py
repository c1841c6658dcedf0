"""`riskforge study transfer`: do failures of one classifier carry over to others, and across data sets?"""

from __future__ import annotations

import re
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


def transfer(
    file: StudyFileArgument,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ADDRESS",
            help="Classifier that samples are made against, in a run of its own; repeatable. Default: the job's.",
        ),
    ] = None,
    ensembles: Annotated[
        list[str] | None,
        typer.Option(
            metavar="leave-one-out|none|A+B",
            help="What samples are made against beside them; repeatable. Default: with three targets or more, for each"
            " the ensemble of all others.",
        ),
    ] = None,
    evaluator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ADDRESS",
            help="Classifier that evaluates and guides nothing; repeatable. Default: the job's transfer models.",
        ),
    ] = None,
    output: StudyOutputOption = None,
    count: CountOption = None,
    executor: ExecutorOption = DEFAULT_EXECUTOR,
    address: AddressOption = None,
    validate: ValidateOption = False,
    set_: StudySetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make samples against each of several classifiers and ensembles of them, and evaluate all by all."""
    fields = {
        "targets": _classifiers("--target", target),
        "ensembles": ensembles,
        "evaluators": _classifiers("--evaluator", evaluator),
        "count": count,
    }
    call_study(
        StudyCall(
            kind="transfer", file=file, fields=fields, output=output, executor=executor, address=address,
            validate=validate, sets=set_, as_json=as_json,
        )
    )  # fmt: skip


def _classifiers(option: str, texts: list[str] | None) -> dict[str, Any] | list[str] | None:
    """Addresses, or a mapping where one of them has a name.

    Raises:
        JobError: some have names and others not, or one is given twice.
    """
    # A path may have an equals sign, too.
    pairs = [re.fullmatch(r"([a-z0-9-]+)=(.+)", text) for text in texts or ()]
    if not any(pairs):
        return texts or None
    named = {pair[1]: pair[2] for pair in pairs if pair}
    if len(named) < len(pairs):
        raise JobError(f"{option}: give each a name of its own, NAME=ADDRESS, or none of them one")
    return named
