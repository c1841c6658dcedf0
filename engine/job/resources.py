"""What a worker takes of a machine of a cluster: `runtime.resources` of a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from engine.methods.fields import Number, Spec

MAX_ENTRIES = 20
# Smaller parts of a GPU hold no model.
MIN_GPU_SHARE = 0.01
# Resources that have a field, or that Ray gives out by itself.
_RESERVED = {
    "CPU": "give num_cpus",
    "GPU": "give num_gpus",
    "memory": "leave it out",
    "object_store_memory": "leave it out",
}
_WORD = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"([a-z0-9]([a-z0-9.-]{{0,250}}[a-z0-9])?/)?{_WORD}")
_LABEL_VALUE = re.compile(rf"!?in\({_WORD}(, ?{_WORD})*\)|!?{_WORD}")

Amounts = dict[str, Number]


class ResourcesSpec(Spec):
    """What a worker takes of a machine."""

    num_gpus: Annotated[Number, Field(ge=0, le=64)] | Literal["auto"] | None = Field(
        default=None,
        description="GPUs of a worker. 0.5: two share a GPU, with half of its memory each; auto: as many share one as"
        " its memory allows by what the first worker uses. Without it: 1 where workers run on GPUs.",
    )
    num_cpus: Annotated[Number, Field(ge=0, le=4096)] | None = Field(
        default=None,
        description="CPU cores that a worker takes, and the threads of one on a GPU. Without it: 1 on a CPU; on a GPU"
        " none, and its part of the machine's cores as threads.",
    )
    custom: Amounts = Field(
        default_factory=dict,
        description="Resources of other names that machines were given (`ray start --resources`), such as `{a100: 1}`.",
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict,
        description="Labels that a machine must have, such as `{ray.io/accelerator-type: A100}`, `{zone: in(a, b)}` or"
        " `{spot: '!true'}`.",
    )

    @property
    def is_default(self) -> bool:
        """Whether nothing is asked for."""
        return self == ResourcesSpec()

    @property
    def asks_for_gpu(self) -> bool:
        """Whether workers are to run on GPUs, whatever `runtime.device` says."""
        return self.num_gpus not in (None, 0)

    def without_measuring(self) -> ResourcesSpec:
        """With a GPU for each worker where the number that share one would have to be measured."""
        return self.model_copy(update={"num_gpus": None}) if self.num_gpus == "auto" else self

    @pydantic.field_validator("num_gpus")
    @classmethod
    def _usable_gpus(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float):
            if 0 < value < MIN_GPU_SHARE:
                raise ValueError(f"so small a part of a GPU holds no model; give {MIN_GPU_SHARE} or more, 0 or auto")
            if value > 1 and value != int(value):
                raise ValueError("above 1 only whole GPUs can be taken; give a whole number, or a part such as 0.5")
        return value

    @pydantic.field_validator("custom")
    @classmethod
    def _usable_amounts(cls, amounts: Amounts) -> Amounts:
        _check_size(amounts)
        for name, amount in amounts.items():
            if remedy := _RESERVED.get(name):
                raise ValueError(f"'{name}' is not a custom resource; {remedy}")
            if not name or len(name) > 100 or not name.isprintable():
                raise ValueError("a resource needs a name of 1 to 100 printable characters")
            if amount <= 0 or (amount > 1 and amount != int(amount)):
                raise ValueError(f"{name}: {amount:g} is no amount; give a whole number, or a part such as 0.5")
        return amounts

    @pydantic.field_validator("label_selector")
    @classmethod
    def _usable_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        _check_size(labels)
        for key, value in labels.items():
            if not _LABEL_KEY.fullmatch(key):
                raise ValueError(f"'{key[:100]}' cannot be the key of a label; write it as `zone` or `ray.io/zone`")
            if not _LABEL_VALUE.fullmatch(value):
                raise ValueError(
                    f"{key}: '{value[:100]}' selects nothing; write a value, `!value`, `in(a, b)` or `!in(a, b)`"
                )
        return labels


def _check_size(entries: dict[str, float] | dict[str, str]) -> None:
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"it has {len(entries)} entries; give {MAX_ENTRIES} or fewer")


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a machine with these labels is selected; one without a label has none of its values."""
    return all(_matches(wanted, labels.get(key)) for key, wanted in selector.items())


def _matches(wanted: str, value: str | None) -> bool:
    is_negated, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    values = [wanted]
    if wanted.startswith("in(") and wanted.endswith(")"):
        values = [part.strip() for part in wanted[3:-1].split(",")]
    return (value in values) != is_negated
