"""The fields of a transfer study."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from engine.job.label_maps import checked_maps
from engine.job.spec import Address, Name
from engine.studies.experiments.spec import StudySpec
from engine.studies.transfer.names import named

MAX_CLASSIFIERS = 40
MAX_SETS = 40
LEAVE_ONE_OUT, NO_ENSEMBLES = "leave-one-out", "none"
Addresses = dict[Name, Address]
Ensemble = Annotated[str, Field(min_length=1, max_length=1000)]


class TransferSpec(StudySpec):
    """Samples made against each of several classifiers and against ensembles of them, evaluated by all."""

    study: Literal["transfer"] = Field(description="The study that the file is for.")
    targets: Addresses = Field(
        default_factory=dict,
        max_length=MAX_CLASSIFIERS,
        description="Classifiers that samples are made against, each in a run of its own: a list of addresses, or names"
        " and addresses. Default: those of the job's `models.target`.",
    )
    ensembles: tuple[Ensemble, ...] | None = Field(
        default=None,
        max_length=MAX_CLASSIFIERS,
        description="What samples are made against beside them: leave-one-out (for each target the ensemble of all"
        " others), none, names joined by plus such as a+b, or a list of these. Default: leave-one-out with three"
        " targets or more, else none.",
    )
    evaluators: Addresses | None = Field(
        default=None,
        max_length=MAX_CLASSIFIERS,
        description="Further classifiers that evaluate and guide nothing, as `targets`. Default: the job's"
        " `models.transfer`.",
    )
    sets: Addresses = Field(
        default_factory=dict,
        max_length=MAX_SETS,
        description="Labelled real images by name, read as `--data` of `riskforge prepare`, on which the same"
        " classifiers are compared; differences are to the first one.",
    )

    label_map: dict[Address, dict[str, str | None]] = Field(
        default_factory=dict,
        description="Of evaluators with other class names than the targets, by name or address, as a job's"
        " `models.label_map`, which counts too.",
    )

    @pydantic.field_validator("label_map", mode="before")
    @classmethod
    def _label_maps(cls, value: Any) -> Any:
        """Indices become texts."""
        return checked_maps(value)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _listed(cls, raw: Any) -> Any:
        """Lists of addresses become mappings, with names from the addresses that are unique among all of them."""
        if not isinstance(raw, dict):
            return raw
        lists = {field: _addresses(raw.get(field)) for field in ("targets", "evaluators")}
        names = iter(named([address for addresses in lists.values() for address in addresses or ()]))
        given = {
            field: {next(names): address for address in addresses}
            for field, addresses in lists.items()
            if addresses is not None
        }
        return raw | given

    @pydantic.field_validator("ensembles", mode="before")
    @classmethod
    def _one_ensemble(cls, value: Any) -> Any:
        """A text is a list of one."""
        return (value,) if isinstance(value, str) else value

    @property
    def models(self) -> tuple[str, ...]:
        """Addresses of all classifiers that the study names."""
        return (*self.targets.values(), *(self.evaluators or {}).values())


def _addresses(value: Any) -> list[str] | None:
    """The addresses of a list, or a single one; None for anything else."""
    if isinstance(value, str):
        return [value]
    is_list = isinstance(value, (list, tuple)) and all(isinstance(address, str) for address in value)
    return list(value) if is_list else None
