"""`riskforge study rounds`: a target is retrained on its failures, which are found again in the retrained one."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from engine.commands.arguments import AddressOption, ExecutorOption, JsonOption
from engine.commands.experiments import (
    StudyCall,
    StudyFileArgument,
    StudyOutputOption,
    StudySetOption,
    ValidateOption,
    call_study,
)
from engine.driver.executors.registry import DEFAULT_EXECUTOR

RealOption = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Labelled images to train on; the same forms as `prepare --data`."),
]
TestOption = Annotated[
    str | None, typer.Option(metavar="DATA", help="Labelled images to test on; contexts are compared.")
]
CalibrateOption = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Labelled images unseen by the target, to fit each model's temperature."),
]
ArmOption = Annotated[
    list[str] | None,
    typer.Option(
        "--arm",
        metavar="ARM",
        help="What is trained on: none, plain, unfiltered (or random), accepted, entropy, augment, pgd; accepted:30 for"
        " another number of samples; repeatable. Default: the file's, or none and accepted.",
    ),
]
RequestOption = Annotated[
    list[str] | None,
    typer.Option("--risky", metavar="REQUEST", help="Requests that failures are found by; repeatable. Default: those"
                 " with an `accept` rule."),
]  # fmt: skip
PlainOption = Annotated[
    list[str] | None,
    typer.Option(metavar="REQUEST", help="Requests of the arm plain; repeatable. Default: unguided ones without rule."),
]
WeakOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONTEXT", help="Contexts that are to gain; repeatable. Default: those that the first run finds."
    ),
]
ProtectOption = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="Keep what a network could: none, distill, average or arithmetic."),
]
CountOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Samples of every class and context in a run. Default: those of each request."
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Samples that a round adds to an arm. Default: as many as the smallest has."),
]


def rounds(
    file: StudyFileArgument,
    real: RealOption = None,
    test: TestOption = None,
    rounds: Annotated[int | None, typer.Option(metavar="N", help="Rounds. Default: the file's, or 3.")] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Trainings of an arm. Default: the file's, or 5.")
    ] = None,
    arm: ArmOption = None,
    protect: ProtectOption = None,
    protect_weight: Annotated[float | None, typer.Option(metavar="X", help="Strength of --protect.")] = None,
    risky: RequestOption = None,
    plain: PlainOption = None,
    weak: WeakOption = None,
    count: CountOption = None,
    samples: SamplesOption = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of a training. Default: the file's, or 100.")
    ] = None,
    mix: Annotated[float | None, typer.Option(metavar="X", help="Share of generated images in a batch.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Images per batch.")] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="X", help="Peak learning rate of AdamW.")] = None,
    calibrate: CalibrateOption = None,
    keep_models: Annotated[
        Literal["last", "all"] | None, typer.Option(help="Which retrained models stay on disk. Default: last.")
    ] = None,
    output: StudyOutputOption = None,
    executor: ExecutorOption = DEFAULT_EXECUTOR,
    address: AddressOption = None,
    validate: ValidateOption = False,
    set_: StudySetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Retrain a target on its failures, find failures of the retrained one, and again; the same command resumes."""
    call_study(
        StudyCall(
            kind="rounds",
            file=file,
            fields={
                "real": real,
                "test": test,
                "rounds": rounds,
                "seeds": seeds,
                "arms": arm or None,
                "protect": protect,
                "protect_weight": protect_weight,
                "risky": risky or None,
                "plain": plain or None,
                "weak": weak or None,
                "count": count,
                "samples": samples,
                "steps": steps,
                "mix": mix,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "calibrate": calibrate,
                "keep_models": keep_models,
            },
            output=output,
            executor=executor,
            address=address,
            validate=validate,
            sets=set_,
            as_json=as_json,
        )
    )
