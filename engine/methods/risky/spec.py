"""Parameters of method `risky`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from engine.methods.fields import Number
from engine.methods.parameters import RiskTarget
from engine.methods.presets import PresetParameters


class RiskyGuidanceSpec(PresetParameters):
    """RiskyDiff guidance: risk under conformity constraints (Yu et al. 2025)."""

    ADVERSARIAL: ClassVar[Mapping[str, Any]] = {
        "every": 1, "counted_from": "start", "skip_last": True, "gradient": "detached",
    }  # fmt: skip
    OLD_VALUES: ClassVar[Mapping[str, tuple[str, ...]]] = {"step": ("paper",), "gradient": ("detached",)}
    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset({"oracle_floor"})
    BY_STEP: ClassVar[Mapping[str, str]] = {
        "scale": "paper", "conformity_weight": "paper", "target_risk": "polyak", "tolerance": "polyak",
        "conformity_floor": "polyak", "oracle_floor": "polyak", "cap": "polyak",
    }  # fmt: skip
    OLD_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {
            "step", "scale", "conformity_weight", "conformity", "target_risk", "tolerance", "cap", "every",
            "gradient_range", "skip_last",
        }
    )  # fmt: skip

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
    oracle_floor: Number | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="polyak: lowest probability of the label under the last of the job's oracles; guidance lifts a"
        " sample that is below. That oracle then guides, and is no evidence of validity.",
    )
    cap: Number = Field(default=0.1, gt=0, le=10, description="polyak: largest step as a fraction of |z|_2.")
    gradient: Literal["unet", "combined", "detached"] = Field(
        default="unet",
        description="unet: of the conditional half's x0, through the UNet, at the last step of the sample itself;"
        " combined: of the x0 that is stepped with, through the UNet's conditional half; detached: the same without the"
        " UNet. Default: unet; adversarial: detached.",
    )
    gradient_range: Number = Field(default=1.0, gt=0, le=1, description="Guide only in this last fraction of steps.")

    @property
    def _last_fraction(self) -> float:
        return self.gradient_range

    @property
    def can_arrive(self) -> bool:
        """Whether risk has a target."""
        return self.step == "polyak"

    @property
    def sees_oracle(self) -> bool:
        """Whether there is a floor that the step rule keeps to."""
        return self.step == "polyak" and self.oracle_floor is not None

    @property
    def risk_target(self) -> RiskTarget | None:
        """Target and tolerance of step `polyak`; the paper's step has none."""
        return RiskTarget(self.target_risk, self.tolerance) if self.step == "polyak" else None
