"""The licence of a model by its files. Nothing is guessed: without a statement it is `unknown`."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from engine.errors import JobError
from engine.models.addresses import locate
from engine.models.programs import is_program

UNKNOWN = "unknown"
# The models of the zoo are the project's own.
OF_ZOO = "apache-2.0"
MAX_CHARS = 100
_MAX_READ = 2**20
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_KNOWN = (
    ("apache-2.0", re.compile(r"\A\s*Apache License\s+Version 2\.0")),
    ("mit", re.compile(r"\A\s*(The )?MIT License")),
)


def licence_of(address: str) -> str:
    """The licence's name: `license` in the header of the folder's README.md, or the licence in its LICENSE file.

    Returns:
        `unknown` where there is neither; `in LICENSE` where the file of that name has a text that is not recognised.
    """
    if address.startswith("zoo:"):
        return OF_ZOO
    if is_program(address):
        return UNKNOWN
    with suppress(JobError, OSError):
        folder = locate(address).folder
        if folder is not None:
            return _of_header(folder / "README.md") or _of_file(folder) or UNKNOWN
    return UNKNOWN


def _of_header(path: Path) -> str:
    match = _FRONT_MATTER.match(_read(path))
    try:
        header: Any = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""
    if not isinstance(header, dict):
        return ""
    name = header.get("license")
    if name == "other":
        name = header.get("license_name") or name
    return name.strip()[:MAX_CHARS] if isinstance(name, str) else ""


def _of_file(folder: Path) -> str:
    for name in _FILES:
        if text := _read(folder / name):
            return next((known for known, pattern in _KNOWN if pattern.match(text)), f"in {name}")
    return ""


def _read(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_MAX_READ)
