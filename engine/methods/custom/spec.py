"""Parameters of a method of the user's own."""

from __future__ import annotations

from pydantic import Field

from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.fields import Identifier, Plain


class CustomGuidanceSpec(BoundaryGuidanceSpec):
    """Guidance by a criterion of the user's own; steps and schedule are those of `boundary`."""

    parameters: dict[Identifier, Plain] = Field(
        default_factory=dict,
        description="Arguments of the function that `method` names: plain values, or lists of them.",
    )
