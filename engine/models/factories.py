"""Functions in the user's own code, which a job names as `package.module:factory`: their import, and their errors.

Imports torch only where their modules do.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from engine.errors import MAX_REASON_CHARS, JobError, first_line
from engine.job.spec_messages import nearest
from engine.terminal import redacted

# The folders that `add_import_folders` added in this process.
_FOLDERS: list[str] = []
# The working folder is the whole process's: one factory at a time.
_WORKING = threading.RLock()
# Of Python's own modules, of installed packages, and of this package.
_INSTALLED = (
    *(Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).parents[1],
)
# In how many of its working folders a factory was called.
_NUM_TRIED: dict[str, int] = {}
# What readers of files raise where there is no such file; `torch.jit.load` and transformers raise the latter two.
_PERHAPS_MISSING = (OSError, ValueError, RuntimeError)
T = TypeVar("T")
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


def call_with_files(address: str, call: Callable[[], T]) -> T:
    """What a call of a user's function gives, in the first folder in which it finds the files that it opens.

    Raises:
        Exception: what it raises in the first of the folders, where it succeeds in none.
    """
    first: Exception | None = None
    for number, folder in enumerate(working_folders(address), 1):
        _NUM_TRIED[address] = max(number, _NUM_TRIED.get(address, 0))
        try:
            with _working_in(folder):
                return call()
        except _PERHAPS_MISSING as error:
            first = first or error
    assert first is not None, "there is a working folder"
    raise first


def working_folders(address: str) -> list[Path]:
    """Where relative paths in a factory may start: next to its file, next to the job, and in the working folder."""
    origin = module_file(module_of(address)[0])
    own = [] if origin is None or is_installed(origin) else [origin.parent, _import_root(origin, address)]
    # Of those that were added the working folder is the first.
    folders = [*own, *map(Path, reversed(_FOLDERS)), Path.cwd()]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def tried_folders(address: str) -> list[Path]:
    """The working folders that a factory was called in so far."""
    return working_folders(address)[: _NUM_TRIED.get(address, 1)]


def module_file(name: str) -> Path | None:
    """The file of a module, which is not imported for that; None where there is none."""
    if (module := sys.modules.get(name)) is not None:
        file = getattr(module, "__file__", None)
        return Path(file).resolve() if file else None
    first, *rest = name.split(".")
    try:
        # Of a name without dots: packages would be imported for others.
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError, OSError):
        return None
    if spec is None or not rest:
        return Path(spec.origin).resolve() if spec and spec.origin and spec.has_location else None
    bases = [Path(folder, *rest) for folder in spec.submodule_search_locations or ()]
    files = [file for base in bases for file in (base / "__init__.py", base.with_name(f"{base.name}.py"))]
    return next((file.resolve() for file in files if file.is_file()), None)


def is_installed(path: Path) -> bool:
    """Whether a file is of an installed package, of Python or of this package, and so not the user's."""
    return any(path.is_relative_to(folder) for folder in _INSTALLED)


def _import_root(origin: Path, address: str) -> Path:
    """The folder that a module's import starts from: above its packages."""
    depth = module_of(address)[0].count(".") + (origin.name == "__init__.py")
    return origin.parents[min(depth, len(origin.parents) - 1)]


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Make a folder the working folder of the process for a while."""
    with _WORKING, contextlib.chdir(folder):
        yield


def _import(name: str, address: str) -> ModuleType:
    try:
        if (known := sys.modules.get(name)) is not None:
            return known
        return call_with_files(address, lambda: importlib.import_module(name))
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
