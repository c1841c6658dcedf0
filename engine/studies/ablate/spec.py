"""Fields of an ablation study. No torch: a study file is checked before it is imported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, field_validator

from engine.job.spec import Address, Name
from engine.methods.fields import Number, Spec
from engine.studies.experiments.spec import StudySpec

Part = Literal["screening", "conformity", "text", "embedding", "mixture", "risk-target", "preset", "guidance"]
# In the order of the table.
PARTS: tuple[Part, ...] = (
    "screening", "conformity", "text", "embedding", "mixture", "risk-target", "preset", "guidance",
)  # fmt: skip
MAX_STEPS = 20
MAX_COMPONENTS = 100


class FixedStep(Spec):
    """The step that takes the place of the risk target."""

    scale: Number = Field(default=10.0, ge=0, le=1000, description="Step size s, as `guidance.risky.scale`.")
    conformity_weight: Number = Field(
        default=10.0, ge=0, le=1e6, description="Weight of conformity, where the recipe has a floor of it."
    )


class AblateSpec(StudySpec):
    """Fields of `study: ablate`."""

    request: Name | None = Field(
        default=None, description="The risky request that is taken apart; not needed where the job has only one."
    )
    parts: tuple[Part, ...] | None = Field(
        default=None, description="What is taken away, one at a time; default: all that the request has."
    )
    text_diffusion: Address | None = Field(
        default=None,
        description="Diffusion model on text alone, for the rows without embeddings where the job's own needs them.",
    )
    fixed_step: FixedStep = Field(default=FixedStep(), description="The paper's step, for the row without risk target.")
    data: Address | None = Field(
        default=None,
        description="Labelled images, as `--data` of `riskforge prepare`; for `predictor_steps` and `components`.",
    )
    predictor_steps: Annotated[StrictInt, Field(ge=2, le=MAX_STEPS)] | None = Field(
        default=None,
        description="Error predictors of falling quality, from that of `data` to chance: screening alone and with"
        " guidance by each of them.",
    )
    components: tuple[Annotated[StrictInt, Field(ge=1, le=MAX_COMPONENTS)], ...] = Field(
        default=(),
        max_length=10,
        description="Gaussians of a class, such as [1, 3, 6]: embeddings of each, alone and with guidance.",
    )

    @field_validator("parts", "components")
    @classmethod
    def _each_once(cls, values: tuple[object, ...] | None) -> tuple[object, ...] | None:
        if values and len(set(values)) != len(values):
            raise ValueError("names one twice; name each once")
        return values
