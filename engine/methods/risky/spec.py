"""Parameters of method `risky`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictInt

from engine.methods.fields import Number
from engine.methods.parameters import MethodParameters, RiskTarget, on_schedule, on_schedule_remedy


class RiskyGuidanceSpec(MethodParameters):
    """RiskyDiff guidance: risk under conformity constraints (Yu et al. 2025)."""

    step: Literal["polyak", "paper"] = Field(
        default="polyak", description="A risk target with a conformity floor, or the paper's fixed step on s, lambda."
    )
    scale: Number = Field(
        default=10.0, ge=0, le=1000, description="paper: step size s, at 4 x 64 x 64 latents; rescaled to any size."
    )
    conformity_weight: Number = Field(default=1e-4, ge=0, le=1e6, description="paper: lambda, weight of conformity.")
    conformity: Literal["cosine", "raw"] = Field(
        default="cosine", description="Cosine of CLIP embeddings, or the paper's raw inner product."
    )
    target_risk: Number = Field(
        default=1.5, ge=0, le=50, description="polyak: risk to reach, in nats, from both sides."
    )
    tolerance: Number = Field(
        default=0.1, ge=0, le=10, description="polyak: samples with a risk this near the target are not moved."
    )
    conformity_floor: Number | None = Field(
        default=None, ge=-1, le=1, description="polyak: lowest conformity; guidance lifts a sample that is below."
    )
    cap: Number = Field(default=0.1, gt=0, le=10, description="polyak: largest step as a fraction of |z|_2.")
    every: StrictInt = Field(
        default=1, ge=1, le=1000, description="Guide at steps i with i % every == 0, i counted from 1."
    )
    gradient_range: Number = Field(default=1.0, gt=0, le=1, description="Guide only in this last fraction of steps.")
    skip_last: bool = Field(default=True, description="Do not guide at the last step, which is never denoised again.")

    def is_guided(self, index: int, total: int) -> bool:
        """Whether `index % every == 0` in the last `gradient_range` of steps, and not the last where `skip_last`."""
        return on_schedule(index, total, every=self.every, skip_last=self.skip_last, last_fraction=self.gradient_range)

    @property
    def schedule_remedy(self) -> str:
        """Which parameters to change, and how, where no step is guided."""
        return on_schedule_remedy(every=self.every, last_fraction=self.gradient_range)

    @property
    def can_arrive(self) -> bool:
        """Whether risk has a target."""
        return self.step == "polyak"

    @property
    def risk_target(self) -> RiskTarget | None:
        """Target and tolerance of step `polyak`; the paper's step has none."""
        return RiskTarget(self.target_risk, self.tolerance) if self.step == "polyak" else None
