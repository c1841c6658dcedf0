"""Parameters of method `boundary`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from engine.methods.fields import Number
from engine.methods.presets import PresetParameters


class BoundaryGuidanceSpec(PresetParameters):
    """KLDB guidance toward the decision boundary of the request's classes."""

    ADVERSARIAL: ClassVar[Mapping[str, Any]] = {
        "every": 5, "counted_from": "start", "skip_last": True, "gradient": "detached", "tolerance": 0.0,
    }  # fmt: skip
    PUBLISHED: ClassVar[frozenset[str]] = frozenset({"unet"})
    OLD_VALUES: ClassVar[Mapping[str, tuple[str, ...]]] = {"step": ("norm", "paper"), "gradient": ("detached", "unet")}
    BY_STEP: ClassVar[Mapping[str, str]] = {"cap": "polyak"}
    OLD_FIELDS: ClassVar[frozenset[str]] = frozenset({"step", "cap", "every", "gradient", "skip_last"})

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
        default=0.02,
        ge=0,
        le=10,
        description="Samples whose KLDB is at most this, in nats, are not moved. Default: 0.02; adversarial: 0.",
    )
    gradient: Literal["combined", "unet", "detached"] = Field(
        default="combined",
        description="combined: of the x0 that is stepped with, through the UNet's conditional half; unet: of the"
        " conditional half's x0, through the UNet; detached: the same without the UNet. Default: combined; adversarial:"
        " detached.",
    )

    @property
    def step_size(self) -> float:
        """`alpha`, or the default of the step rule."""
        if self.alpha is not None:
            return self.alpha
        return 1.0 if self.step == "polyak" else 0.05

    @property
    def can_arrive(self) -> bool:
        """Whether there is a tolerance."""
        return self.tolerance > 0

    def in_effect(self) -> dict[str, Any]:
        """The parameters, with the step size of the rule where none is given."""
        return self.model_dump() | {"alpha": self.step_size}
