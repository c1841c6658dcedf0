"""Functions of the user's own that a job names as `package.module:factory`: where they are imported from, and errors.

Imports torch no earlier than they do.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import MAX_REASON_CHARS, JobError, first_line
from engine.job.spec_messages import nearest
from engine.terminal import redacted

_FOLDERS: list[str] = []
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_factory(address: str) -> bool:
    """Whether an address is `package.module:factory`: the job's words for running code of the user's own."""
    return bool(_FACTORY.fullmatch(address)) and not address.startswith("zoo:")


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


def find_factory(address: str) -> Callable[[], Any]:
    """The function of `package.module:factory`.

    Raises:
        JobError: no such module, it cannot be imported, or it has no such function.

    Side effects: imports the module.
    """
    name, attribute = module_of(address)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise JobError(f"'{address}': module '{name}' cannot be imported: {reason_of(error)}") from error
        looked = ", ".join(repr(folder) for folder in import_folders()) or "the folders of installed packages"
        raise JobError(
            f"'{address}': there is no module '{error.name}'; it was looked for in {looked} and PYTHONPATH: start in"
            " the folder that holds it, lay it beside the job file, or set PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise JobError(f"'{address}': module '{name}' cannot be imported: {reason_of(error)}") from error
    factory = getattr(module, attribute, None)
    if callable(factory):
        return factory
    what = "has no" if factory is None else "has something that cannot be called as"
    place = getattr(module, "__file__", None) or "a folder without __init__.py"
    known = [one for one in vars(module) if not one.startswith("_")]
    raise JobError(f"'{address}': module '{name}' ({place}) {what} '{attribute}'{nearest(attribute, known)}")


def reason_of(error: BaseException) -> str:
    """An error in a line, with the place in the user's code that it came from."""
    text = redacted(first_line(error, ""))[:MAX_REASON_CHARS]
    frames = [one for one in traceback.extract_tb(error.__traceback__) if _is_users(one.filename)]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"


def _is_users(filename: str) -> bool:
    """Whether a frame is in the user's code: not in this package, torch or the standard library."""
    others = [Path(os.__file__).parent, Path(__file__).parents[1]]
    if torch := sys.modules.get("torch"):
        others.append(Path(str(torch.__file__)).parent)
    return not filename.startswith(("<", *(f"{folder}{os.sep}" for folder in others)))
