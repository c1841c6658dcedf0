"""What a factory depends on: files that it opens and folders that it lists, its modules, variables and libraries.

Python reports what it opens itself (`sys.addaudithook`). What libraries open in C++ or Rust (safetensors, TorchScript)
it does not, so files of weights next to the factory, next to what it opens, and at the paths in its code count too.
Imports no torch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import re
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.models.factories import is_installed
from engine.models.untrusted_files import read_whole

# Larger files are recognised by size and times: reading them would take as long as loading.
MAX_DIGESTED_BYTES = 64 * 2**20
# A factory that depends on more is described again every time.
MAX_FILES = 2000
MAX_SOURCE_BYTES = 4 * 2**20
MISSING = "missing"
_WEIGHTS = frozenset(
    f".{name}"
    for name in (
        "safetensors", "pt", "pth", "pt2", "ts", "th", "bin", "ckpt", "onnx", "h5", "hdf5", "npz", "npy", "parquet",
        "arrow", "gguf", "msgpack",
    )
)  # fmt: skip
_NO_FILES = ("/proc/", "/sys/", "/dev/")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{2,60}")
# Of caches that libraries load weights from, and of what decides networks.
_VARIABLES = ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HOME")
_LIBRARIES = ("riskforge", "torch", "torchvision", "timm", "transformers", "safetensors", "numpy")
_MAX_TEXT = 400

# A module that was changed since may not be what its file says.
_STARTED = time.time()
_opened: set[str] | None = None
_is_hooked = False


@contextlib.contextmanager
def traced() -> Iterator[set[str]]:
    """Collect the absolute paths of the files that are opened and the folders that are listed meanwhile.

    Side effects: adds an audit hook to the process, once.
    """
    global _opened, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_note)
        _is_hooked = True
    paths: set[str] = set()
    _opened = paths
    try:
        yield paths
    finally:
        _opened = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is None or event not in ("open", "os.listdir", "os.scandir") or not arguments:
        return
    # Modules have a record of their own; their import lists whole folders.
    if sys._getframe(1).f_code.co_filename.startswith("<frozen importlib"):
        return
    with contextlib.suppress(TypeError, ValueError, OSError):
        if not isinstance(arguments[0], int):
            _opened.add(str(Path(os.fsdecode(arguments[0] or ".")).absolute()))


def dependencies(factory_file: Path, folders: Iterable[Path], opened: Iterable[str]) -> dict[str, str]:
    """Fingerprints of everything that a factory depends on, by name.

    Args:
        folders: the working folders that it was called in.
        opened: as `traced` gives them.
    """
    modules = [factory_file, *_user_modules()]
    places = list(dict.fromkeys([factory_file.parent, *folders]))
    paths = {Path(path) for path in opened if not _is_ignored(path)}
    texts = {text for module in modules for text in _texts(module)}
    for text in texts:
        paths |= {place / text for place in places if _exists(place / text)}
    homes = {*places, *(path.parent for path in paths if path.is_file()), *(path for path in paths if path.is_dir())}
    weights = {path for home in homes for path in _listed(home) if path.suffix.lower() in _WEIGHTS}
    names = [f"file:{path}" for path in sorted({*modules, *paths, *weights})]
    variables = {*_VARIABLES, *(text for text in texts if _VARIABLE.fullmatch(text))}
    names += [f"variable:{name}" for name in sorted(variables)]
    libraries = {*_LIBRARIES, *(name for module in modules for name in _imported(module))}
    names += [f"library:{name}" for name in sorted(libraries)]
    return {name: fingerprint(name) for name in ["python", *names]}


def fingerprint(name: str) -> str:
    """The present state of something that a factory depends on; equal while it does not change."""
    kind, _, value = name.partition(":")
    if kind == "file":
        return _of_file(Path(value))
    if kind == "variable":
        return hashlib.sha256(os.environ.get(value, "").encode("utf-8", "surrogateescape")).hexdigest()
    if kind == "library":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            return importlib.metadata.version(value)
        return MISSING
    return sys.version


def _of_file(path: Path) -> str:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            names = "\0".join(sorted(entry.name for entry in path.iterdir()))
            return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_DIGESTED_BYTES:
            return hashlib.sha256(read_whole(path, MAX_DIGESTED_BYTES)).hexdigest()
        return f"{status.st_mode}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"
    except (OSError, ValueError):
        return MISSING


def _is_ignored(path: str) -> bool:
    return path.startswith(_NO_FILES) or path.endswith(".pyc") or is_installed(Path(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists() and not is_installed(path)
    except (OSError, ValueError):
        return False


def _listed(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []


def _user_modules() -> list[Path]:
    """The files of the modules in this process that are not of installed packages."""
    # Modules that libraries make name files that are not there.
    named = {str(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    files = {Path(name).resolve() for name in named if name and not _is_of_library(Path(name).absolute())}
    return sorted(file for file in files if file.is_file())


@functools.cache
def _is_of_library(file: Path) -> bool:
    """Whether a module's file is of an installed package; asked once for each of a process's thousands."""
    return is_installed(file.resolve())


def are_as_loaded() -> bool:
    """Whether the files of the user's modules are those that this process has imported."""
    try:
        return all(file.stat().st_mtime < _STARTED for file in _user_modules())
    except OSError:
        return False


def _tree(module: Path) -> ast.Module:
    try:
        return ast.parse(read_whole(module, MAX_SOURCE_BYTES))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return ast.Module(body=[], type_ignores=[])


def _texts(module: Path) -> set[str]:
    """The texts in a module's code that may be paths or names of variables."""
    values = (node.value for node in ast.walk(_tree(module)) if isinstance(node, ast.Constant))
    return {value for value in values if isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and value.isprintable()}


def _imported(module: Path) -> set[str]:
    """The names of the packages that a module imports."""
    names: set[str] = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)
