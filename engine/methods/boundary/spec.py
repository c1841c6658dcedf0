"""Parameters of method `boundary`."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field, StrictInt

from engine.methods.fields import Number
from engine.methods.parameters import MethodParameters, on_schedule, on_schedule_remedy


class BoundaryGuidanceSpec(MethodParameters):
    """KLDB guidance toward the decision boundary of the request's classes."""

    step: Literal["polyak", "norm", "paper"] = Field(
        default="polyak", description="Step rule: Polyak (no step size), |g|_2-normalised, or the paper's max|g|."
    )
    alpha: Number | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Step size; 0 switches guidance off. Default: 1 for polyak (a factor), 0.05 for norm and paper.",
    )
    cap: Number = Field(default=0.1, gt=0, le=10, description="Polyak only: largest step as a fraction of |z|_2.")
    tolerance: Number = Field(
        default=0.0, ge=0, le=10, description="Samples whose criterion is at most this (KLDB: in nats) are not moved."
    )
    every: StrictInt = Field(
        default=5, ge=1, le=1000, description="Guide at steps i with i % every == 0, i counted from 1."
    )
    gradient: Literal["detached", "unet"] = Field(
        default="detached", description="Gradient at the detached x0 prediction, or through the UNet."
    )
    skip_last: bool = Field(default=True, description="Do not guide at the last step, which is never denoised again.")

    @property
    def step_size(self) -> float:
        """`alpha`, or the default of the step rule."""
        if self.alpha is not None:
            return self.alpha
        return 1.0 if self.step == "polyak" else 0.05

    def is_guided(self, index: int, total: int) -> bool:
        """Whether `index % every == 0`, and not the last step where `skip_last`."""
        return on_schedule(index, total, every=self.every, skip_last=self.skip_last)

    @property
    def can_arrive(self) -> bool:
        """Whether there is a tolerance."""
        return self.tolerance > 0

    @pydantic.model_serializer(mode="wrap")
    def _without_default(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Jobs and plans without a tolerance are stored as they were before there was one."""
        return {key: value for key, value in dump(self).items() if key != "tolerance" or self.can_arrive}

    @property
    def schedule_remedy(self) -> str:
        """Which parameters to change, and how, where no step is guided."""
        return on_schedule_remedy(every=self.every)

    def in_effect(self) -> dict[str, Any]:
        """The parameters, with the step size of the rule where none is given."""
        return self.model_dump() | {"alpha": self.step_size}
