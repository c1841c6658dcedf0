"""The settings of a classifier that is a program: its classes and preprocessing, from a side file or a factory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from engine.errors import JobError
from engine.job.plan import MAX_TEMPERATURE, MIN_TEMPERATURE
from engine.models.class_name_checks import check_names
from engine.models.class_name_files import read_names
from engine.models.untrusted_files import MAX_RECORD_BYTES, read_whole

# A settings file, for messages.
EXAMPLE = (
    '{"labels": ["cat", "dog"], "image_size": 224, "resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224,'
    ' 0.225], "interpolation": "bilinear", "temperature": 1.0, "output": "logits"}'
)

_Pixels = Annotated[int, Field(strict=True, ge=1, le=8192)]
_Number = Annotated[float, Field(strict=True)]
_Positive = Annotated[float, Field(strict=True, gt=0, lt=1e6)]
_Temperature = Annotated[float, Field(strict=True, ge=MIN_TEMPERATURE, lt=MAX_TEMPERATURE)]


class TargetSettings(BaseModel):
    """What the file of a network does not hold: its classes, and the preprocessing of its images.

    An image is resized, cropped at its centre, scaled to [0, 1] and normalised, as in torchvision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: tuple[str, ...] = Field(
        min_length=2, description="Class names in index order, or the path of a file with one a line (.json: a list)."
    )
    image_size: _Pixels | tuple[_Pixels, _Pixels] = Field(
        description="Height and width of its input in pixels; a single number is both."
    )
    mean: tuple[_Number, _Number, _Number] = Field(description="Subtracted from red, green, blue in [0, 1].")
    std: tuple[_Positive, _Positive, _Positive] = Field(description="Divides red, green, blue after that.")
    resize: _Pixels | None = Field(
        default=None,
        description="Shorter edge in pixels before the centre crop; without it, images are resized to image_size.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(default="bilinear", description="Of the resize, antialiased.")
    temperature: _Temperature = Field(default=1.0, description="Calibration temperature T: logits are divided by it.")
    output: Literal["logits", "logit"] = Field(
        default="logits",
        description="Output of the network, before any softmax; logit: one z for two classes, read as [0, z].",
    )

    @pydantic.field_validator("labels")
    @classmethod
    def _names(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        try:
            check_names(labels, "labels")
        except JobError as error:
            raise ValueError(str(error).removeprefix("labels: ")) from None
        return labels

    @pydantic.model_validator(mode="after")
    def _two_of_one(self) -> TargetSettings:
        if self.output == "logit" and len(self.labels) != 2:
            raise ValueError(f"output: 'logit' is of two classes, and labels has {len(self.labels)}; name both")
        return self

    @property
    def is_binary(self) -> bool:
        """Whether the network has one logit z, which is read as [0, z]."""
        return self.output == "logit"

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


def side_file(path: Path) -> Path:
    """The path of a file's settings: `model.pt.json` for `model.pt`."""
    return path.with_name(f"{path.name}.json")


def side_names(path: Path) -> Path | None:
    """The file that the settings of a file name for its classes; None where they list them, or cannot be read."""
    try:
        labels = json.loads(read_whole(side_file(path), MAX_RECORD_BYTES))["labels"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return path.parent / labels if isinstance(labels, str) else None


def side_settings(path: Path, address: str) -> TargetSettings:
    """The settings in the side file of a file.

    Raises:
        JobError: there is no side file, or it is not valid.
    """
    side = side_file(path)
    try:
        raw = json.loads(read_whole(side, MAX_RECORD_BYTES))
    except FileNotFoundError:
        raise JobError(
            f"'{address}' does not hold its classes and preprocessing; put a file '{side.name}' next to it, such as"
            f" {EXAMPLE}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(f"'{side}' cannot be read as JSON ({error})") from None
    return parse_settings(raw, f"'{side}'", side.parent)


def parse_settings(raw: Any, where: str, *folders: Path) -> TargetSettings:
    """Check settings.

    Args:
        where: their source, for messages.
        folders: where a file that `labels` names may be; the first that has it counts.

    Raises:
        JobError: all problems, one line each.
    """
    if isinstance(raw, dict) and isinstance(name := raw.get("labels"), str):
        raw = raw | {"labels": _names_of(name, where, folders)}
    try:
        return TargetSettings.model_validate(raw)
    except pydantic.ValidationError as error:
        problems: dict[str, str] = {}
        for item in error.errors():
            field = str(item["loc"][0]) if item["loc"] else "settings"
            problems.setdefault(field, f"{item['msg'][0].lower()}{item['msg'][1:]}")
        raise JobError([f"{where}: {field}: {text}; such as {EXAMPLE}" for field, text in problems.items()]) from None


def _names_of(name: str, where: str, folders: tuple[Path, ...]) -> list[str]:
    """The class names in a file that settings name.

    Raises:
        JobError: there is no such file, or it cannot be read.
    """
    places = [folder / name for folder in folders]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        looked = " or ".join(f"'{folder}'" for folder in folders) or "any folder"
        raise JobError(f"{where}: labels: there is no file {name!r} in {looked}; give its path, or a list of names")
    try:
        return read_names(path)
    except JobError as error:
        raise JobError(f"{where}: labels: {error}") from None
