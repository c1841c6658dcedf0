"""Parameters of a method of the user's own."""

from __future__ import annotations

from pydantic import Field

from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.fields import Identifier, Number, Plain


class CustomGuidanceSpec(BoundaryGuidanceSpec):
    """Guidance by a criterion of the user's own; steps and schedule are those of `boundary`."""

    tolerance: Number = Field(
        default=0.0, ge=0, le=1e6, description="Samples whose criterion is at most this are not moved."
    )
    parameters: dict[Identifier, Plain] = Field(
        default_factory=dict,
        description="Arguments of the function that `method` names: plain values, or lists of them.",
    )
