"""Classifiers that are programs instead of a model folder: a file of TorchScript or torch.export, or a factory.

A file does not hold its labels, so its settings are in a side file (`engine.models.program_settings`); a factory in the
user's own code returns a module and the same settings; a folder (`engine.models.factory_folders`) names a factory and
holds other weights for it. Imports no torch.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Literal

from engine.errors import JobError
from engine.models.factory_folders import runs_code

_CONVERT = "convert it to TorchScript or torch.export, or name a factory that loads it (package.module:factory)"


def is_program(address: str) -> bool:
    """Whether an address is that of a file, of a factory, or of a folder of a retrained one."""
    return runs_code(address) or as_file(address) is not None


def as_file(address: str) -> Path | None:
    """The file that an address names, or None if it names none."""
    if address.startswith("zoo:"):
        return None
    try:
        path = Path(address).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None


def archive_kind(path: Path, address: str) -> Literal["torchscript", "export"]:
    """The kind of model in a file, by the archive's table of contents: suffixes are not reliable, nothing is unpickled.

    Raises:
        JobError: it is neither, or could be opened only by unpickling or running compiled code.
    """
    kind = None
    try:
        with zipfile.ZipFile(path) as archive:
            kind = _kind(archive, address)
    except zipfile.BadZipFile:
        pass
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise JobError(f"'{address}' cannot be read as a model archive ({error})") from None
    if kind is None:
        raise JobError(
            f"'{address}' is a file, but not of TorchScript or torch.export; {_CONVERT}, or give the folder of a model"
        )
    return kind


def _kind(archive: zipfile.ZipFile, address: str) -> Literal["torchscript", "export"] | None:
    # Every member is in a folder that is named after the file.
    members = {name.partition("/")[2]: name for name in archive.namelist()}
    if "constants.pkl" in members and any(name.startswith("code/") for name in members):
        return "torchscript"
    if "archive_format" in members and any(name.startswith("models/") for name in members):
        _check_export(archive, members, address)
        return "export"
    if "data.pkl" in members:
        raise JobError(f"'{address}' is a pickle (weights alone, or a whole object), never opened here; {_CONVERT}")
    return None


def _check_export(archive: zipfile.ZipFile, members: dict[str, str], address: str) -> None:
    """Refuse parts of an export that are compiled code or pickled objects."""
    if any(name.startswith("data/aotinductor/") for name in members):
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
