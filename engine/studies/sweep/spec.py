"""The fields of a sweep's file. `engine.studies.sweep.program` checks them against the job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from engine.job.spec import Address, Name
from engine.methods.fields import Plain
from engine.studies.experiments.spec import StudySpec
from engine.studies.sweep.fields import MAX_FIELDS, canonical, value_text

ValueName = Annotated[str, Field(min_length=1, max_length=40)]
# By its form alone, so that a wrong value is reported once. The tags are what messages leave out of locations.
FieldValues = Annotated[
    Annotated[tuple[Plain, ...], Tag("list")] | Annotated[dict[ValueName, Plain], Tag("dict")],
    Discriminator(lambda given: "dict" if isinstance(given, dict) else "list"),
]
FieldName = Annotated[str, Field(min_length=1, max_length=200)]


class SweepSpec(StudySpec):
    """Fields of a job crossed: a cell for each combination of their values, all in one run, from the same noise."""

    study: Literal["sweep"] = Field(description="The study that the file is for.")
    fields: dict[FieldName, FieldValues] = Field(
        min_length=1,
        max_length=MAX_FIELDS,
        description="Values by dotted path below a request, such as `guidance.risky.scale: [3, 10, 30]`; or names (of"
        " tables) with values. A value may set several fields at once: `guidance.boundary: {paper 0.1:"
        " {step: paper, alpha: 0.1}, ours: {step: polyak}}`.",
    )
    requests: tuple[Name, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="Requests of the job that make cells; default: all that use a field, and unguided ones of the same"
        " classes for reference.",
    )
    baseline: Name | None = Field(
        default=None,
        description="Request or cell that others are compared with on shared noise; default: an unguided request, or"
        " else the first cell of the same classes.",
    )
    real: Address | None = Field(
        default=None,
        description="Labelled real images of the classes, read as `--real` of `riskforge evaluate`: for the kernel"
        " distance, recall and coverage.",
    )

    @property
    def values(self) -> dict[str, tuple[Any, ...]]:
        """The values of each field."""
        return {
            field: tuple(given.values()) if isinstance(given, dict) else given for field, given in self.fields.items()
        }

    @property
    def texts(self) -> dict[str, dict[str, str]]:
        """What tables call the values of each field, by `canonical`."""
        return {
            field: {canonical(value): name for name, value in given.items()}
            if isinstance(given, dict)
            else {canonical(value): value_text(value) for value in given}
            for field, given in self.fields.items()
        }
