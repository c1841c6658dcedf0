"""`riskforge study ablate`: a risky recipe without each of its parts, its predictor weakened, its Gaussians counted."""

from __future__ import annotations

from typing import Annotated

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

PartOption = Annotated[
    list[str] | None,
    typer.Option(
        "--part",
        metavar="PART",
        help="Take away only this: screening, conformity, text, embedding, mixture, risk-target, preset or guidance;"
        " repeatable. Default: all that the request has.",
    ),
]
AblatedRequestOption = Annotated[
    str | None,
    typer.Option("--request", metavar="NAME", help="The risky request; not needed where the job has only one."),
]
TextDiffusionOption = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Diffusion model on text alone, for the rows without embeddings."),
]
AblationDataOption = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="Labelled images, as of `prepare`; for --weaken and --components."),
]
WeakenOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=2, help="Also screen by N error predictors, from that of DATA down to chance."),
]
ComponentsOption = Annotated[
    list[int] | None,
    typer.Option(metavar="K", min=1, help="Also draw embeddings from K Gaussians a class of DATA; repeatable."),
]


def ablate(
    file: StudyFileArgument,
    part: PartOption = None,
    request: AblatedRequestOption = None,
    text_diffusion: TextDiffusionOption = None,
    data: AblationDataOption = None,
    weaken: WeakenOption = None,
    components: ComponentsOption = None,
    count: CountOption = None,
    output: StudyOutputOption = None,
    executor: ExecutorOption = DEFAULT_EXECUTOR,
    address: AddressOption = None,
    validate: ValidateOption = False,
    set_: StudySetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take each part of a risky request away, on shared noise, and say which ones matter; the same command resumes."""
    call_study(
        StudyCall(
            kind="ablate",
            file=file,
            fields={
                "parts": part,
                "request": request,
                "text_diffusion": text_diffusion,
                "data": data,
                "predictor_steps": weaken,
                "components": components,
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
