"""Presets of guidance: values for the parameters that a job does not name. No torch: jobs are checked before that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import Field, StrictInt

from engine.methods.parameters import MethodParameters, on_schedule, on_schedule_remedy

Preset = Literal["perceptible", "adversarial"]


class PresetParameters(MethodParameters):
    """Parameters with presets: fields that are not named take the preset's values.

    The defaults of the fields are those of preset `perceptible`. A class says in `ADVERSARIAL` where the other one
    differs.
    """

    ADVERSARIAL: ClassVar[Mapping[str, Any]]
    # Gradients that pass through the UNet at the last step, too, as published.
    PUBLISHED: ClassVar[frozenset[str]] = frozenset()
    # Values that only jobs of before there were presets, and recipes of papers, name.
    OLD_VALUES: ClassVar[Mapping[str, tuple[str, ...]]]
    # Fields of before there were presets, which jobs stored then have; manifests leave out those that are null.
    OLD_FIELDS: ClassVar[frozenset[str]]
    # Fields of after there were presets, which jobs and plans of before do not have: left out where they are null.
    LATER_FIELDS: ClassVar[frozenset[str]] = frozenset()
    # Fields that one step rule alone reads, with its name.
    BY_STEP: ClassVar[Mapping[str, str]] = {}

    preset: Preset = Field(
        default="perceptible",
        description="Fields that are not named take its values. perceptible: through the UNet, changes that people see;"
        " adversarial: without, changes that are hardly seen on photographs. Default: perceptible, or adversarial where"
        " a named field has a value that perceptible guidance never has: a paper's step, or a detached gradient (of"
        " boundary also unet).",
    )
    every: StrictInt = Field(
        default=3,
        ge=1,
        le=1000,
        description="Guide every so many steps. Default: 3; adversarial: 5 for boundary, 1 for risky.",
    )
    counted_from: Literal["start", "end"] = Field(
        default="end",
        description="start: guide at steps i with i % every == 0, i counted from 1; end: at steps with"
        " (T - i) % every == 0 of T, so at the last one. Default: end; adversarial: start.",
    )
    skip_last: bool = Field(
        default=False,
        description="Do not guide at the last step, which is never denoised again. Default: false, as a sample that was"
        " guided before is nearly there; adversarial: true.",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, named: Any) -> Any:
        """Fill in the values of the preset."""
        if not isinstance(named, Mapping):
            return named
        preset = named.get("preset", cls.implied_preset(named) or "perceptible")
        return {**(cls.ADVERSARIAL if preset == "adversarial" else {}), **named, "preset": preset}

    @classmethod
    def implied_preset(cls, named: Mapping[str, Any]) -> Preset | None:
        """The preset that named fields choose, by naming it or by values that belong to one; None for neither."""
        if "preset" in named:
            return "adversarial" if named["preset"] == "adversarial" else "perceptible"
        is_old = any(named.get(field) in values for field, values in cls.OLD_VALUES.items())
        return "adversarial" if is_old or named.keys() >= cls.OLD_FIELDS else None

    @classmethod
    def beneath(cls, base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a job that still hold where a request overrides some.

        Where it chooses a preset, the job's own values of its preset make way; others that the job names stay.
        """
        if cls.implied_preset(override) is None:
            return dict(base)
        of_preset = cls.model_validate({"preset": base.get("preset", "adversarial")}).model_dump()
        return {key: value for key, value in base.items() if value != of_preset.get(key)}

    @property
    def _last_fraction(self) -> float:
        """Share of the steps, at the end, that may be guided."""
        return 1.0

    def is_guided(self, index: int, total: int) -> bool:
        """Whether the schedule guides step `index` of `total`, counted from 1."""
        return on_schedule(
            index,
            total,
            every=self.every,
            skip_last=self.skip_last,
            last_fraction=self._last_fraction,
            from_end=self.counted_from == "end",
        )

    def is_through_unet(self, index: int, total: int) -> bool:
        """Whether the gradient of step `index` of `total` passes through the UNet; see `GuidedDenoiser` on `source`."""
        gradient = getattr(self, "gradient", "")
        return gradient in self.PUBLISHED or (gradient != "detached" and index < total)

    @property
    def schedule_remedy(self) -> str:
        """Which parameters to change, and how, where no step is guided."""
        return on_schedule_remedy(every=self.every, last_fraction=self._last_fraction)

    def identity(self) -> dict[str, Any]:
        """The values, whichever preset gave them: plans of before there were presets have the fields of that time."""
        return self._old_and_changed(self.model_dump(mode="json"))

    @pydantic.model_serializer(mode="wrap")
    def _as_before(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Jobs of preset `adversarial` are stored as they were before there was another."""
        values = self._without_absent(dump(self))
        return self._old_and_changed(values) if self.preset == "adversarial" else values

    def _old_and_changed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values without the preset, and without those that jobs without the field mean."""
        implied = {key for key in self.ADVERSARIAL.keys() - self.OLD_FIELDS if values.get(key) == self.ADVERSARIAL[key]}
        return {key: value for key, value in values.items() if key not in {"preset", *implied}}

    def _without_absent(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values without later fields that are null."""
        return {key: value for key, value in values.items() if value is not None or key not in self.LATER_FIELDS}
