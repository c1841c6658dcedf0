"""Parameters of a method that is a criterion: the user's own, or built in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import Field

from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.fields import Identifier, Number, Plain


class CustomGuidanceSpec(BoundaryGuidanceSpec):
    """Guidance by a criterion; steps and schedule are those of `boundary`."""

    # Null where they are not chosen, as in jobs of before there were such fields.
    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset({"with_oracle", "images"})

    tolerance: Number = Field(
        default=0.0, ge=0, le=1e6, description="Samples whose criterion is at most this are not moved."
    )
    parameters: dict[Identifier, Plain] = Field(
        default_factory=dict,
        description="Arguments of the function that `method` names: plain values, or lists of them.",
    )
    with_oracle: bool | None = Field(
        default=None,
        description="Let the criterion see the last oracle of the job (`scene.scorers['oracle']`), which is then marked"
        " as one that guides and decides nothing.",
    )
    images: Annotated[str, Field(min_length=1, max_length=1000)] | None = Field(
        default=None,
        description="Labelled images that the criterion sees (`scene.given`), read as `--data` of `riskforge prepare`;"
        " `feature` needs them.",
    )

    @pydantic.field_validator("with_oracle")
    @classmethod
    def _chosen(cls, value: bool | None) -> bool | None:
        """`false` is no choice."""
        return value or None

    @property
    def sees_oracle(self) -> bool:
        """Whether the criterion is given the last oracle."""
        return bool(self.with_oracle)

    def identity(self) -> dict[str, Any]:
        """Without the address of images, whose digest a plan has."""
        return _without(super().identity(), "images")


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
