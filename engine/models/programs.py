"""Classifiers that are no model folder: a file of TorchScript or torch.export, or a factory in the user's own code.

A file has a side file of the same name plus `.json`, as it carries no labels; a factory gives the same settings beside
its module. Nothing here imports torch but what asks a factory: its labels and its digest are known by calling it.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from engine.errors import JobError
from engine.models.classifier_checks import MAX_TEMPERATURE, MIN_TEMPERATURE, check_names
from engine.models.untrusted_files import MAX_RECORD_BYTES, read_whole

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
# What a settings file holds, for messages.
EXAMPLE = (
    '{"labels": ["cat", "dog"], "image_size": 224, "resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224,'
    ' 0.225], "interpolation": "bilinear", "temperature": 1.0, "output": "logits"}'
)
_CONVERT = "convert it to TorchScript or torch.export, or name a factory that loads it (package.module:factory)"

_Pixels = Annotated[int, Field(strict=True, ge=1, le=8192)]
_Number = Annotated[float, Field(strict=True)]
_Positive = Annotated[float, Field(strict=True, gt=0, lt=1e6)]
_Temperature = Annotated[float, Field(strict=True, ge=MIN_TEMPERATURE, lt=MAX_TEMPERATURE)]


class TargetSettings(BaseModel):
    """What a network does not say of itself: its classes, and how it wants its images.

    An image is resized, cropped at its centre, scaled to [0, 1] and normalised.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: tuple[str, ...] = Field(min_length=2, description="Class names in index order.")
    image_size: _Pixels | tuple[_Pixels, _Pixels] = Field(description="Height and width of its input, or both in one.")
    mean: tuple[_Number, _Number, _Number] = Field(description="Subtracted from red, green, blue in [0, 1].")
    std: tuple[_Positive, _Positive, _Positive] = Field(description="Divides red, green, blue after that.")
    resize: _Pixels | None = Field(
        default=None, description="Shorter edge before the centre crop; without it, images are resized to image_size."
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(default="bilinear", description="Of the resize, antialiased.")
    temperature: _Temperature = Field(default=1.0, description="Calibration temperature T: logits are divided by it.")
    output: Literal["logits"] = Field(default="logits", description="What the network gives, before any softmax.")

    @pydantic.field_validator("labels")
    @classmethod
    def _names(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        try:
            check_names(labels, "labels")
        except JobError as error:
            raise ValueError(str(error).removeprefix("labels: ")) from None
        return labels

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


def is_program(address: str) -> bool:
    """Whether an address is that of a file or of a factory."""
    return is_factory(address) or as_file(address) is not None


def is_factory(address: str) -> bool:
    """Whether an address is `package.module:factory`: the job's words for running code of the user's own."""
    return bool(_FACTORY.fullmatch(address)) and not address.startswith("zoo:")


def as_file(address: str) -> Path | None:
    """The file of an address, or None."""
    if address.startswith("zoo:"):
        return None
    try:
        path = Path(address).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None


def side_file(path: Path) -> Path:
    """Where the settings of a file are: `model.pt.json` for `model.pt`."""
    return path.with_name(f"{path.name}.json")


def side_settings(path: Path, address: str) -> TargetSettings:
    """The settings beside a file.

    Raises:
        JobError: there are none, or they are not as they must be.
    """
    side = side_file(path)
    try:
        raw = json.loads(read_whole(side, MAX_RECORD_BYTES))
    except FileNotFoundError:
        raise JobError(
            f"'{address}' says nothing of its classes and images; put a file '{side.name}' beside it, such as {EXAMPLE}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(f"'{side}' cannot be read as JSON ({error})") from None
    return parse_settings(raw, f"'{side}'")


def parse_settings(raw: Any, where: str) -> TargetSettings:
    """Check settings.

    Args:
        where: whose they are, for messages.

    Raises:
        JobError: all problems, a line each.
    """
    try:
        return TargetSettings.model_validate(raw)
    except pydantic.ValidationError as error:
        found: dict[str, str] = {}
        for item in error.errors():
            field = str(item["loc"][0]) if item["loc"] else "settings"
            found.setdefault(field, f"{item['msg'][0].lower()}{item['msg'][1:]}")
        raise JobError([f"{where}: {field}: {text}; such as {EXAMPLE}" for field, text in found.items()]) from None


def archive_kind(path: Path, address: str) -> Literal["torchscript", "export"]:
    """What kind of model a file is, by its table of contents: suffixes tell little, and nothing is unpickled.

    Raises:
        JobError: it is neither, or only unpickling or compiled code would open it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # Every member is below a folder that is named after the file.
            members = {name.partition("/")[2]: name for name in archive.namelist()}
            if "constants.pkl" in members and any(one.startswith("code/") for one in members):
                return "torchscript"
            if "archive_format" in members and any(one.startswith("models/") for one in members):
                _check_export(archive, members, address)
                return "export"
            if "data.pkl" in members:
                raise JobError(
                    f"'{address}' is a pickle (weights alone, or a whole object), never opened here; {_CONVERT}"
                )
    except zipfile.BadZipFile:
        pass
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise JobError(f"'{address}' cannot be read as a model archive ({error})") from None
    raise JobError(
        f"'{address}' is a file, but not one of TorchScript or torch.export; {_CONVERT}, or give the folder of a model"
    )


def _check_export(archive: zipfile.ZipFile, members: dict[str, str], address: str) -> None:
    """Refuse parts of an export that are compiled code or pickled objects."""
    if any(one.startswith("data/aotinductor/") for one in members):
        raise JobError(f"'{address}' holds compiled code; save the exported program itself with torch.export.save")
    for name, full in members.items():
        pickled = name.startswith(("data/weights/", "data/constants/")) and name.endswith(".pt")
        if name.endswith("_config.json") and name.startswith("data/"):
            entries = json.loads(archive.read(full)).get("config", {})
            pickled = any(entry.get("use_pickle") is not False for entry in entries.values())
        if pickled:
            raise JobError(
                f"'{address}' holds pickled objects ('{name}'), never opened here; export plain tensors alone"
            )


_FOLDERS: list[str] = []


def add_import_folders(folders: Iterable[str]) -> None:
    """Let factories be imported from some folders too.

    Side effects: adds them to the end of `sys.path`, so that they shadow nothing that is installed.
    """
    for folder in folders:
        if folder not in _FOLDERS:
            _FOLDERS.append(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def import_folders() -> tuple[str, ...]:
    """The folders that were added in this process, for its workers."""
    return tuple(_FOLDERS)


def module_of(address: str) -> tuple[str, str]:
    """Module and name of a factory."""
    module, _, name = address.partition(":")
    return module, name


def factories(addresses: Iterable[str | None]) -> Iterator[str]:
    """Those of some addresses that are factories."""
    return (one for one in addresses if one and is_factory(one))
