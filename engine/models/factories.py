"""Functions in the user's own code, which a job names as `package.module:factory`: their import, and their errors.

Imports torch only where their modules do.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.errors import MAX_REASON_CHARS, JobError, first_line
from engine.job.spec_messages import nearest
from engine.terminal import redacted

# The folders that `add_import_folders` added in this process.
_FOLDERS: list[str] = []
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_factory(address: str) -> bool:
    """Whether an address is `package.module:factory`, which names code to be run."""
    return bool(_FACTORY.fullmatch(address)) and not address.startswith("zoo:")


def add_import_folders(folders: Iterable[str]) -> None:
    """Let factories be imported from more folders.

    Side effects: adds them at the end of `sys.path`, so that they do not shadow installed packages.
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
    """The addresses among these that are factories."""
    return (address for address in addresses if address and is_factory(address))


def find_factory(address: str) -> Callable[..., Any]:
    """The function of `package.module:factory`.

    Raises:
        JobError: no such module, it cannot be imported, or it has no such function.

    Side effects: imports the module.
    """
    name, attribute = module_of(address)
    module = _import(name, address)
    factory = getattr(module, attribute, None)
    if callable(factory):
        return factory
    what = "has no" if factory is None else "has something that cannot be called as"
    place = getattr(module, "__file__", None) or "a folder without __init__.py"
    known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    raise JobError(f"'{address}': module '{name}' ({place}) {what} '{attribute}'{nearest(attribute, known)}")


def _import(name: str, address: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise JobError(f"'{address}': module '{name}' cannot be imported: {reason_of(error)}") from error
        searched = ", ".join(repr(folder) for folder in import_folders()) or "the folders of installed packages"
        raise JobError(
            f"'{address}': there is no module '{error.name}' in {searched} and PYTHONPATH; start in the folder that"
            " holds it, put it next to the job file, or set PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise JobError(f"'{address}': module '{name}' cannot be imported: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """An error in one line, with the innermost place in the user's code."""
    text = redacted(first_line(error, ""))[:MAX_REASON_CHARS]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"


def _is_users(filename: str) -> bool:
    """Whether a frame is in the user's code: not in this package, torch or the standard library."""
    others = [Path(os.__file__).parent, Path(__file__).parents[1]]
    if torch := sys.modules.get("torch"):
        others.append(Path(str(torch.__file__)).parent)
    return not filename.startswith(("<", *(f"{folder}{os.sep}" for folder in others)))
