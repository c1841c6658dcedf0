"""Imports of libraries that workers never use, put off until something does.

accelerate imports the client of AWS for a questionnaire of its command line, and each scheduler of diffusers SciPy's
statistics for one kind of sigmas.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

DEFERRED = ("boto3", "scipy.stats")


@contextlib.contextmanager
def deferring(names: tuple[str, ...] = DEFERRED) -> Iterator[None]:
    """Imports of these modules in the block are put off until the first use of what they hold.

    Libraries still see that they are installed. Python's own `LazyLoader` would not do: it imports a module as soon as
    anything looks at its file, as `inspect` does for all modules.

    Side effects: placeholders in `sys.modules` during the block. Who imported one there keeps it; it finds the module.
    """
    placeholders = [_Placeholder(name) for name in names if name not in sys.modules and _is_installed(name)]
    sys.modules.update({placeholder.__name__: placeholder for placeholder in placeholders})
    try:
        yield
    finally:
        for placeholder in placeholders:
            _remove(placeholder)


class _Placeholder(ModuleType):
    """Stands for a module that is imported when one of its public names is used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # `importlib.util.find_spec`, by which libraries ask what is installed, reads it of modules that are imported.
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        # For `import NAME.PART`, Python asks for `__path__`.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _remove(self)
        return getattr(importlib.import_module(self.__name__), name)


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _remove(placeholder: ModuleType) -> None:
    if sys.modules.get(placeholder.__name__) is placeholder:
        del sys.modules[placeholder.__name__]
